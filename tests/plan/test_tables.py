"""The pages show what the closed forms and the cost model say now."""

import functools
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)
# Seconds of simulation, once for all tests.
tables.TABLES = {
    page: {name: functools.cache(make) for name, make in made.items()} for page, made in tables.TABLES.items()
}


def page_text(page):
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["choosing", "published", pytest.param("interlocked", marks=pytest.mark.slow)]
)
def test_the_tables_are_up_to_date(page):
    """If this fails, run ``make tables`` and look at what changed."""
    assert tables.updated(page_text(page), page) == page_text(page)


def test_check_tells_of_an_old_table(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"choosing": {"schedules": tables.TABLES["choosing"]["schedules"]}})
    assert tables.main(["--check"]) == 0
    monkeypatch.setattr(tables, "TABLES", {"choosing": {"schedules": lambda: "| another |"}})
    assert tables.main(["--check"]) == 1


def test_an_old_figure_is_noticed():
    text = page_text("choosing")
    assert "| 1F1B | 0.64 " in text
    assert tables.updated(text.replace("| 1F1B | 0.64 ", "| 1F1B | 0.65 "), "choosing") == text
    with pytest.raises(ValueError, match="no place for the table schedules"):
        tables.updated("no markers", "choosing")
