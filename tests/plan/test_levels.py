"""Levels of recomputation on a command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixpipe.plan.cost_model.levels import LEVELS, parse_levels, spell_levels


@given(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=12))
def test_what_is_spelled_is_read_back(levels):
    found = parse_levels(spell_levels(levels), len(levels))
    assert ((found,) * len(levels) if found in LEVELS else found) == tuple(levels)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no level ''"),
        ("full", "no level 'full'"),
        ("none:0", "needs its number of layers"),
        ("none:-1", "needs its number of layers"),
        ("none:1,products", "needs its number of layers"),
        ("none:²", "needs its number of layers"),
        ("none:3", "each of the model's 4 layers once"),
        ("none:5", "each of the model's 4 layers once"),
        ("none:99999999999999", "each of the model's 4 layers once"),
        ("none:2,,products:2", "needs its number of layers"),
        ("none:2,selective:2", "no level 'selective'"),
    ],
)
def test_other_words_are_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_levels(text, 4)
