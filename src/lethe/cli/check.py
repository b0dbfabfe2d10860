"""The command `lethe check`: proves the replay on a model before anything is trained."""

from collections.abc import Mapping
from typing import Any

from tyro.conf import Positional

from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.tables import Table, short
from lethe.runs.config import RunConfig


def check(
    model: Positional[str],
    layer: int = 7,
    train_modules: tuple[str, ...] = (),
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Prove that replaying the slice of this model equals its own forward, and say what would be trained.

    Args:
        model: `builtin`, a model folder or a hub id.
        layer: Layer l whose output is steered.
        train_modules: Matrices to train; by default the MLP output matrices.
        device: cpu, cuda, mps or auto.
    """
    from lethe.runs.check import check as check_model
    from lethe.system.machine import explaining_memory

    settings = RunConfig.of(model=model, layer=layer, train_modules=train_modules, device=device)
    with explaining_memory(f"with layers 0..{layer}.\nLower --layer."):
        facts = check_model(settings)
    if as_json:
        print_json(facts)
    else:
        show(table(f"{model}: replaying the slice equals the model's own forward.", facts))


CHECK = Command(run=check, examples=("lethe check builtin --layer 5", "lethe check ./my-model --layer 7"))


def table(title: str, facts: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(title, ("what", "value"))
    for name, value in facts.items():
        lines = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, entry in lines:
            table.add(name, f"{key} {short(entry)}".strip())
    return table
