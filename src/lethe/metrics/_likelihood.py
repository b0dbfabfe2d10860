"""How probable a model finds a question's correct answer, its paraphrase and wrong ones: what TOFU's metrics share."""

from dataclasses import dataclass

from lethe.inference.answers import free_form
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import log_probs
from lethe.inference.spans import answer_spans
from lethe.types import EvalSet, Question


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Mean log-probability per token, in nats, of the texts that might answer one question; EOS does not count."""

    answer: float
    paraphrase: float
    """Of the correct answer in other words; of the answer itself where there are none."""
    wrong: tuple[float, ...]
    is_normalised: bool
    """Whether the answer is one of a closed list: the question has wrong answers and no paraphrase."""

    @property
    def log_truth_ratio(self) -> float:
        """Log of R: the geometric mean of the wrong answers' probabilities over the paraphrase's; needs wrong ones."""
        return sum(self.wrong) / len(self.wrong) - self.paraphrase


def likelihoods(subject: LoadedModel, data: EvalSet) -> list[Likelihood]:
    """One for each free-form question, read once whoever asks for them.

    A probability is that of the whole text to the power of one over its number of tokens.
    """

    def find() -> list[Likelihood]:
        asked = [(question, _texts(question)) for question in free_form(data)]
        spans = answer_spans(subject, [(question.prompt, text) for question, texts in asked for text in texts])
        means = (float(tokens.double().mean()) for tokens in log_probs(subject.model, spans))
        found = []
        for question, texts in asked:
            answer, *others = (next(means) for _ in texts)
            paraphrase = others.pop(0) if question.paraphrase else answer
            closed = bool(others) and not question.paraphrase
            found.append(Likelihood(answer=answer, paraphrase=paraphrase, wrong=tuple(others), is_normalised=closed))
        return found

    return subject.once(("likelihoods", data), find)


def log_truth_ratios(subject: LoadedModel, data: EvalSet) -> list[float]:
    """The log of R of each question that has wrong answers."""
    return [found.log_truth_ratio for found in likelihoods(subject, data) if found.wrong]


def _texts(question: Question) -> tuple[str, ...]:
    return (question.answer, *[question.paraphrase] * bool(question.paraphrase), *question.perturbed)
