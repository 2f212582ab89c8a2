"""Names of classes as a page shows them: code points ("u+1f600") by their Unicode names, every other name as it is."""

from __future__ import annotations

import functools
import re
import unicodedata

_CODE_POINTS = re.compile(r"u\+[0-9a-f]{4,6}(-u\+[0-9a-f]{4,6})*", re.IGNORECASE)
_JOINER, _KEYCAP, _BLACK_FLAG = "\u200d", "\u20e3", "\U0001f3f4"
_VARIATION_SELECTORS = ("\ufe0e", "\ufe0f")  # text or picture: the same character
_SKIN_TONES = {
    chr(0x1F3FB + i): tone for i, tone in enumerate(("light", "medium-light", "medium", "medium-dark", "dark"))
}
_REGIONS = {chr(0x1F1E6 + i): chr(ord("A") + i) for i in range(26)}  # a flag is the two letters of its country
_TAGS = {
    chr(0xE0000 + i): chr(i).upper() for i in range(0x20, 0x7F)
}  # after a black flag: letters of a part of a country
_LAST_TAG = "\U000e007f"


@functools.cache
def shown_name(class_name: str) -> str:
    """The name that is shown for a class: "grinning face" for "u+1f600", "flag: DE" for "u+1f1e9-u+1f1ea".

    A name that is no sequence of code points, or has one without a Unicode name, is returned as it is.
    """
    if not _CODE_POINTS.fullmatch(class_name):
        return class_name
    try:
        characters = "".join(chr(int(code[2:], 16)) for code in class_name.split("-"))
        return _sequence_name(characters)
    except ValueError:  # not a character, or one without a name
        return class_name


def _sequence_name(characters: str) -> str:
    """The name of an emoji sequence.

    Raises:
        ValueError: A character has no name.
    """
    for selector in _VARIATION_SELECTORS:
        characters = characters.replace(selector, "")
    if len(characters) == 2 and all(c in _REGIONS for c in characters):
        return f"flag: {_REGIONS[characters[0]]}{_REGIONS[characters[1]]}"
    if characters.startswith(_BLACK_FLAG) and characters.endswith(_LAST_TAG):
        letters = "".join(_TAGS[c] for c in characters[1:-1] if c in _TAGS)
        return f"flag: {letters[:2]}-{letters[2:]}"
    if len(characters) == 2 and characters[1] == _KEYCAP:
        return f"keycap {characters[0]}"
    return " + ".join(_part_name(part) for part in characters.split(_JOINER))


def _part_name(part: str) -> str:
    tones = [f"{_SKIN_TONES[c]} skin tone" for c in part if c in _SKIN_TONES]
    names = [unicodedata.name(c).lower() for c in part if c not in _SKIN_TONES]
    return ", ".join([" ".join(names), *tones] if names else tones)
