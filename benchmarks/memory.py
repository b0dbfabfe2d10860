"""Peak memory of unlearning a 7B-shaped model on a CPU: loading layers 0..7, the check, two steps of RMU."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from lethe import RMU, Batch, Gradient, LayerSlice, load_model
from lethe.data.batches import Schedule
from lethe.model.layers import trainable_names
from lethe.types import Topic

LAYER = 7
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
)
TARGET_GB = 8.0
Result = TypeVar("Result")


def peak_mb() -> float:
    """Highest resident memory of this process so far; mapped pages of files count while they are resident.

    Not ru_maxrss: a child process starts with its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def forget_peak() -> None:
    """Start `peak_mb` anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def random_batch(vocabulary: int, rows: int, tokens: int, *, seed: int) -> Batch:
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), mask=torch.ones_like(ids).bool())


def random_schedule(vocabulary: int, rows: int, tokens: int, *, steps: int, distinct: int) -> Schedule:
    """`distinct` pairs of batches, in turn."""
    forget, retain = (
        [random_batch(vocabulary, rows, tokens, seed=seed + side) for seed in range(0, 2 * distinct, 2)]
        for side in (0, 1)
    )
    topic = Topic(name="random", batches=tuple(forget[step % distinct] for step in range(steps)))
    return Schedule(topics=(topic,), retain=tuple(retain[step % distinct] for step in range(steps)), steps=steps)


def write_model(folder: Path) -> None:
    """A checkpoint of all 32 layers, one shard a layer; layers 8..31 are sparse files: only their headers are real."""
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(CONFIG).state_dict().items()}
    shard = {
        name: f"layer-{name.split('.')[2]}.safetensors" if ".layers." in name else "ends.safetensors" for name in shapes
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    rng = torch.Generator().manual_seed(0)
    read = {"ends.safetensors", *(f"layer-{layer}.safetensors" for layer in range(LAYER + 1))}
    for file in sorted(set(shard.values())):
        header, size = {}, 0
        for name in (name for name in shapes if shard[name] == file):
            end = size + 2 * shapes[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [size, end]}
            size = end
        start = json.dumps(header).encode()
        start += b" " * (-len(start) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(start).to_bytes(8, "little") + start)
            for name in header if file in read else ():
                values = torch.ones(shapes[name], dtype=torch.bfloat16)
                if "norm" not in name:
                    values.normal_(std=0.02, generator=rng)
                out.write(values.view(torch.uint8).numpy().data)
            out.truncate(8 + len(start) + size)


def main(rows: int = 1, tokens: int = 128, threads: int = 2) -> None:
    """Print the peak of each phase, above what the process holds after its imports."""
    torch.set_num_threads(threads)
    held, highest = peak_mb(), 0.0
    folder = Path(tempfile.mkdtemp())
    if shutil.disk_usage(folder).free < 5e9:
        raise SystemExit(f"{folder} has less than the 5 GB that the weights take; set TMPDIR to a larger disk.")

    def phase(name: str, work: Callable[[], Result]) -> Result:
        nonlocal highest
        forget_peak()
        started = time.perf_counter()
        result = work()
        peak = (peak_mb() - held) / 1e3
        highest = max(highest, peak)
        print(f"{name:24} {peak:5.2f} GB {time.perf_counter() - started:7.1f} s", flush=True)
        return result

    try:
        write_model(folder)
        model = phase(f"load layers 0..{LAYER} of 32", lambda: load_model(folder, layers=LAYER + 1))
        train = [name for layer in range(LAYER - 2, LAYER + 1) for name in trainable_names(model, layer)]
        layers = phase("slice", lambda: LayerSlice(model, LAYER - 2, LAYER + 1, tuple(train)))
        phase("check", lambda: layers.check(random_batch(CONFIG.vocab_size, rows, tokens, seed=9)))
        plan = random_schedule(CONFIG.vocab_size, rows, tokens, steps=2, distinct=2)
        phase("2 steps", lambda: Gradient().train(layers, RMU(), plan, torch.Generator().manual_seed(0)))
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    finally:
        shutil.rmtree(folder)
    whole = CONFIG.num_hidden_layers * sum(p.numel() for p in layers.layers[0].parameters())
    whole += 2 * CONFIG.vocab_size * CONFIG.hidden_size
    print(
        f"of it loaded weights {weights:.2f} GB; two full copies of the model: {4 * whole / 1e9:.1f} GB by arithmetic"
    )
    print(
        f"peak: {highest:.2f} GB, target {TARGET_GB:g} GB, ratio to two full copies 1/{4 * whole / 1e9 / highest:.1f}"
    )


if __name__ == "__main__":
    tyro.cli(main)
