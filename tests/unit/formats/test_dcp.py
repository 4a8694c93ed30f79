"""Where the pieces of a DCP directory go, and whether chunks cover their tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from dcpconv.core.catalog import Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill, OutChunk, OutTensor, Part
from dcpconv.formats.boxes import Region, inspect_boxes
from dcpconv.formats.dcp.directory import outline
from dcpconv.formats.torchfile.frames import tensor_frame
from support.machine.counting import lines_run

BF16 = BY_NAME["bfloat16"]

# --------------------------------------------------------------------------------------- coverage


def grid(shape: tuple[int, ...], rng: random.Random) -> list[Region]:
    """Boxes of an irregular grid that cover ``shape`` exactly once."""
    boxes: list[Region] = [((), ())]
    for length in shape:
        edges = sorted({0, length, *(rng.randint(0, length) for _ in range(rng.randint(0, 3)))})
        boxes = [
            ((*offsets, start), (*sizes, stop - start))
            for offsets, sizes in boxes
            for start, stop in itertools.pairwise(edges)
        ]
    rng.shuffle(boxes)
    return boxes


def counts(shape: tuple[int, ...], boxes: list[Region]) -> torch.Tensor:
    """How often each element is stored."""
    found = torch.zeros(shape, dtype=torch.int32)
    for offsets, sizes in boxes:
        found[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return found


@pytest.mark.parametrize("seed", range(200))
def test_coverage_agrees_with_counting(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
    boxes = grid(shape, rng)
    if seed % 4 and boxes:
        boxes.pop()
    if seed % 4 > 1 and shape:
        offsets = tuple(rng.randrange(length) for length in shape)
        sizes = tuple(rng.randint(0, n - o) for n, o in zip(shape, offsets, strict=True))
        boxes.append((offsets, sizes))
    stored = counts(shape, boxes)
    problems = inspect_boxes(shape, boxes)
    assert any("both hold" in problem for problem in problems) == bool((stored > 1).any())
    assert any("nothing" in problem for problem in problems) == bool((stored == 0).any())


COVERAGE = [
    pytest.param((4,), [((0,), (4,))], (), id="whole"),
    pytest.param((), [((), ())], (), id="0-d"),
    pytest.param((), [], ("nothing is stored for [] of []",), id="0-d-lost"),
    pytest.param((0, 3), [], (), id="empty"),
    pytest.param((0, 3), [((0, 0), (0, 3))], (), id="empty-with-a-chunk"),
    pytest.param((4,), [((0,), (4,)), ((4,), (0,))], (), id="empty-rank"),
    pytest.param((4,), [((2,), (4,))], ("[2:6] reaches outside [4]",), id="outside"),
    pytest.param(
        (4, 4),
        [((0, 0), (2, 4)), ((2, 0), (2, 2))],
        ("nothing is stored for [2:4, 2:4] of [4, 4]",),
        id="corner",
    ),
    pytest.param(
        (4,),
        [((0,), (2,)), ((1,), (2,))],
        ("[0:2] and [1:3] both hold [1:2] of [4]", "nothing is stored for [3:4] of [4]"),
        id="overlap-and-gap",
    ),
]


@pytest.mark.parametrize(("shape", "boxes", "expected"), COVERAGE)
def test_what_coverage_says(
    shape: tuple[int, ...], boxes: list[Region], expected: tuple[str, ...]
) -> None:
    assert inspect_boxes(shape, boxes) == expected


def test_the_chunks_of_an_entry() -> None:
    extent = Extent("f", 0, 4)
    entry = TensorEntry("w", BF16, (4,), (Chunk((0,), (2,), extent),))
    assert inspect_boxes(entry.shape, [(c.offsets, c.sizes) for c in entry.chunks]) == (
        "nothing is stored for [2:4] of [4]",
    )


@pytest.mark.parametrize("lost", [None, 77])
@pytest.mark.parametrize("columns", [1, 16])
def test_the_work_per_chunk_does_not_grow_with_their_number(columns: int, lost: int | None) -> None:
    def work(number: int) -> int:
        rows = number // columns
        boxes = [((row, column * 2), (1, 2)) for row in range(rows) for column in range(columns)]
        if lost is not None:
            del boxes[lost]
        found: list[str] = []
        lines = lines_run(lambda: found.extend(inspect_boxes((rows, columns * 2), boxes)))
        assert len(found) == (lost is not None)
        return lines

    assert work(2048) < 5 * work(512)


# ---------------------------------------------------------------------------------------- placing


def tensor(
    key: str,
    shape: tuple[int, ...],
    *,
    source: int = 0,
    chunks: int = 1,
    tied_to: str | None = None,
) -> OutTensor:
    """Row chunks filled by one run each; ``source`` is where the first starts."""
    rows = shape[0] // chunks
    numel = rows * torch.Size(shape[1:]).numel()
    return OutTensor(
        key,
        tuple(key.split("/")),
        BF16,
        shape,
        tuple(
            OutChunk(
                (number * rows, *(0 for _ in shape[1:])),
                (rows, *shape[1:]),
                Fill(
                    BF16,
                    BF16,
                    numel,
                    (Part("src", source + number * numel * 2, 0, ((numel, 1, 1),)),),
                ),
            )
            for number in range(chunks)
        ),
        tied_to,
    )


@pytest.mark.parametrize("modulus", [4096, 65536])
@pytest.mark.parametrize("source", [0, 8, 4095, 123_457])
def test_long_payloads_keep_the_alignment_of_their_source(modulus: int, source: int) -> None:
    tensors = [tensor(f"w{i}", (256 * (i + 1), 512), source=source + 64 * i) for i in range(5)]
    (file,) = outline(tensors, {}, modulus=modulus).files
    assert len(file.payloads) == 5
    for offset, fill in file.payloads:
        assert offset % modulus == fill.parts[0].offset % modulus


def test_short_payloads_are_packed_and_start_on_64_bytes() -> None:
    (file,) = outline([tensor(f"w{i}", (3, i + 1)) for i in range(50)], {}).files
    assert all(offset % 64 == 0 for offset, _ in file.payloads)
    used = sum(len(data) for _, data in file.literals) + sum(f.nbytes for _, f in file.payloads)
    assert used > file.nbytes - 50 * 64


def test_files_are_covered_in_order_and_gaps_are_short() -> None:
    tensors = [tensor(f"w{i}", (64, 100 * i + 100), source=i * 1001, chunks=2) for i in range(20)]
    for file in outline(tensors, {("step",): 3}, max_file_size=100_000).files:
        pieces = sorted(
            [(offset, offset + len(data)) for offset, data in file.literals]
            + [(offset, offset + fill.nbytes) for offset, fill in file.payloads]
        )
        end = 0
        for start, stop in pieces:
            assert 0 <= start - end < 4096
            end = stop
        assert end == file.nbytes
        assert list(file.literals) == sorted(file.literals)


def test_chunk_i_goes_to_the_file_of_rank_i() -> None:
    drawn = outline([tensor("a", (4, 3), chunks=4), tensor("b", (4, 3), chunks=2)], {("x",): 1})
    assert [(file.name, len(file.payloads)) for file in drawn.files] == [
        ("__0_0.distcp", 2),
        ("__1_0.distcp", 2),
        ("__2_0.distcp", 1),
        ("__3_0.distcp", 1),
    ]
    assert [name for name, _ in drawn.commit] == [".metadata"]


def test_no_file_beyond_the_limit_but_for_one_item() -> None:
    tensors = [tensor(f"w{i}", (64, 64)) for i in range(9)] + [tensor("big", (640, 640))]
    files = outline(tensors, {}, max_file_size=30_000).files
    assert [file.name for file in files] == [f"__0_{number}.distcp" for number in range(len(files))]
    assert all(file.nbytes <= 30_000 or len(file.payloads) == 1 for file in files)
    assert len(files) == 5 + 1  # aligned to 4096 bytes, two of the small ones fit in a file


def test_an_item_is_its_frame_around_its_payload() -> None:
    (file,) = outline([tensor("w", (6, 5))], {}).files
    frame = tensor_frame(BF16, (6, 5))
    ((payload, fill),) = file.payloads
    assert file.literals == (
        (payload - len(frame.head), frame.head),
        (payload + fill.nbytes, frame.tail),
    )


def test_a_tied_tensor_of_other_boxes_is_written_out() -> None:
    same = outline([tensor("a", (4, 3)), tensor("b", (4, 3), tied_to="a")], {})
    other = outline([tensor("a", (4, 3)), tensor("b", (4, 3), chunks=2, tied_to="a")], {})
    assert [sum(len(f.payloads) for f in drawn.files) for drawn in (same, other)] == [1, 3]


def test_equal_keys_are_refused_together() -> None:
    tensors = [tensor("model/w", (2, 2)), tensor("model.w", (2, 2)), tensor("a", (2, 2))]
    with pytest.raises(FormatError) as raised:
        outline(tensors, {("a",): 1})
    assert raised.value.facts == (("key", "model.w"), ("key", "a"))


def test_a_fill_of_another_size_is_a_mistake() -> None:
    wrong = OutChunk((0,), (3,), Fill(BF16, BF16, 4, (Part("f", 0, 0, ((4, 1, 1),)),)))
    with pytest.raises(ValueError, match="8 bytes fill a box"):
        outline([OutTensor("w", ("w",), BF16, (3,), (wrong,))], {})


def test_the_work_per_tensor_does_not_grow_with_their_number() -> None:
    def work(number: int) -> int:
        names = [f"model/layers.{i}.weight" for i in range(number)]
        tensors = [tensor(name, (2048, 7168), source=i) for i, name in enumerate(names)]
        drawn = []
        lines = lines_run(lambda: drawn.append(outline(tensors, {}, max_file_size=5 << 30)))
        assert len(drawn[0].commit[0][1]) < number * 250
        return lines

    assert work(1200) < 5 * work(300)
