"""Whether runs still find the same bits as at another commit: `python benchmarks/behaviour.py f7482d3`.

Both sides are run here with one thread, each in processes of its own, from a checkout of that commit and from this one;
every tensor of every patch is compared by its SHA-256. Bits depend on processor and torch, so hashes of one machine say
nothing about another: the script runs both sides instead of keeping a list.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]

RUNS = {
    "demo": "demo",
    "rmu": "unlearn rmu --model builtin --steps 40 --seed 1 --evaluate none",
    "adaptive-rmu sample norm": "unlearn adaptive-rmu --model builtin --norm sample --steps 20 --evaluate none",
    "rsv with noise on the input": "unlearn rsv --model builtin --nu 5 --noise input --steps 20 --evaluate none",
    "lunar by ridge": "unlearn lunar --model builtin --evaluate none",
    "lunar pooled": "unlearn lunar --model builtin --solver pooled --evaluate none",
    "lunar by gradient": "unlearn lunar --model builtin --solver gradient --steps 10 --evaluate none",
    "rmu by ridge": "unlearn rmu --model builtin --solver ridge --evaluate none",
    "as published": "unlearn rmu --model builtin --as-published --steps 20 --evaluate none",
    "sweep": "sweep adaptive-rmu --grid layer=4,5 beta=2,3 --steps 10 --limit 8",
}


def hashes(checkout: Path, folder: Path) -> dict[str, dict[str, str]]:
    """By run and cell, the hash of each tensor of its patch."""
    found: dict[str, dict[str, str]] = {}
    for number, (name, arguments) in enumerate(RUNS.items()):
        out = folder / str(number)
        code = "from lethe.cli import main; (main if callable(main) else main.main)()"
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-c", code, *arguments.split(), "--out", str(out)],
            env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for patch in sorted(out.rglob("patch.safetensors")):
            cell = f"{name} {patch.parent.relative_to(out)}".removesuffix(" .")
            found[cell] = {
                tensor: hashlib.sha256(value.view(-1).numpy().tobytes()).hexdigest()
                for tensor, value in load_file(patch).items()
            }
    return found


def main() -> None:
    """Print a line for each run, and exit with 1 if one differs."""
    commit = sys.argv[1] if len(sys.argv) > 1 else "f7482d3"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(["git", "worktree", "add", "--detach", folder / "old", commit], cwd=HERE, check=True)
        try:
            for side in ("then", "now"):
                (folder / side).mkdir()
            then, now = hashes(folder / "old", folder / "then"), hashes(HERE, folder / "now")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder / "old"], cwd=HERE, check=True)
    print(json.dumps(then, indent=1))
    equal = {name: then[name] == now.get(name) for name in then}
    for name, same in equal.items():
        print(f"{'same bits' if same else 'DIFFERENT'}  {name}  ({len(then[name])} tensors)")
    sys.exit(not all(equal.values()) or set(then) != set(now))


if __name__ == "__main__":
    main()
