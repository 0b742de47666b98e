"""What a run reports of its routers."""

import numpy as np
import pytest

from sparse_lm.accounting import Measured, measured_in
from sparse_lm.routing.diagnostics import WINDOW, RouterWatch, router_row, strongest_pair
from sparse_lm.train.churn import churn


def test_load_and_violation_by_hand() -> None:
    row = router_row({"3": {"load": (np.array([6.0, 1.0, 1.0, 0.0]), 8.0), "entropy": (3.0, 4.0)}}, population=False)
    # fractions 6/8, 1/8, 1/8, 0; the largest is 3 times the mean of 1/4: violation 2
    assert row == {
        "router/blocks.3/load": [0.75, 0.125, 0.125, 0.0],
        "router/blocks.3/max_violation": 2.0,
        "router/blocks.3/entropy": 0.75,
    }


def test_stacked_runs_are_reported_by_block_and_populations_by_member() -> None:
    load = np.array([[[2.0, 2.0], [4.0, 0.0]], [[1.0, 3.0], [3.0, 1.0]]])  # members, layers, experts
    count = np.full((2, 2), 4.0)
    row = router_row({"1_to_2": {"load": (load, count)}}, population=True)
    assert row["router/blocks.1/load"] == [[0.5, 0.5], [0.25, 0.75]]
    assert row["router/blocks.2/max_violation"] == [1.0, 0.5]


def test_nothing_routed_is_zero_and_not_nan() -> None:
    row = router_row({"0": {"load": (np.zeros(2), 0.0), "dropped": (0.0, 0.0)}}, population=False)
    assert row["router/blocks.0/load"] == [0.0, 0.0] and row["router/blocks.0/dropped"] == 0.0


def test_a_name_that_is_no_run_is_an_error() -> None:
    with pytest.raises(AssertionError, match="'head'"):
        router_row({"head": {}}, population=False)


def test_coactivation_by_hand() -> None:
    # own tokens 10, 4, 2; together 0-1: 4, 0-2: 1, 1-2: 0. Expert 1 shares all of its tokens with expert 0
    together = np.array([[10.0, 4.0, 1.0], [4.0, 4.0, 0.0], [1.0, 0.0, 2.0]])
    row = router_row({"3": {"coactivation": (together, 12.0)}}, population=False)
    assert row == {"router/blocks.3/coactivation": 1.0}
    # An expert with less than a tenth of the even share says nothing: of its one token anything may be true.
    together[2] = [1.0, 1.0, 0.5]
    together[1] = [2.0, 10.0, 1.0]
    assert float(strongest_pair(together)) == 0.4  # expert 0: 4 of 10
    assert strongest_pair(np.stack([together, np.eye(3)])).tolist() == [0.4, 0.0]


def row_of(load, per_token=2.0, dropped=0.0) -> dict:
    prefix = "router/blocks.1/"
    return {prefix + "load": load, prefix + "experts_per_token": per_token, prefix + "dropped": dropped, "loss": 1.0}


EVEN = [0.25, 0.25, 0.25, 0.25]


def test_an_expert_is_dead_that_had_no_token_in_the_whole_window() -> None:
    watch = RouterWatch()
    counts = [
        watch.update(row_of(load))[0]["router/blocks.1/dead_experts"]
        for load in ([0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5], EVEN)
    ]
    assert counts == [2, 1, 0]  # experts 0 and 1; expert 1 alone; none
    for _ in range(WINDOW - 1):
        entries, alarms = watch.update(row_of([0.5, 0.5, 0, 0]))
        assert entries["router/blocks.1/dead_experts"] == 0 and not alarms  # the even row is still in the window
    assert watch.update(row_of([0.5, 0.5, 0, 0]))[0]["router/blocks.1/dead_experts"] == 2


def test_alarms_are_raised_once_after_a_window_with_advice() -> None:
    watch, raised = RouterWatch(), []
    # half of all assignments, two experts a token: every token goes to expert 0
    collapsed = [0.5, 0.2, 0.2, 0.1]
    for n in range(1, 2 * WINDOW):
        raised += [(n, alarm) for alarm in watch.update(row_of(collapsed, per_token=1.9))[1]]
    assert [n for n, _ in raised] == [WINDOW] and "95% of the tokens go to one expert" in raised[0][1]
    assert "blocks.1" in raised[0][1] and "learning rate" in raised[0][1]
    for _ in range(3):
        assert watch.update(row_of(EVEN))[1] == []
    later = [watch.update(row_of(EVEN, dropped=0.3))[1] for _ in range(WINDOW)]
    assert later[:-1] == [[]] * (WINDOW - 1) and "30% of the assignments are dropped" in later[-1][0]
    assert not any(RouterWatch().update(row_of(EVEN))[1] for _ in range(2 * WINDOW))
    # Few experts, all of them used by every token, is no collapse.
    dense = RouterWatch()
    assert not any(dense.update(row_of([0.5, 0.5], per_token=2.0))[1] for _ in range(2 * WINDOW))


def test_a_resumed_run_goes_on_watching() -> None:
    straight, resumed = RouterWatch(), RouterWatch()
    rows = [row_of([0.5, 0.5, 0, 0])] * WINDOW
    found = [straight.update(row) for row in rows]
    resumed.restore(rows[:-1])
    assert resumed.update(rows[-1]) == found[-1] and found[-1][1]


def test_the_worst_member_of_a_population_counts() -> None:
    watch = RouterWatch()
    row = row_of([EVEN, [1.0, 0, 0, 0]], per_token=[1.0, 1.0], dropped=[0.0, 0.0])
    for _ in range(WINDOW):
        entries, alarms = watch.update(row)
    assert entries == {"router/blocks.1/dead_experts": [0, 3]}
    assert any("dead experts" in alarm for alarm in alarms) and any("100% of the tokens" in alarm for alarm in alarms)


def test_measured_numbers_for_the_account() -> None:
    row = {**row_of(EVEN, per_token=[1.0, 2.0]), "router/blocks.0/depth_fraction": 0.25}
    assert measured_in(row) == {0: Measured(None, 0.25), 1: Measured(1.5, None)}


def test_churn_by_hand() -> None:
    before = np.array([[0, 1], [2, 3], [1, -1], [-1, -1]])
    after = np.array([[1, 0], [2, 0], [2, 1], [-1, -1]])
    # token 0 the same in another order, token 1 one new of two, token 2 one new of two, token 3 none: 2 of 6
    assert churn(before, after) == pytest.approx(2 / 6)
    assert churn(np.stack([before, after]), np.stack([after, after]), members=True) == pytest.approx([2 / 6, 0.0])
    assert churn(after, -np.ones_like(after)) == 0.0
