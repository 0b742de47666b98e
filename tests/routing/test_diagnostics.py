"""What a run reports of its routers."""

import numpy as np
import pytest

from sparse_lm.routing.diagnostics import router_row


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
