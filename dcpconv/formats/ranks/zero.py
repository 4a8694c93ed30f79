"""DeepSpeed ZeRO checkpoints: fp32 weights that lie flat in one file per rank, as boxes of bytes.

Stages 1 and 2 lay the parameters of a group end to end, pad the vector to twice the number of ranks
and cut it evenly, so a parameter may begin in one rank's file and end in another's.  Stage 3 pads
and cuts every parameter by itself; a rank's vector is its cuts, end to end.

Source:
    deepspeed 0.19.8 ``runtime/zero/stage_1_and_2.py`` (``__init__``, ``state_dict``),
    ``runtime/zero/stage3.py`` (``_rigid_state_dict``), ``utils/zero_to_fp32.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, Extent, MadeChunks, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.formats.ranks.intervals import Segment, chunks_of
from dcpconv.formats.ranks.zero_files import ModelFile, OptimFile, ParameterShapes
from dcpconv.formats.ranks.zero_world import ZeroWorld, read_world
from dcpconv.formats.torchfile.archive import StoredTensor

Flat = Callable[[OptimFile, int], StoredTensor | None]
"""The vector of a group in a rank's file; ``None`` where it has none."""

Make = Callable[[], Iterator[Chunk]]
"""Makes the chunks of a tensor."""


def read_catalog(directory: Path, source: Path) -> Catalog:
    """The weights of a run: fp32 masters, or the 16-bit ones where no optimizer was saved.

    Args:
        directory: Where the rank files lie.
        source: What the user named.

    Raises:
        FormatError: A file is missing, damaged or of another save, or parts do not add up.
    """
    return replace(catalog_of(read_world(directory), directory), source=source)


def catalog_of(world: ZeroWorld, root: Path) -> Catalog:
    """The weights of a run whose file names are relative to ``root``."""
    tensors, tied = weights_of(world)
    return Catalog(
        form="ranks",
        path=root,
        source=root,
        files=world.files,
        tensors=tensors,
        tied=tied,
        notes=_notes(world),
        identities=world.identities,
    )


def weights_of(world: ZeroWorld) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of the model in the order of its ``state_dict()``, and which are tied."""
    masters = flat_entries(world, lambda optim, n: optim.groups[n])
    return with_model(world.directory, world.models, masters)


def with_model(
    directory: Path, models: Sequence[ModelFile], masters: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The trained parameters and what the model files have beside them, and which are tied.

    Raises:
        FormatError: A parameter is in no file, or files contradict each other.
    """
    model = models[0]
    # A universal checkpoint has files of second names as well.
    known = {key: entry for key, entry in masters.items() if key not in model.shared}
    known |= _frozen(directory, models)
    _check_shapes(directory, model, known)
    shared = {key: owner for key, owner in model.shared.items() if key not in known}
    shared |= _sharing_storage(model, known.keys() | shared.keys())
    entries: dict[str, TensorEntry] = {}
    lost = [key for key in model.frozen if key not in known]
    for key in dict.fromkeys([*model.module, *known, *shared]):
        stored = model.module.get(key)
        if key in known:
            entries[key] = known[key]
        elif key in shared and shared[key] in known:
            entries[key] = replace(known[shared[key]], key=key)
        elif stored is not None:
            if model.is_split and key not in model.buffers and not stored.nbytes:
                lost.append(key)
            else:
                entries[key] = whole_entry(key, model.file, stored)
    if lost:
        raise FormatError(
            "no rank file holds these parameters",
            [("directory", directory), *(("missing", key) for key in lost)],
        )
    return entries, {key: owner for key, owner in shared.items() if owner in entries}


def flat_entries(world: ZeroWorld, flat: Flat) -> dict[str, TensorEntry]:
    """The trained parameters, or other tensors of their shapes, from vectors of the rank files.

    Raises:
        FormatError: A vector is of another length than its parameters need.
    """
    if not world.optims:
        return {}
    found: dict[str, TensorEntry] = {}
    for numbers, shapes in groups_of(world):
        vectors = [[flat(optim, number) for number in numbers] for optim in world.optims]
        if any(vector is None for row in vectors for vector in row):
            continue
        lengths = [sum(v.shape[0] for v in row if v is not None) for row in vectors]
        segments = [
            _segments(optim.file, [v for v in row if v is not None])
            for optim, row in zip(world.optims, vectors, strict=True)
        ]
        dtype = next(vector.dtype for vector in vectors[0] if vector is not None)
        place = _cut_each if world.stage == 3 else _cut_group
        for key, make in place(world, numbers, shapes, lengths, segments, dtype.itemsize):
            found[key] = TensorEntry(key, dtype, shapes[key], MadeChunks(make))
    return found


