"""Keys that differ only in their numbers, as one: ``layers.{0..31}.attention.wo.weight``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dcpconv.core.printing import printable
from dcpconv.families.keymaps import split_key
from dcpconv.plan.coverage import Fault

_DOTTED = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class Folded:
    """Faults that differ only in the numbers of their keys.

    Attributes:
        key: The keys, with ranges in place of numbers.
        why: The reason, with the same ranges.
        count: Keys.
        first: One of them, as it is.
    """

    key: str
    why: str
    count: int
    first: Fault

    def __str__(self) -> str:
        many = f"{self.count:,} keys" if self.count > 1 else ""
        return "  ".join(part for part in (self.key, many, self.why) if part)


def fold(faults: Iterable[Fault]) -> list[Folded]:
    """Faults with the same reason under one key, in the order of their first.

    >>> faults = [Fault(f"layers.{n}.wo", f"needs h.{n}.o") for n in (0, 1, 2, 5)]
    >>> [(folded.key, folded.why) for folded in fold(faults)]
    [('layers.{0..2,5}.wo', 'needs h.{0..2,5}.o')]
    """
    groups: dict[tuple[str, str], dict[tuple[int, ...], Fault]] = {}
    for fault in faults:
        template, numbers = split_key(printable(fault.key))
        why = _template(printable(fault.why), numbers)
        groups.setdefault((template, why), {})[numbers] = fault
    folded = []
    for (template, why), members in groups.items():
        for box in _boxes(list(members)):
            ranges = [_range(numbers) for numbers in box]
            count = 1
            for numbers in box:
                count *= len(numbers)
            first = members[tuple(numbers[0] for numbers in box)]
            key = _filled(template.split("{}"), ranges)
            reason = _reason(why, ranges)
            # In one naming a key needs itself, which says nothing.
            folded.append(Folded(key, "" if first.kind == "absent" else reason, count, first))
    return folded


def _template(why: str, numbers: tuple[int, ...]) -> str:
    """The reason with the key's own numbers taken out."""
    if not numbers:
        return why

    def mark(found: re.Match[str]) -> str:
        number = int(found[0])
        return f"\0{numbers.index(number)}\0" if number in numbers else found[0]

    return _DOTTED.sub(mark, why)


def _reason(template: str, ranges: Sequence[str]) -> str:
    parts = template.split("\0")
    return "".join(ranges[int(part)] if at % 2 else part for at, part in enumerate(parts))


def _filled(parts: Sequence[str], ranges: Sequence[str]) -> str:
    return "".join(part + (ranges[at] if at < len(ranges) else "") for at, part in enumerate(parts))


def _boxes(members: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Sets of numbers per place whose products are the members, each member once."""
    if not members[0]:
        yield ()
        return
    last: dict[tuple[int, ...], list[int]] = {}
    for member in members:
        last.setdefault(member[:-1], []).append(member[-1])
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prefix, ends in last.items():
        alike.setdefault(tuple(sorted(ends)), []).append(prefix)
    for numbers, prefixes in alike.items():
        for box in _boxes(prefixes):
            yield (*box, numbers)


def _range(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as people write them.

    >>> _range([3]), _range([0, 1, 2, 5])
    ('3', '{0..2,5}')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"
