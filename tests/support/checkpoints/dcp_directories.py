"""DCP directories for tests: drawn from tensors, written out, and read back byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dcpconv.core.catalog import Catalog, KeyPath
from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.outline import Fill, OutChunk, Outline, OutTensor, Part
from dcpconv.formats.dcp.directory import outline
from support.checkpoints.engine_cases import slow_file

Region = tuple[tuple[int, ...], tuple[int, ...]]


def dtype_of(tensor: torch.Tensor) -> DType:
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


def raw(tensor: torch.Tensor) -> bytes:
    """The elements in C order, as they lie in memory."""
    storage = tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage()
    return bytes(storage.tolist())  # type: ignore[no-untyped-call]


def rows(shape: Sequence[int], count: int) -> list[Region]:
    """``count`` row chunks, cut as FSDP2 cuts them; empty ones left out."""
    if 0 in shape[:1] or not shape:
        return [((0,) * len(shape), tuple(shape))]
    step = -(-shape[0] // count)
    tail = tuple(shape[1:])
    zeros = (0,) * len(tail)
    return [
        ((start, *zeros), (min(step, shape[0] - start), *tail))
        for start in range(0, shape[0], step)
    ]


def out_tensor(path: KeyPath, tensor: torch.Tensor, boxes: Iterable[Region]) -> OutTensor:
    """A tensor whose box ``i`` is filled from the source file ``key:i``."""
    key, dtype = ".".join(map(str, path)), dtype_of(tensor)
    chunks = []
    for number, (offsets, sizes) in enumerate(boxes):
        numel = torch.Size(sizes).numel()
        parts = (Part(f"{key}:{number}", 0, 0, ((numel, 1, 1),) if numel > 1 else ()),)
        fill = Fill(dtype, dtype, numel, parts if numel else ())
        chunks.append(OutChunk(tuple(offsets), tuple(sizes), fill))
    return OutTensor(key, path, dtype, tuple(tensor.shape), tuple(chunks))


def sources(
    tensors: Mapping[KeyPath, torch.Tensor], boxes: Mapping[KeyPath, list[Region]]
) -> dict[str, bytes]:
    """The source files that ``out_tensor`` names."""
    return {
        f"{'.'.join(map(str, path))}:{number}": raw(tensor[_index(box)])
        for path, tensor in tensors.items()
        for number, box in enumerate(boxes[path])
    }


def write(
    root: Path,
    tensors: Mapping[KeyPath, torch.Tensor],
    objects: Mapping[KeyPath, object] | None = None,
    *,
    chunks: int = 1,
    max_file_size: int | None = None,
) -> Outline:
    """A directory as ``outline`` draws it, in row chunks."""
    boxes = {path: rows(tensor.shape, chunks) for path, tensor in tensors.items()}
    drawn = outline(
        [out_tensor(path, tensor, boxes[path]) for path, tensor in tensors.items()],
        objects or {},
        max_file_size=max_file_size,
    )
    write_outline(root, drawn, sources(tensors, boxes))
    return drawn


def write_outline(root: Path, drawn: Outline, files: Mapping[str, bytes]) -> None:
    """Every file of an outline."""
    root.mkdir(parents=True, exist_ok=True)
    for file in drawn.files:
        (root / file.name).write_bytes(slow_file(file, files))
    for name, data in drawn.commit:
        (root / name).write_bytes(data)


def read_tensor(catalog: Catalog, key: str) -> torch.Tensor:
    """A tensor put together from the bytes that the catalog points at."""
    entry = catalog.tensors[key]
    dtype: torch.dtype = getattr(torch, entry.dtype.name)
    whole = torch.empty(entry.shape, dtype=dtype)
    filled = torch.zeros(entry.shape, dtype=torch.uint8)
    for chunk in entry.chunks:
        with (catalog.path / chunk.extent.file).open("rb") as file:
            file.seek(chunk.extent.offset)
            data = bytearray(file.read(chunk.extent.nbytes))
        index = _index((chunk.offsets, chunk.sizes))
        if data:
            flat = torch.frombuffer(data, dtype=dtype)
            strides = chunk.strides or torch.empty(chunk.sizes, device="meta").stride()
            whole[index] = flat.as_strided(chunk.sizes, strides)
        filled[index] += 1
    assert bool((filled == 1).all())
    return whole


def _index(box: Region) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
