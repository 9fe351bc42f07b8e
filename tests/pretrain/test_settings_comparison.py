"""A checkpoint is gone on from with the settings that it was made with, or with changes on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

from helixpipe.data.fingerprint import fingerprint
from helixpipe.data.prefix import inspect_prefix
from helixpipe.plan.execution import Execution
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.comparison import (
    CHANGES_NOTHING,
    changeable,
    compare_settings,
    settings_of,
)
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.parser import build_parser
from megatron.pretrain.settings.schedule import ScheduleSettings

OPTIONS = {action.dest: action for action in build_parser()._actions if action.dest != "help"}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def parse(common, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    # With all that a setting can depend on, so that every option is compared.
    line = f"{common} --eod-mask-loss --load /nowhere"
    return lambda more="": parse_arguments(f"{line} {more}".split())


def another_value(action, value):
    """One that the option might have, too."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if action.choices:
        return next(choice for choice in action.choices if choice != value)
    return Path("/elsewhere") if action.type is Path else f"other than {value}"


def with_another(settings, name):
    changed = {name: another_value(OPTIONS[name], settings.options[name])}
    return replace(settings, options={**settings.options, **changed})


def compared(saved, job, *allow_changed):
    return compare_settings(saved, settings_of(job), allow_changed, "FOLDER")


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_compared_or_changes_nothing(parse, name):
    settings = parse()
    saved, job = settings_of(settings), with_another(settings, name)
    if name in CHANGES_NOTHING:
        assert compared(saved, job) == []
        return
    if name == "train_iters":
        (change,) = compared(saved, job)
        assert change.text == "--train-iters 4 (was 3)"
        return
    with pytest.raises(DataError, match=r"^FOLDER was trained with ") as refused:
        compared(saved, job)
    flag = OPTIONS[name].option_strings[0]
    assert f"was trained with {flag} " in str(refused.value)
    assert "\n" not in str(refused.value)
    option = name.replace("_", "-")
    assert str(refused.value).endswith(f" --allow-changed {option}") == (option in changeable())
    if option in changeable():
        (change,) = compared(saved, job, option)
        assert change.text.startswith(f"{flag} ")
        assert change.text.endswith(f" (was {settings.options[name]})")
    else:
        with pytest.raises(DataError, match="give the same, or use another checkpoint"):
            compared(saved, job, option)


def test_what_changes_nothing_are_options():
    assert OPTIONS.keys() >= CHANGES_NOTHING


def test_an_option_that_the_checkpoint_does_not_know_was_at_its_default(parse):
    saved = settings_of(parse())
    del saved["seed"]
    assert compared(saved, parse()) == []
    with pytest.raises(DataError, match="--seed 1234, this job has 7"):
        compared(saved, parse("--seed 7"))


def test_a_setting_that_this_program_does_not_know_is_refused(parse):
    saved = {**settings_of(parse()), "z_loss": 0.1}
    with pytest.raises(DataError, match=r"was trained with --z-loss 0\.1, this job has None"):
        compared(saved, parse())


@pytest.mark.parametrize("decay", ["", "--lr-decay-iters 3"])
def test_learning_rates_follow_a_longer_job_only_if_they_always_did(parse, decay):
    saved = settings_of(parse(decay))
    (change,) = compared(saved, parse("--train-iters 9"))
    assert change.text == "--train-iters 9 (was 3)"
    with pytest.raises(DataError, match="--lr-decay-iters 3, this job has 5"):
        compared(saved, parse("--train-iters 9 --lr-decay-iters 5"))


def test_the_longest_position_matters_only_where_it_is_learned(parse):
    rope = "--position-embedding-type rope --max-position-embeddings"
    saved = settings_of(parse(f"{rope} 64"))
    assert compared(saved, parse(f"{rope} 128")) == []
    with pytest.raises(DataError, match="--max-position-embeddings 64, this job has 128"):
        compared(settings_of(parse("--max-position-embeddings 64")), parse("--max-position-embeddings 128"))


