"""A run in plain words and rounded numbers: what the page and the Markdown summary both say."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lethe.report.record import RunRecord
from lethe.types import Scores

SETS = ("forget", "earlier", "adjacent", "retain", "unknown")
"""Sets in the order of every table and figure."""


FEATURED = (
    "multiple_choice",
    "exact_match",
    "perplexity",
    "answer_confidence",
    "rouge1_recall",
    "refusal_rate",
    "trigger",
    "trigger_control",
    "deviation_score",
)
"""Metrics that a reader sees first; the others stand in a table that opens on request."""


LIMITS = (
    "This hides knowledge rather than deletes it: the weights still hold it, and fine-tuning, quantisation or a "
    "targeted attack may bring it back. Run an audit before relying on it."
)


_NOUNS = {
    "multiple_choice": ("accuracy", "questions"),
    "exact_match": ("the share of exact answers", "questions"),
    "answer_confidence": ("confidence", "questions"),
    "perplexity": ("perplexity", "text"),
}
"""Metrics that can carry the sentence of outcome, best first: what is measured, and on what."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the before/after table."""

    metric: str
    hint: str
    """Which way shows knowledge, or what else the metric is about."""
    set: str
    before: str
    after: str
    change: str
    within_noise: bool
    n: int
    is_featured: bool


def metric_names(scores: Iterable[str]) -> list[str]:
    """Metrics of `metric/set` names: the ones people ask for first, then by name."""
    found = {metric_and_set(name)[0] for name in scores}
    return [metric for metric in FEATURED if metric in found] + sorted(found - set(FEATURED))


def metric_and_set(name: str) -> tuple[str, str]:
    """`exact_match/forget` in its two parts; a number that joins several sets, `deviation_score`, names none."""
    metric, _, data = name.partition("/")
    return metric, data


def spoken(metric: str, *scores: Scores) -> str:
    """A metric's name as people say it: as it calls itself in a score, or without underscores."""
    return next((score.label for score in scores if score.label), metric.replace("_", " "))


def main_metric(runs: Iterable[RunRecord]) -> str | None:
    """The first metric that some run measured on its forget set before and after; None if there is none."""
    measured = {name for run in runs for name in run.before if name in run.after}
    return next((metric for metric in _NOUNS if f"{metric}/forget" in measured), None)


def is_share(*scores: Scores) -> bool:
    """True for a part of a whole, which reads best in per cent."""
    return all(score.unit == "share" for score in scores)


def noise(before: Scores, after: Scores) -> float:
    """Two standard errors of the difference.

    The same questions are asked twice, so taking the two scores as independent overstates the noise: a small
    loss on few questions can hide in it, and pages that use this say so.
    """
    return 2 * math.hypot(*(score.stderr if math.isfinite(score.stderr) else 0.0 for score in (before, after)))


def outcome(run: RunRecord) -> str:
    """What the run did, in one sentence."""
    metric = main_metric([run])
    if metric is None:
        return (
            "Nothing was measured before and after on a forget set, so this report cannot say what was forgotten "
            "or what was kept; to find out, run lethe eval."
        )
    level, first = _forget(metric, run.before[f"{metric}/forget"], run.after[f"{metric}/forget"])
    clauses, suffered, unmeasured = [first], [], []
    for name in ("adjacent", "retain"):
        before, after = run.before.get(f"{metric}/{name}"), run.after.get(f"{metric}/{name}")
        if before is not None and after is not None:
            clauses.append(f"on {name} {_NOUNS[metric][1]} it {_moved(before, after)}")
            if _learned(before, after) < -noise(before, after):
                suffered.append(name)
        elif name == "retain":
            unmeasured.append("what happened to retain was not measured")
    sentence = _lead(level, suffered) + "; ".join(clauses + unmeasured) + "."
    return sentence[0].upper() + sentence[1:]


def rows(run: RunRecord) -> list[Row]:
    """The before/after table: metrics in the order of `metric_names`, sets in the order of `SETS`."""
    table = []
    both = [name for name in run.before if name in run.after]
    for metric in metric_names(both):
        names = [name for name in both if metric_and_set(name)[0] == metric]
        for name in sorted(names, key=lambda name: (_set_rank(metric_and_set(name)[1]), name)):
            before, after = run.before[name], run.after[name]
            share = is_share(before, after)
            change = after.value - before.value
            table.append(
                Row(
                    metric=spoken(metric, after),
                    hint=after.hint or _hint(after, has_set="/" in name),
                    set=metric_and_set(name)[1] or "all",
                    is_featured=metric in FEATURED,
                    before=with_error(before),
                    after=with_error(after),
                    change=_signed(change, share=share),
                    within_noise=abs(change) <= noise(before, after),
                    n=after.n,
                )
            )
    return table


