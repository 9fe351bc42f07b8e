"""What people read: links lead somewhere, and every command on every page is one that works.

Commands of the planner run as they stand, in the order of their page. Those that train or measure are parsed
by their own programs here, and run, shortened, in the slow test.
"""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from scripts import load_script

from helixpipe.__main__ import build_parser as planning_parser
from helixpipe.__main__ import main as helixpipe
from helixpipe.commands import prepare_program
from helixpipe.megatron_lm.options import take_options
from megatron.pretrain.settings.parser import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Read, simulate and draw only: they run in this process.
PLANNING = ("advise", "plan", "costs", "simulate", "draw")
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(page):
    """Every command of a page's bash blocks, as words; environment assignments are left out."""
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and not line.lstrip().startswith("#SBATCH"):
                yield words


def every_command():
    return [
        pytest.param(page, words, id=f"{page.stem}-{number}-{words[0]}")
        for page in PAGES
        for number, words in enumerate(commands_of(page))
    ]


def links_of(page):
    """What a page's links and pictures lead to in the checkout."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in links_of(page):
        assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_commands_and_links_are_found(capsys):
    commands = sum(len(list(commands_of(page))) for page in PAGES)
    links = sum(len(list(links_of(page))) for page in PAGES)
    with capsys.disabled():
        print(f" {commands} commands and {links} links on {len(PAGES)} pages are checked ", end="")
    assert min(commands, links) > len(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short(page):
    """A page has one idea; the README fits on two screens."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (120 if page.stem == "README" else 199)


@pytest.mark.parametrize(("page", "words"), every_command())
def test_every_command_is_one_that_its_program_takes(page, words):
    check_command(words)


def check_command(words):
    """Fail for a flag, a file or a target that does not exist."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "helixpipe":
        check_planning(words[1:])
    elif words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word in ("pretrain_gpt.py", "-m"))
        if words[start : start + 2] == ["-m", "helixpipe.megatron_lm"]:
            assert take_options(words[start + 3 :]) is not None
        elif words[start] == "-m":
            assert words[start + 1] == "helixpipe"
            check_planning(words[start + 2 :])
        else:
            check_training(words[start + 1 :])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).exists(), f"there is no {script}"
        if words[-1] == "..." and "pretrain_gpt.py" in words:
            check_training(words[words.index("pretrain_gpt.py") + 1 :])
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).exists(), f"there is no {words[1]}"
        if words[0] == "python":
            load_script(ROOT / words[1]).build_parser().parse_args(words[2:])
    else:
        assert words[:2] == ["pip", "install"], f"no test knows how to check {words[0]}"


def check_planning(words):
    if words[:1] == ["train"]:
        check_training(planning_parser().parse_known_args(words)[1])
    elif words[:1] == ["prepare"]:
        prepare_program.build_parser().parse_args(words[1:])
    else:
        planning_parser().parse_args(words)


def check_training(words):
    """Three dots stand for the arguments of another command of the page."""
    parser = build_parser()
    if not {"…", "..."} & set(words):
        parser.parse_args(words)
        return
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= known


def test_a_flag_that_does_not_exist_is_noticed(capsys):
    with pytest.raises(ValueError, match="--sequence-length"):
        check_command(shlex.split("helixpipe draw --plan plan.json --sequence-length 1"))
    with pytest.raises(AssertionError):
        check_command(shlex.split("torchrun pretrain_gpt.py … --save-every 3"))
    with pytest.raises(SystemExit):
        check_command(
            shlex.split("python tools/prepare_data.py --input docs --output-prefix a --vocab-sise 9")
        )
    assert "did you mean --vocab-size?" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="no test knows"):
        check_command(["curl", "somewhere"])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which relative paths of the pages mean what they mean in a checkout."""
    for name in ("docs", "examples", "tools", "pretrain_gpt.py", "helixpipe", "megatron"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Their advice takes seconds. That of planning.md, which runs always, is README's.
ADVISING = ("README", "sliced")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in ADVISING), id=page.stem) for page in PAGES],
)
def test_the_planners_commands_run_in_order(page, checkout, capsys):
    """Those that need a measured file, which the slow test makes, are left to it."""
    for words in commands_of(page):
        if words[0] == "helixpipe" and words[1] in PLANNING and inputs_exist(words, checkout):
            assert helixpipe(words[1:]) == 0, (words, capsys.readouterr().err)


def inputs_exist(words, folder):
    """True if every file that the command reads is there."""
    flags = ("--plan", "--costs", "--timeline", "--trace", "--hardware", "--model")
    read = [value for flag, value in pairwise(words) if flag in flags]
    return all((folder / value).exists() for value in read if "." in value or "/" in value)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["README", "training", "planning"])
def test_training_commands_run_shortened(name, checkout):
    """Real processes on the page's own sizes; only the number of iterations is cut."""
    page = next(page for page in PAGES if page.stem == name)
    ran = 0
    for words in commands_of(page):
        if words[0] == "torchrun" and not {"…", "..."} & set(words):
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            if "--train-iters" in words:
                words[words.index("--train-iters") + 1] = "2"
        elif words[0] == "python":
            words = [sys.executable, *words[1:]]
        else:
            continue
        finished = run(words, checkout)
        assert finished.returncode == 0, finished.stderr[-2000:]
        ran += 1
    assert ran


def run(words, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words[1:]] if words[0] == "python" else words
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
