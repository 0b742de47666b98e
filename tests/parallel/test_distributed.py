"""Who is to blame when a run of several processes stands still, worked by hand on a made-up clock."""

import json

import pytest

from sparse_lm.config import ConfigError, validate
from sparse_lm.parallel.distributed import Cluster, Distributed, join
from sparse_lm.parallel.watchdog import Judge


def sign(beat: int, progress: int, activity: str = "step") -> str:
    return json.dumps([beat, progress, activity])


def judge(processes: int = 3, now: float = 100.0) -> Judge:
    return Judge(range(processes), peer_timeout_s=10.0, stall_timeout_s=60.0, now=now)


def test_a_process_is_dead_after_the_timeout_since_its_last_new_sign() -> None:
    watched = judge()
    for second in range(1, 21):
        now = 100.0 + second
        watched.hear(0, sign(second, 1), now)
        watched.hear(1, sign(min(second, 4), 1), now)  # beats last at 104
        # Process 2 was never heard: its silence began at 100.
        expected = [i for i, last in ((1, min(now, 104.0)), (2, 100.0)) if now - last > 10.0]
        assert watched.dead(now) == expected
    assert watched.dead(114.0) == [2] and watched.dead(114.5) == [1, 2]


def test_the_process_furthest_behind_is_the_one_that_hangs() -> None:
    watched = judge()
    for second in range(1, 101):
        now = 100.0 + second
        watched.hear(0, sign(second, min(second, 12), "the numbers of step 4"), now)
        watched.hear(1, sign(second, min(second, 10), "waiting for the batch of step 5"), now)
        watched.hear(2, sign(second, min(second, 12), "the numbers of step 4"), now)
        # The last progress of all is at 112, that of process 1 at 110; 60 s after the last one the run counts as hanging.
        found = watched.hanging(now)
        assert (found is not None) == (now > 172.0)
        if found:
            assert found == (1, "waiting for the batch of step 5", now - 110.0)
    assert watched.dead(now) == []  # it breathes all the time


def test_of_equals_the_one_that_stopped_first_is_named() -> None:
    watched = judge(2)
    watched.hear(1, sign(1, 5, "validating"), 101.0)
    watched.hear(0, sign(1, 5, "validating"), 103.0)
    assert watched.hanging(163.0) is None
    assert watched.hanging(164.0) == (1, "validating", 63.0)


def test_a_run_that_moves_anywhere_does_not_hang() -> None:
    watched = judge(2)
    for second in range(1, 301):
        watched.hear(0, sign(second, 1), 100.0 + second)
        watched.hear(1, sign(second, second), 100.0 + second)
        assert watched.hanging(100.0 + second) is None


def test_one_process_joins_nothing() -> None:
    with join(Distributed()) as cluster:
        assert (cluster.index, cluster.count, cluster.first) == (0, 1, True)
        cluster.agree("anything", lambda: pytest.fail("nobody to compare with"))
        cluster.barrier("nowhere")
        assert cluster.of_first("key", lambda: "own") == "own"
        assert cluster.first_then_others("work", lambda: 7) == 7
    with pytest.raises(KeyError), join(Distributed()):
        raise KeyError("passes through")


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"coordinator": "a:1"}, "processes", "go together"),
        ({"processes": 2, "process": 0}, "coordinator", "go together"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "coordinator", "host:port"),
        ({"coordinator": "a:b", "processes": 2, "process": 0}, "coordinator", "host:port"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "process", "0 to 1"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "processes", "at least 1"),
        ({"coordinator": "a:1", "cluster": "slurm"}, "coordinator", "None when cluster is given"),
        ({"peer_timeout_s": 0.5}, "peer_timeout_s", "at least 1 second"),
        ({"cluster": "slrum"}, "cluster", "Literal"),
    ],
)
def test_impossible_fields(fields: dict, field: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Distributed(**fields))
    assert error.value.field == field and words in error.value.allowed


def test_a_process_knows_its_own_name() -> None:
    cluster = Cluster(Distributed(), None, 3, 8)
    assert cluster.name(3).startswith("process 3 (") and "pid" in cluster.name(3)
    assert cluster.name(5) == "process 5"
