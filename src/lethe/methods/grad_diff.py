"""Gradient difference: ascend on forget text, descend on retain text. A baseline, and the plainest token loss."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.methods.protocol import Side, Term, TokenMethod
from lethe.model.losses import masked_mean
from lethe.model.token_view import TokenLogProbs
from lethe.types import State


@dataclass(frozen=True, kw_only=True)
class GradDiff(TokenMethod):
    """Make forget tokens less likely: the mean log-probability of forget tokens is the loss.

    Likelihoods are averaged over the tokens of a batch. The loss has no lower bound: it runs away with too many steps.
    """

    source: ClassVar[str] = "Liu et al. 2022, Continual Learning and Private Unlearning, arXiv 2203.12817, section 4"
    shown: ClassVar[str] = "nats a token {forget_nll:.3g}"

    gamma: float = 1.0
    """Weight of the forget loss."""

    def forget_loss(self, side: Side[TokenLogProbs], state: State) -> Term:
        """Gamma times the mean log-probability of forget tokens."""
        likelihood = masked_mean(side.now.of_tokens, side.now.mask)
        return Term(loss=self.gamma * likelihood, measures={"forget_nll": -likelihood})
