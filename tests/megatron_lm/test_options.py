"""Our options are taken out of another program's command line; what cannot run there is refused."""

import subprocess
import sys

import pytest
from models import Case, make_config

from helixpipe.megatron_lm import enable, switch
from helixpipe.megatron_lm.known_options import check_config
from helixpipe.megatron_lm.options import take_options


def test_the_rest_of_the_command_line_is_left_alone():
    words = "--lr 1e-3 --pipeline-schedule helix --num-fold 1 --load x --num-layers 4".split()
    options = take_options(words)
    assert words == "--lr 1e-3 --load x --num-layers 4".split()
    assert (options.schedule, options.plan) == ("helix", {"num_fold": 1})
    assert options.recompute_levels == "without-attention"


def test_sliced_helix_has_options_of_its_own():
    words = "--pipeline-schedule sliced-helix --resend-context --loss-chunk-size 8 --seq-length 64".split()
    options = take_options(words)
    assert words == ["--seq-length", "64"]
    assert options.plan == {"resend_context": True}
    assert (options.recompute_levels, options.loss_chunk_size) == ("without-attention", 8)


def test_without_a_schedule_nothing_is_taken():
    words = ["--pipeline-model-parallel-size", "2", "--num-layers", "4"]
    before = list(words)
    assert take_options(words) is None
    assert words == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--num-fold 2", "--num-fold needs --pipeline-schedule"),
        ("--pipeline-schedule helicks", "did you mean helix"),
        ("--pipeline-schedule zb-v --num-fold 2", "--num-fold does not apply to zb-v"),
        ("--pipeline-schedule elastic", "does not run inside Megatron-LM"),
        ("--pipeline-schedule zb-h1 --num-fold 2", "--num-fold does not apply to zb-h1"),
        ("--pipeline-schedule zb-h1 --mlp-chunk-size 8", "--mlp-chunk-size does not apply to zb-h1"),
        ("--pipeline-schedule helix --num-fold 0", "--num-fold"),
        ("--pipeline-schedule helix --num-slices 2", "--num-slices does not apply to helix"),
        ("--pipeline-schedule helix --resend-context", "--resend-context does not apply to helix"),
        ("--pipeline-schedule sliced-helix --round-order filo", "--round-order does not apply"),
        ("--pipeline-schedule 1f1b --hang-timeout-s 60", "--hang-timeout-s does not apply to 1f1b"),
        ("--pipeline-schedule interleaved --failure-dir x", "--failure-dir does not apply to interleaved"),
    ],
)
def test_what_cannot_be_is_one_line(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        take_options(text.split())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("flag", ["--hang-timeout-s 60", "--failure-dir x"])
def test_a_script_that_nobody_watches_has_no_use_for_options_of_watching(flag):
    with pytest.raises(ValueError, match=f"^{flag.split()[0]} needs .*; start the script with"):
        enable(f"--pipeline-schedule helix {flag}".split())


@pytest.mark.parametrize("version", ["0.16.0", "0.20.0", "0.20.0rc1", "1.0.0", "dev"])
def test_an_unknown_version_is_refused(monkeypatch, version):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(ValueError, match="is not known"):
        switch.check_version()


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.19.0rc2"])
def test_known_versions(monkeypatch, version):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    assert switch.check_version() == version


SCRIPT = """
import sys
print(__name__, sys.argv[1:], "torch" in sys.modules, "megatron" in sys.modules)
import beside
"""


def helix(tmp_path, *arguments):
    command = [sys.executable, "-m", "helixpipe.megatron_lm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)


def test_a_script_without_the_option_runs_as_if_it_were_alone(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("print('found')")
    finished = helix(tmp_path, "train.py", "--lr", "1")
    assert finished.stdout.splitlines() == ["__main__ ['--lr', '1'] False False", "found"]
    assert finished.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "usage: "),
        (("nothing.py",), "nothing.py is not a file"),
        (("train.py", "--pipeline-schedule", "elastic"), "does not run inside Megatron-LM"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, words):
    (tmp_path / "train.py").write_text("")
    finished = helix(tmp_path, *arguments)
    (line,) = finished.stderr.splitlines()
    assert words in line
    assert finished.returncode in (2, 3)


def test_errors_of_the_script_keep_their_traceback(tmp_path):
    (tmp_path / "train.py").write_text("raise ValueError('theirs')")
    finished = helix(tmp_path, "train.py")
    assert "Traceback" in finished.stderr
    assert finished.returncode == 1


def test_experts_are_not_known_inside_another_program():
    with pytest.raises(ValueError, match="--pipeline-schedule helix does not know num_moe_experts=4"):
        check_config(make_config(Case(pp=1, experts=4, style="llama")), "helix")
