"""Text out of a file on its way to a terminal: nothing in it may move the cursor or the eye."""

from __future__ import annotations

import re

_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: colours, titles, line ends
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # no width, or other reading order
    "\ud800-\udfff]"  # halves of a pair, which no encoding can print
)


def printable(text: str) -> str:
    r"""The text on one line, with everything escaped that a terminal would act on.

    >>> printable("a\x1b]0;title\x07b")
    'a\\x1b]0;title\\x07b'
    """
    return _ACTIVE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "backslashreplace").decode("ascii")
