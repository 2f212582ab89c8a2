"""The sweep files that come with the program, by name. No PyTorch is imported here: commands list them."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline import ROOT
from pipeline.errors import UserError, close_names, did_you_mean
from pipeline.recipes import title_of

SHIPPED = Path(ROOT) / "tune_configs"  # of a checkout, and of an installed package too


def sweep_file_names() -> list[str]:
    """Names of the shipped sweep files."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def sweep_file_title(name: str) -> str:
    """The first sentence of a shipped sweep file's comment."""
    return title_of(SHIPPED / f"{name}.yaml")


def find_sweep_file(path: str) -> Path:
    """The file that a path, or the name of a shipped sweep file, stands for.

    Raises:
        UserError: There is none.
    """
    if os.path.isfile(path):
        return Path(path).resolve()
    name = path.removeprefix("tune_configs/").removesuffix(".yaml").removesuffix(".yml")
    names = sweep_file_names()
    if name in names:
        return SHIPPED / f"{name}.yaml"
    if os.path.isdir(path):
        raise UserError(f"sweep {path!r} is a folder, expected a YAML file")
    there = [str(found) for pattern in ("*.yaml", "*.yml") for found in sorted(Path(path).parent.glob(pattern))]
    if close_names(path, there):
        raise UserError(f"there is no sweep file {path!r}: {did_you_mean(path, there)}")
    hint = did_you_mean(name, names, otherwise="shipped are")
    raise UserError(f"sweep {path!r} is neither a file nor shipped with the program; {hint}")
