"""`raydml config [RECIPE] [--set a.b=c ...]`: a recipe as it is run, all keys with their values and meanings, as YAML.

raydml config baseline/emoji > emoji.yaml     a recipe to edit
raydml config --schema > recipe.schema.json   what an editor checks and completes recipes with
"""

from __future__ import annotations

import argparse
import json
import sys

from pipeline.errors import UserError, fail
from pipeline.recipes import add_recipe_arguments, read_recipe

PROG = "python -m pipeline.show_config"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of recipes instead")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Exit status: 0 printed, 2 bad input."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.schema and (options.recipe or options.overrides):
            raise UserError("--schema is that of all recipes: it goes without a recipe and without --set")
        values = read_recipe(options.recipe, options.overrides)
        # Here, after the arguments: the config imports PyTorch.
        from pipeline.config import build_config
        from pipeline.config_text import annotated_yaml, json_schema

        print(json.dumps(json_schema(), indent=1) if options.schema else annotated_yaml(build_config(values)))
    except UserError as error:
        return fail(error, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