def _hint(score: Scores, *, has_set: bool) -> str:
    if score.better == "neither":
        return ""
    # One number for forget and retain together has a good end; on a set alone it depends on the set.
    return f"{score.better}: knows more" if has_set else f"{score.better}: better"


def with_error(score: Scores) -> str:
    """Value and standard error, as many decimals as the error deserves: `29.3 ± 3.7 %`, `12.41 ± 0.32`."""
    share = is_share(score)
    value, stderr, unit = (100 * score.value, 100 * score.stderr, " %") if share else (score.value, score.stderr, "")
    if not math.isfinite(value):
        return amount(score.value)
    if not math.isfinite(stderr):
        return f"{value:.1f} %" if share else amount(value)
    decimals = 1 if share else 3
    if not share and stderr > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}{unit}"


def amount(value: float, *, share: bool = False) -> str:
    """A number for a sentence: whole per cent, or three significant digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinity"
    if share:
        # 99.8 % must not read as 100 %, nor 0.2 % as nothing.
        whole = round(100 * value)
        exact = whole not in (0, 100) or abs(100 * value - whole) < 0.05
        return f"{whole} %" if exact else f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def size(count: int | float) -> str:
    """Bytes in the unit that reads best, decimal as disks are sold."""
    if not math.isfinite(count):
        return "not measured"
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def layers(numbers: tuple[int, ...]) -> str:
    """`layer 5`, `layers 3 and 5`, `layers 3, 4 and 5`."""
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    return f"layers {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _forget(metric: str, before: Scores, after: Scores) -> tuple[str, str]:
    """How far forgetting went ("full", "part", "not", "nothing", "shift"), and the clause that says so."""
    what, where = _NOUNS[metric]
    share = is_share(before, after)
    subject = f"on forget {where} {what}"
    if not share:
        # Without a known floor nobody can say how much is left.
        return ("shift" if _learned(before, after) < -noise(before, after) else "not"), (
            f"{subject} {_moved(before, after)}"
        )
    floor = 0.0 if after.chance is None else after.chance
    chance = "" if after.chance is None else f"chance {amount(floor, share=True)}"
    if before.value - floor <= 2 * before.stderr:
        known = f"was {amount(before.value, share=True)} before ({chance or 'none to lose'}, within noise)"
        return "nothing", f"{subject} {known} and is {amount(after.value, share=True)} now"
    if _learned(before, after) >= -noise(before, after):
        return "not", f"{subject} {_moved(before, after, aside=chance)}"
    above = after.value - floor
    if above > 2 * after.stderr:
        return "part", f"{subject} {_moved(before, after, aside=chance and f'still above {chance}')}"
    if above < -2 * after.stderr:
        return "full", f"{subject} {_moved(before, after, aside=f'below {chance}, which itself can betray knowledge')}"
    return "full", f"{subject} {_moved(before, after, aside=chance and f'{chance}, within noise')}"


def _lead(level: str, suffered: list[str]) -> str:
    """The judgement before the numbers; silent where they speak for themselves."""
    cost = f"{' and '.join(suffered)} suffered" if suffered else ""
    worked, joint = {
        "full": ("Forgetting worked" if suffered else "", ", but "),
        "shift": ("", ""),
        "part": ("Forgetting was partial", ", and "),
        "not": ("Forgetting failed", ", and "),
        "nothing": ("There was nothing to forget", ", and "),
    }[level]
    judgement = f"{worked}{joint}{cost}" if cost else worked
    return f"{judgement}: " if judgement else ""


def _learned(before: Scores, after: Scores) -> float:
    """The change, positive when the model knows more than before."""
    return (before.value - after.value) if after.better == "lower" else (after.value - before.value)


def _moved(before: Scores, after: Scores, *, aside: str = "") -> str:
    share = is_share(before, after)
    old, new = amount(before.value, share=share), amount(after.value, share=share)
    change, limit = abs(after.value - before.value), noise(before, after)
    if change <= limit:
        # "Stayed" would promise too much of a change that only just hides in the noise.
        verb = "stayed at" if change <= limit / 2 else "is now"
        was = "as before" if old == new else f"was {old}, within noise"
        return f"{verb} {new} ({was}{f'; {aside}' if aside else ''})"
    if old == new and share:
        old, new = f"{100 * before.value:.1f} %", f"{100 * after.value:.1f} %"
    verb = "went" if math.isnan(after.value) else "fell" if after.value < before.value else "rose"
    return f"{verb} from {old} to {new}" + (f" ({aside})" if aside else "")


def _signed(change: float, *, share: bool) -> str:
    text = f"{100 * change:+.1f}" if share and math.isfinite(change) else amount(change)
    if not share and change > 0:
        text = f"+{text}"
    return text.replace("-", "\u2212")


def _set_rank(name: str) -> int:
    return SETS.index(name) if name in SETS else len(SETS)
