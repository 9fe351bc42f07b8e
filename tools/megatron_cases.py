"""Whether this program takes command lines of Megatron's: a table, one line each.

    python tools/megatron_cases.py CASES.json [--set NAME=VALUE …]

The file holds groups of cases by name, each with values by flag; true and null are flags without a value.
Nothing is trained: a line is accepted if everything that needs neither data nor GPUs is found to fit.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import RANKS  # noqa: E402
from helixpipe.data.prefix import DatasetInfo  # noqa: E402
from helixpipe.json_input import read_json  # noqa: E402
from helixpipe.layers.optional_packages import TRANSFORMER_ENGINE, why_not_usable  # noqa: E402
from helixpipe.plan.build import find_schedule  # noqa: E402
from helixpipe.plan.execution import Execution  # noqa: E402
from megatron.pretrain.settings.arguments import parse_arguments  # noqa: E402
from megatron.pretrain.settings.megatron_flags import REFUSED  # noqa: E402
from megatron.pretrain.settings.schedule import DEFAULT_WITH_VIRTUAL_STAGES  # noqa: E402

Case = Mapping[str, Any]

# GPT-2's, where a line does not say it.
_DATA = DatasetInfo("", 50257, eod=0, num_documents=10**6, num_tokens=2**40, longest_document=2**20)
_PATHS = ("--data-path", "--data-cache-path", "--save", "--load", "--tensorboard-dir")
_STAGES = "--num-layers-per-virtual-pipeline-stage"
_REFUSED = frozenset(f"--{name}" for names in REFUSED.values() for name in names.split())


class Verdict(NamedTuple):
    """What became of a line under one schedule.

    Attributes:
        refused: flags that are not supported, with their values.
        problem: what else does not fit; empty if nothing.
        changes: what was added or left out for it to fit.
    """

    refused: tuple[str, ...]
    problem: str
    changes: tuple[str, ...] = ()

    @property
    def is_accepted(self) -> bool:
        """True if the line can be trained with."""
        return not (self.refused or self.problem)

    def text(self) -> str:
        """For a cell of the table."""
        if self.refused:
            return f"refused: {', '.join(f'`{flag}`' for flag in self.refused)}"
        if self.problem:
            return f"refused: {self.problem}"
        return ", ".join(("accepted", *self.changes))


def judge(case: Case, ranks: int, schedule: str) -> Verdict:
    """Parse a line under a schedule; flags that are refused are left out one by one, and counted."""
    words_of = {flag: _words(flag, value) for flag, value in case.items()}
    words_of["--pipeline-schedule"] = ["--pipeline-schedule", schedule]
    changes: tuple[str, ...] = ()
    if _STAGES in words_of and find_schedule(schedule).execution is Execution.MEGATRON:
        words_of["--pipeline-schedule"][1] = DEFAULT_WITH_VIRTUAL_STAGES
    elif _STAGES in words_of:
        del words_of[_STAGES]
        changes = (f"without `{_STAGES}`",)
    refused: list[str] = []
    while True:
        problem = _problem(words_of, ranks)
        flag = re.match(r"--[a-z0-9_-]+", problem)
        if flag is not None and flag[0] in _REFUSED and flag[0] in words_of:
            refused.append(" ".join(words_of.pop(flag[0])[:2]))
        elif "--num-fold 1" in problem and "--num-fold" not in words_of:
            words_of["--num-fold"] = ["--num-fold", "1"]
            changes = (*changes, "with `--num-fold 1`")
        else:
            return Verdict(tuple(refused), problem, changes)


def _problem(words_of: Mapping[str, Sequence[str]], ranks: int) -> str:
    """Why the line cannot be trained with; empty if it can."""
    os.environ.update(WORLD_SIZE=str(ranks), RANK="0")
    try:
        parse_arguments([word for words in words_of.values() for word in words], _DATA, makes_folders=False)
    except ValueError as error:
        return str(error)
    return ""


def _words(flag: str, value: Any) -> list[str]:
    """A flag as on the command line; of what only other machines have, what stands for it here."""
    if value is True or (value is None and flag not in _PATHS):
        return [flag]
    if flag in _PATHS:
        return [flag, "elsewhere"]
    text = str(value).strip("'")
    if flag == "--transformer-impl" and text == TRANSFORMER_ENGINE and why_not_usable(TRANSFORMER_ENGINE):
        text = "local"
    return [flag, *text.split()]


def table(cases: Mapping[str, Case], ranks: int) -> str:
    """Markdown: a row for each case, and the sums."""
    lines = ["| command line | ranks | flags | 1F1B | helix |", "|---|---|---|---|---|"]
    found = {
        name: [judge(case, ranks, schedule) for schedule in ("1f1b", "helix")] for name, case in cases.items()
    }
    for name, (plain, helix) in found.items():
        under_helix = "the same" if helix.refused and helix.refused == plain.refused else helix.text()
        lines.append(f"| {name} | {ranks} | {len(cases[name])} | {plain.text()} | {under_helix} |")
    accepted = [sum(verdicts[i].is_accepted for verdicts in found.values()) for i in range(2)]
    refused = sum(len(plain.refused) for plain, _ in found.values())
    lines.append(f"| **{len(found)} lines** | | | **{accepted[0]} accepted** | **{accepted[1]} accepted** |")
    flags = sum(len(case) for case in cases.values())
    return "\n".join([*lines, "", f"{refused} of {flags} flags are refused."])


def read_cases(path: Path, variables: Mapping[str, str]) -> dict[str, Case]:
    """The cases of a file, with the variables in their values replaced.

    Raises:
        ValueError: no such file, or one of another form.
    """
    try:
        groups = read_json(path, "cases")
        found = {name: dict(case) for group in groups.values() if isinstance(group, dict)
                 for name, case in group.items()}  # fmt: skip
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no cases ({error}); see --help") from None
    for case in found.values():
        for flag, value in case.items():
            name = str(value).strip("${}'")
            case[flag] = variables.get(name, value)
    return found


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="megatron_cases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path, metavar="CASES.json")
    parser.add_argument("--ranks", type=RANKS, default=8, help="that every line is started with (default 8)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="variables in the lines, as scripts set them",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = build_parser().parse_args(arguments)
    variables = dict(assignment.partition("=")[::2] for assignment in options.set)
    try:
        cases = read_cases(options.cases, variables)
    except ValueError as error:
        print(f"megatron_cases: error: {error}", file=sys.stderr)
        return 2
    print(table(cases, options.ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
