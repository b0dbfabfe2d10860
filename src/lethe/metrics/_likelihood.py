"""How probable a model finds a question's correct answer, its paraphrase and wrong ones: what TOFU's metrics share."""

from dataclasses import dataclass

from lethe.inference.reading import Reading
from lethe.inference.spans import generated_spans
from lethe.types import Question


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


def likelihoods(reading: Reading) -> list[Likelihood]:
    """One for each free-form question.

    A probability is that of the whole text to the power of one over its number of tokens.
    """
    asked = [(question.prompt, _texts(question)) for question in reading.free_form]
    tokens = reading.log_probs(generated_spans(reading.model, asked))
    means = (float(some.double().mean()) for some in tokens)
    found = []
    for question, (_, texts) in zip(reading.free_form, asked, strict=True):
        answer, *others = (next(means) for _ in texts)
        paraphrase = others.pop(0) if question.paraphrase else answer
        closed = bool(others) and not question.paraphrase
        found.append(Likelihood(answer=answer, paraphrase=paraphrase, wrong=tuple(others), is_normalised=closed))
    return found


def log_truth_ratios(reading: Reading) -> list[float]:
    """The log of R of each question that has wrong answers."""
    return [found.log_truth_ratio for found in likelihoods(reading) if found.wrong]


def _texts(question: Question) -> tuple[str, ...]:
    return (question.answer, *[question.paraphrase] * bool(question.paraphrase), *question.perturbed)
