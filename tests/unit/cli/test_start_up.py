"""The command line answers at once: help and lists import nothing heavy, and TAB completes names and flags."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lethe.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "scipy", "matplotlib", "jinja2", "yaml", "safetensors", "jaxtyping")
QUICK = (
    "--help", "--version", "nonsense", "ls", "ls methods", "ls metrics", "ls analyses --json", "ls suites",
    "ls solvers", "ls optimizers", "unlearn rmu --help", "unlearn adaptive-rmu --model ./mine -h", "unlearn rnu",
    "sweep lunar --help", "analyze layers --help", "analyze all --help", "data check --help", "data rank --help",
)  # fmt: skip


def in_a_process_of_its_own(commands: list[str]) -> None:
    """Run commands one after the other in one new process, and require that none imported anything heavy."""
    code = f"""
import contextlib, io, sys
from lethe.cli.main import main
for command in {commands}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(command.split())
        except SystemExit as end:
            pass
    assert out.getvalue() or "there is no" in err.getvalue(), (command, err.getvalue())
    heavy = sorted(set({HEAVY}) & sys.modules.keys())
    assert not heavy, f"lethe {{command}} imports {{', '.join(heavy)}}"
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("commands", [[f"{name} --help" for name in COMMANDS], QUICK], ids=["help of each", "others"])
def test_help_and_lists_import_nothing_heavy(commands: list[str]) -> None:
    in_a_process_of_its_own(list(commands))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lethe completion bash` prints."""
    ended = subprocess.run(
        [sys.executable, "-m", "lethe.cli.main", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path = tmp_path_factory.mktemp("completion") / "lethe"
    path.write_text(ended.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lethe unl", {"unlearn"}),
        ("lethe unlearn a", {"adaptive-rmu"}),
        ("lethe unlearn ", {"adaptive-rmu", "finetune", "grad-diff", "lunar", "rmu", "rsv"}),
        ("lethe unlearn rmu --steering", {"--steering-coeff"}),
        ("lethe unlearn rmu --batch", {"--batch-size"}),
        ("lethe analyze al", {"alignment", "all"}),
        ("lethe data ", {"check", "rank"}),
        ("lethe eval --forget-q", {"--forget-questions"}),
        ("lethe sweep rsv --hal", {"--halving"}),
    ],
)
def test_bash_completes(line: str, offered: set[str], script: Path) -> None:
    words = line.split(" ")
    typed = " ".join(f"'{word}'" for word in words)
    code = f"""
source {script}
complete -p lethe >/dev/null || exit 3
function=$(complete -p lethe | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}
$function
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    ended = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert offered <= set(ended.stdout.split()), ended.stdout
    if words[-1]:
        assert all(word.startswith(words[-1]) for word in ended.stdout.split())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lethe.cli.main", "completion", shell], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for word in ("unlearn", "adaptive-rmu", "steering-coeff", "forget-questions"):
        assert word in ended.stdout
