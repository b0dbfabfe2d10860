"""What the README tells people to type works, in the order it tells it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lethe.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lethe.evaluation.eval_sets.TEXTS", 8)
    ours = [command[1:] for command in COMMANDS if command[0] == "lethe"]
    assert len(ours) >= 8
    for command in ours:
        # The demo trains as it does for everybody; the other runs are cut short, they only have to work.
        few = ["--steps", "4", "--limit", "4"] if command[0] in ("unlearn", "sweep") else []
        few = few[2:] if command[1:2] == ["lunar"] else few  # solved in closed form, without steps
        few = ["--limit", "4"] if command[0] == "eval" else few
        with pytest.raises(SystemExit) as end:
            main([*command, *few])
        assert end.value.code == 0, command
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 50_000
    assert "multiple_choice" in capsys.readouterr().out
    edited, again = tmp_path / "edited-model", tmp_path / "model-again"
    assert (edited / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_make_has_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M)


def test_the_python_runs(tmp_path: Path):
    assert len(PYTHON) == 2
    out = python(PYTHON[0].replace("steps=100", "steps=4, limit=4"), tmp_path)
    assert re.search(r"multiple_choice/forget: \d\.\d\d -> \d\.\d\d \+- \d\.\d\d \(n = 4\)", out)


def test_the_method_of_the_readme_runs(tmp_path: Path):
    python(
        PYTHON[1]
        + "from pathlib import Path\n"
        + "settings = {'steps': 4, 'lr': 1e-2, 'evaluate': 'none', 'threads': 1, 'out': Path('run')}\n"
        + "config = lethe.RunConfig.of(model='builtin', **settings)\n"
        + "history = lethe.unlearn(Shrink(alpha=1), config).history\n"
        + "first, last = (row.measures['forget_norm_mean'] for row in (history[0], history[-1]))\n"
        + "assert last < first, history\n",
        tmp_path,
    )


def python(code: str, folder: Path) -> str:
    """Run code as a user would: in a process without the type checks of this test run."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    # On busy cores threads that wait for each other take minutes for seconds of work.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=one_thread, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_generated_index_is_up_to_date():
    subprocess.run([sys.executable, str(ROOT / "docs/make_index.py"), "--check"], check=True, timeout=120)
