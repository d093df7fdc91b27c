from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddfast.data import samples
from ddfast.data.samples import DuplicateId, Sample, SampleList, sample_id

KEYS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, st.integers(0, 3)), unique_by=lambda pair: pair[0], max_size=20))
def test_a_list_of_samples_in_arrays(pairs: list[tuple[str, int]]) -> None:
    wanted = [Sample(sample_id(key), key, label) for key, label in sorted(pairs, key=lambda p: (p[1], p[0]))]
    found = SampleList.of(pairs)
    assert len(found) == len(wanted)
    assert list(found) == wanted
    assert found == wanted
    assert found[:] == wanted
    assert found[::-2] == wanted[::-2]
    assert found.ids.tolist() == [sample.id for sample in wanted]
    assert found.labels.tolist() == [sample.label for sample in wanted]
    for index, sample in enumerate(wanted):
        assert found[index] == sample
        assert found[index - len(wanted)] == sample
        assert found.position(sample.id) == index
        assert found.index(sample) == index
        assert sample in found
    assert pickle.loads(pickle.dumps(found)) == found


def test_what_is_not_there() -> None:
    found = SampleList.of([("a/0", 0), ("b/0", 1)])
    with pytest.raises(IndexError, match="sample 2 of 2"):
        found[2]
    with pytest.raises(KeyError):
        found.position(17)
    assert Sample(17, "a/0", 0) not in found
    assert Sample(sample_id("a/0"), "a/0", 1) not in found
    assert "a/0" not in found
    assert found != [*found, found[0]]
    assert found != SampleList.of([("a/0", 0), ("b/0", 0)])
    assert found.take(np.array([1, 0, 1])) == [found[1], found[0], found[1]]
    assert SampleList.of([]) == []


def test_arrays_are_read_only_and_counts_must_agree() -> None:
    found = SampleList.of([("a/0", 0), ("b/0", 1)])
    with pytest.raises(ValueError, match="read-only"):
        found.ids[0] = 1
    with pytest.raises(ValueError, match="as many"):
        SampleList(b"a/0\0b/0", np.zeros(3))
    with pytest.raises(ValueError, match="NUL"):
        SampleList.of([("a\0b", 0)])


def test_two_keys_with_one_id_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "digest_of", lambda key: bytes([key[-1]] * 8))
    with pytest.raises(DuplicateId) as caught:
        SampleList.of([("a/1", 0), ("a/2", 0), ("b/1", 1)])
    assert caught.value.keys == ["a/1", "b/1"]


def test_a_sample_costs_bytes_not_objects() -> None:
    count = 20_000
    found = SampleList.of((f"class/{n:08d}.jpg", 0) for n in range(count))
    held = len(pickle.dumps(found))
    assert held < 60 * count
    assert sum(sys.getsizeof(value) for value in vars(found).values()) < 70 * count
