"""Packages of other people stay within known major versions."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement

from tools.cluster_checks.text import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIREMENTS = sorted(
    {*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]}
    | {line for lines in PROJECT["optional-dependencies"].values() for line in lines}
)


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_a_dependency_has_a_lowest_and_a_highest_version(line: str) -> None:
    requirement = Requirement(line)
    operators = {part.operator for part in requirement.specifier}
    assert requirement.name == "raydml" or "==" in operators or ({">=", "<"} <= operators)
