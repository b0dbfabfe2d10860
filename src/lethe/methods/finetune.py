"""Fine-tuning: learn the forget corpus as any text is learned. As an attack on an edit, relearning is this."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.methods.protocol import Side, Term, TokenMethod
from lethe.model.losses import masked_mean
from lethe.model.token_view import TokenLogProbs
from lethe.types import State


@dataclass(frozen=True, kw_only=True)
class Finetune(TokenMethod):
    """Make the tokens of the forget corpora more likely: cross-entropy, averaged over the tokens of a batch."""

    source: ClassVar[str] = "next-token prediction; as relearning in Hu et al. 2024, arXiv 2406.13356"
    shown: ClassVar[str] = "nats a token {forget_nll:.3g}"

    alpha: float = 0.0
    """Weight of the retain loss; with 0 no retain batch is read."""

    def forget_loss(self, side: Side[TokenLogProbs], state: State) -> Term:
        """Mean negative log-probability of the corpus's tokens, in nats."""
        nll = -masked_mean(side.now.of_tokens, side.now.mask)
        return Term(loss=nll, measures={"forget_nll": nll})
