"""How many of the correct answer's words an answer gives."""

from dataclasses import dataclass
from typing import ClassVar

from rouge_score.rouge_scorer import RougeScorer

from lethe.inference.reading import Reading, golds
from lethe.metrics._ngrams import has_rouge_words
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class Rouge1Recall(Metric):
    """Share of the correct answer's words that stand in the model's answer, in any order, each as often as it occurs.

    Words are lower case and stemmed. The best of the gold answer and the accepted ones counts, and of several sampled
    answers their mean. A long answer is not punished: read it beside `repetition`. Only Latin letters and digits make
    words, so questions whose correct answers have none are left out; None where no other free-form one is left.
    """

    source: ClassVar[str] = "Lin, ROUGE (2004), by the library rouge-score; stemmed recall as in TOFU and LUNAR"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Recall in [0, 1] over the free-form questions."""
        return _recall(reading, "rouge1")


@dataclass(frozen=True, kw_only=True)
class RougeLRecall(Metric):
    """Share of the correct answer's words that stand in the model's answer in the same order, others between them.

    Otherwise as `Rouge1Recall`.
    """

    source: ClassVar[str] = "Lin, ROUGE (2004), by the library rouge-score; stemmed recall as in TOFU and LUNAR"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Recall in [0, 1] over the free-form questions."""
        return _recall(reading, "rougeL")


def _recall(reading: Reading, kind: str) -> Scores | None:
    scorer = RougeScorer([kind], use_stemmer=True)
    right = [tuple(gold for gold in golds(question) if has_rouge_words(gold)) for question in reading.free_form]
    if not any(right):
        return None
    values = [
        sum(max(scorer.score(gold, text)[kind].recall for gold in texts) for text in said) / len(said)
        for said, texts in zip(reading.answers, right, strict=True)
        if texts
    ]
    return mean_scores(values, "higher")
