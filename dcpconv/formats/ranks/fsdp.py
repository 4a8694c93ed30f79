"""Rank files of FSDP trainers: verl's and SkyRL's ``model_world_size_N_rank_R.pt``, accelerate's.

Each is a ``torch.save`` file of one rank's state dict; its tensors say themselves where they
belong (``DTensor``, ``ShardedTensor``).  Every file is opened once, and only its pickle is read.

Source:
    verl 0.4 to 0.7 ``verl/utils/checkpoint/fsdp_checkpoint_manager.py``; accelerate 1.15
    ``utils/fsdp_utils.py`` (``save_fsdp_model``, ``LOCAL_STATE_DICT``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import DcpconvError, FormatError
from dcpconv.formats.collecting import without_garbage_collection
from dcpconv.formats.ranks.flat import FindParameters, is_flat, join_flat
from dcpconv.formats.ranks.joining import Joined, RankFile, join, mesh_ranks, writers
from dcpconv.formats.ranks.siblings import Siblings
from dcpconv.formats.torchfile import is_torch_file
from dcpconv.formats.torchfile.stored import StoredTensor

CONFIG: Final = "fsdp_config.json"
"""Beside verl's rank files: ``FSDP_version`` and ``world_size``."""

_NAME = re.compile(
    r"(?P<stem>.+?)(?:_world_size_(?P<world>\d{1,7}))?_rank_?(?P<rank>\d{1,7})\.(?:pt|pth|bin)"
)
_NO_WEIGHTS = re.compile(r"(?:optim|extra|rng|random|sched|train|data|loader|ema_optim)")
_COMPARED: Final = 1 << 16
"""Bytes of a tensor that are compared between two ranks that both hold all of it."""


@dataclass(frozen=True, slots=True)
class RankSet:
    """Files of one state dict.

    Attributes:
        stem: What their names share: ``model``, ``pytorch_model_fsdp``.
        world: Ranks that the names speak of, or ``None``.
        names: File by rank.
    """

    stem: str
    world: int | None
    names: Mapping[int, str]

    def name(self, rank: int) -> str:
        """The file that a rank should have."""
        some, name = next(iter(self.names.items()))
        head, digits, tail = name.rpartition(str(some))
        return self.names.get(rank, f"{head}{rank:0{len(digits)}d}{tail}" if head else name)

    def lost(self, world: int) -> list[str]:
        """Files that should be there."""
        return [self.name(rank) for rank in range(world) if rank not in self.names]


def find_sets(directory: Path, *, optimizer: bool = False) -> list[RankSet]:
    """The sets of rank files in a directory, by their names alone.

    Args:
        directory: Where they lie.
        optimizer: Those of the optimizer instead of those of the weights.
    """
    found: dict[tuple[str, int | None], dict[int, str]] = {}
    for item in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(item.name)
        if match is None or not item.is_file():
            continue
        stem = match["stem"]
        is_wanted = stem.startswith("optim") if optimizer else _NO_WEIGHTS.match(stem) is None
        if is_wanted:
            world = int(match["world"]) if match["world"] else None
            found.setdefault((stem, world), {})[int(match["rank"])] = item.name
    return [RankSet(stem, world, names) for (stem, world), names in found.items()]


def is_rank_directory(path: Path) -> bool:
    """Whether a directory holds weights in one file per rank."""
    return any(is_torch_file(path / next(iter(found.names.values()))) for found in find_sets(path))


def read_catalog(
    path: Path, problems: list[str] | None = None, parameters: FindParameters | None = None
) -> Catalog:
    """Everything in the rank files of a directory, each tensor as one.

    Args:
        path: The directory.
        problems: Collects files that are lost or damaged instead of raising.
        parameters: Looks for names and shapes of parameters that lie flat in the files.

    Raises:
        FormatError: Files are lost, damaged, of another world, or do not fit together.
    """
    found = _only_set(path)
    with without_garbage_collection():
        files, lost = read_set(path, found, problems)
        joined = join_flat(path, files, parameters) if is_flat(files) else join(files)
    joined.faults += _copies(path, files, joined)
    if problems is None or not lost:
        joined.require(path)
    count = f"{len(files)} rank files are" if len(files) != 1 else "one rank file is"
    notes = [f"{count} read as one model", *_unlike(path, files, joined)]
    return Catalog(
        form="torch",
        path=path,
        source=path,
        files={file.name: file.nbytes for file in files},
        tensors=joined.tensors,
        objects=joined.objects,
        paths=joined.paths,
        tied=joined.tied,
        notes=tuple(notes),
        identities={file.name: file.identity for file in files},
    )


def read_set(
    directory: Path, found: RankSet, problems: list[str] | None = None
) -> tuple[list[RankFile], list[str]]:
    """The leaves of every rank's file, in the order of ranks, and the names of lost files.

    Args:
        directory: Where the files lie.
        found: The files.
        problems: Collects files that are lost or damaged instead of raising.

    Raises:
        FormatError: Files are lost, damaged, or of another world than their names say.
    """
    files: list[RankFile] = []
    wrong: list[str] = []
    siblings = Siblings()
    if found.world is not None and (lost := found.lost(found.world)):
        _report_lost(directory, lost, problems)
        wrong += lost
    for rank in sorted(found.names):
        name = found.names[rank]
        try:
            contents = siblings.read(directory / name)
        except DcpconvError as error:
            if problems is None:
                raise
            problems.append(f"{name}: {error.headline}")
            wrong.append(name)
            continue
        files.append(RankFile(name, rank, contents.identity, contents.leaves))
    world = found.world or max(mesh_ranks(files), max(found.names) + 1)
    if found.world is None and (lost := found.lost(world)):
        _report_lost(directory, lost, problems)
        wrong += lost
    _check_world(directory, found, files)
    return files, wrong


