"""How often answers refuse, and how near they are to the refusals that are wanted."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.data.refusals import WANTED, is_refusal
from lethe.inference.answers import answers
from lethe.inference.embedding import embed
from lethe.inference.loaded_model import LoadedModel
from lethe.types import EvalSet, Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class RefusalRate:
    """Share of answers to free-form questions that refuse, by the rule of `lethe.refusals.is_refusal`.

    Of several sampled answers the share counts. None without a free-form question.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024): answers of the 'I don't know' kind; the phrases are Lethe's own"
    better: ClassVar[str] = "lower"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Rate in [0, 1] over the free-form questions."""
        said = answers(subject, data)
        values = [sum(is_refusal(text, data.refusals) for text in texts) / len(texts) for texts in said]
        return mean_scores(values, "lower") if values else None


@dataclass(frozen=True, kw_only=True)
class RefusalQuality:
    """Mean over answers of the largest cosine to a wanted refusal: `data.refusals`, by default `refusals.WANTED`.

    Sentences are compared by `data.encoder` or, without one, by the untouched model itself (`lethe.embedding.embed`);
    the two scales differ. An empty answer counts 0. None without a free-form question.
    """

    source: ClassVar[str] = "Shen et al., LUNAR (2025), arXiv 2502.07218: refusal quality (control score in v1)"
    better: ClassVar[str] = "neither"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Cosine in [-1, 1] over the free-form questions."""
        said = answers(subject, data)
        if not said:
            return None
        wanted = embed(subject, data.refusals or WANTED, data.encoder)
        texts = sorted({text for row in said for text in row})
        nearest = (embed(subject, texts, data.encoder) @ wanted.T).amax(1).double().tolist()
        quality = dict(zip(texts, nearest, strict=True))
        return mean_scores([sum(quality[text] for text in row) / len(row) for row in said], "neither")
