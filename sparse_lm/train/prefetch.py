"""Batches ahead of the steps: taken from the stream, placed on the devices and searched for table rows in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sparse_lm.memory.working_set import Wanted


class Prefetch:
    """Takes batches from a stream in a thread and places them on the devices, two ahead; states stay with their batches.

    Args:
      stream: yields (batch, data state after it).
      put: places a batch on the devices.
      find: says which rows of tables it reads, None where that takes the parts of other processes.
    """

    def __init__(
        self,
        stream: Iterator[tuple[Any, dict[str, Any]]],
        put: Callable[[Any], Any],
        find: Callable[[Any], Wanted | None],
    ):
        self._queue: queue.Queue = queue.Queue(2)
        self._stop = threading.Event()
        self._stream, self._put, self._find = stream, put, find
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for batch, state in self._stream:
                found = self._find(batch)
                self._offer((self._put(batch), found, int(batch["segments_BL"].max()), state, None))
                if self._stop.is_set():
                    return
        except Exception as error:  # handed to the loop, which raises it
            self._offer((None, None, 0, None, error))

    def _offer(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def next(self) -> tuple[Any, Wanted | None, int, dict[str, Any]]:
        """Returns (batch on the devices, the rows that it reads if found, most documents in one of its rows, the data state after it)."""
        batch, wanted, documents, state, error = self._queue.get()
        if error is not None:
            raise error
        return batch, wanted, documents, state

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()
