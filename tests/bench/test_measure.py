"""The arithmetic of the figures."""

from __future__ import annotations

import pytest

from tests.bench.measure import (
    Contender,
    Figure,
    Goal,
    Turns,
    at_least,
    at_most,
    in_turns,
    table_of,
)


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    turns = Turns({"ours": [1.0, 9.0, 3.0], "theirs": [2.0, 3.0, 3.0]})
    assert turns.median("ours") == 3.0
    assert turns.ratio("ours", to="theirs") == 1.0


def contender(name: str, done: list[str]) -> Contender:
    return Contender(lambda: done.append(name), lambda: done.append("-"))


def test_every_second_round_goes_backwards() -> None:
    done: list[str] = []
    contenders = {name: contender(name, done) for name in ("a", "b")}
    in_turns(contenders, 2, warm_up=1)
    assert "".join(done) == "-a-b" + "-b-a" + "-a-b"


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [(at_most(1.15), 1.15, 1.16), (at_least(6), 6, 5.9)]
)
def test_a_goal_is_met_up_to_its_bound(goal: Goal, met: float, missed: float) -> None:
    figures = [
        Figure(
            group="g",
            name="n",
            ours=1,
            against="a",
            reference=1,
            unit="s",
            ratio=ratio,
            goal=goal,
        )
        for ratio in (met, missed)
    ]
    assert [figure.met for figure in figures] == [True, False]
    assert [line.split(" | ")[-1] for line in list(table_of(figures))[-2:]] == [
        f"{goal}: met |",
        f"{goal}: missed |",
    ]
