"""Whether the next-token logits still depend on the prompt."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.analyses.protocol import Finding
from lethe.analyses.workbench import Bench
from lethe.errors import UsageError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import read_spans
from lethe.inference.spans import answer_spans, prompt_and_answers
from lethe.report.standalone_figures import drawing
from lethe.report.style import COLOURS
from lethe.types import EvalSet


@dataclass(frozen=True, kw_only=True)
class PromptIndependence:
    """Spread of the next-token logits over prompts, and divergence between the predictions for two prompts.

    If every forget token sits at c * u, as the theory assumes, all forget prompts get one and the same prediction.
    The spread is the mean squared distance of a prompt's logits from their mean over prompts, by the squared
    length of that mean; logits are centred over the vocabulary first, which changes no prediction.
    """

    source: ClassVar[str] = "Lethe; a test of assumption 1 and proposition 1 of Dang et al. 2025, arXiv 2408.06223"

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """c, in units of the median norm of forget tokens at the layer."""
    questions: int = 100
    """Most questions of each set."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without forget questions, or without the corpora that training takes."""
        names = ["forget"]
        if "retain" in bench.sets and bench.sets["retain"].questions:
            names.append("retain")
        sets = {name: bench.asked(name, self.questions) for name in names}
        rows: list[dict[str, Any]] = []
        for edit in bench.variants(self.multiples):
            with bench.applied(edit.weights) as subject:
                found = {name: _independence(_logits(subject, data)) for name, data in sets.items()}
            rows.append({"label": edit.label, "c": edit.coefficient} | found)
        data = {"layer": bench.config.layer, "models": rows}
        with drawing(2) as (figure, pair):
            titles = {"kl": "mean KL between two prompts (nats)", "spread": "spread of logits over prompts"}
            for axes, (measure, title) in zip(pair, titles.items(), strict=True):
                for name in sets:
                    axes.errorbar(
                        range(len(rows)),
                        [row[name][measure] for row in rows],
                        yerr=[row[name][f"{measure}_stderr"] for row in rows],
                        color=COLOURS[name],
                        marker="o",
                        label=f"{name} prompts",
                    )
                axes.set_xticks(range(len(rows)), [row["label"].removeprefix("c = ") for row in rows])
                axes.set(xlabel="model: base, or c" if len(rows) > 2 else "model", ylabel=title)
                axes.set_ylim(bottom=0)
                axes.margins(x=0.08)
            pair[0].legend()
        return Finding(
            name="prompt-independence",
            title="Do the logits still depend on the prompt?",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _logits(subject: LoadedModel, data: EvalSet) -> Float[Tensor, "prompt vocab"]:
    """Logits of the answer's first token after each prompt."""
    asked = [prompt_and_answers(question, data.scoring) for question in data.questions]
    spans = answer_spans(subject, [(prompt, answers[:1]) for prompt, answers in asked])
    # The answer's first token alone, or every logit of the others would be kept, too.
    firsts = [replace(span, ids=span.ids[: span.start + 1]) for span in spans]
    return torch.cat(read_spans(subject.model, firsts, lambda logits, _: logits))


def _independence(logits: Float[Tensor, "prompt vocab"]) -> dict[str, float]:
    """Both measures, with errors from leaving out one prompt at a time."""
    n = len(logits)
    if n < 3:
        raise UsageError(f"prompts are compared with one another, which takes at least 3 questions. Found {n}.")
    z = logits.double()
    z = z - z.mean(1, keepdim=True)
    squares = z.square().sum(1)

    def spread(total: Tensor, square: Tensor, count: int) -> Tensor:
        mean = (total / count).square().sum(-1)
        return (square / count - mean) / mean

    log_p = z.log_softmax(1)
    p = log_p.exp()
    kl = (p * log_p).sum(1, keepdim=True) - p @ log_p.T
    kl.fill_diagonal_(0)
    without_kl = (kl.sum() - kl.sum(0) - kl.sum(1)) / ((n - 1) * (n - 2))
    without_spread = spread(z.sum(0) - z, squares.sum() - squares, n - 1)
    return {
        "kl": float(kl.sum() / (n * (n - 1))),
        "kl_stderr": _jackknife(without_kl),
        "spread": float(spread(z.sum(0), squares.sum(), n)),
        "spread_stderr": _jackknife(without_spread),
        "n": n,
    }


def _jackknife(without: Float[Tensor, " n"]) -> float:
    n = len(without)
    return float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def _reading(data: dict[str, Any]) -> str:
    base, last = data["models"][0], data["models"][-1]
    parts = []
    for name in [key for key in ("forget", "retain") if key in base]:
        a, b = base[name], last[name]
        noise = 2 * (a["kl_stderr"] ** 2 + b["kl_stderr"] ** 2) ** 0.5
        change = b["kl"] - a["kl"]
        verb = "stays at" if abs(change) <= noise else "falls to" if change < 0 else "rises to"
        parts.append(
            f"for {name} prompts it {verb} {b['kl']:.2f} nats (base {a['kl']:.2f}), and their logits spread by "
            f"{b['spread']:.2f} of the squared mean (base {a['spread']:.2f})"
        )
    left = last["forget"]["kl"] / base["forget"]["kl"] if base["forget"]["kl"] > 0 else float("nan")
    verdict = (
        "The predictions have all but collapsed onto one, as the theory's first assumption says"
        if left < 0.1
        else "The predictions depend on the prompt less than before, but have not collapsed onto one"
        if left < 0.8
        else "The predictions still depend on the prompt, against the theory's first assumption"
    )
    return (
        f"The mean KL divergence between the next-token predictions for two prompts, base against {last['label']} at "
        f"layer {data['layer']}: {'; '.join(parts)}. {verdict}: {100 * left:.0f} % of the divergence between forget "
        "prompts is left."
    )
