"""The order of rows: every row as often as its weight says, and any step can be asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio.training.order import Plan, Stream, key


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.5, 1.0, 2.0, 3.0])), min_size=1, max_size=3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_two_epochs_show_each_row_as_often_as_its_weight_says(sources, seed):
    plan = Plan(tuple(n for n, _ in sources), tuple(w for _, w in sources), 4, 1, seed)
    seen = Counter(plan.epoch(0) + plan.epoch(1))
    for source, (count, weight) in enumerate(sources):
        for index in range(count):
            assert abs(seen[source, index] - 2 * weight) <= (1 if weight < 1 else 0)


def test_weight_a_half_shows_the_other_half_next_time():
    plan = Plan((10,), (0.5,), 1, 1, 0)
    first, second = set(plan.epoch(0)), set(plan.epoch(1))
    assert len(first) == len(second) == 5 and not first & second


def test_any_step_can_be_asked_for_and_gives_the_same_rows():
    plan = Plan((7, 5), (1.0, 2.0), 3, 2, 1)
    straight = Stream(plan)
    steps = [straight.step(number) for number in range(12)]
    for number in (11, 3, 7, 0):
        assert Stream(plan).step(number) == steps[number]
    rows = [(draw.epoch, draw.source, draw.index) for step in steps for batch in step for draw in batch]
    assert rows == [(e, *row) for e in range(5) for row in plan.epoch(e)][: len(rows)]


def test_draws_differ_between_epochs_and_agree_between_runs():
    a, b = (Stream(Plan((4,), (1.0,), 4, 1, 9)) for _ in range(2))
    seeds = [draw.seed for step in range(3) for draw in a.step(step)[0]]
    assert len(set(seeds)) == 12
    assert seeds == [draw.seed for step in range(3) for draw in b.step(step)[0]]
    assert key(1, "a") != key("1a") and 0 <= key("x") < 2**63


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 2), (2.0, 4), (0.5, 1), (3.0, 5)])
def test_epochs_become_steps(epochs, steps):
    assert Plan((13,), (1.0,), 8, 1, 0).steps(epochs) == steps
