"""Which layer to steer, and how far: proposed from the untouched model's activations, before anything is trained.

The rule: of the layers where moving a forget token by its own length changes at least half as many next-token
predictions as where it changes the most, take the deepest. The later the layer, the fewer the layers in which a change
can spread to other text; but the later it is, the less of a move reaches the prediction.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lethe.advice.layer_readings import ALPHAS, LayerReading, draw, read_layers
from lethe.methods.protocol import SteeringMethod
from lethe.runs.config import RunConfig
from lethe.runs.estimate import plan
from lethe.runs.workspace import Workspace
from lethe.system.atomic_files import write_json
from lethe.system.machine import threads
from lethe.system.progress import Progress

REACH = 0.5
"""Share of the greatest reach that a layer must have."""


BETA = 2.0
"""Length of the forget target, in units of the forget norm: the least that the paper tries."""


MOVED = 1 / 3
"""How far a linear map may move held-out retain tokens, in units of their norm, at that length: it decides alpha."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings to try at a layer, and what it costs to try them."""

    layer: int
    steering_coeff: float
    """For RMU: `beta` times the median forget norm, to three digits."""
    beta: float
    """For Adaptive RMU."""
    alpha: float
    steps: int
    minutes: float
    """Training alone, if its matrix products ran at the rate of one measured here."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The proposal with its reason, the layers next to it, and the readings of all."""

    model: str
    chosen: Proposal
    reason: str
    runners_up: tuple[Proposal, ...]
    """The layers next to the chosen one, the earlier first: the rule's threshold is soft."""
    layers: tuple[LayerReading, ...]
    tokens: int
    """Tokens that the model read for it, each pass counted."""
    seconds: float
    """Time that the readings took, without loading the model."""

    def save(self, path: Path) -> Path:
        """Write as JSON; it holds no text of a corpus."""
        return write_json(path, dataclasses.asdict(self))


def advise(config: RunConfig, progress: Progress) -> Advice:
    """Read a few texts with the run's untouched model, and propose where and how far to steer.

    The config's layer does not matter. Every text is read once, and a thousand forget tokens once more for every layer.

    Raises: CorpusError if a corpus is missing or has one text only; ModelError, UnknownModuleError, DivergedError.
    """
    workspace = Workspace(config.base)
    corpora = workspace.corpora(config.data, "texts")
    samples = draw(*corpora.texts(), workspace.tokenizer, config.batching, config.seed)
    with threads(config.base.threads):
        model = workspace.model()
        started = time.perf_counter()
        layers, tokens = read_layers(model, samples, progress, train_modules=config.train_modules, seed=config.seed)
        seconds = time.perf_counter() - started
    best, alpha = choose(layers), choose_alpha(layers)
    nearby = [row for row in layers if abs(row.layer - best.layer) == 1]
    chosen, *others = (_proposal(config, row, alpha) for row in (best, *nearby))
    return Advice(
        model=config.base.model,
        chosen=chosen,
        reason=_reason(layers, best, chosen),
        runners_up=tuple(others),
        layers=layers,
        tokens=tokens,
        seconds=seconds,
    )


def choose(layers: Sequence[LayerReading]) -> LayerReading:
    """The deepest layer whose reach is at least `REACH` of the greatest."""
    least = REACH * max(row.reach for row in layers)
    return max((row for row in layers if row.reach >= least), key=lambda row: row.layer)


def choose_alpha(layers: Sequence[LayerReading]) -> float:
    """The least of `ALPHAS` with which maps of the proposed length leave held-out retain tokens alone.

    One layer's readings are too noisy for it, so it is the median layer's move that may be `MOVED` at most. The
    largest where none does; a method's plain default where no layer has such readings.
    """
    moved = [row.retain_moved for row in layers if row.retain_moved is not None]
    if not moved:
        return SteeringMethod.alpha
    kept = (alpha for alpha, by_layer in zip(ALPHAS, zip(*moved, strict=True), strict=True)
            if BETA * statistics.median(by_layer) <= MOVED)  # fmt: skip
    return next(kept, ALPHAS[-1])


def _proposal(config: RunConfig, row: LayerReading, alpha: float) -> Proposal:
    cost = plan(replace(config, layer=row.layer, train_layers=()))
    return Proposal(
        layer=row.layer,
        steering_coeff=float(f"{BETA * row.median_norm:.3g}"),
        beta=BETA,
        alpha=alpha,
        steps=getattr(config.solver, "steps", 0),
        minutes=cost.seconds / 60,
    )


def _reason(layers: Sequence[LayerReading], best: LayerReading, chosen: Proposal) -> str:
    most = max(layers, key=lambda row: row.reach)
    depth = len(layers)
    where = (
        f"Moving a forget token by its own length changes {100 * most.reach:.0f} % of next-token predictions at layer "
        f"{most.layer}, where it changes the most"
    )
    if best.layer == depth - 1:
        choice = f"{where}, and {100 * best.reach:.0f} % at layer {best.layer}, the last: the reach never halves."
    else:
        after = layers[best.layer + 1]
        choice = (
            f"{where}. Layer {best.layer} of 0..{depth - 1} is the deepest with at least half of that: "
            f"{100 * best.reach:.0f} %, against {100 * after.reach:.0f} % at layer {after.layer}."
        )
    length = (
        f"The median norm of forget tokens there is {best.median_norm:.3g}, so c = {BETA:g} x {best.median_norm:.3g} = "
        f"{chosen.steering_coeff:g}, the same length as beta = {BETA:g}."
    )
    moved = [row.retain_moved[ALPHAS.index(chosen.alpha)] for row in layers if row.retain_moved is not None]
    share = BETA * statistics.median(moved) if moved else 0.0
    if not moved:
        weight = f"No single matrix could be tried on held-out text, so alpha = {chosen.alpha:g} is only the default."
    elif share <= MOVED:
        weight = (
            f"alpha = {chosen.alpha:g} is the least of {', '.join(f'{alpha:g}' for alpha in ALPHAS)} with which linear "
            f"maps of that length move held-out retain tokens by no more than a third of their norm "
            f"({100 * share:.0f} %, median over layers)."
        )
    else:
        weight = (
            f"Even with alpha = {chosen.alpha:g} linear maps of that length move held-out retain tokens by "
            f"{100 * share:.0f} % of their norm: forget and retain texts are hard to tell apart."
        )
    return f"{choice} {length} {weight}"
