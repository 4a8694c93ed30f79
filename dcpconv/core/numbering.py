"""What numbers can mean when they count only some of a list of names, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def some_of(
    numbers: Sequence[object], names: Sequence[str], fits: Callable[[object, str], bool]
) -> list[list[str]]:
    """The first and the last choice of names that fit the numbers one after the other.

    Every other choice lies between them, so where both are the same there is no other.

    Args:
        numbers: What is counted.
        names: What it may be, in order.
        fits: Whether a number can mean a name.

    Returns:
        Nothing, where no choice fits; else the two.

    >>> sizes = {"a": 2, "b": 3, "c": 3}
    >>> some_of([3], "abc", lambda size, name: size == sizes[name])
    [['b'], ['c']]
    """
    first = _first(numbers, names, fits)
    last = _first(numbers[::-1], names[::-1], fits)
    return [first, last[::-1]] if first is not None and last is not None else []


def _first(
    numbers: Sequence[object], names: Sequence[str], fits: Callable[[object, str], bool]
) -> list[str] | None:
    rest = iter(names)
    found = []
    for number in numbers:
        name = next((name for name in rest if fits(number, name)), None)
        if name is None:
            return None
        found.append(name)
    return found
