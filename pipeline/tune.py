"""`python -m pipeline.tune SWEEP.yaml [--set a.b=c ...]`: a search over methods and hyper-parameters, and its answer.

SWEEP is a sweep file, or the name of one of those that come with this program (`raydml list tune_configs`). Run again, the same
command continues an interrupted sweep, trains the trials that a larger budget adds, or prints the answer of a finished one.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import RunError, UserError, fail
from pipeline.recipes import add_set_argument

PROG = "python -m pipeline.tune"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", metavar="SWEEP", help="sweep file, or name of one that comes with this program")
    add_set_argument(parser, "the sweep file", "budget.trials=40")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print what would be trained")
    parser.add_argument(
        "--images-per-second", type=float, metavar="N", help="--dry-run: speed of one trial, for the expected hours"
    )
    parser.add_argument(
        "--lengthen",
        type=int,
        nargs="+",
        default=[],
        metavar="TRIAL",
        help="train these trials, which were stopped early, to their full length",
    )
    parser.add_argument("--fresh", action="store_true", help="remove an earlier sweep of this name, its runs too")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 finished, 1 some trial failed or the sweep cannot go on, 2 bad input, 128 + signal when stopped."""
    options = build_parser(prog).parse_args(arguments)
    try:
        print("loading PyTorch ...", file=sys.stderr, flush=True)
        from pipeline.tuning.sweep_file import load_sweep  # here, after the first line: PyTorch and Ray take 10 CPU-s

        sweep = load_sweep(options.sweep, options.overrides)
        if options.dry_run:
            from pipeline.tuning.dry_run import dry_run

            dry_run(sweep, options.images_per_second)
            return 0
        from pipeline.tuning.driver import run_sweep
        from pipeline.tuning.leaderboard import show_answer

        result = run_sweep(sweep, options.lengthen, fresh=options.fresh)
        show_answer(result.answer)
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail(RunError("interrupted; the records of all trials are kept, the same command continues"), 130)
    if result.signal is not None:
        print("stopped: the trials are saved, the same command continues", file=sys.stderr)
        return 128 + result.signal
    for record in result.failed:
        print(f"trial {record.number} failed, the same command tries it again: {record.error}", file=sys.stderr)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
