"""Which files of a directory hold an hf checkpoint, and whether they agree with its index.

Works on names alone, so that a directory here and a repository on a hub are judged alike.

Source: transformers 5.23 ``modeling_utils.py`` for the names of files and index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping

from dcpconv.core.errors import FormatError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def parse_index(data: bytes, where: object) -> dict[str, str]:
    """Key -> file name, as an index says.

    Raises:
        FormatError: It is no index, or names files outside its directory.
    """
    try:
        weight_map = json.loads(data)["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map names something that is no file")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            "the index cannot be read", [("file", where), ("because", error)]
        ) from None
    names = set(weight_map.values())
    outside = [n for n in sorted(names) if "/" in n or "\\" in n or n.startswith(".")]
    if outside:
        raise FormatError(
            "the index names files outside its directory",
            [("index", where), *(("file", name) for name in outside)],
        )
    return dict(weight_map)


def choose(
    present: Collection[str], weight_map: Mapping[str, str] | None, found: list[str]
) -> list[str]:
    """The files to read; those the index names and nobody has are added to ``found``.

    Args:
        present: Names in the directory.
        weight_map: Of the index, where there is one that counts.
        found: Problems, one sentence each.
    """
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        found.extend(
            f"{name} is named by the index but absent" for name in names if name not in present
        )
        return [name for name in names if name in present]
    if SINGLE in present:
        return [SINGLE]
    return sorted(name for name in present if name.endswith(".safetensors"))


def strays(present: Collection[str], weight_map: Mapping[str, str] | None) -> Iterator[str]:
    """Shard files that do not belong to the set: left over, or of a set that is not complete.

    Other safetensors beside an index (Mistral's ``consolidated.safetensors``) are no shard files
    of it, and nothing is said about them.
    """
    numbered = {name: found for name in present if (found := _NUMBERED.fullmatch(name))}
    if weight_map is not None:
        named = set(weight_map.values())
        stems = {found[1] for name in named if (found := _NUMBERED.fullmatch(name))}
        for name, found in sorted(numbered.items()):
            if name not in named and found[1] in stems:
                yield f"{name} is an orphan: the index does not name it"
        return
    if SINGLE in present:
        for name, found in sorted(numbered.items()):
            if found[1] == "model":
                yield f"{name} is an orphan: {SINGLE} beside it is what loaders read"
        return
    sets: dict[tuple[str, int], set[int]] = {}
    for found in numbered.values():
        sets.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (stem, total), numbers in sorted(sets.items()):
        if len(numbers) < total:
            first = next(number for number in range(1, total + 1) if number not in numbers)
            name = f"{stem}-{first:05}-of-{total:05}.safetensors"
            others = f", and {total - len(numbers) - 1} more" if total > len(numbers) + 1 else ""
            yield f"{name} is absent{others}"


def index_problems(
    weight_map: Mapping[str, str] | None,
    files_of: Mapping[str, str],
    files: Collection[str],
) -> Iterator[str]:
    """Where the index and the files that could be read contradict each other.

    Args:
        weight_map: Key -> file name, as the index says.
        files_of: Key -> file name, as the files say.
        files: Names of the files that were read; the others are reported themselves.
    """
    for key, name in (weight_map or {}).items():
        if name not in files:
            continue
        if key not in files_of:
            yield f"the index puts {key} into {name}, which does not hold it"
        elif files_of[key] != name:
            yield f"the index puts {key} into {name}; {files_of[key]} holds it"


def unnamed(weight_map: Mapping[str, str] | None, files_of: Mapping[str, str]) -> Iterator[str]:
    """Keys in the files that the index passes over."""
    if weight_map is None:
        return
    for key, name in files_of.items():
        if key not in weight_map:
            yield f"{name} holds {key}, which the index does not name"
