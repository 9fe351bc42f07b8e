"""The walks of docs/architecture.md name files and functions that exist."""

import ast
import re

import pytest
from sources import ROOT, parsed

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^## (A .*)\n\n(?:.*\n\n)?((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
STEPS = [
    pytest.param(file, name, id=f"{title.partition(',')[0]}-{number}")
    for title, table in WALKS
    for number, (file, name) in enumerate(
        re.findall(r"^\| `(\S+\.py)` \| `(\w+)` \|", table, flags=re.MULTILINE)
    )
]


def test_there_are_three_walks_and_every_step_is_checked():
    assert [title.partition(",")[0] for title, _ in WALKS] == ["A micro batch", "A plan", "A document"]
    # A head and a line below it.
    assert len(STEPS) == sum(table.count("\n") - 2 for _, table in WALKS)


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_each_step_is_where_the_page_says(file, name):
    tree = parsed(ROOT / file)
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_room_is_on_the_page():
    table = PAGE.partition("## Rooms")[2].partition("\n## ")[0]
    rooms = {path.name for path in (ROOT / "helixpipe").iterdir() if (path / "__init__.py").is_file()}
    assert [room for room in sorted(rooms) if not re.search(rf"\b{room}\b", table)] == []
