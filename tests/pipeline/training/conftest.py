"""The training command in this process, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline import train
from tests.pipeline.conftest import Base

Outcome = tuple[int, str, str]
Train = Callable[..., Outcome]


@pytest.fixture
def run(base: Base, capsys: pytest.CaptureFixture) -> Train:
    """`run("--set", "a=b", seed=1)`: status, stdout and stderr of the command for the tiny recipe, changed."""

    def command(*arguments: str, **changes: Any) -> Outcome:
        capsys.readouterr()
        status = train.main([base.recipe({k.replace("__", "."): v for k, v in changes.items()}), *arguments])
        return status, *capsys.readouterr()

    return command


def assert_one_error(outcome: Outcome, status: int, says: str) -> None:
    got, _, err = outcome
    lines = err.rstrip("\n").split("\n")
    assert got == status and "Traceback" not in err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    assert says in lines[-1]
