"""`raydml compare RUN RUN ...`: settings in which runs differ, their figures side by side, and how these were measured."""

from __future__ import annotations

import argparse
import sys

from pipeline.console import aligned
from pipeline.errors import RunError, UserError, fail
from pipeline.runs.records import comparison, find_run, read_run

PROG = "python -m pipeline.compare"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, URI, or name below the default storage")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 compared, 2 bad input."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if len(options.runs) < 2:
            raise UserError("got one run, expected two or more to compare")
        records = [read_run(find_run(name)) for name in options.runs]
    except (UserError, RunError) as error:
        return fail(error, 2)
    for title, rows in comparison(records).items():
        print(f"{title}\n" + "\n".join(f"  {line}" for line in aligned(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
