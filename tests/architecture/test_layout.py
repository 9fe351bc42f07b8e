"""The layout shows the design: which room may use which, no circles, nothing too long or written twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache

import pytest
from sources import PACKAGES, PROGRAMS, parsed, relative, sources

# Every arrow that there may be between rooms; whatever is not here is an import in the wrong direction.
ARROWS = {
    "contact_points": (),
    "refusals": (),
    "json_input": (),
    "gradient_edges": (),
    "reliability": (),
    "plan": ("json_input",),
    "command_line": ("data", "reliability", "refusals"),
    "data": ("reliability", "refusals", "json_input"),
    "elastic": ("plan", "json_input"),
    "report": ("plan", "elastic", "data", "json_input"),
    "kernels": ("command_line",),
    "runtime": ("plan", "elastic", "kernels", "reliability", "gradient_edges"),
    "layers": ("plan", "elastic", "kernels", "contact_points", "refusals", "gradient_edges"),
    "megatron_adapter": (
        "plan", "elastic", "runtime", "layers", "reliability", "contact_points", "refusals",
    ),
    # Helix inside Megatron-LM's training program.
    "megatron_lm": (
        "plan", "layers", "megatron_adapter", "reliability", "contact_points", "refusals",
        "command_line",
    ),
    "profiling": ("plan", "elastic", "runtime", "layers", "megatron_adapter"),
    "preflight": ("plan", "runtime", "reliability", "json_input"),
    # This fork's own training program.
    "pretrain": (
        "plan", "elastic", "runtime", "layers", "kernels", "megatron_adapter", "data", "reliability",
        "contact_points", "refusals", "command_line", "json_input",
    ),
    # The subcommands of `helixpipe`; preflight looks at a job before it trains, with the job's own parser.
    "commands": (
        "plan", "elastic", "report", "data", "runtime", "profiling", "preflight", "reliability", "refusals",
        "command_line", "pretrain", "json_input",
    ),
}  # fmt: skip
# How options are read, which other programs share with the subcommands.
COMMAND_LINE = (
    "helixpipe.commands.parser", "helixpipe.commands.ranges", "helixpipe.commands.tokenizer_arguments",
)  # fmt: skip
# Planning, drawing and advising need no more than the base install.
WITHOUT_TORCH = ("plan", "elastic", "report", "data", "reliability", "command_line", "refusals", "json_input")
# Through Megatron's own builder of indexed datasets.
WRITES_DATASETS = "helixpipe.data.prepare"

MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_FILE = 500
MOST_SHARED_LINES = 12


@cache
def modules():
    """Modules of the packages by name, with their trees."""
    return {
        relative(path)[: -len(".py")].replace("/", ".").removesuffix(".__init__"): parsed(path)
        for path in sources(*PACKAGES)
    }


def imports_of(tree, known):
    """Names of the known modules that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


def room_of(module):
    if module in COMMAND_LINE:
        return "command_line"
    return (
        "pretrain" if module.startswith("megatron.pretrain") else module.partition(".")[2].partition(".")[0]
    )


def test_rooms_use_only_the_rooms_below_them():
    wrong = sorted(
        f"{module} imports {found}"
        for module, tree in modules().items()
        for found in imports_of(tree, modules())
        if room_of(module) not in ("", "__main__") and room_of(found)
        if room_of(found) != room_of(module) and room_of(found) not in ARROWS[room_of(module)]
    )
    assert wrong == []


def test_every_arrow_is_used():
    used = {
        (room_of(module), room_of(found))
        for module, tree in modules().items()
        for found in imports_of(tree, modules())
    }
    assert {(room, below) for room, rooms in ARROWS.items() for below in rooms} - used == set()


def circle_in(arrows):
    """One circle of a graph, as the names along it; empty if there is none."""
    state = {}

    def visit(node, path):
        state[node] = "open"
        for following in arrows[node]:
            if state.get(following) == "open":
                return [*path[path.index(following) :], following] if following in path else [node, following]
            if following not in state and (found := visit(following, [*path, following])):
                return found
        state[node] = "done"
        return []

    for node in arrows:
        if node not in state and (found := visit(node, [node])):
            return found
    return []


def test_no_circle_among_rooms_or_modules():
    assert circle_in(ARROWS) == []
    assert (
        circle_in({name: set(imports_of(tree, modules())) - {name} for name, tree in modules().items()}) == []
    )
    assert circle_in({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_of_the_base_install_do_not_import_torch(room):
    wrong = [
        f"{module}: {name}"
        for module, tree in modules().items()
        if room_of(module) == room and not module.startswith(WRITES_DATASETS)
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
        if name.partition(".")[0] == "torch" or name.startswith("megatron.core")
    ]  # fmt: skip
    assert wrong == []


def test_no_function_and_no_file_is_too_long():
    wrong = []
    for path in sources(*PACKAGES, *PROGRAMS):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            wrong.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(f"{relative(path)}: {node.name} has {length} lines")
    assert wrong == []


def code_lines(path):
    """(number, text) of the lines that are code: no blanks, comments, docstrings or imports."""
    left_out = set()
    for node in ast.walk(parsed(path)):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#") and number not in left_out:
            yield number, text


def shared_runs(paths, length):
    """Places where the same ``length`` lines of code stand twice."""
    seen = defaultdict(list)
    for path in paths:
        lines = list(code_lines(path))
        for first in range(len(lines) - length + 1):
            run = tuple(text for _, text in lines[first : first + length])
            seen[run].append(f"{relative(path)}:{lines[first][0]}")
    return sorted(places for places in seen.values() if len(places) > 1)


def test_no_two_places_share_code():
    found = shared_runs(sources(*PACKAGES, *PROGRAMS), MOST_SHARED_LINES + 1)
    assert found == []


def test_shared_code_is_noticed():
    """Shorter runs do stand twice: the search is not blind."""
    assert shared_runs(sources(*PACKAGES), 6)


# Messages and records of our own processes, which no user has written.
OWN_MESSAGES = {
    "helixpipe.json_input", "helixpipe.reliability.sentinel", "helixpipe.reliability.wire",
    "helixpipe.megatron_adapter.watching", "megatron.pretrain.health.agreement",
}  # fmt: skip


def test_json_files_are_read_in_one_place():
    found = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("loads", "load")
        and ast.unparse(node)[:5] == "json."
    }
    assert found == OWN_MESSAGES


def is_search_path(node):
    return isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node) == "sys.path"


# What stands for packages that are, or are not, installed changes where modules come from.
STANDS_FOR_INSTALLED = {"tests/support/stand_ins/__init__.py"}


def test_tests_find_each_other_by_pytests_settings():
    """Not by changes of sys.path; no two files have one name, and nothing is taken from a conftest."""
    paths = sources("tests")
    names = [path.name for path in paths if "stand_ins" not in path.parts and path.name != "conftest.py"]
    assert len(names) == len(set(names))
    tricks = {
        relative(path)
        for path in paths
        if re.search(r"sys\.path|conftest", path.read_text(encoding="utf-8"))
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.ImportFrom) and node.module == "conftest")
        or (
            isinstance(node, ast.Attribute)
            and node.attr in ("insert", "append")
            and is_search_path(node.value)
        )
        or (isinstance(node, ast.Assign) and any(map(is_search_path, ast.walk(node.targets[0]))))
    }
    assert tricks == STANDS_FOR_INSTALLED
