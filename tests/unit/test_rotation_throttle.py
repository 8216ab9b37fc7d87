"""Batch sizes and waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlalchemy_lucent.rotation.throttle import Throttle

MEBIBYTE = 1 << 20


class Clock:
    """Takes the place of sleeping, and remembers."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def pace(
    batch_size: int = 1000,
    batch_time: float | None = None,
    max_rate: float | None = None,
    pause: float = 0,
) -> tuple[Throttle, Clock]:
    clock = Clock()
    return Throttle(batch_size, batch_time, max_rate, pause, clock.sleep), clock


def test_a_table_begins_with_a_small_batch_and_goes_on_with_whole_ones() -> None:
    paced, _ = pace(1000)
    assert paced.limit == 100
    paced.after(100, 100 * 150, 0.01)
    assert paced.limit == 1000
    paced.begin_table()
    assert paced.limit == 100


@pytest.mark.parametrize(
    "size, limit", [(16 * MEBIBYTE, 1), (5 * MEBIBYTE, 3), (64 << 10, 256), (2200, 1000)]
)
def test_large_values_make_batches_small(size: int, limit: int) -> None:
    paced, _ = pace(1000)
    paced.after(100, 100 * size, 0.01)
    assert paced.limit == limit


def test_batches_grow_and_shrink_to_take_their_time() -> None:
    paced, _ = pace(50, batch_time=1.0)
    for _ in range(40):
        paced.after(paced.limit, 0, paced.limit / 400)
    assert 390 <= paced.limit <= 400
    for _ in range(40):
        paced.after(paced.limit, 0, paced.limit / 20)
    assert 19 <= paced.limit <= 20


def test_a_small_first_batch_does_not_make_the_next_ones_small() -> None:
    paced, _ = pace(1000, batch_time=1.0)
    paced.after(100, 0, 0.01)
    assert paced.limit == 1000


def test_the_rest_of_the_time_that_a_rate_leaves_is_waited() -> None:
    paced, clock = pace(max_rate=50)
    assert paced.limit == 50
    paced.after(50, 0, 0.4)
    paced.after(25, 0, 3.0)  # slower than the limit already
    assert clock.waits == [pytest.approx(0.6)]


def test_the_longer_of_pause_and_rate_is_waited() -> None:
    paced, clock = pace(max_rate=100, pause=0.25)
    paced.after(100, 0, 0.1)
    paced.after(10, 0, 0.05)
    assert clock.waits == [pytest.approx(0.9), pytest.approx(0.25)]


@given(
    batch_size=st.integers(1, 10**6),
    batch_time=st.none() | st.floats(1e-6, 1e6),
    max_rate=st.none() | st.floats(1, 1e9),
    batches=st.lists(
        st.tuples(st.integers(0, 10**5), st.integers(0, 1 << 40), st.floats(0, 1e6)), max_size=20
    ),
)
def test_a_batch_has_a_row_at_least_and_not_more_than_allowed(
    batch_size: int,
    batch_time: float | None,
    max_rate: float | None,
    batches: list[tuple[int, int, float]],
) -> None:
    paced, _ = pace(batch_size, batch_time, max_rate)
    for rows, size, seconds in batches:
        assert paced.limit >= 1
        if batch_time is None:
            assert paced.limit <= batch_size
        if max_rate is not None:
            assert paced.limit <= max_rate
        paced.after(min(rows, paced.limit), size, seconds)


def test_where_one_may_write_others_get_their_turn_each_second() -> None:
    clock = Clock()
    paced = Throttle(1000, None, None, 0.0, clock.sleep, has_one_writer=True)
    for _ in range(25):
        paced.after(100, 100, 0.1)
    assert [round(slept, 2) for slept in clock.waits] == [0.12, 0.12]


def test_a_pause_is_a_turn_for_others_too() -> None:
    clock = Clock()
    paced = Throttle(1000, None, None, 0.2, clock.sleep, has_one_writer=True)
    for _ in range(25):
        paced.after(100, 100, 0.1)
    assert clock.waits == [0.2] * 25
