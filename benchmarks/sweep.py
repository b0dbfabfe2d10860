"""Time per cell of a sweep over layers and coefficients, against the same cells as separate two-model runs.

The sweep's side is run whole. Of the other side one training step at each layer and one evaluation are measured, and
multiplied: a separate run trains for the same steps, and measures the model before and after with all of its layers
and the head at every position. Both sides train on the same batches, and one cell's weights are compared.

Times are the processor's, on one thread, so that other work on the machine counts little. By default a cell trains on
four times as many tokens as it is measured on; a WMDP run of 150 steps with 1273 questions is at about three times.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from transformers import LlamaForCausalLM, PreTrainedModel

import step
from lethe import RMU, Gradient, LayerSlice, load_model
from lethe.data.batches import Schedule
from lethe.inference.log_probs import log_probs
from lethe.inference.prefix_cache import shared_log_probs
from lethe.inference.spans import Span
from lethe.methods.protocol import SteeringMethod
from lethe.model.hidden_cache import HiddenCache
from lethe.model.layers import trainable_names
from lethe.model.recordings import Recordings, Store
from memory import random_batch, random_schedule

LAYERS = tuple(range(3, 32, 4))
COEFFICIENTS = (3.0, 6.5, 20.0, 50.0)
TARGET = 9.0
ROOM = 8 * 10**9


def train(layers: LayerSlice, method: SteeringMethod, plan: Schedule) -> dict[str, torch.Tensor]:
    """The new weights; the model is as before afterwards."""
    try:
        Gradient().train(layers, method, plan, torch.Generator().manual_seed(0))
        return layers.delta()
    finally:
        layers.restore()


def questions(rows: int, tokens: int) -> list[Span]:
    """Random rows whose last four tokens are asked for."""
    ids = random_batch(step.CONFIG.vocab_size, rows, tokens, seed=99).input_ids.tolist()
    return [Span(ids=tuple(row), start=tokens - 4) for row in ids]


def put(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return before


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def products(work: Callable[[], object]) -> float:
    """Seconds of plain matrix products with the shapes and strides of those that the work makes."""
    with step.Products() as noted:
        work()
    made = [[torch.empty_strided(*operand).normal_() for operand in pair] for pair in noted.operands]
    return min(seconds(lambda: [torch.mm(*pair) for pair in made]) for _ in range(3))


def main(steps: int = 2, rows: int = 4, tokens: int = 128, asked: int = 4) -> None:
    """Run the sweep once, and print what a cell costs on both sides."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        LlamaForCausalLM(step.CONFIG).save_pretrained(temporary)
        model = load_model(Path(temporary))
    plan = random_schedule(step.CONFIG.vocab_size, rows, tokens, steps=steps, distinct=steps)
    spans = questions(asked, tokens)
    cuts = []
    for layer in LAYERS:
        names = [trainable_names(model, trained) for trained in range(layer - 2, layer + 1)]
        cuts.append((layer - 2, layer + 1, sum(names, ())))
    shared = Recordings(Store(ROOM), tuple(cuts))
    starts = HiddenCache([start for start, _, _ in cuts], Store(ROOM))

    started = time.process_time()
    with starts.reading(model, None):
        shared_log_probs(model, spans)
    base = time.process_time() - started
    training: list[list[float]] = []
    measuring: list[list[float]] = []
    edits = {}
    for cut in cuts:
        training.append([])
        measuring.append([])
        for coefficient in COEFFICIENTS:
            started = time.process_time()
            layers = shared.cut(model, *cut)
            values = train(layers, RMU(steering_coeff=coefficient), plan)
            training[-1].append(time.process_time() - started)
            edits[cut[1] - 1, coefficient] = values
            started = time.process_time()
            before = put(model, values)
            with starts.reading(model, cut[0]):
                scored = shared_log_probs(model, spans)
            put(model, before)
            measuring[-1].append(time.process_time() - started)
    # One more cell in the middle of the grid, whose recordings are there: how much of it is plain products.
    middle = len(LAYERS) // 2

    def cell() -> None:
        values = train(shared.cut(model, *cuts[middle]), RMU(steering_coeff=COEFFICIENTS[-1]), plan)
        before = put(model, values)
        with starts.reading(model, cuts[middle][0]):
            shared_log_probs(model, spans)
        put(model, before)

    share = products(cell) / min(seconds(cell) for _ in range(3))
    count = len(LAYERS) * len(COEFFICIENTS)
    whole = [sum(map(sum, training)), base + sum(map(sum, measuring))]

    # The other side: two whole models, hooks, every layer.
    values = edits[LAYERS[-1], COEFFICIENTS[-1]]
    before = put(model, values)
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(scored, log_probs(model, spans), strict=True))
    put(model, before)
    evaluation = min(seconds(lambda: log_probs(model, spans)) for _ in range(3))
    naive_steps = []
    other = copy.deepcopy(model)
    difference = 0.0
    for layer in LAYERS:
        step.LAYER = layer
        own = copy.deepcopy(model)
        loop = step.Naive(own, other)
        naive_steps.append(seconds(lambda loop=loop: loop.step(*plan.at(0)[1:])))
        if layer == LAYERS[1]:
            for number in range(1, steps):
                loop.step(*plan.at(number)[1:])
            trained = edits[layer, step.METHOD.steering_coeff]
            difference = max((own.get_parameter(n) - v).abs().max().item() for n, v in trained.items())
        del loop, own
    per_step = statistics.mean(naive_steps)
    mine, theirs = [part / count for part in whole], [steps * per_step, 2 * evaluation]
    print(f"{len(LAYERS)} layers x {len(COEFFICIENTS)} coefficients, {steps} steps a cell, {asked} rows asked")
    print(f"largest difference of a cell's weights {difference:.1e}; equal scores: {same}; sound: {starts.is_sound}")
    print(f"separate runs, extrapolated: step {per_step:.2f} s, an evaluation {evaluation:.2f} s")
    for name, a, b in zip(("training", "evaluation"), theirs, mine, strict=True):
        print(f"{name} of a cell: separate {a:.2f} s, sweep {b:.2f} s, ratio {a / b:.1f}")
    print(f"both: ratio {sum(theirs) / sum(mine):.1f} (target {TARGET:g})")
    print(f"after-the-edit evaluation alone: ratio {evaluation * count / sum(map(sum, measuring)):.1f}")
    further = statistics.mean(t for row in training for t in row[1:]), statistics.mean(t for r in measuring for t in r)
    layer = statistics.mean(row[0] for row in training[1:])
    print(f"a further coefficient: {further[0]:.2f} s training, {further[1]:.2f} s evaluation")
    print(f"plain matrix products of a further cell's shapes take {100 * share:.0f} % of its time")
    print(f"a further layer's first cell: {layer:.2f} s training; the first of all: {training[0][0]:.2f} s")


if __name__ == "__main__":
    tyro.cli(main)
