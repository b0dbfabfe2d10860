"""Whether an answer says what the correct one says, by a model of natural language inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lethe.errors import ModelError
from lethe.inference.log_probs import measuring
from lethe.inference.reading import Reading, golds
from lethe.metrics.protocol import Metric
from lethe.model.layers import device_of
from lethe.model.loading import load_folder
from lethe.types import Scores, Unit, mean_scores

MOST_TOKENS = 512
"""Answer and correct answer are read up to this many tokens together, or up to the model's own limit if lower."""


PAIRS_PER_BATCH = 16


LABEL = "entailment"
"""The label, in any case, of an inference model's configuration."""


@dataclass(frozen=True, kw_only=True)
class Entailment(Metric):
    """Share of answers that entail the correct one: an inference model's most probable label of the two says so.

    The premise is the generated answer, the hypothesis the gold answer; one of the accepted answers entailed is
    enough. An empty answer entails nothing. Of several sampled answers the share counts. None without `nli`, the
    folder of a classifier in Hugging Face's format with a label "entailment", or without a free-form question.
    """

    source: ClassVar[str] = (
        "Fan et al. 2025, arXiv 2510.07626: entailment score, there with sileod/deberta-v3-base-tasksource-nli"
    )
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions and a model of natural language inference"

    nli: Path | None = None
    """Folder of a model of natural language inference; without it nothing is measured."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in [0, 1] over the free-form questions.

        Raises: ModelError if the folder is missing, or holds no such classifier.
        """
        if self.nli is None or not reading.free_form:
            return None
        said = reading.answers
        right = [golds(question) for question in reading.free_form]
        pairs = {
            (text, gold) for texts, known in zip(said, right, strict=True) for text in texts for gold in known if text
        }
        entailing = self._judge.entailing(sorted(pairs), device_of(reading.model.model))
        values = [
            sum(any((text, gold) in entailing for gold in known) for text in texts) / len(texts)
            for texts, known in zip(said, right, strict=True)
        ]
        return mean_scores(values, "higher")

    @cached_property
    def _judge(self) -> "_Judge":
        return _load(self.nli or Path())


@dataclass(frozen=True, kw_only=True)
class _Judge:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: int
    """Which of the model's labels is entailment."""

    def entailing(self, pairs: Sequence[tuple[str, str]], device: torch.device) -> set[tuple[str, str]]:
        """Those pairs of a premise and a hypothesis of which the first entails the second."""
        self.model.to(device)  # type: ignore[arg-type]
        own = getattr(self.model.config, "max_position_embeddings", MOST_TOKENS)
        limit = min(MOST_TOKENS, self.tokenizer.model_max_length, own)
        ordered = sorted(pairs, key=lambda pair: sum(map(len, pair)), reverse=True)
        found = set()
        with measuring(self.model):
            for start in range(0, len(ordered), PAIRS_PER_BATCH):
                some = ordered[start : start + PAIRS_PER_BATCH]
                inputs = self.tokenizer(
                    [premise for premise, _ in some],
                    [hypothesis for _, hypothesis in some],
                    truncation=True,
                    max_length=limit,
                    padding=True,
                    return_tensors="pt",
                )
                labels = self.model(**inputs.to(self.model.device)).logits.argmax(-1).tolist()
                found |= {pair for pair, label in zip(some, labels, strict=True) if label == self.label}
        return found


def _load(folder: Path) -> _Judge:
    what = "model of natural language inference"
    model, tokenizer = load_folder(AutoModelForSequenceClassification, folder, torch.device("cpu"), what=what)
    names = model.config.id2label or {}
    labels = {name.casefold(): int(index) for index, name in names.items()}
    if LABEL not in labels:
        raise ModelError(
            f"{folder} has no label {LABEL!r}. Its labels are: {', '.join(names.values())}.\n"
            f"Pass a {what}, or name its labels in id2label of config.json."
        )
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer in {folder} has no padding token, so pairs of different lengths cannot be read together.\n"
            "Name one in its tokenizer_config.json."
        )
    return _Judge(model=model, tokenizer=tokenizer, label=labels[LABEL])
