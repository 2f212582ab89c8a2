"""summary.json as it is read again."""

from __future__ import annotations

import pytest

from methods.config import Length
from pipeline.runs.summary import finished_length


@pytest.mark.parametrize("text", ["4 epochs", "4.0 epochs"])
def test_the_finished_length_is_a_value(text: str) -> None:
    length = finished_length({"protocol": {"length": text}})
    assert length == Length(value=4, unit="epochs") != Length(value=4, unit="steps")
