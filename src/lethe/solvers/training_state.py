"""Everything needed to go on with an interrupted training, as one safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lethe.errors import RunFolderError
from lethe.system import tensor_file
from lethe.types import State


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after `step` steps. Saving and loading it changes no later bit of the run."""

    step: int
    tensors: dict[str, Tensor]
    """Master weights and optimizer moments, by name."""
    states: dict[str, State]
    """What the method found, by topic."""
    rng: torch.Generator

    def save(self, path: Path) -> None:
        """Write atomically: to a temporary name, then renamed.

        Raises: SaveError if the disk is full or the folder cannot be written.
        """
        tensors = {f"tensor/{name}": tensor for name, tensor in self.tensors.items()}
        for topic, state in self.states.items():
            # A topic may be named by a path, so the key's parts are joined by a sign that no path has.
            tensors |= {f"state\t{topic}\t{key}": value for key, value in state.items()}
        tensors["rng"] = self.rng.get_state()
        # A topic of which a method keeps nothing was prepared all the same, and is not prepared again.
        tensor_file.save(path, tensors, {"step": self.step, "topics": list(self.states)})

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read what `save` wrote.

        Raises: RunFolderError if the file is damaged.
        """

        def damaged(reason: str) -> RunFolderError:
            fix = "Delete it to start the run from its first step."
            return RunFolderError(f"the checkpoint {path} is damaged: {reason}.\n{fix}")

        with tensor_file.reading(path, damaged) as (everything, header):
            rng = torch.Generator()
            rng.set_state(everything.pop("rng"))
            states: dict[str, State] = {topic: {} for topic in header.get("topics", ())}
            tensors = {}
            for key, value in everything.items():
                if key.startswith("state\t"):
                    _, topic, name = key.split("\t")
                    states.setdefault(topic, {})[name] = value
                else:
                    tensors[key.removeprefix("tensor/")] = value
            return cls(step=header["step"], tensors=tensors, states=states, rng=rng)
