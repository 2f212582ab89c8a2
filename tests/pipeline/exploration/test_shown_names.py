"""Code points by name; all other names as they are."""

from __future__ import annotations

import pytest

from pipeline.exploration.shown_names import shown_name


@pytest.mark.parametrize(
    ("class_name", "shown"),
    [
        ("u+1f600", "grinning face"),
        ("U+0420", "cyrillic capital letter er"),
        ("u+2764-u+fe0f", "heavy black heart"),
        ("u+0030-u+fe0f-u+20e3", "keycap 0"),
        ("u+0023-u+20e3", "keycap #"),
        ("u+1f1e9-u+1f1ea", "flag: DE"),
        ("u+1f3f4-u+e0067-u+e0062-u+e0065-u+e006e-u+e0067-u+e007f", "flag: GB-ENG"),
        ("u+1f44b-u+1f3fd", "waving hand sign, medium skin tone"),
        ("u+1f3fb", "light skin tone"),
        ("u+1f468-u+200d-u+1f680", "man + rocket"),
        ("u+1f3c3-u+1f3ff-u+200d-u+2640-u+fe0f", "runner, dark skin tone + female sign"),
        ("cat", "cat"),
        ("u+", "u+"),
        ("u+1f600 and more", "u+1f600 and more"),
        ("<b>u+1f600</b>", "<b>u+1f600</b>"),
        ("u+0001", "u+0001"),  # without a name
        ("u+d800", "u+d800"),  # half a surrogate pair
        ("u+110000", "u+110000"),  # no character at all
        ("", ""),
    ],
)
def test_names(class_name: str, shown: str) -> None:
    assert shown_name(class_name) == shown
