"""The gradient that an attacker who searches over tokens goes by, before and after."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench
from lethe.errors import UsageError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import measuring
from lethe.inference.spans import Span, answer_spans, prompt_and_answers
from lethe.model import hooks
from lethe.model.layers import device_of
from lethe.model.losses import token_log_probs
from lethe.report.standalone_figures import drawing
from lethe.report.style import COLOURS, INK
from lethe.types import Batch, EvalSet, Question

TARGETS = ("answer", "other")
"""What the attack wants the model to say: the right answer, which the base gives anyway, or a wrong choice, which
neither model is likely to give."""


@dataclass(frozen=True, kw_only=True)
class TokenGradient:
    """Norm of the gradient of an attack's loss with respect to the one-hot tokens of the prompt, edited by base.

    The loss is the mean negative log-probability of a target after the prompt, as in GCG. Were forget activations
    independent of the tokens, as the paper argues, the gradient would vanish and the attack would search at random.
    """

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223, section on GCG (an argument, no measurement there)"

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """c, in units of the median norm of forget tokens at the layer."""
    questions: int = 40
    """Most questions of each set."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without forget questions with choices, or without the corpora that training takes."""
        names = ["forget"]
        if "retain" in bench.sets and bench.sets["retain"].questions:
            names.append("retain")
        sets = {name: bench.asked(name, self.questions) for name in names}
        norms: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        edits = bench.variants(self.multiples)
        for edit in edits:
            with bench.applied(edit.weights) as subject:
                for name, asked in sets.items():
                    for target in TARGETS:
                        norms[edit.label, name, target] = _gradients(subject, _spans(subject, asked, target))
        rows: list[dict[str, Any]] = []
        for edit in edits[1:]:
            for name in sets:
                for target in TARGETS:
                    pairs = list(zip(norms[edit.label, name, target], norms["base", name, target], strict=True))
                    ratios = [after / before for (_, after), (_, before) in pairs if before > 0]
                    logs = [math.log10(max(ratio, 1e-12)) for ratio in ratios]
                    rows.append(
                        {
                            "label": edit.label, "c": edit.coefficient, "set": name, "target": target,
                            "ratio": ratios, "log10_ratio": summary(logs),
                            "below_a_tenth": sum(ratio < 0.1 for ratio in ratios) / len(ratios),
                            "loss_before": statistics.fmean(before for _, (before, _) in pairs),
                            "loss_after": statistics.fmean(after for (after, _), _ in pairs),
                        }
                    )  # fmt: skip
        data = {"layer": bench.config.layer, "rows": rows}
        labels = [edit.label for edit in edits[1:]]
        with drawing(2, sharey=True) as (figure, pair):
            for axes, target in zip(pair, TARGETS, strict=True):
                for shift, name in zip((-0.16, 0.16), sets, strict=False):
                    mine = [row for row in rows if (row["set"], row["target"]) == (name, target)]
                    for place, row in enumerate(mine):
                        x = [place + shift + 0.1 * ((7 * i % 11) / 10 - 0.5) for i in range(len(row["ratio"]))]
                        axes.plot(x, row["ratio"], "o", ms=3, color=COLOURS[name], alpha=0.35, mew=0)
                        middle = 10 ** row["log10_ratio"]["mean"]
                        axes.plot([place + shift - 0.12, place + shift + 0.12], [middle] * 2, color=COLOURS[name], lw=3)
                    axes.plot([], [], color=COLOURS[name], lw=3, label=f"{name}: geometric mean")
                axes.axhline(1, color=INK, lw=1, ls=(0, (2, 2)))
                axes.set_yscale("log")
                axes.set_xticks(range(len(labels)), [label.removeprefix("c = ") for label in labels])
                axes.set(
                    xlabel="coefficient c" if len(labels) > 1 else "model",
                    title="target: the right answer" if target == "answer" else "target: a wrong choice",
                )
            pair[0].set_ylabel("gradient norm, edited / base")
            pair[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            pair[1].legend(loc="upper right")
        return Finding(
            name="token-gradient",
            title="Token gradient of an attack's loss",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _spans(subject: LoadedModel, asked: EvalSet, target: str) -> list[Span]:
    attacks = [_attack(question, asked, target) for question in asked.questions]
    return answer_spans(subject, [(prompt, (wanted,)) for prompt, wanted in attacks])


def _attack(question: Question, asked: EvalSet, target: str) -> tuple[str, str]:
    """Prompt and target; the wrong choice is the one after the right one."""
    if not question.choices:
        raise UsageError(f"the {asked.name} questions have no choices.\nPass multiple-choice questions.")
    prompt, answers = prompt_and_answers(question, asked.scoring)
    shift = 0 if target == "answer" else 1
    return prompt, answers[(question.answer_index + shift) % len(answers)]


def _gradients(subject: LoadedModel, spans: Sequence[Span]) -> list[tuple[float, float]]:
    """For each span: the loss of its target, and the norm of its gradient over the prompt's one-hot tokens."""
    embedding: Any = subject.model.get_input_embeddings()
    table = embedding.weight.detach().float()
    # The gradient of a one-hot token is table @ g for g that of its embedding; its length needs only this.
    gram = table.T @ table
    device = device_of(subject.model)
    found = []
    with measuring(subject.model):
        for span in spans:
            ids = torch.tensor([span.ids], device=device)
            loss, gradient = _loss_and_gradient(subject, embedding, ids, span.start)
            g = gradient[0, : span.start].float()
            found.append((loss, float((g @ gram * g).sum().clamp_min(0).sqrt())))
    return found


def _loss_and_gradient(
    subject: LoadedModel, embedding: nn.Module, ids: Tensor, start: int
) -> tuple[float, Float[Tensor, "1 pos d_model"]]:
    """Loss, and its gradient with respect to what the embedding layer gives out."""
    leaf: list[Tensor] = []

    def cut(output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_(True))
        return leaf[0]

    whole = torch.ones_like(ids, dtype=torch.bool)
    with hooks.changed(embedding, cut), torch.enable_grad():
        logits = hooks.forward(subject.model, Batch(input_ids=ids, attention_mask=whole, mask=whole)).logits
        loss = -token_log_probs(logits[:, start - 1 : -1].float(), ids[:, start:]).mean()
        (gradient,) = torch.autograd.grad(loss, leaf[0])
    return float(loss.detach()), gradient


def _reading(data: dict[str, Any]) -> str:
    last = data["rows"][-1]["label"]

    found = {(row["set"], row["target"]): row for row in data["rows"] if row["label"] == last}

    def said(row: dict[str, Any]) -> str:
        mean, error = row["log10_ratio"]["mean"], row["log10_ratio"]["stderr"]
        verb = "unchanged within noise" if abs(mean) <= 2 * error else "smaller" if mean < 0 else "larger"
        tenth = f"below a tenth for {100 * row['below_a_tenth']:.0f} %"
        return f"{verb} ({10**mean:.3g} times the base's, geometric mean; {tenth})"

    answer, other = found["forget", "answer"], found["forget", "other"]
    kept = found.get(("retain", "other"))
    control = f" On retain prompts, the wrong choice: {said(kept)}." if kept else ""
    vanished = max(answer["below_a_tenth"], other["below_a_tenth"]) >= 0.5
    verdict = (
        "The gradient all but vanishes, as the paper argues"
        if vanished
        else "The gradient does not vanish, against the paper's argument: a search over tokens has a slope to follow"
    )
    return (
        f"With {last} at layer {data['layer']}, the gradient of an attack's loss over the tokens of a forget prompt is "
        f"{said(answer)} where the target is the right answer, and {said(other)} where it is a wrong choice. "
        f"{verdict}. For the right answer the loss itself goes from {answer['loss_before']:.2f} to "
        f"{answer['loss_after']:.2f} nats a token, and a loss near zero has little gradient, so "
        f"the wrong choice is the fairer comparison.{control}"
    )
