"""How sure the model is of each token it generates, for several coefficients."""

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench
from lethe.data.tokens import encode, pad
from lethe.inference.generate import eos_ids
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, measuring
from lethe.inference.spans import context_length, prompt_and_answers
from lethe.model.layers import device_of
from lethe.report.standalone_figures import drawing, shades
from lethe.report.style import INK
from lethe.types import Question


@dataclass(frozen=True, kw_only=True)
class MaxLogit:
    """Largest logit and largest probability at each generated token, greedy answers to forget questions."""

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: MaxLogit of base and RMU models for several c"

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """c, in units of the median norm of forget tokens at the layer."""
    questions: int = 60
    """Most questions."""
    new_tokens: int = 30
    """Most tokens of an answer; it ends earlier at EOS."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without forget questions, or without the corpora that training takes."""
        asked = bench.asked("forget", self.questions)
        rows: list[dict[str, Any]] = []
        for edit in bench.variants(self.multiples):
            with bench.applied(edit.weights) as subject:
                answers = _answers(subject, asked.questions, asked.scoring, self.new_tokens)
            row: dict[str, Any] = {"label": edit.label, "c": edit.coefficient}
            for index, name in enumerate(("max_logit", "max_probability")):
                pooled = sorted(float(token[index]) for answer in answers for token in answer)
                # Tokens of one answer are not independent, so the error is over answers.
                means = [float(answer[:, index].mean()) for answer in answers]
                row[name] = {
                    **summary(means),
                    "tokens": len(pooled),
                    "pooled_mean": statistics.fmean(pooled),
                    "quantiles": [pooled[round(part / 100 * (len(pooled) - 1))] for part in range(101)],
                }
            rows.append(row)
        data = {"layer": bench.config.layer, "questions": len(asked.questions), "models": rows}
        with drawing(2) as (figure, pair):
            titles = {"max_logit": "largest logit", "max_probability": "largest probability"}
            for axes, (name, title) in zip(pair, titles.items(), strict=True):
                for row, colour in zip(rows, [INK, *shades(len(rows) - 1)], strict=True):
                    axes.plot(
                        row[name]["quantiles"],
                        [part / 100 for part in range(101)],
                        color=colour,
                        ls=(0, (4, 1.5)) if row["label"] == "base" else "-",
                        label=row["label"],
                    )
                axes.set(xlabel=f"{title} of a generated token", ylabel="share of tokens below", ylim=(0, 1.02))
            pair[0].legend()
        return Finding(
            name="max-logit",
            title="Confidence in generated tokens",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _answers(
    subject: LoadedModel, questions: tuple[Question, ...], scoring: Any, new_tokens: int
) -> list[torch.Tensor]:
    """Per question [token, 2]: the largest logit and the largest probability at each token of its greedy answer."""
    model, tokenizer = subject.model, subject.tokenizer
    stops = eos_ids(model, tokenizer)
    prompts = [prompt_and_answers(question, scoring)[0].rstrip() for question in questions]
    room = max(1, context_length(model) - new_tokens)
    rows = [tuple(ids[-room:]) for ids in encode(tokenizer, prompts)]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        # Written out, because what is left open is taken from the model's own settings.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found: list[torch.Tensor] = []
    with measuring(model):
        for part in batches(rows, TOKENS_PER_BATCH):
            ids, mask = pad(part, side="left", device=device_of(model))
            output: Any = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare it
                input_ids=ids, attention_mask=mask.long(), generation_config=config
            )
            tops = [
                torch.stack([step.float().amax(-1), step.float().softmax(-1).amax(-1)], -1).cpu()
                for step in output.logits
            ]
            by_row = torch.stack(tops, 1)
            for values, new in zip(by_row, output.sequences[:, ids.shape[1] :].tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(new) if token in stops), len(new))
                found.append(values[:end])
    return found


def _reading(data: dict[str, Any]) -> str:
    base, *others = data["models"]
    last = others[-1]

    def moved(name: str, form: str) -> str:
        a, b = base[name], last[name]
        change, noise = b["mean"] - a["mean"], 2 * (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5
        verb = "stays" if abs(change) <= noise else "falls" if change < 0 else "rises"
        return f"{verb} from {form.format(a['mean'])} to {form.format(b['mean'])}".replace("stays from", "stays, from")

    steps = ", ".join(f"{row['max_probability']['mean']:.2f} ({row['label']})" for row in data["models"])
    spread = [row["max_logit"]["quantiles"][75] - row["max_logit"]["quantiles"][25] for row in (base, last)]
    return (
        f"On {data['questions']} forget questions the largest logit of a generated token "
        f"{moved('max_logit', '{:.1f}')} between the base and {last['label']} (layer {data['layer']}), and the largest "
        f"probability {moved('max_probability', '{:.2f}')}. The middle half of the largest logits is "
        f"{'narrower' if spread[1] < spread[0] else 'wider'}: {spread[0]:.2f} before, {spread[1]:.2f} after. "
        f"Mean largest probability: {steps}."
    )
