"""Starts the workers of a run that do without Ray Train, and what every way of training shares: stop signals, the display, state.json.

one process  runtime.workers == 0
torchrun     when torchrun's environment is found: this process is one of the workers
Ray Train    `ray_train`
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.console import say
from pipeline.distributed.collectives import Ranks
from pipeline.distributed.cpus import use_cpus
from pipeline.distributed.hang_watch import HangWatch, collective_timeout
from pipeline.distributed.run_status import RunStatus, worker_label
from pipeline.distributed.worker_log import worker_log
from pipeline.errors import RunError
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import run_folder
from pipeline.runs.run_state import RunStateWriter
from pipeline.training.loop import Worker

Show = Callable[[dict[str, Any]], None]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
STOPPING = "stopping: saving a checkpoint ..."


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a stop request, and says so at once; the second Ctrl-C interrupts at once.

    Attributes:
        received: Number of the first signal, or None.
    """

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self.on_stop = on_stop
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and os.environ.get("RANK", "0") == "0":
            # Not through the console: a signal may come while that is writing, and its streams cannot be entered twice.
            at_line_start = b"\r\x1b[2K" if os.isatty(2) else b""  # over the progress bar, which is drawn again below
            os.write(2, at_line_start + STOPPING.encode() + b"\n")
        self.received = number
        self.on_stop()


def device_of(config: Config) -> torch.device:
    if not config.runtime.gpus_per_worker:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def run_in_process(config: Config, store_uri: str, show: Show) -> int | None:
    """Trains in this process (one of torchrun's, or the only one); returns the signal that stopped it, if any.

    Raises:
        RunError, UserError: The run cannot go on.
    """
    use_cpus(config.runtime.cpus_per_worker or 1)
    device = device_of(config)
    ranks = Ranks()
    if under_torchrun():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = collective_timeout(config.runtime.hang_timeout_s)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
    status = RunStatus()
    state = state_writer(config, status.summary, status.stop) if ranks.rank == 0 else None
    try:
        with (
            state or contextlib.nullcontext(),
            StopSignals(status.stop) as signals,
            status_display(status.read, show if ranks.rank == 0 else lambda _: None),
            contextlib.ExitStack() as stack,
        ):
            watch = None
            if ranks.world > 1:
                label = worker_label(ranks.rank, socket.gethostname())
                stack.enter_context(worker_log(label, say))
                watch = stack.enter_context(HangWatch(label, config.runtime.hang_timeout_s, say))
            Worker(config, store_uri, ranks, device, status, watch=watch)()
    except OSError as error:
        raise no_space_error(error) from error
    finally:
        if ranks.world > 1:
            dist.destroy_process_group()
    if signals.received is None and state is not None and not under_torchrun():  # which would start a failed rank again
        return state.signal
    return signals.received


def state_writer(
    config: Config,
    read: Callable[[], dict[str, Any]],
    stop: Callable[[], None],
) -> RunStateWriter:
    """Writes state.json of a run, and looks for a request to stop it; see `RunStateWriter`."""
    folder = run_folder(config)

    def finished() -> bool:
        latest = Checkpoints(folder).latest()
        return latest is not None and latest.finished

    return RunStateWriter(folder, read, stop, config.evaluation.metric, finished)


@contextlib.contextmanager
def status_display(read: Callable[[int, int], dict[str, Any]], show: Show, every_s: float = 0.3) -> Iterator[None]:
    """Shows a run's status from a thread while the block runs, and a last time at its end."""
    done = threading.Event()
    messages_shown = validations_shown = 0

    def show_once() -> None:
        nonlocal messages_shown, validations_shown
        state = read(messages_shown, validations_shown)
        messages_shown += len(state["messages"])
        validations_shown += len(state["validations"])
        show(state)

    def show_repeatedly() -> None:
        while not done.wait(every_s):
            show_once()

    thread = threading.Thread(target=show_repeatedly, daemon=True, name="show")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show_once()


def no_space_error(error: OSError) -> OSError | RunError:
    """One line about a disk that takes no more data; any other error as it is."""
    if error.errno not in NO_SPACE:
        return error
    place = f"{error.filename}: " if error.filename else ""
    return RunError(f"{place}{error.strerror}; the newest checkpoint is kept: make room and run the same command again")