def groups_of(world: ZeroWorld) -> list[tuple[tuple[int, ...], ParameterShapes]]:
    """Which vectors hold which parameters.

    Raises:
        FormatError: The files do not have the same groups.
    """
    shapes = world.models[0].groups
    counts = {len(optim.groups) for optim in world.optims}
    if counts == {len(shapes)}:
        return [((number,), group) for number, group in enumerate(shapes)]
    if world.stage == 3 and len(counts) == 1:
        # Sub-groups are cut anywhere; before DeepSpeed 0.4 the shapes were not listed by them.
        return [(tuple(range(*counts)), {k: v for group in shapes for k, v in group.items()})]
    raise FormatError(
        "rank files do not have the parameter groups that the model file lists",
        [
            ("directory", world.directory),
            ("expected", f"{len(shapes)} groups"),
            *(
                ("file", f"{Path(optim.file).name}: {len(optim.groups)} groups")
                for optim in world.optims
                if len(optim.groups) != len(shapes)
            ),
        ],
    )


def _cut_group(
    world: ZeroWorld,
    numbers: tuple[int, ...],
    shapes: ParameterShapes,
    lengths: Sequence[int],
    segments: Sequence[Sequence[Segment]],
    itemsize: int,
) -> Iterator[tuple[str, Make]]:
    """Stages 1 and 2: one vector of all parameters, cut evenly among the ranks."""
    (number,) = numbers
    first, ranks = world.optims[0], len(world.optims)
    gaps: Sequence[int] = ()
    if first.gaps is not None and number < len(first.gaps):
        gaps = first.gaps[number]
    if len(gaps) != len(shapes):
        gaps = (0,) * len(shapes)
    numels = [math.prod(shape) + gap for shape, gap in zip(shapes.values(), gaps, strict=True)]
    needed, size = sum(numels), max(lengths)
    wrong = [
        (rank, max(0, min(size, needed - rank * size)))
        for rank, length in enumerate(lengths)
        if length not in {size, max(0, min(size, needed - rank * size))}
    ]
    if wrong:
        raise _uneven(world, number, [(rank, wanted, lengths[rank]) for rank, wanted in wrong])
    held = sum(lengths)
    if held < needed or _aligned(held, ranks) != _aligned(needed, ranks):
        raise FormatError(
            "the partitions of a group do not add up to its parameters",
            [
                ("directory", world.directory),
                ("group", number),
                ("expected", f"{needed} elements, and padding to a multiple of {2 * ranks}"),
                *(
                    ("file", f"{Path(optim.file).name}: {length} elements")
                    for optim, length in [*zip(world.optims, lengths, strict=True)][:8]
                ),
            ],
            hint="files of different runs were mixed, or the save was interrupted",
        )
    vector = [
        replace(segment, start=rank * size + segment.start)
        for rank, row in enumerate(segments)
        for segment in row
    ]
    starts = accumulate(numels, initial=0)
    for (key, shape), at in zip(shapes.items(), starts, strict=False):
        yield key, partial(chunks_of, shape, vector, at=at, itemsize=itemsize)


