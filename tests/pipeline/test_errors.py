"""Errors as one line, and hints for unknown names."""

from __future__ import annotations

import pytest

from pipeline.errors import RunError, UserError, did_you_mean, joined_lines, one_line


def test_one_line() -> None:
    assert (
        one_line(UserError("no  token\n\n  set it by X\n")) == "no  token set it by X" and one_line(RunError("")) == ""
    )
    assert one_line(KeyError()) == "KeyError" and one_line(UserError("x" * 2000)) == "x" * 1000 + " ..."
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert joined_lines(ValueError("two\n  lines")) == "two lines"


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("resnet5O", ["vit", "resnet50"], "did you mean the model 'x.resnet50'?"),
        ("qqq", ["vit", "resnet50"], "expected one of vit, resnet50"),
        ("RESNET50", ["vit", "resnet50"], "did you mean the model 'x.resnet50'?"),
        ("resist", ["vit", "resnet50"], "expected one of vit, resnet50"),  # similarity 0.57
        ("qqq", [f"model{i}" for i in range(1001)], "none of the 1,001 names is similar"),
    ],
)
def test_did_you_mean(name: str, names: list[str], hint: str) -> None:
    assert did_you_mean(name, iter(names), kind="the model ", prefix="x.") == hint
