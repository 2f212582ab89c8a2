"""`raydml doctor [RECIPE] [--set a.b=c ...]`: everything that a run needs, checked before anything is spent.

Without RAY_ADDRESS this machine is checked, with it every node of that cluster; also as `ray job submit -- python -m
pipeline.doctor RECIPE`. No run is started, and nothing is left in the storage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipeline.errors import RunError, UserError, fail
from pipeline.recipes import add_recipe_arguments, read_recipe, resolve

PROG = "python -m pipeline.doctor"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 a run can start, perhaps with warnings, 1 it would fail, 2 bad input."""
    options = build_parser(prog).parse_args(arguments)
    return check(options.recipe, options.overrides, options.json)


def check(recipe: str | None, overrides: Sequence[str], as_object: bool) -> int:
    """Prints the diagnosis of a recipe; returns the exit status.

    Args:
        recipe, overrides: See `pipeline.recipes.load_config`.
        as_object: Print one JSON object instead of a table.
    """
    try:
        values = read_recipe(recipe, overrides)
        say("loading PyTorch ...")
        # Here, after the first line: PyTorch, Ray, timm and torchvision take 10 CPU-s.
        from pipeline.diagnosis.diagnose import diagnose
        from pipeline.diagnosis.rows import as_json, print_table, worst

        config = resolve(values, recipe)
        rows = diagnose(config, say)
    except UserError as error:
        return fail(error, 2)
    except RunError as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail(RunError("interrupted"), 130)
    if as_object:
        print(json.dumps(as_json(config.name, rows), indent=1))
    else:
        print_table(f"{config.name}: before a run", rows)
    return 1 if worst(rows) == "fails" else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
