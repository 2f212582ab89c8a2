"""`python -m pipeline.watch NAME`: a run or a sweep while it runs, from any machine that sees its storage.

    raydml watch photos                              a run or a sweep by name, or its folder
    raydml watch s3://bucket/raydml/runs/photos      on the storage that all nodes share
    raydml watch photos --storage s3://bucket/raydml the same
    raydml watch photos --once                       how it stands now, and whether it lives
    raydml watch photos --json                       for programs: an object a line, at each change

In a terminal it is drawn again every few seconds, elsewhere each change is a line. Ends with the run or sweep; to leave
earlier, Ctrl-C. What is watched is not disturbed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pipeline.errors import RunError, UserError, fail
from pipeline.recipes import add_name_arguments
from pipeline.storage import Folder

PROG = "python -m pipeline.watch"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_name_arguments(parser)
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--every", type=float, default=3.0, metavar="SECONDS", help="time between two readings (default: 3)"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 finished or shown once, 1 it was stopped or failed, 2 bad input, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.every <= 0:
            raise UserError(f"--every {options.every:g}: expected more than 0 seconds")
        from pipeline.tuning.find import find_run_or_sweep

        kind, folder = find_run_or_sweep(options.name, options.storage)
        finished = watch_run(folder, options) if kind == "run" else watch_sweep(folder, options)
    except (UserError, RunError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return 130
    return 0 if options.once or finished else 1


def watch_run(folder: Folder, options: argparse.Namespace) -> bool:
    from pipeline.runs.watch_run import RunReader, run_view

    reader = RunReader(folder)
    first = reader.read_alive() if options.once else reader.read()
    return _shown(run_view(reader), first, options)


def watch_sweep(folder: Folder, options: argparse.Namespace) -> bool:
    from pipeline.tuning.watch import SweepReader
    from pipeline.tuning.watch_text import sweep_view

    reader = SweepReader(folder)
    return _shown(sweep_view(reader), reader.read(), options)


def _shown(view: Any, first: Any, options: argparse.Namespace) -> bool:
    """Shows it once, or until it ends; returns whether it is finished."""
    from pipeline.runs.following import follow

    if options.once or first.ended:
        print(json.dumps(view.as_json(first)) if options.json else "\n".join(view.as_lines(first)))
        return bool(first.finished)
    return bool(follow(view, first, options.every, options.json).finished)


if __name__ == "__main__":
    sys.exit(main())
