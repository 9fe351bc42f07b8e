"""What a schedule is stands in its registry entry: nothing else asks for a schedule's name."""

import ast

from sources import PACKAGES, PROGRAMS, parsed, relative, sources, strings

from helixpipe.plan.schedules import SCHEDULES

# Tables of formulas, and names that are given where nobody has named one.
MAY_NAME = {
    "helixpipe/plan/formulas.py": set(SCHEDULES),
    "helixpipe/elastic/chunk_schedule.py": {"elastic"},  # its own plans
    "helixpipe/elastic/round_schedule.py": {"elastic-helix"},
    "helixpipe/megatron_adapter/forward_backward.py": {"helix"},  # HelixForwardBackward, for other programs
    "megatron/pretrain/settings/schedule.py": {"1f1b", "interleaved"},  # the defaults
    # A command, a group of options and a row of a table.
    "helixpipe/commands/batch_planning.py": {"elastic", "elastic-helix"},
    "megatron/pretrain/settings/elastic_job.py": {"elastic"},
    "helixpipe/report/batch_plan.py": {"elastic"},
}


def names_in(tree):
    return {node.value for node in strings(tree) if node.value in SCHEDULES}


def test_packages_name_no_schedule():
    found = {}
    for path in sources(*PACKAGES):
        where = relative(path)
        named = names_in(parsed(path)) - MAY_NAME.get(where, set())
        if named and not where.startswith("helixpipe/plan/schedules/"):
            found[where] = sorted(named)
    assert found == {}


def test_nothing_compares_with_a_schedules_name():
    """Benchmarks list what they compare, but ask the entry what it is."""
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in sources(*PACKAGES, *PROGRAMS)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Compare)
        if any(names_in(side) for side in node.comparators)
    ]
    assert found == []


def test_a_name_is_noticed():
    tree = ast.parse('"""helix"""\ndef f(name):\n    """helix"""\n    return name in ("helix", "zb-v")\n')
    assert names_in(tree) == {"helix", "zb-v"}
