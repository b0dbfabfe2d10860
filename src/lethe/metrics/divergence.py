"""How far an edit moved what the model predicts on running text."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.errors import DivergedError
from lethe.inference.reading import Reading
from lethe.inference.spans import encode_texts
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class KlToFrozen(Metric):
    """KL divergence in nats from the untouched model's next-token predictions to the edited one's: sum p0 log(p0 / p).

    Read where a token of the set's first `texts` texts is predicted, as far as perplexity reads them; neither padding
    nor what follows a text's end counts. A text counts by the mean over its tokens. Exactly 0 for an unedited model.
    None on a set that is to be forgotten, whose predictions should move, and without a text of two tokens.
    """

    source: ClassVar[str] = "Kullback and Leibler 1951; as a retain measure in Maini et al., TOFU (2024)"
    higher_means: ClassVar[Knowledge] = "less"
    needs: ClassVar[str] = "texts of a set to keep"
    unit: ClassVar[Unit] = "nats"
    label: ClassVar[str] = "KL divergence from the untouched model"
    hint: ClassVar[str] = "lower: nearer to before"

    texts: int = 32
    """Most texts that are read, the first ones: each costs two forwards."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Nats, 0 or more, over the texts."""
        moved = _moved(reading, self.texts)
        return mean_scores([divergence for divergence, _ in moved], "lower") if moved else None


@dataclass(frozen=True, kw_only=True)
class TopOneAgreement(Metric):
    """Share of next-token predictions whose most probable token is the untouched model's; read as `KlToFrozen` is.

    Of equally probable tokens the one of lower id counts.
    """

    source: ClassVar[str] = "Lethe's own, beside the KL divergence: one minus the share of flipped predictions"
    needs: ClassVar[str] = "texts of a set to keep"
    unit: ClassVar[Unit] = "share"
    label: ClassVar[str] = "top-1 agreement with the untouched model"
    hint: ClassVar[str] = "higher: nearer to before"

    texts: int = 32
    """Most texts that are read, the first ones: each costs two forwards."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in [0, 1] over the texts."""
        moved = _moved(reading, self.texts)
        return mean_scores([agreement for _, agreement in moved], "higher") if moved else None


def _moved(reading: Reading, count: int) -> list[tuple[float, float]]:
    """Each text's mean divergence and agreement.

    Raises: DivergedError if a prediction is NaN or infinite.
    """
    if reading.data.role == "forget":
        return []
    # Rows of a single token predict nothing; they stand between the first texts all the same.
    first = encode_texts(reading.model, reading.data.texts[:count])
    texts = reading.texts_against_frozen([row for row in first if len(row) > 1], predictions=True)
    moved = [text.moved for text in texts if text.moved is not None]
    if not all(math.isfinite(divergence) for divergence, _ in moved):
        raise DivergedError(
            "the model's output is NaN or infinite on a text, so it cannot be compared with the untouched model's.\n"
            "Load it in float32 or bfloat16, or train it with a lower learning rate or steering coefficient."
        )
    return moved