def test_micro_batches_matter_only_where_they_weigh_differently(parse):
    per_token = "--calculate-per-token-loss"
    assert compared(settings_of(parse(per_token)), parse(f"{per_token} --micro-batch-size 2")) == []
    with pytest.raises(DataError, match="--micro-batch-size 1, this job has 2"):
        compared(settings_of(parse()), parse("--micro-batch-size 2"))


def test_documents_are_other_samples_than_packed_text(parse):
    settings = parse()
    elastic = replace(settings, schedule=ScheduleSettings("elastic", Execution.CHUNKS, None))
    with pytest.raises(
        DataError, match=r"packed, this job has documents; .* --allow-changed pipeline-schedule$"
    ):
        compared(settings_of(settings), elastic)
    (change,) = compared(settings_of(settings), elastic, "pipeline-schedule")
    assert change.reorders


def test_a_vocabulary_of_another_size_names_its_remedy(parse):
    saved = settings_of(parse("--make-vocab-size-divisible-by 128"))
    assert compared(saved, parse("--make-vocab-size-divisible-by 192")) == []
    with pytest.raises(DataError, match="--padded-vocab-size 384, this job has 512; give the same"):
        compared(saved, parse("--make-vocab-size-divisible-by 256"))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".tokenizer.json"])
def test_data_is_known_by_its_content(parse, tmp_path, suffix):
    settings = parse()
    info = settings.data.dataset
    for other in (".bin", ".idx", ".tokenizer.json"):
        (tmp_path / f"copy{other}").write_bytes(Path(f"{info.prefix}{other}").read_bytes())
    copy = replace(settings, data=replace(settings.data, dataset=inspect_prefix(tmp_path / "copy")))
    assert compared(settings_of(settings), copy) == []
    content = bytearray((tmp_path / f"copy{suffix}").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / f"copy{suffix}").write_bytes(content)
    assert fingerprint(copy.data.dataset) != fingerprint(info)
    with pytest.raises(DataError, match=r"the data of hash .*, or change it on purpose with .* data-path$"):
        compared(settings_of(settings), copy)


@pytest.fixture(scope="module")
def resumed(common, tmp_path_factory):
    """Three iterations, and what becomes of jobs that go on from them."""
    saved = tmp_path_factory.mktemp("saved")
    cases = ["", "--seed 99", "--seed 99 --allow-changed seed", "--global-batch-size 8",
             "--global-batch-size 8 --allow-changed global-batch-size", "--train-iters 2"]  # fmt: skip
    line = f"--lr-decay-style constant --load {saved} --train-iters 4"
    jobs = [(f"--lr-decay-style constant --save {saved}", Fault())]
    (outcomes,) = run_on_ranks(
        1, run_cases, [*jobs, *((f"{line} {case}", Fault()) for case in cases)], 1, 1, common
    )
    assert [outcome["code"] for outcome in outcomes] == [0, 0, 3, 0, 3, 0, 0]
    return dict(zip(cases, outcomes[1:], strict=True))


def test_changes_are_said(resumed):
    assert any("changed since then: --train-iters 4 (was 3)" in line for line in resumed[""]["lines"])
    assert "--allow-changed seed" in resumed["--seed 99"]["error"]
    lines = resumed["--seed 99 --allow-changed seed"]["lines"]
    assert any("--seed 99 (was 1234)" in line for line in lines)
    assert "at sample 0 of another order than that of the first samples" in lines


def test_samples_are_counted(resumed):
    def consumed(case):
        return next(line for line in resumed[case]["lines"] if "iteration 4/4" in line).split(" | ")[1]

    assert consumed("") == "consumed samples: 16"
    assert consumed("--global-batch-size 8 --allow-changed global-batch-size") == "consumed samples: 20"


def test_a_job_that_is_done_says_so(resumed):
    lines = resumed["--train-iters 2"]["lines"]
    assert "nothing to train: --train-iters 2 is reached; give more to go on" in lines
