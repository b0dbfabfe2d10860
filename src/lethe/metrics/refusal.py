"""How often answers refuse, and how near they are to the refusals that are wanted."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lethe.data.refusals import WANTED, is_refusal
from lethe.inference.embedding import SentenceEncoder, embedder
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class RefusalRate(Metric):
    """Share of answers to free-form questions that refuse, by the rule of `lethe.refusals.is_refusal`.

    Of several sampled answers the share counts. None without a free-form question.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024): answers of the 'I don't know' kind; the phrases are Lethe's own"
    higher_means: ClassVar[Knowledge] = "less"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    refusals: tuple[str, ...] = ()
    """Refusals that are wanted, in the model's own words; they count beside a list of common phrases."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Rate in [0, 1] over the free-form questions."""
        said = reading.answers
        values = [sum(is_refusal(text, self.refusals) for text in texts) / len(texts) for texts in said]
        return mean_scores(values, "lower") if values else None


@dataclass(frozen=True, kw_only=True)
class RefusalQuality(Metric):
    """Mean over answers of the largest cosine to a wanted refusal: `refusals`, by default `data.refusals.WANTED`.

    Sentences are compared by `encoder` or, without one, by the untouched model itself (`inference.embedding`);
    the two scales differ. An empty answer counts 0. None without a free-form question.
    """

    source: ClassVar[str] = "Shen et al., LUNAR (2025), arXiv 2502.07218: refusal quality (control score in v1)"
    higher_means: ClassVar[Knowledge] = "neither"
    needs: ClassVar[str] = "free-form questions"

    refusals: tuple[str, ...] = ()
    """Refusals that are wanted, in the model's own words; by default a list of common ones."""
    encoder: Path | None = None
    """Folder of a sentence encoder; by default the measured model's own mean hidden state compares sentences."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Cosine in [-1, 1] over the free-form questions."""
        said = reading.answers
        if not said:
            return None
        embed = embedder(reading.model, self._sentences)
        texts = sorted({text for row in said for text in row})
        nearest = (embed(texts) @ embed(self.refusals or WANTED).T).amax(1).double().tolist()
        quality = dict(zip(texts, nearest, strict=True))
        return mean_scores([sum(quality[text] for text in row) / len(row) for row in said], "neither")

    @cached_property
    def _sentences(self) -> SentenceEncoder | None:
        return SentenceEncoder(self.encoder) if self.encoder else None
