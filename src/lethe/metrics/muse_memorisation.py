"""What a model says of a passage it read, word for word, and of the facts in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rouge_score.rouge_scorer import RougeScorer

from lethe.data.tokens import encode, has_bos
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.inference.spans import context_length
from lethe.metrics._ngrams import has_rouge_words
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores

VERBATIM_TOKENS = 128


ANSWER_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Verbmem(Metric):
    """How much of a passage the model goes on with as it was written: ROUGE-L F1, words not stemmed.

    The greedy continuation of 128 tokens, newlines included, against the first 128 tokens of the true one (half the
    context of a model that has no room for so many). MUSE prints it times 100. Only Latin letters and digits make
    words, so passages that go on without any are left out; None where no other is left.
    """

    source: ClassVar[str] = "Shi et al., MUSE (2024), arXiv 2407.06460: verbatim memorization (VerbMem)"
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "what a retain-only model scores: common words overlap"
    label: ClassVar[str] = "verbatim memorisation (VerbMem)"
    needs: ClassVar[str] = "passages cut into a beginning and how it goes on"

    def __call__(self, reading: Reading) -> Scores | None:
        """F1 in [0, 1] over the passages."""
        subject = reading.model
        passages = [passage for passage in reading.data.passages if has_rouge_words(passage[1])]
        if not passages:
            return None
        room = _room(subject, VERBATIM_TOKENS)
        said = generate(subject, [start for start, _ in passages], [room] * len(passages), lines=False)
        return mean_scores(_f1(_beginnings(subject, [rest for _, rest in passages], room), said), "higher")


@dataclass(frozen=True, kw_only=True)
class Knowmem(Metric):
    """How well short questions about passages are answered after solved examples: ROUGE-L F1, words not stemmed.

    The greedy answer of at most 32 tokens is cut at an empty line or the next "Question:". Prompts are read without
    the space that MUSE's end with. MUSE prints it times 100. Questions without solved examples before them, or whose
    answers have no word of Latin letters or digits, are left out; None where no other is left.
    """

    source: ClassVar[str] = "Shi et al., MUSE (2024), arXiv 2407.06460: knowledge memorization (KnowMem)"
    unit: ClassVar[Unit] = "share"
    label: ClassVar[str] = "knowledge memorisation (KnowMem)"
    needs: ClassVar[str] = "free-form questions after solved examples, in MUSE's form (Question: ... Answer: ...)"

    def __call__(self, reading: Reading) -> Scores | None:
        """F1 in [0, 1] over the questions that stand after solved examples."""
        asked = [one for one in reading.free_form if _has_examples(one.prompt) and has_rouge_words(one.answer)]
        if not asked:
            return None
        room = _room(reading.model, ANSWER_TOKENS)
        said = generate(reading.model, [one.prompt for one in asked], [room] * len(asked), lines=False)
        cut = [re.split(r"\n\n|\nQuestion|Question:", text)[0] for text in said]
        return mean_scores(_f1([one.answer for one in asked], cut), "higher")


def _has_examples(prompt: str) -> bool:
    return re.search(r"Question: .*\nAnswer: .+\n\nQuestion: ", prompt) is not None


def _room(subject: LoadedModel, tokens: int) -> int:
    return min(tokens, max(1, context_length(subject.model) // 2))


def _beginnings(subject: LoadedModel, texts: Sequence[str], tokens: int) -> list[str]:
    rows = [row[has_bos(subject.tokenizer, row) :][:tokens] for row in encode(subject.tokenizer, texts)]
    return [str(subject.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _f1(golds: Sequence[str], said: Sequence[str]) -> list[float]:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [float(scorer.score(gold, text)["rougeL"].fmeasure) for gold, text in zip(golds, said, strict=True)]
