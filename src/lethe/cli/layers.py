"""Commands that say which layer to steer: by reading the model (`advise`), or by steering each one (`layers`)."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lethe.cli import progress_bars, tables
from lethe.cli.console import NOTES, RESULT, Json, print_json
from lethe.data.settings import BUILTIN


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
    from lethe.methods.lunar import LUNAR
    from lethe.runs.defaults import defaults
    from lethe.system import machine

    config = defaults(LUNAR, model)[1].changed(
        forget=forget, retain=retain, reference=reference, refusals=refusals, encoder=encoder, device=device,
        dtype=dtype,
    )  # fmt: skip
    with progress_bars.Bars(NOTES) as progress, machine.explaining_memory(f"with {model} loaded whole."):
        found = search_run(config, coefficient=steering_coeff, top=top, progress=progress)
    found.save(out)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        RESULT.print(tables.layer_search(found))
        RESULT.print(f"next: lethe unlearn lunar --model {model} --layers-from {out} ...")


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
    from lethe.methods.rmu import RMU
    from lethe.runs.config import GRADIENT
    from lethe.runs.defaults import defaults
    from lethe.system.machine import explaining_memory

    given = {"forget": forget, "retain": retain, "seed": seed, "device": device, "dtype": dtype}
    own = {"steps": steps} if steps else {}
    config = defaults(RMU, model, solver=GRADIENT)[1].changed(**own, **given)
    with progress_bars.Bars(NOTES) as progress, explaining_memory(f"with {model} loaded whole."):
        found = adviser.advise(config, progress)
    if out is not None:
        found.save(out)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        RESULT.print(tables.advice(found))
        RESULT.print(f"{found.reason}\nnext: lethe unlearn rmu --model {model} --layer auto ...")
