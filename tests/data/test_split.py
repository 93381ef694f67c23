"""Splitting by hash: complete, disjoint, and the same for a row whatever stands around it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.data import RowSet, read_rows, split_by_hash
from etude.errors import ConfigError

TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8), min_size=1)
FRACTIONS = st.floats(0, 1, exclude_max=True)
SEEDS = st.integers(0, 2**32)


def texts(rows: RowSet) -> list[str]:
    return [row["text"] for row in rows]


def rows_of(values: list[str]) -> RowSet:
    return read_rows([{"text": value} for value in values])


@settings(deadline=None)
@given(TEXTS, FRACTIONS, SEEDS)
def test_every_row_is_on_one_side_in_its_old_order(values: list[str], fraction: float, seed: int) -> None:
    rows = rows_of(values)
    train, held_out = split_by_hash(rows, fraction, seed)
    lines = [{part.origin(index)[1] for index in range(len(part))} for part in (train, held_out)]
    assert lines[0] | lines[1] == set(range(1, len(rows) + 1)) and not lines[0] & lines[1]
    assert not set(texts(train)) & set(texts(held_out))
    for part in (train, held_out):
        assert texts(part) == [value for value in values if value in set(texts(part))]


@settings(deadline=None)
@given(TEXTS, TEXTS, FRACTIONS, SEEDS)
def test_a_row_stays_where_it_was_when_rows_are_added(
    values: list[str], added: list[str], fraction: float, seed: int
) -> None:
    _, before = split_by_hash(rows_of(values), fraction, seed)
    _, after = split_by_hash(rows_of(added + values), fraction, seed)
    assert set(texts(before)) == set(texts(after)) & set(values)


@settings(deadline=None)
@given(TEXTS, FRACTIONS, FRACTIONS)
def test_a_larger_share_holds_out_the_same_rows_and_more(values: list[str], one: float, other: float) -> None:
    _, small = split_by_hash(rows_of(values), min(one, other))
    _, large = split_by_hash(rows_of(values), max(one, other))
    assert set(texts(small)) <= set(texts(large))


def test_the_share_and_the_seed_are_what_they_say() -> None:
    rows = rows_of([str(number) for number in range(4000)])
    held_out = {seed: texts(split_by_hash(rows, 0.05, seed)[1]) for seed in (0, 1)}
    assert all(140 < len(part) < 260 for part in held_out.values())  # 200 expected, standard deviation 14
    assert held_out[0] != held_out[1]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5, float("nan")])
def test_a_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction: expected a share"):
        split_by_hash(rows_of(["a"]), fraction)
