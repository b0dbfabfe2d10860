"""How long the command line takes to answer, beside importing what it is made of: medians, both sides in one run.

python benchmarks/start_up.py [REPEATS]
"""

import statistics
import subprocess
import sys
import time

BASE = ["-c", "import tyro, rich"]
COMMANDS = (
    "--help",
    "ls methods",
    "ls metrics",
    "unlearn --help",
    "unlearn rmu --help",
    "sweep rmu --help",
    "eval --help",
)
MOST = 3.0
"""How many times the imports' time `lethe --help` and `lethe unlearn rmu --help` may take."""


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(repeats: int = 15) -> None:
    sides = {"import tyro, rich": BASE} | {
        f"lethe {command}": ["-m", "lethe.cli.main", *command.split()] for command in COMMANDS
    }
    # In turn, so that a busy moment of the machine meets both sides; the first round only warms the disk.
    rounds = [{name: seconds(arguments) for name, arguments in sides.items()} for _ in range(repeats + 1)][1:]
    medians = {name: statistics.median(one[name] for one in rounds) for name in sides}
    base = medians["import tyro, rich"]
    for name, median in medians.items():
        print(f"{name:26} {1000 * median:7.0f} ms   {median / base:5.2f} x")
    slow = [name for name in ("lethe --help", "lethe unlearn rmu --help") if medians[name] > MOST * base]
    if slow:
        sys.exit(f"more than {MOST:g} times the imports: {', '.join(slow)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
