"""The activation store."""

import pytest

from helixpipe.runtime.store import ActivationStore


def test_values_come_back_once():
    store = ActivationStore()
    store.put((0, 1), "a")
    store.put((1, 0), "b")
    assert len(store) == 2
    assert store.take((0, 1)) == "a"
    assert store.take((1, 0)) == "b"
    assert len(store) == 0
    store.assert_empty()
    with pytest.raises(AssertionError, match="segment 0, micro batch 1 is not stored"):
        store.take((0, 1))


def test_a_second_value_under_one_key_is_refused_and_the_first_kept():
    store = ActivationStore()
    store.put((2, 3), "a")
    with pytest.raises(AssertionError, match="segment 2, micro batch 3 is already stored"):
        store.put((2, 3), "b")
    assert store.take((2, 3)) == "a"


def test_a_key_is_free_again_once_taken():
    store = ActivationStore()
    for value in ("a", "b"):
        store.put((0, 0), value)
        assert store.take((0, 0)) == value


def test_peak_counts_what_was_held_at_once():
    store = ActivationStore()
    assert store.peak == 0
    for i in range(3):
        store.put((0, i), i)
    for i in range(3):
        store.take((0, i))
    store.put((1, 0), None)
    assert store.peak == 3


def test_what_is_left_is_named():
    store = ActivationStore()
    store.put((4, 1), None)
    store.put((0, 2), None)
    with pytest.raises(AssertionError, match=r"\[\(0, 2\), \(4, 1\)\]"):
        store.assert_empty()