def _only_set(path: Path) -> RankSet:
    sets = find_sets(path)
    if len(sets) > 1:
        kinds = [
            f"{found.name(min(found.names))} and {len(found.names) - 1} more" for found in sets
        ]
        raise FormatError(
            "the directory holds rank files of several saves",
            [("directory", path), *(("found", kind) for kind in kinds)],
            hint="move those that are not wanted elsewhere; file dates tell the newest",
        )
    return sets[0]


def _report_lost(directory: Path, lost: Sequence[str], problems: list[str] | None) -> None:
    if problems is not None:
        problems.extend(f"{name} is missing" for name in lost)
        return
    shown = [("missing", name) for name in lost[:8]]
    more = [("missing", f"and {len(lost) - 8} more")] if len(lost) > 8 else []
    raise FormatError(
        "files of ranks are missing",
        [("directory", directory), *shown, *more],
        hint="fetch them; the others cannot be used without",
    )


def _check_world(directory: Path, found: RankSet, files: Sequence[RankFile]) -> None:
    """Names, meshes and config must speak of the same number of ranks."""
    world = found.world
    facts: list[tuple[str, object]] = []
    if world is not None:
        beyond = [name for rank, name in sorted(found.names.items()) if rank >= world]
        facts += [("beyond", f"{name}, of {world} ranks") for name in beyond]
        of_mesh = mesh_ranks(files)
        if of_mesh > world:
            facts.append(("file", f"{files[0].name} was saved by {of_mesh} ranks"))
        stated = _stated_world(directory)
        if stated is not None and stated != world:
            names = f"{found.name(0)}, ..."
            facts.append((CONFIG, f"world_size {stated}, where files are {names}"))
    said = writers(files)
    if len(set(said.values())) == len(files):  # each is of another rank: then they are right
        facts += [
            ("file", f"{file.name} holds the share of rank {said[file.name]}")
            for file in files
            if said[file.name] != file.rank
        ]
    if facts:
        raise FormatError(
            "rank files are not of the world that their names say",
            [("directory", directory), *facts[:8]],
            hint="files of two saves are mixed, or were renamed; copy the directory again",
        )


def _stated_world(directory: Path) -> int | None:
    try:
        fields = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    stated = fields.get("world_size") if isinstance(fields, dict) else None
    return stated if type(stated) is int else None


def _copies(directory: Path, files: Sequence[RankFile], joined: Joined) -> list[tuple[str, object]]:
    """Files that say they are of one rank and hold the same bytes for different boxes."""
    owners: dict[int, str] = {}
    found: list[tuple[str, object]] = []
    for name, own in writers(files).items():
        owner = owners.setdefault(own, name)
        if owner != name and _hold_the_same(directory, owner, name, joined):
            found.append(("file", f"{name} is a copy of {owner}"))
    return found


def _hold_the_same(directory: Path, one: str, other: str, joined: Joined) -> bool:
    compared = 0
    with (directory / one).open("rb") as first, (directory / other).open("rb") as second:
        for entry in joined.tensors.values():
            extents = {chunk.extent.file: chunk.extent for chunk in entry.chunks}
            if one not in extents or other not in extents:
                continue
            read = []
            for file, extent in ((first, extents[one]), (second, extents[other])):
                file.seek(extent.offset)
                read.append(file.read(min(extent.nbytes, _COMPARED)))
            if read[0] != read[1]:
                return False
            compared += 1
    return compared > 0


def _unlike(directory: Path, files: Sequence[RankFile], joined: Joined) -> list[str]:
    """A note on tensors that each rank holds whole, but not alike, as running statistics may be.

    Raises:
        FormatError: No tensor is in pieces, and those that should be copies differ: nothing says
            how the files belong together.
    """
    if len(files) < 2:
        return []
    first, second = files[0], files[1]
    differing = [
        key
        for key in joined.alike
        if _start(directory, first, key) != _start(directory, second, key)
    ]
    if differing and len(joined.alike) == len(joined.tensors):
        raise FormatError(
            "ranks hold different tensors under one key, and nothing says how they fit together",
            [
                ("files", f"{first.name}, {second.name}"),
                *(("key", key) for key in differing[:8]),
            ],
            hint="if they are different models, give the file of one",
        )
    if not differing:
        return []
    shown = ", ".join(differing[:4]) + (" and more" if len(differing) > 4 else "")
    return [f"{shown}: ranks hold other values; those of rank {first.rank} are taken"]


def _start(directory: Path, file: RankFile, key: str) -> bytes | None:
    """First bytes of a tensor that the file holds whole."""
    leaf = file.leaves.get(key, ((), None))[1]
    if not isinstance(leaf, StoredTensor):
        return None
    with (directory / file.name).open("rb") as opened:
        opened.seek(leaf.offset)
        return opened.read(min(leaf.nbytes, _COMPARED))
