"""Signs of life of a worker, and a watch over its training steps: one that takes too long ends the process, to be started again.

Two kinds of hang are found, both within `runtime.hang_timeout_s`:

- The process does not run (stopped, swapped out, a machine that froze). Ray Train's health check starts the workers again, and
  `RunStatus` names the rank that fell silent. Without Ray, the other ranks wait in their step:
- A step does not end (a collective that another rank never joins, a lock, a loader that gives nothing). Every rank watches its own
  steps from a thread: it says so, writes the stacks of all its threads to its log, and ends its process.

A rank that waits for one that has told an error and ended its training is found too: the connection stays open as long as that
process lives, so it would wait for the time limit of the collective.

Only training steps are watched, with the wait for their images: an evaluation, a checkpoint, an index that is built, a plan that is
mined or the first images of an epoch may take any time. There, a collective ends after its own time limit (`collective_timeout`).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

LONGEST_INTERVAL_S = 5.0  # between two signs of life
SHORTEST_COLLECTIVE_TIMEOUT_S = 1800.0


def collective_timeout(hang_timeout_s: float) -> timedelta:
    """How long ranks wait for one another at most: long, as rank 0 may have long work to do alone."""
    return timedelta(seconds=max(SHORTEST_COLLECTIVE_TIMEOUT_S, 10 * hang_timeout_s))


def end_process() -> None:
    """Ends this process at once, without waiting for threads that hang."""
    time.sleep(1)  # what was said is on its way
    os._exit(1)


class HangWatch:
    """Gives signs of life from a thread, and ends the process when a step takes too long.

    Args:
        label: Rank and node, for messages.
        timeout_s: Longest time of a step; None: steps are not watched.
        say: Tells a line.
        beat: Gives a sign of life, with the present step.
        failed: Whether some rank has told an error that ends the run.
        end: Ends the process.
    """

    def __init__(
        self,
        label: str,
        timeout_s: float | None,
        say: Callable[[str], None],
        beat: Callable[[int], None] = lambda step: None,
        failed: Callable[[], bool] = lambda: False,
        end: Callable[[], None] = end_process,
    ) -> None:
        self.label = label
        self.timeout_s = timeout_s
        self.say = say
        self.beat = beat
        self.failed = failed
        self.end = end
        self._step = 0
        self._since: float | None = None
        self._done = threading.Event()

    def begin_step(self, step: int) -> None:
        """A step begins; called again, it begins anew."""
        self._step, self._since = step, time.monotonic()

    def end_step(self) -> None:
        self._since = None

    def __enter__(self) -> HangWatch:
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        interval_s = LONGEST_INTERVAL_S if self.timeout_s is None else min(LONGEST_INTERVAL_S, self.timeout_s / 6)
        told_failure = 0  # how often in a row
        while not self._done.is_set():
            self.beat(self._step)
            told_failure = told_failure + 1 if self.failed() else 0
            if told_failure == 3:  # time enough to find it by itself
                self.end()
                return
            since = self._since
            if self.timeout_s is not None and since is not None and time.monotonic() - since > self.timeout_s:
                self.say(
                    f"{self.label} has not got through step {self._step} in {time.monotonic() - since:.0f} s "
                    "(runtime.hang_timeout_s): it waits for another rank, or hangs itself, and is ended to be started again; the "
                    "stacks of its threads are in its log"
                )
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
                self.end()
                return
            self._done.wait(interval_s)
