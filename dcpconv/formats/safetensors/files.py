"""The hf form: a directory of ``*.safetensors`` with, above one file, an index.

Source:
    safetensors README, "Format": eight bytes of header length, a JSON header, the tensors' bytes
    without holes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dcpconv.core.catalog import Catalog, Chunk, Identity, TensorEntry
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill, OutFile, Outline, OutTensor
from dcpconv.formats.boxes import inspect_boxes
from dcpconv.formats.collecting import without_garbage_collection
from dcpconv.formats.safetensors.header import parse_entries, parse_header
from dcpconv.formats.safetensors.index import (
    INDEX,
    SINGLE,
    choose,
    index_problems,
    parse_index,
    strays,
    unnamed,
)
from dcpconv.formats.safetensors.metadata import united
from dcpconv.stores.local import OpenFile, identities_of, read_regular
from dcpconv.stores.remote import read_heads_ahead

MAX_FILE_SIZE = 5 * 10**9
"""Bytes per shard file, huggingface_hub's own default of 5 GB."""

_RANK_FILE = re.compile(r"shard-(\d{5})-")
_LARGEST_INDEX = 1 << 28
"""Bytes; the index of a 671B model takes 9 MB."""


def is_hf(path: Path) -> bool:
    """Whether a path is a safetensors file, or a directory that holds some."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and any(file.is_file() for file in path.glob("*.safetensors"))


def read_catalog(path: Path, *, problems: list[str] | None = None) -> Catalog:
    """Reads the headers of a safetensors file or directory.

    Also reads transformers' distributed form, whose files hold local slices under full names and
    say where in ``DCP_SHARDING_INFO``.

    Args:
        path: One file, or a directory.
        problems: Collects what is wrong instead of raising, so that ``check`` can list it all.

    Raises:
        FormatError: A file is truncated, malformed or absent, or the index contradicts the files;
            everything found is listed.
    """
    with without_garbage_collection():
        return _read_catalog(path, problems)


def _read_catalog(path: Path, problems: list[str] | None) -> Catalog:
    found = problems if problems is not None else []
    directory = path if path.is_dir() else path.parent
    weight_map = None
    identities: dict[str, Identity] = {}
    present: Collection[str] = (path.name,)
    if path.is_dir():
        present = {file.name for file in path.glob("*.safetensors") if file.is_file()}
        identities = identities_of(directory, [INDEX])
        weight_map = _read_index(directory)
        found.extend(strays(present, weight_map) if problems is not None else ())
    names = choose(present, weight_map, found) if path.is_dir() else [path.name]
    identities = (identities if weight_map is not None else {}) | identities_of(directory, names)
    read_heads_ahead(directory, names)
    catalog = gather(
        names,
        lambda name: _read_file(directory, name),
        weight_map=weight_map,
        directory=directory,
        source=path,
        found=found,
        is_strict=problems is None,
    )
    return replace(catalog, identities=identities)


Headed = tuple[int, list[TensorEntry], Mapping[str, str]]
"""Size of a shard file in bytes, its tensors, and its ``__metadata__``."""


def gather(
    names: Iterable[str],
    read: Callable[[str], Headed],
    *,
    weight_map: Mapping[str, str] | None,
    directory: Path,
    source: Path,
    found: list[str],
    is_strict: bool,
) -> Catalog:
    """Puts the headers of shard files together, wherever the files are.

    Args:
        names: The files.
        read: Header of one file; raises FormatError.
        weight_map: Key -> file name, where there is an index.
        directory: What ``Extent.file`` is relative to.
        source: What the user named.
        found: Problems so far; more are added.
        is_strict: Raise what was found.

    Raises:
        FormatError: Only if ``is_strict``.
    """
    files: dict[str, int] = {}
    chunks: dict[str, list[tuple[Chunk, TensorEntry]]] = {}
    said: dict[str, Mapping[str, str]] = {}
    for name in names:
        try:
            size, entries, said[name] = read(name)
            offsets = saved_offsets(said[name], directory / name)
        except FormatError as error:
            if is_strict:
                raise
            found.append(error.in_one_line)
            continue
        files[name] = size
        for entry in entries:
            at = offsets.get(entry.key)
            if at is None and entry.key in chunks:
                found.append(f"{entry.key} is in {name} and in {_file_of(chunks[entry.key])}")
                continue
            if at is not None and len(at) != len(entry.shape):
                found.append(f"{name}: DCP_SHARDING_INFO of {entry.key} has {len(at)} dims")
                continue
            chunk = entry.chunks[0]
            placed = chunk if at is None else Chunk(at, chunk.sizes, chunk.extent)
            chunks.setdefault(entry.key, []).append((placed, entry))
    files_of = {key: _file_of(parts) for key, parts in chunks.items()}
    found.extend(index_problems(weight_map, files_of, files))
    found.extend(_slice_problems(chunks, files))
    if is_strict and found:
        raise FormatError(
            "the shard files do not hold what they should",
            [("source", source), *(("problem", text) for text in found)],
            hint="fetch the named files again",
        )
    if not is_strict:
        found.extend(unnamed(weight_map, files_of))
    tensors = {key: _assemble(key, parts) for key, parts in chunks.items()}
    if weight_map is not None:
        tensors = {key: tensors[key] for key in weight_map if key in tensors} | tensors
    skipped = _skipped(files)
    metadata, notes = united(said)
    if skipped and not found:
        notes = (_skipped_note(skipped), *notes)
    return Catalog("hf", directory, source, files, tensors, notes=notes, metadata=metadata)


def outline(
    tensors: Sequence[OutTensor],
    *,
    modulus: int,
    max_file_size: int = MAX_FILE_SIZE,
    metadata: Mapping[str, str] | None = None,
    stem: str = "",
) -> Outline:
    """Places tensors into shard files, split as huggingface_hub splits them.

    Where more than half of a file's bytes can lie at the same offset modulo ``modulus`` as in
    their source, the header is padded for it: a file system can then share blocks.

    Args:
        tensors: Whole tensors, one chunk each, with bare keys.
        modulus: Block size to line up with, in bytes; a multiple of 8.
        max_file_size: Bytes of tensors in one file at most; a larger tensor gets its own file.
        metadata: Entries of ``__metadata__``, which every file says.
        stem: Goes into the names of several files, where others have to stay.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # noqa: PLC0415  slow import

    by_key = {tensor.key: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_key,
        get_storage_size=lambda tensor: tensor.chunks[0].fill.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_size,
    )
    files = tuple(
        one_file(name, [by_key[key] for key in keys], modulus=modulus, metadata=metadata)
        for name, keys in split.filename_to_tensors.items()
    )
    if stem and len(files) > 1:
        renamed = {file.name: file.name.replace("model-", f"model-{stem}-") for file in files}
        files = tuple(replace(file, name=renamed[file.name]) for file in files)
    else:
        renamed = {file.name: file.name for file in files}
    if len(files) <= 1:
        return Outline(files or (one_file(SINGLE, [], modulus=modulus, metadata=metadata),))
    index = {
        "metadata": {"total_size": sum(tensor.chunks[0].fill.nbytes for tensor in tensors)},
        "weight_map": {
            key: renamed[name] for key, name in sorted(split.tensor_to_filename.items())
        },
    }
    return Outline(files, ((INDEX, (json.dumps(index, indent=2) + "\n").encode()),))


