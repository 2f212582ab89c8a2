"""The promises of exported networks, for the three backbones that they are made for."""

from __future__ import annotations

import pytest

from benchmarks.export import BACKBONES, rows


@pytest.mark.slow
def test_every_backbone_keeps_the_promises() -> None:
    table = rows()
    assert len([row for row in table if row.promised]) == 2 * len(BACKBONES) + 1
    assert not [row for row in table if not row.ok]
