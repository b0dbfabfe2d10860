"""How sure the model is as it begins to answer, rightly or wrongly."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import read_spans
from lethe.inference.spans import pair_spans, prompt_and_answers
from lethe.types import EvalSet, Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class AnswerConfidence:
    """Mean probability of the most probable token where the answer's first token stands.

    The prompt is the one that multiple choice reads: the rendered question for letters, the question's own prompt
    otherwise. None without questions.
    """

    source: ClassVar[str] = "Hendrycks and Gimpel, maximum softmax probability (ICLR 2017), at one token"
    better: ClassVar[str] = "neither"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "questions"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Confidence in (0, 1] over the questions."""
        if not data.questions:
            return None
        # One token is predicted from the same row whichever answer follows, so the first one serves.
        asked = [prompt_and_answers(question, data.scoring) for question in data.questions]
        spans = pair_spans(subject, [(prompt, answers[0]) for prompt, answers in asked])
        highest = read_spans(subject.model, spans, lambda logits, _: logits[0].float().softmax(-1).max())
        return mean_scores([float(value) for value in highest], "neither")
