"""Signs of life: which of several processes is dead, hangs or has failed, and how a run with such a process ends.

A thread of each process writes a sign of life into the coordination service about once a second. Process 0 reads them all and publishes
a verdict when one of them has been silent for too long, has made no progress for too long, or has reported an error; the others watch
process 0 and read the verdict. So each process does a constant amount of work however many there are.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from sparse_lm.parallel.distributed import Cluster

RESUMABLE = 75
"""Exit code of a run that can go on when it is started again (EX_TEMPFAIL of sysexits.h)."""

FAILED = 2
"""Exit code of processes that stop because another one failed with an error of its own: starting again meets it again."""

BEAT_S = 1.0
"""Most seconds between two signs of life."""


def number(key: str) -> int:
    """Returns the process number that a key ends in."""
    return int(key.rpartition("/")[2])


class Judge:
    """Decides from signs of life which process is dead or hangs. Pure but for the clock that is handed in.

    Args:
      expected: numbers of the processes to watch.
      peer_timeout_s: seconds of silence that make a process dead.
      stall_timeout_s: seconds without progress that make a process hang.
      now: the time at the beginning, seconds.
    """

    def __init__(self, expected: range, peer_timeout_s: float, stall_timeout_s: float, now: float):
        self._peer_timeout_s, self._stall_timeout_s = peer_timeout_s, stall_timeout_s
        self._beats = dict.fromkeys(expected, (-1, now))
        self._progress: dict[int, tuple[int, str, float]] = dict.fromkeys(expected, (-1, "starting", now))

    def hear(self, index: int, sign_of_life: str, now: float) -> None:
        """Takes what `Cluster.sign_of_life` wrote."""
        beat, progress, activity = json.loads(sign_of_life)
        if self._beats[index][0] != beat:
            self._beats[index] = (beat, now)
        if self._progress[index][0] != progress:
            self._progress[index] = (progress, activity, now)

    def dead(self, now: float) -> list[int]:
        """Returns the processes that have been silent for too long."""
        return [index for index, (_, at) in self._beats.items() if now - at > self._peer_timeout_s]

    def hanging(self, now: float) -> tuple[int, str, float] | None:
        """Returns (process, what it was doing, seconds) of the process furthest behind, once nothing has moved for too long."""
        if any(now - at <= self._stall_timeout_s for _, _, at in self._progress.values()):
            return None
        index = min(self._progress, key=lambda i: (self._progress[i][0], self._progress[i][2]))
        _, activity, at = self._progress[index]
        return index, activity, now - at


class Watchdog(threading.Thread):
    """Writes this process's signs of life and reads those of others; ends the process when the run cannot go on."""

    def __init__(self, cluster: Cluster, client: Any):
        super().__init__(name="watchdog", daemon=True)
        self._cluster, self._client = cluster, client
        self._stopped = threading.Event()
        self._every_s = min(BEAT_S, cluster.config.peer_timeout_s / 4)

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(10 * BEAT_S)

    def run(self) -> None:
        """See threading.Thread.run."""
        cluster, config = self._cluster, self._cluster.config
        watched = range(cluster.count) if cluster.first else range(1)
        judge = Judge(watched, config.peer_timeout_s, config.stall_timeout_s, time.monotonic())
        reached, beats, woke = time.monotonic(), 0, time.monotonic()
        while not self._stopped.wait(self._every_s):
            beats, now = beats + 1, time.monotonic()
            if (
                now - woke > config.peer_timeout_s
            ):  # this process was stopped; silence of others in that time means nothing
                judge = Judge(watched, config.peer_timeout_s, config.stall_timeout_s, now)
            woke = now
            try:
                sign = cluster.sign_of_life(beats)
                self._client.key_value_set(f"beat/{cluster.index}", sign, allow_overwrite=True)
                if cluster.first:
                    self._client.key_value_set("first/beat", sign, allow_overwrite=True)
                if cluster.first:
                    self._judge(judge)
                else:
                    self._follow(judge)
                reached = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if self._stopped.is_set():
                    return
                if time.monotonic() - reached > config.peer_timeout_s:
                    reason = f"{cluster.name(0)} cannot be reached for {config.peer_timeout_s:g} s ({str(error).splitlines()[0][:200]})"
                    cluster.stop_now(reason)

    def _judge(self, judge: Judge) -> None:
        """Process 0: hears everybody; publishes a verdict and ends."""
        cluster = self._cluster
        now = time.monotonic()
        for key, sign in self._client.key_value_dir_get("beat/"):
            judge.hear(number(key), sign, now)
        failed = sorted(self._client.key_value_dir_get("failed/"), key=lambda item: number(item[0]))
        verdict: tuple[str, int] | None = None
        if failed:
            verdict = f"{cluster.name(number(failed[0][0]))} failed: {failed[0][1]}", FAILED
        elif dead := judge.dead(now):
            names = ", ".join(cluster.name(index) for index in dead)
            seconds = f"{cluster.config.peer_timeout_s:g} s (distributed.peer_timeout_s)"
            verdict = f"no sign of life for {seconds} from {names}", RESUMABLE
        elif found := judge.hanging(now):
            index, activity, stalled_s = found
            limit = f"distributed.stall_timeout_s = {cluster.config.stall_timeout_s:g}"
            verdict = f"{cluster.name(index)} hangs: {activity!r} for {stalled_s:.0f} s ({limit})", RESUMABLE
        if verdict is not None:
            self._client.key_value_set("first/verdict", json.dumps(verdict), allow_overwrite=True)
            # The service lives in this process: the others must have read the verdict before it ends, and a process that
            # failed must have ended by itself (see `Cluster.fail`), or it would lose its own words and exit code.
            self._end(*verdict, grace_s=8 * BEAT_S)

    def _follow(self, judge: Judge) -> None:
        """Other processes: read the verdict, and watch process 0."""
        cluster = self._cluster
        found = dict(self._client.key_value_dir_get("first/"))
        if "first/verdict" in found:
            self._end(*json.loads(found["first/verdict"]), grace_s=2 * BEAT_S)
        now = time.monotonic()
        if "first/beat" in found:
            judge.hear(0, found["first/beat"], now)
        if judge.dead(now):
            self._end(
                f"no sign of life for {cluster.config.peer_timeout_s:g} s from {cluster.name(0)}", RESUMABLE, grace_s=0
            )

    def _end(self, reason: str, code: int, *, grace_s: float) -> None:
        """Ends the process, unless its main thread is ending it by itself (an error that all processes share)."""
        if self._cluster.ending.wait(grace_s) or self._stopped.is_set():
            return
        hint = " Start all processes again to go on after the last finished save." if code == RESUMABLE else ""
        self._cluster.stop_now(f"{reason}; {self._cluster.name(self._cluster.index)} stops.{hint}", code)
