"""Text out of a file on its way to a terminal: nothing in it may move the cursor or the eye."""

from __future__ import annotations

import re

_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: colours, titles, line ends
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # no width, or another order
    "\ud800-\udfff]"  # halves of a pair, which no encoding can print
)


def printable(text: str, *, spelled: str = "") -> str:
    r"""The text on one line, with everything escaped that a terminal would act on.

    Args:
        text: May come from a file.
        spelled: How a character is written by its number, such as ``\u{:04x}``; else as Python
            writes it.

    >>> printable("a\x1b]0;title\x07b")
    'a\\x1b]0;title\\x07b'
    """
    if spelled:
        return _ACTIVE.sub(lambda found: spelled.format(ord(found[0])), text)
    return _ACTIVE.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_lines(text: str, *, spelled: str = "") -> str:
    """The same, where line ends are ours."""
    return "\n".join(printable(line, spelled=spelled) for line in text.split("\n"))
