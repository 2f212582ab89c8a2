"""The page of messages says what the commands say."""

from __future__ import annotations

from tools.error_page import PAGE, page


def test_the_page_of_messages_is_up_to_date() -> None:
    assert page() == PAGE.read_text(encoding="utf-8"), "run `python -m tools.error_page`"
