"""Archives and frames: zip64, slices of a file, and what the reader asks of the disk."""

from __future__ import annotations

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.archive import StoredTensor, read_archive, read_tensors
from dcpconv.formats.torchfile.frames import ArchiveLayout, object_frame, tensor_call, tensor_frame
from support.checkpoints.torch_files import (
    DTYPES,
    archive_of,
    make_tensor,
    payload_of,
    saved,
    torch_file,
    zip_of,
)

SHAPES = [
    pytest.param((), id="0-d"),
    pytest.param((7,), id="vector"),
    pytest.param((3, 5), id="weight"),
    pytest.param((0, 4), id="empty"),
    pytest.param((2, 0, 3), id="empty-middle"),
    pytest.param((1, 1, 3), id="ones"),
]


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_head_payload_tail_is_what_torch_loads(name: str, shape: tuple[int, ...]) -> None:
    tensor = make_tensor(DTYPES[name], shape)
    frame = tensor_frame(BY_NAME[name], shape)
    whole = frame.head + payload_of(tensor) + frame.tail
    assert len(whole) == frame.nbytes

    loaded = torch.load(io.BytesIO(whole), weights_only=True)

    assert loaded.dtype is tensor.dtype
    assert loaded.shape == tensor.shape
    assert loaded.stride() == tensor.stride()
    assert payload_of(loaded) == payload_of(tensor)
    (stored,) = read_tensors(archive_of(whole))[1]
    assert (stored.offset, stored.nbytes) == (len(frame.head), frame.payload_nbytes)


def test_frame_is_made_once_and_carries_requires_grad() -> None:
    dtype = BY_NAME["float32"]
    assert tensor_frame(dtype, (2,)) is tensor_frame(dtype, (2,))
    frame = tensor_frame(dtype, (2,), requires_grad=True)
    loaded = torch.load(io.BytesIO(frame.head + bytes(8) + frame.tail), weights_only=True)
    assert loaded.requires_grad
    assert read_tensors(archive_of(frame.head + bytes(8) + frame.tail))[1][0].requires_grad


@pytest.mark.parametrize("value", [None, 3, "x", b"", {"lr": [1e-3, (1, 2)]}], ids=repr)
def test_object_frame_is_what_torch_loads(value: object) -> None:
    assert torch.load(io.BytesIO(object_frame(value)), weights_only=True) == value
    assert read_tensors(archive_of(object_frame(value))) == (value, ())


def test_small_records_carry_their_checksum() -> None:
    with zipfile.ZipFile(io.BytesIO(object_frame({"a": 1}))) as file:
        assert file.testzip() is None
        assert file.namelist() == ["archive/data.pkl", "archive/byteorder", "archive/version"]


def test_frame_beyond_four_gibibytes_is_zip64(tmp_path: Path) -> None:
    shape = (5 << 30,)
    frame = tensor_frame(BY_NAME["uint8"], shape)
    path = tmp_path / "huge.pt"
    with path.open("wb") as file:  # sparse: 5 GiB apparent, a few blocks on disk
        file.write(frame.head)
        file.seek(len(frame.head) + frame.payload_nbytes - 3)
        file.write(b"end" + frame.tail)

    loaded = torch.load(path, weights_only=True, mmap=True)

    assert loaded.shape == shape
    assert bytes(loaded[-3:].tolist()) == b"end"
    with mapped(path) as data:
        archive = read_archive(lambda at, nbytes: data[at : at + nbytes], len(data), "huge.pt")
        assert archive.extent("data/0") == (len(frame.head), 5 << 30)


def test_records_beyond_sixteen_bits_and_headers_beyond_32(tmp_path: Path) -> None:
    layout = ArchiveLayout()
    count = 66_000
    layout.add("data.pkl", b"N.")
    layout.add("version", b"3\n")
    layout.add_payload("data/0", 5 << 30, modulus=4096, residue=4095)
    for index in range(1, count):
        layout.add(f"data/{index}", b"%d" % index)
    layout.finish()
    path = tmp_path / "many.pt"
    with path.open("wb") as file:
        for offset, literal in layout.literals:
            file.seek(offset)
            file.write(literal)

    assert path.stat().st_size == layout.position
    reader: Any = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record(f"data/{count - 1}") == b"%d" % (count - 1)
    with mapped(path) as data:
        archive = read_archive(lambda at, nbytes: data[at : at + nbytes], len(data), "many.pt")
        assert len(archive.names) == count + 2
        assert archive.extent("data/0")[0] % 4096 == 4095
        assert archive.extent("data/0")[0] == reader.get_record_offset("data/0")
        assert archive.read(f"data/{count - 1}") == b"%d" % (count - 1)


@pytest.mark.parametrize("residue", [0, 1, 3, 63, 4000, 4095])
def test_payload_lands_where_it_was_asked_to(residue: int) -> None:
    layout = ArchiveLayout()
    layout.add("data.pkl", b"N.")
    for index in range(3):
        offset = layout.add_payload(f"data/{index}", 10, modulus=4096, residue=residue)
        assert offset % 4096 == residue
    layout.finish()
    data = bytearray(layout.position)
    for offset, literal in layout.literals:
        data[offset : offset + len(literal)] = literal
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        assert [info.file_size for info in file.infolist()] == [2, 10, 10, 10]
    assert archive_of(bytes(data)).extent("data/2")[0] % 4096 == residue


def test_archive_inside_a_larger_file_has_offsets_of_its_own() -> None:
    data = saved({"w": torch.arange(6)})
    shift = 1234
    whole = b"\xaa" * shift + data + b"\xbb" * 99
    archive = read_archive(
        lambda at, nbytes: whole[shift + at : shift + at + nbytes], len(data), "item"
    )
    (stored,) = read_tensors(archive)[1]
    assert whole[shift + stored.offset :][: stored.nbytes] == payload_of(torch.arange(6))


def test_small_archive_takes_few_short_reads() -> None:
    data = saved(torch.zeros(1 << 18))
    reads: list[int] = []

    def read(offset: int, nbytes: int) -> bytes:
        reads.append(nbytes)
        return data[offset : offset + nbytes]

    read_tensors(read_archive(read, len(data), "item"))
    assert len(reads) <= 4
    assert sum(reads) < 20_000


def test_prefix_is_any_name() -> None:
    data = saved({"w": torch.ones(2)}).replace(b"archive/", b"weights/")
    assert "data.pkl" in archive_of(data)
    assert isinstance(read_tensors(archive_of(data))[1][0], StoredTensor)


def test_a_comment_after_the_directory_is_no_obstacle() -> None:
    buffer = io.BytesIO(saved(torch.ones(2)))
    with zipfile.ZipFile(buffer, "a") as file:
        file.comment = b"x" * 9000
    assert "data/0" in archive_of(buffer.getvalue())


def test_device_tags_are_ignored() -> None:
    call = tensor_call(BY_NAME["float32"], (2,), storage_key="0")
    data = torch_file({"w": call}, {"0": bytes(8)}).replace(b"cpu", b"npu")
    assert read_tensors(archive_of(data))[1][0].shape == (2,)


def test_big_endian_is_refused() -> None:
    with pytest.raises(FormatError, match="little-endian"):
        archive_of(zip_of({"data.pkl": b"N.", "byteorder": b"big"}))
