"""`python -m pipeline.stop NAME`: asks a run or a sweep to save a checkpoint and to end, and waits until it has.

    raydml stop photos                               a run or a sweep by name, or its folder
    raydml stop s3://bucket/raydml/runs/photos       from any machine that sees the storage
    raydml stop photos --timeout 0                   only ask

It ends as after SIGTERM: the same command continues it. The request is a file in its folder, which the run looks for every 2 s
in a folder, every 10 s in object storage (a sweep every 5 s); it names one start of the command, so it stops no later one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from pipeline.errors import RunError, UserError, fail
from pipeline.recipes import add_name_arguments
from pipeline.storage import Folder

PROG = "python -m pipeline.stop"
TIMEOUT_S = 300.0
SILENT_S = 60.0  # without a sign of life, after which nothing is waited for any more
POLL_S = 1.0


class Present(NamedTuple):
    """How a run or a sweep stands.

    Attributes:
        start: The start of its command that is meant.
        running: It says that it runs.
        sign: Changes with every sign of life.
        text: "is stopped at step 1,200; the same command continues it".
        good: It has ended without an error.
    """

    start: tuple[int, str]
    running: bool
    sign: object
    text: str
    good: bool


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_name_arguments(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help=f"longest wait for its end (default: {TIMEOUT_S:g}); 0: only ask",
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 it has ended (or was asked, with --timeout 0), 1 it has not, or with an error, 2 it does not run, or bad input."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.timeout < 0:
            raise UserError(f"--timeout {options.timeout:g}: expected 0 or more seconds")
        from pipeline.tuning.find import find_run_or_sweep

        kind, folder = find_run_or_sweep(options.name, options.storage)
        read = run_present if kind == "run" else sweep_present
        return stop(f"the {kind} {options.name}", folder, lambda: read(folder), options.timeout)
    except (UserError, OSError) as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail(RunError("interrupted; the request to stop stands"), 130)


def stop(what: str, folder: Folder, read: Callable[[], Present], timeout_s: float) -> int:
    """Asks what runs in a folder to stop, and waits; returns the exit status.

    Raises:
        UserError: It does not run.
        RunError: It did not end in time, gives no sign of life, or another start of it has begun.
    """
    from pipeline.runs.run_state import request_stop

    before = read()
    if not before.running:
        raise UserError(f"{what} does not run: it {before.text}")
    request_stop(folder, *before.start)
    print(f"asked {what} to save and to end", flush=True)
    if timeout_s == 0:
        return 0
    asked_at = heard_at = time.monotonic()
    present = before
    while time.monotonic() - asked_at < timeout_s:
        time.sleep(POLL_S)
        last, present = present, read()
        if present.start != before.start:
            raise RunError(f"another start of {what} has begun, which was not asked: run this command again")
        if not present.running:
            print(f"{what} {present.text}")
            return 0 if present.good else 1
        if present.sign != last.sign:
            heard_at = time.monotonic()
        elif time.monotonic() - heard_at > SILENT_S:
            raise RunError(
                f"{what} gives no sign of life for {SILENT_S:g} s: it was killed, or hangs; it {present.text}. End its "
                "processes, if there are any; the same command continues it from its newest checkpoint"
            )
    raise RunError(f"{what} has not ended within {timeout_s:g} s; the request stands, and it {present.text}")


def run_present(folder: Folder) -> Present:
    from pipeline.runs.watch_run import position, require_state

    state = require_state(folder)
    at = position(state.progress).removeprefix(", ")
    end = {"stopped": "; the same command continues it", "failed": f": {state.message}"}.get(state.state, "")
    text = f"is at {at or 'its start'}" if not state.ended else f"is {state.state}{f' at {at}' if at else ''}{end}"
    return Present(
        (state.start, state.token), not state.ended, (state.token, state.beat), text, state.state != "failed"
    )


def sweep_present(folder: Folder) -> Present:
    from pipeline.tuning.sweep_folder import SweepFolder, read_state

    state = read_state(folder)
    if state is None:
        raise UserError(f"{folder} has not been started yet")
    end = "; the same command continues it" if state.state == "stopped" else ""
    text = f"is {state.state}{f': {state.message}' if state.message else ''}{end}"
    start = (SweepFolder(folder).current_start(), "")
    return Present(start, state.state == "running", state.heartbeat, text, state.state != "failed")


if __name__ == "__main__":
    sys.exit(main())