def _read_file(directory: Path, name: str) -> Headed:
    where = directory / name
    try:
        with OpenFile(where) as file:
            size = file.nbytes
            start, header = parse_header(file.read, size, where)
    except OSError as error:
        raise FormatError(
            "cannot read the shard file", [("file", where), ("because", error.strerror)]
        ) from None
    entries = parse_entries(header, start, size, name, where)
    return size, entries, header.get("__metadata__") or {}


def saved_offsets(metadata: object, where: object) -> dict[str, tuple[int, ...]]:
    """Where the slices of transformers' distributed form begin, by key; empty for plain files.

    Source:
        torch 2.13 ``distributed/checkpoint/_hf_utils.py``, ``DCP_SHARDING_INFO``.
    """
    if not isinstance(metadata, dict) or "DCP_SHARDING_INFO" not in metadata:
        return {}
    try:
        info = json.loads(metadata["DCP_SHARDING_INFO"])
        return {key: _offsets(value["saved_offsets"]) for key, value in info.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            "DCP_SHARDING_INFO cannot be read", [("file", where), ("because", error)]
        ) from None


def _offsets(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or any(
        type(n) is not int or not 0 <= n < 1 << 62 for n in value
    ):
        raise ValueError(f"saved_offsets are {value!r:.80}")
    return tuple(value)


def _counted(tensor: OutTensor) -> list[int]:
    """A shape as safetensors counts it: in numbers, where a byte holds several."""
    *outer, last = tensor.shape or (1,)
    if tensor.dtype.packed == 1:
        return list(tensor.shape)
    return [*outer, last * tensor.dtype.packed]


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.is_file() or (directory / SINGLE).is_file():
        return None  # a lone model.safetensors is what from_pretrained reads first
    try:
        return parse_index(read_regular(path, most=_LARGEST_INDEX), path)
    except OSError as error:
        raise FormatError(
            "the index cannot be read", [("file", path), ("because", error)]
        ) from None


def _file_of(parts: list[tuple[Chunk, TensorEntry]]) -> str:
    return parts[0][0].extent.file


def _assemble(key: str, parts: list[tuple[Chunk, TensorEntry]]) -> TensorEntry:
    if len(parts) == 1 and not any(parts[0][0].offsets):
        return parts[0][1]
    chunks = tuple(sorted((chunk for chunk, _ in parts), key=lambda chunk: chunk.offsets))
    ends = (
        tuple(o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks
    )
    shape = tuple(max(dim) for dim in zip(*ends, strict=True))
    return TensorEntry(key, parts[0][1].dtype, shape, chunks)


def _slice_problems(
    chunks: Mapping[str, list[tuple[Chunk, TensorEntry]]], files: Iterable[str]
) -> Iterator[str]:
    """Gaps and overlaps, and which files they may be lost in.

    A gap in the numbers alone says nothing: ranks that had nothing to write leave one.  What only
    a lost file held, whole, shows only against a config.

    Source:
        torch 2.13 ``distributed/checkpoint/hf_storage.py``: numbers are ranks, plus one.
    """
    problems = []
    for key, parts in chunks.items():
        entry = _assemble(key, parts)
        boxes = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
        problems += [f"{key}: {problem}" for problem in inspect_boxes(entry.shape, boxes)]
    if problems:
        yield from (
            f"shard-{n:05d}-*.safetensors is absent, a later one is there" for n in _skipped(files)
        )
    yield from problems


def _skipped_note(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
    return f"no shard file has number {listed}; every tensor of the others is whole"


def _skipped(files: Iterable[str]) -> list[int]:
    """Numbers that no file of the distributed form has, below the highest."""
    numbers = {int(match[1]) for name in files if (match := _RANK_FILE.match(name))}
    return sorted(set(range(1, max(numbers, default=0))) - numbers)


def one_file(
    name: str,
    tensors: Iterable[OutTensor],
    *,
    modulus: int,
    metadata: Mapping[str, str] | None = None,
) -> OutFile:
    """One file of a given name with all of these tensors, placed as ``outline`` does."""
    # Wide types first keep every tensor aligned to its own element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    fills: list[tuple[int, Fill]] = []
    wishes: dict[int, int] = {}
    position = 0
    for tensor in tensors:
        fill = tensor.chunks[0].fill
        header[tensor.key] = {
            "dtype": tensor.dtype.safetensors,
            "shape": _counted(tensor),
            "data_offsets": [position, position + fill.nbytes],
        }
        fills.append((position, fill))
        congruence = fill.congruence(modulus)
        if congruence is not None and (congruence - position) % 8 == 0:
            wish = (congruence - position) % modulus
            wishes[wish] = wishes.get(wish, 0) + fill.nbytes
        position += fill.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    best = max(wishes, key=lambda wish: (wishes[wish], -wish), default=0)
    start = 8 + len(text)
    if 2 * wishes.get(best, 0) > position:
        start += (best - start) % modulus
    else:  # too little to gain: files of torch's own DCP line up in no two tensors
        start += -start % 8
    head = struct.pack("<Q", start - 8) + text.ljust(start - 8)
    return OutFile(
        name,
        start + position,
        ((0, head),),
        tuple((start + offset, fill) for offset, fill in fills),
    )
