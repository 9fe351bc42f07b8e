"""Whatever is wrong with a JSON text that a user hands in, one line says so."""

import pytest

from helixpipe.elastic.costs.costs_file import costs_from_json
from helixpipe.elastic.costs.fit import measurements_from_json
from helixpipe.elastic.recipe import Recipe
from helixpipe.json_input import parse_object, read_json
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.advise import read_machine
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.simulation.timeline import Timeline

PLAN = build_plan("1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2))


def read_hardware(text, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(text)
    return read_machine(str(path))


READERS = {
    "not a plan": Plan.from_json,
    "not a timeline": Timeline.from_json,
    "not a recipe": Recipe.from_json,
    "costs": costs_from_json,
    "measurements": measurements_from_json,
    "costs of a plan": lambda text: parse_costs(text, PLAN),
}
TEXTS = {"nothing": "", "cut": '{"a": ', "deep": "[" * 100_000, "a long number": "1" * 5000, "a word": "NaNs"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("what", READERS)
def test_no_json_is_refused_in_one_line(what, text):
    with pytest.raises(ValueError, match=f"^{what.partition(' of ')[0]}: invalid JSON") as caught:
        READERS[what](text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file_of_hardware_is_named(text, tmp_path):
    with pytest.raises(ValueError, match=r"^hardware .*machine.json: invalid JSON"):
        read_hardware(text, tmp_path)


def test_an_object_is_asked_for():
    with pytest.raises(ValueError, match=r"^costs: expected a JSON object, found \[1\]"):
        parse_object("[1]", "costs")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"^hardware .*file: not a text file"):
        read_json(tmp_path / "file", "hardware")
