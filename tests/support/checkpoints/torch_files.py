"""torch.save files for tests: made by torch, made by hand, and put together from an Outline."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, OutChunk, OutFile, OutTensor, Part
from dcpconv.formats.torchfile.archive import Archive, read_archive
from dcpconv.formats.torchfile.unpickling import dumps

DTYPES = {name: getattr(torch, name) for name in BY_NAME if hasattr(torch, name)}


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Every bit pattern of the type may occur; a bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    top = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, top, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)


def payload_of(tensor: torch.Tensor) -> bytes:
    """Elements in C order."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive_of(data: bytes) -> Archive:
    return read_archive(lambda offset, nbytes: data[offset : offset + nbytes], len(data), "a.pth")


def zip_of(records: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in records.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def torch_file(value: object, storages: Mapping[str, bytes] = {}) -> bytes:
    """A whole file around a hand-made pickle."""
    records = {"data.pkl": value if isinstance(value, bytes) else dumps(value)}
    records |= {f"data/{key}": data for key, data in storages.items()}
    return zip_of({**records, "byteorder": b"little", "version": b"3\n"})


def stored_elements(catalog: Catalog, entry: TensorEntry) -> torch.Tensor:
    """The tensor that an entry describes, from the bytes of its extent and nothing else."""
    (chunk,) = entry.chunks
    dtype = DTYPES[entry.dtype.name]
    if not entry.numel:
        return torch.empty(entry.shape, dtype=dtype)
    with (catalog.path / chunk.extent.file).open("rb") as file:
        file.seek(chunk.extent.offset)
        raw = torch.frombuffer(bytearray(file.read(chunk.extent.nbytes)), dtype=dtype)
    if chunk.strides is None:
        return raw.reshape(entry.shape)
    return raw.as_strided(entry.shape, chunk.strides)


def out_tensor(
    path: tuple[str | int, ...],
    tensor: torch.Tensor,
    *,
    tied_to: str | None = None,
    source_offset: int = 0,
) -> OutTensor:
    """A target tensor that is copied whole from ``source_offset`` of a file named after its key."""
    key = ".".join(map(str, path))
    dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
    shape, numel = tuple(tensor.shape), tensor.numel()
    part = Part(key, source_offset, 0, ((numel, 1, 1),) if numel > 1 else ())
    fill = Fill(dtype, dtype, numel, (part,) if numel else ())
    chunk = OutChunk((0,) * len(shape), shape, fill)
    return OutTensor(key, path, dtype, shape, (chunk,), tied_to)


def assemble(file: OutFile, directory: Path, payload: Callable[[Fill], bytes]) -> Path:
    """The file as an engine would write it: zeros, then literals, then payloads."""
    path = directory / file.name
    with path.open("wb") as out:
        out.truncate(file.nbytes)
        for offset, data in file.literals:
            out.seek(offset)
            out.write(data)
        for offset, fill in file.payloads:
            out.seek(offset)
            out.write(payload(fill))
    return path
