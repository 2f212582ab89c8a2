"""`python -m pipeline.train [recipe.yaml | preset] [--set a.b=c ...]`: one run, from a dataset to a report.

Without arguments: the built-in demo. Run again, the same command continues an interrupted run, or
prints the summary of a finished one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from pipeline.errors import NameTakenError, RunError, UserError, fail
from pipeline.recipes import add_recipe_arguments, read_recipe, resolve

PROG = "python -m pipeline.train"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.add_argument("--fresh", action="store_true", help="remove an earlier run of this name and start over")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print what was found, as `raydml doctor` does"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 finished, 1 the run failed, 2 bad input, 128 + signal when stopped."""
    options = build_parser(prog).parse_args(arguments)
    if options.dry_run:
        from pipeline import doctor

        return doctor.check(options.recipe, options.overrides, as_object=False)
    try:
        values = read_recipe(options.recipe, options.overrides)
        if os.environ.get("RANK", "0") == "0":  # torchrun starts this once a rank
            print(f"{values.get('name', 'run')}: loading PyTorch ...", file=sys.stderr, flush=True)
        # Here, after the first line: PyTorch, Ray, timm and torchvision take 10 CPU-s.
        from pipeline.training.start import run

        signal = run(resolve(values, options.recipe), options.fresh)
    except NameTakenError as error:
        return fail(UserError(f"{error}; as a run of its own: {_under(error.free_name, arguments, prog)}"), 2)
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail(RunError("interrupted; the newest checkpoint is kept"), 130)
    return 0 if signal is None else 128 + signal


def _under(name: str, arguments: list[str] | None, prog: str) -> str:
    """The command with another name of the run."""
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if a != "--fresh"]
    return shlex.join([*prog.split(), *given, "--set", f"name={name}"])


if __name__ == "__main__":
    sys.exit(main())
