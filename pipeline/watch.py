"""`python -m pipeline.watch SWEEP`: a sweep while it runs, from another shell or machine.

    raydml watch emoji_quick                         a sweep by name, or its folder
    raydml watch s3://bucket/raydml/sweeps/sop       on the storage that all nodes share
    raydml watch emoji_quick --once                  what there is now

In a terminal the tables are refreshed every few seconds, elsewhere each change is a line. Ends with the sweep; to leave earlier,
Ctrl-C. The sweep is not disturbed.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import RunError, UserError, fail

PROG = "python -m pipeline.watch"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP", help="name of a sweep, or its folder or s3:// URI")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    parser.add_argument(
        "--every", type=float, default=3.0, metavar="SECONDS", help="time between two readings (default: 3)"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 the sweep is finished or was shown once, 1 it was stopped or failed, 2 bad input, 130 interrupted."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.every <= 0:
            raise UserError(f"--every {options.every:g}: expected more than 0 seconds")
        from pipeline.tuning.sweep_folder import find_sweep
        from pipeline.tuning.watch import SweepReader
        from pipeline.tuning.watch_display import follow
        from pipeline.tuning.watch_text import as_lines

        reader = SweepReader(find_sweep(options.sweep))
        first = reader.read()
        if options.once or first.ended:
            print("\n".join(as_lines(first)))
        last = first if options.once else follow(reader, first, options.every)
    except (UserError, RunError, OSError) as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return 130
    return 0 if options.once or last.finished else 1


if __name__ == "__main__":
    sys.exit(main())