def _cut_each(
    world: ZeroWorld,
    numbers: tuple[int, ...],
    shapes: ParameterShapes,
    lengths: Sequence[int],
    segments: Sequence[Sequence[Segment]],
    itemsize: int,
) -> Iterator[tuple[str, Make]]:
    """Stage 3: every parameter is cut by itself; a rank has its cuts in one vector."""
    ranks = len(world.optims)
    parts = [-(-math.prod(shape) // ranks) for shape in shapes.values()]
    needed = sum(parts)
    wrong = [(rank, needed, length) for rank, length in enumerate(lengths) if length != needed]
    if wrong:
        raise _uneven(world, numbers[0], wrong)
    starts = accumulate(parts, initial=0)
    for (key, shape), at, part in zip(shapes.items(), starts, parts, strict=False):
        yield key, partial(_cuts, shape, segments, at, part, itemsize)


def _cuts(
    shape: tuple[int, ...],
    segments: Sequence[Sequence[Segment]],
    at: int,
    part: int,
    itemsize: int,
) -> Iterator[Chunk]:
    numel = math.prod(shape)
    for rank, row in enumerate(segments):
        first, stop = rank * part, min((rank + 1) * part, numel)
        if first >= stop:
            return
        yield from chunks_of(shape, row, at=at, itemsize=itemsize, first=first, stop=stop)


def _segments(file: str, vectors: Sequence[StoredTensor]) -> list[Segment]:
    made: list[Segment] = []
    start = 0
    for vector in vectors:
        if vector.shape[0]:
            made.append(Segment(start, vector.shape[0], file, vector.offset))
        start += vector.shape[0]
    return made


def _aligned(numel: int, ranks: int) -> int:
    """Stages 1 and 2 align a group to two elements per rank."""
    return -(-numel // (2 * ranks)) * 2 * ranks


def _uneven(world: ZeroWorld, number: int, wrong: Sequence[tuple[int, int, int]]) -> FormatError:
    return FormatError(
        "a partition is not as long as its parameters need",
        [
            ("directory", world.directory),
            ("group", number),
            *(
                ("file", f"{Path(world.optims[rank].file).name}: {found} elements, not {wanted}")
                for rank, wanted, found in wrong[:8]
            ),
        ],
        hint="files of different runs were mixed, or the save was interrupted",
    )


def _frozen(directory: Path, models: Sequence[ModelFile]) -> dict[str, TensorEntry]:
    """Parameters that no optimizer knows: whole, or one cut per rank in stage 3."""
    first = models[0]
    if not first.is_split:
        return {
            key: whole_entry(key, first.file, stored)
            for key in first.frozen
            if (stored := first.module.get(key) or first.fragments.get(key)) is not None
        }
    found: dict[str, TensorEntry] = {}
    wrong: list[tuple[str, object]] = []
    for key, shape in first.frozen.items():
        part = -(-math.prod(shape) // len(models))
        segments: list[list[Segment]] = []
        for model in models:
            cut = model.fragments.get(key)
            if cut is None or cut.shape != (part,) or not cut.is_contiguous:
                shown = "no share" if cut is None else f"shape {list(cut.shape)}"
                wrong.append(("file", f"{Path(model.file).name}: {shown} of {key}, not [{part}]"))
            else:
                segments.append(_segments(model.file, [cut]))
                dtype = cut.dtype
        if not wrong:
            make = partial(_cuts, shape, segments, 0, part, dtype.itemsize)
            found[key] = TensorEntry(key, dtype, shape, MadeChunks(make))
    if wrong:
        raise FormatError(
            "shares of frozen parameters do not add up", [("directory", directory), *wrong]
        )
    return found


def whole_entry(key: str, file: str, tensor: StoredTensor) -> TensorEntry:
    """A tensor that one file holds whole."""
    chunk = Chunk(
        (0,) * len(tensor.shape),
        tensor.shape,
        Extent(file, tensor.offset, tensor.nbytes),
        None if tensor.is_contiguous else tensor.strides,
    )
    return TensorEntry(key, tensor.dtype, tensor.shape, (chunk,))


def _sharing_storage(model: ModelFile, known: set[str]) -> dict[str, str]:
    """Second names that DeepSpeed before 0.8 did not list: they have the storage of a first one."""
    owners: dict[object, str] = {}
    for key, tensor in model.module.items():
        if key in known and tensor is not None and tensor.nbytes:
            owners.setdefault((tensor.offset, tensor.shape, tensor.strides), key)
    return {
        key: owners[region]
        for key, tensor in model.module.items()
        if tensor is not None
        and key not in known
        and (region := (tensor.offset, tensor.shape, tensor.strides)) in owners
    }


def _check_shapes(directory: Path, model: ModelFile, known: Mapping[str, TensorEntry]) -> None:
    if model.is_split:
        return
    wrong = [
        ("key", f"{key}: {list(entry.shape)} in param_shapes, {list(stored.shape)} in module")
        for key, entry in known.items()
        if (stored := model.module.get(key)) is not None and stored.shape != entry.shape
    ]
    if wrong:
        raise FormatError(
            "a model file contradicts itself",
            [("file", directory / Path(model.file).name), *wrong],
        )


def _notes(world: ZeroWorld) -> tuple[str, ...]:
    if world.optims:
        ranks = "1 rank" if len(world.optims) == 1 else f"{len(world.optims)} ranks"
        return (f"fp32 weights of {ranks} of DeepSpeed ZeRO-{world.stage} are read as one model",)
    if world.stage:
        return (
            "there are no optimizer files: these are the weights of the forward pass, not fp32",
        )
    return ()
