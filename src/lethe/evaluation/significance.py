"""Whether two measured numbers differ: paired by question, over seeds, with the tests and intervals that fit.

A score has two sources of error: which questions were asked, and which seed the run had. Over seeds it is their mean,
and its squared standard error is

    spread^2 / seeds + by_question^2

with the spread the sample deviation between seeds, and by_question the standard error over questions of each
question's mean over seeds. What question and seed do together stands in both terms, so this errs on the large side.
The question terms of two scores on the same questions shrink by the correlation of their values:

    first^2 + second^2 - 2 r first second

and for means that is the variance of the differences by question / n. Quantiles are Student's, with Satterthwaite's
degrees of freedom for the sum.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import numpy as np
from jaxtyping import Float

from lethe.errors import InvalidValueError
from lethe.types import Scores

LEVEL = 0.95
"""Of every interval."""


DRAWS = 2000
"""Draws of the bootstrap: the end of an interval is then known to about 3 % of its half width."""


ROUNDING = 1e-6
"""A difference below this share of the larger value is no difference."""


_BLOCK = 4_000_000
"""Most resampled values in memory at once."""


Values = Float[np.ndarray, " question"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score, or the mean of one over seeds."""

    value: float
    by_question: float
    """Standard error over questions; NaN where nobody knows it."""
    spread: float | None
    """Sample deviation between seeds; None for one seed."""
    seeds: int
    n: int
    """Questions."""
    examples: tuple[float, ...] = ()
    """Each question's value, its mean over seeds; empty where not kept."""

    @property
    def stderr(self) -> float:
        """Standard error of `value`, by the formula at the top of the module."""
        return math.sqrt(math.fsum(part for part, _ in (self.asked, *self.between)))

    @property
    def asked(self) -> tuple[float, int]:
        """The questions' part of the squared standard error with its degrees of freedom."""
        return _square(self.by_question), self.n - 1

    @property
    def between(self) -> list[tuple[float, int]]:
        """The seeds' part of the squared standard error with its degrees of freedom; none for one seed."""
        return [] if self.spread is None else [(_square(self.spread) / self.seeds, self.seeds - 1)]

    @cached_property
    def is_mean(self) -> bool:
        """Whether `value` is the mean of the questions' values, as accuracy is and perplexity is not."""
        return bool(self.examples) and math.isclose(
            statistics.fmean(self.examples), self.value, rel_tol=ROUNDING, abs_tol=1e-9
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the second of two scores lies above the first; NaN for what cannot be known."""

    value: float
    stderr: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    p: float
    """Two-sided, for this one test."""
    test: str
    """McNemar or t; empty without an error to test against."""
    is_paired: bool
    """Whether both scores are known on the same questions."""

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval holds 0 or p is above 5 %; None without an error to tell."""
        return None if not self.test else self.low <= 0 <= self.high or self.p > 1 - LEVEL


def over_seeds(scores: Sequence[Scores]) -> Estimate:
    """One score, or the mean of the same score of several seeds.

    Raises: InvalidValueError for no score.
    """
    if not scores:
        raise InvalidValueError("a mean over seeds needs at least one score. Got none.")
    values = [score.value for score in scores]
    examples: tuple[float, ...] = ()
    if len({len(score.per_example) for score in scores}) == 1:
        rows = np.array([score.per_example for score in scores], dtype=np.float64)
        examples = tuple(rows.mean(axis=0).tolist()) if np.isfinite(rows).all() else ()
    found = Estimate(
        value=math.fsum(values) / len(values),
        by_question=math.nan,
        spread=statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
        seeds=len(values),
        n=min(score.n for score in scores),
        examples=examples,
    )
    return replace(found, by_question=_by_question(found, scores))


def difference(first: Estimate, second: Estimate, *, paired: bool, seed: int = 0) -> Difference:
    """The second score minus the first, with interval and test.

    Pass `paired` where both are known to be measured on the same questions; values by question are needed, too, else
    the scores count as independent. Of one seed each and means of their values, the interval is a bootstrap over
    questions with this seed, and hits (values of 0 and 1) are tested by McNemar's exact test. All else is by Student's
    t, whose p is never below what exchanging the signs of n differences can show, 2^(1 - n).
    """
    value = second.value - first.value
    pair = paired and len(first.examples) == len(second.examples) >= 2
    asked = [(_questions_part(first, second), first.n - 1)] if pair else [first.asked, second.asked]
    parts = [*asked, *first.between, *second.between]
    variance = math.fsum(part for part, _ in parts)
    t = _scipy().t
    if not (math.isfinite(variance) and math.isfinite(value)):
        unknown = {"stderr": math.nan, "low": math.nan, "high": math.nan, "p": math.nan}
        return Difference(value=value, test="", is_paired=pair, **unknown)
    stderr, degrees = math.sqrt(variance), _degrees(parts, variance)
    reach = float(t.ppf((1 + LEVEL) / 2, degrees)) * stderr
    low, high, test = value - reach, value + reach, "t"
    p = 2 * float(t.sf(abs(value) / stderr, degrees)) if stderr else 0.0
    if pair and first.seeds == second.seeds == 1 and first.is_mean and second.is_mean:
        values = np.array(first.examples), np.array(second.examples)
        low, high = bootstrap(values[1] - values[0], np.random.default_rng(seed))
        p = max(p, 2.0 ** (1 - len(values[0])))
        if all(np.isin(hits, (0, 1)).all() for hits in values):
            p, test = mcnemar(*values), "McNemar"
    if abs(value) <= ROUNDING * max(abs(first.value), abs(second.value)):
        p = 1.0
    return Difference(value=value, stderr=stderr, low=low, high=high, p=p, test=test, is_paired=pair)


def bootstrap(values: Values, rng: np.random.Generator, *, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % interval of a mean, by resampling its values; of paired scores these are the differences by question.

    Percentiles, widened for few values as Hesterberg 2015 (arXiv 1411.5279, expanded percentile interval) does: plain
    ones are too narrow by Student's quantile and by sqrt((n - 1) / n).

    Raises: InvalidValueError for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise InvalidValueError(f"a bootstrap needs at least two values. Got {n}.")
    stats, block = _scipy(), max(1, _BLOCK // n)
    sizes = [min(block, draws - done) for done in range(0, draws, block)]
    means = np.concatenate([values[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])
    tail = float(stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, n - 1) * math.sqrt(n / (n - 1))))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(first: Values, second: Values) -> float:
    """Two-sided p of McNemar's exact test: of the questions that one of two hits and the other misses, is it half each?

    Values are 1 for a hit and 0 for a miss, in the same order of questions; 1.0 if no question tells them apart.
    Source: McNemar 1947; the exact form is a binomial test.
    """
    lost, won = int((first > second).sum()), int((first < second).sum())
    return float(_scipy().binomtest(won, lost + won, 0.5).pvalue) if lost + won else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for all tests made together (Holm 1979), in [0, 1]; NaN stays NaN and counts as no test."""
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _scipy() -> ModuleType:
    # Half a second of imports, which the command line's other commands can do without.
    from scipy import stats

    return stats


def _by_question(found: Estimate, scores: Sequence[Scores]) -> float:
    """Standard error over questions: the score's own for one seed, else that of the questions' means over seeds."""
    own = statistics.fmean(score.stderr for score in scores)
    # A metric without a known error says 0; only values by question that are all alike really have none.
    if found.n < 2 or (own == 0 and not found.is_mean):
        return math.nan
    if found.seeds > 1 and found.is_mean:
        return statistics.stdev(found.examples) / math.sqrt(len(found.examples))
    # Seeds that share their questions share their error, so more of them make it no smaller.
    return own


def _questions_part(first: Estimate, second: Estimate) -> float:
    """The questions' part of the squared standard error of a paired difference."""
    values = np.array(first.examples), np.array(second.examples)
    if first.is_mean and second.is_mean:
        return float((values[1] - values[0]).var(ddof=1)) / len(values[0])
    spreads = [float(row.std()) for row in values]
    r = float(np.corrcoef(*values)[0, 1]) if min(spreads) > 0 else 0.0
    together = 2 * r * first.by_question * second.by_question
    part = _square(first.by_question) + _square(second.by_question) - together
    return part if math.isnan(part) else max(0.0, part)


def _degrees(parts: Sequence[tuple[float, int]], variance: float) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances; those of the first where there is no variance."""
    if variance == 0:
        return float(max(1, parts[0][1]))
    # Shares of the variance, because its square may be beyond the numbers.
    return 1 / math.fsum(_square(part / variance) / max(1, degrees) for part, degrees in parts)


def _square(value: float) -> float:
    """Infinity beyond the numbers, where ** raises: perplexities of a ruined model go up to 1e260."""
    return value * value
