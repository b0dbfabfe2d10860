"""Commands that say which layer to steer: by reading the model (`advise`), or by steering each one (`layers`)."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from lethe import methods
from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.tables import Table
from lethe.data.settings import BUILTIN
from lethe.runs.defaults import defaults
from lethe.system.plugins import load

if TYPE_CHECKING:
    import lethe.advice.advise
    import lethe.advice.layer_search


def layers(
    model: Positional[str] = BUILTIN,
    forget: tuple[str, ...] = (BUILTIN,),
    retain: str = BUILTIN,
    reference: str = BUILTIN,
    steering_coeff: float = 2.0,
    top: int = 1,
    refusals: Path | None = None,
    encoder: Path | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    out: Path = Path("runs/layers.json"),
    as_json: Json = False,
) -> None:
    """Find the layers where steering makes the model decline forget prompts, for `lethe unlearn lunar --layers-from`.

    Args:
        model: `builtin`, a model folder or a hub id.
        forget: Forget prompts, one topic each.
        retain: Retain prompts; nothing is measured on them.
        reference: Prompts that the model cannot answer.
        steering_coeff: Multiple of the direction that is added.
        top: How many layers to choose.
        refusals: Wanted refusals, one a line.
        encoder: Folder of a sentence encoder.
        device: cpu, cuda, mps or auto.
        dtype: Number type of the weights.
        out: Where the scores are written.
    """
    from lethe.advice.layer_search import search_run
    from lethe.system import machine

    config = defaults(load("lunar", methods), model)[1].changed(
        forget=forget, retain=retain, reference=reference, refusals=refusals, encoder=encoder, device=device,
        dtype=dtype,
    )  # fmt: skip
    with progress_bars.Bars() as progress, machine.explaining_memory(f"with {model} loaded whole."):
        found = search_run(config, coefficient=steering_coeff, top=top, progress=progress)
    found.save(out)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show(_searched(found))
        show(f"next: lethe unlearn lunar --model {model} --layers-from {out} ...")


LAYERS = Command(
    run=layers,
    examples=("lethe layers builtin", "lethe layers ./my-model --forget q.jsonl --retain r.jsonl --out layers.json"),
)


def advise(
    model: Positional[str] = BUILTIN,
    forget: tuple[str, ...] = (BUILTIN,),
    retain: str = BUILTIN,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Propose layer, coefficient and alpha for this model and these corpora, without training; `--layer auto` uses it.

    Args:
        model: `builtin`, a model folder or a hub id.
        forget: Forget corpora.
        retain: Retain corpus.
        steps: Steps of the run whose time is estimated.
        seed: Seed of the texts that are read.
        device: cpu, cuda, mps or auto.
        dtype: Number type of the weights.
        out: Where the readings are written, as JSON.
    """
    from lethe.advice import advise as adviser
    from lethe.system.machine import explaining_memory

    given = {"forget": forget, "retain": retain, "seed": seed, "device": device, "dtype": dtype}
    own = {"steps": steps} if steps else {}
    config = defaults(load("rmu", methods), model)[1].changed(**own, **given)
    with progress_bars.Bars() as progress, explaining_memory(f"with {model} loaded whole."):
        found = adviser.advise(config, progress)
    if out is not None:
        found.save(out)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show(_advice(found))
        show(f"{found.reason}\nnext: lethe unlearn rmu --model {model} --layer auto ...")


ADVISE = Command(
    run=advise,
    examples=("lethe advise builtin", "lethe advise ./my-model --forget a.jsonl --retain r.txt --out advice.json"),
)


def _advice(found: "lethe.advice.advise.Advice") -> Table:
    """What was read at each layer, and which one is proposed."""
    columns = ("layer", "norm", "growth", "reach", "passed on", "separability", "chosen")
    table = Table(f"{found.model}: {found.tokens} tokens read in {found.seconds:.0f} s", columns, ("layer",))
    for row in found.layers:
        table.add(
            str(row.layer),
            f"{row.median_norm:.3g}",
            f"{row.growth:.2f}",
            f"{100 * row.reach:.0f} %",
            f"{row.passed_on:.2f}",
            "" if row.separability is None else f"{row.separability:.2f}",
            "chosen" if row.layer == found.chosen.layer else "",
        )
    return table


def _searched(found: "lethe.advice.layer_search.LayerSearch") -> Table:
    """Scores of each layer."""
    columns = ("layer", "refused", "wanted (s1)", "unwanted (s2)", "s1 - s2", "direction", "chosen")
    table = Table(f"steered by {found.coefficient:g} times the direction at the last prompt token", columns, ("layer",))
    for row in found.layers:
        table.add(
            str(row.layer),
            f"{100 * row.refusal_rate:.0f} %",
            f"{row.wanted:.3f}",
            f"{row.unwanted:.3f}",
            f"{row.wanted - row.unwanted:+.3f}",
            f"{row.length:.3g}",
            str(found.chosen.index(row.layer) + 1) if row.layer in found.chosen else "",
        )
    return table
