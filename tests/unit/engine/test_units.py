"""How a file is cut into units of work."""

from __future__ import annotations

import pytest

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, OutFile
from dcpconv.engine.units import Given, Run, Stretch, Unit, units
from support.checkpoints.engine_cases import contiguous

U8 = BY_NAME["uint8"]
MIB = 1 << 20


def cut(file: OutFile) -> list[Unit]:
    return list(units(file, block=4096, tile=4 * MIB))


def run(offset: int, nbytes: int) -> Fill:
    return Fill(U8, U8, nbytes, (contiguous("a", offset, nbytes),))


def test_congruent_runs_leave_their_ends_to_their_neighbours() -> None:
    file = OutFile("o", 3 * MIB, ((0, b"header"),), ((100, run(4096 + 100, MIB)),))
    head, middle, tail = cut(file)

    assert isinstance(head, Stretch)
    assert head.pieces == (Given(0, b"header"), Run(100, 3996, "a", 4196))
    assert middle == Run(4096, MIB - 4096, "a", 8192)
    assert isinstance(tail, Stretch)
    assert tail.pieces == (Run(MIB, 100, "a", MIB + 4096),)


def test_other_runs_stay_whole() -> None:
    file = OutFile("o", 3 * MIB, (), ((100, run(77, MIB)),))

    assert cut(file) == [Run(100, MIB, "a", 77)]


def test_a_huge_run_is_several_units_none_of_them_short() -> None:
    file = OutFile("o", 300 * MIB, (), ((0, run(0, 256 * MIB + 4096)),))
    found = cut(file)

    assert sum(unit.nbytes for unit in found) == 256 * MIB + 4096
    assert len(found) == 4
    assert min(unit.nbytes for unit in found) >= 64 * MIB


def test_small_neighbours_are_one_stretch_across_small_gaps() -> None:
    payloads = tuple((offset, run(offset, 1000)) for offset in range(64, 100_000, 2000))
    (stretch,) = cut(OutFile("o", 200_000, ((0, b"head"),), payloads))

    assert isinstance(stretch, Stretch)
    assert len(stretch.pieces) == 51


def test_a_large_gap_is_left_alone() -> None:
    file = OutFile("o", 9 * MIB, ((0, b"a"), (5 * MIB, b"b")), ())

    assert [unit.nbytes for unit in cut(file)] == [1, 1]


def test_empty_payloads_are_nothing() -> None:
    empty = Fill(U8, U8, 0, ())

    assert cut(OutFile("o", 10, ((0, b""),), ((0, empty), (10, empty)))) == []


BAD = [
    pytest.param(OutFile("o", 10, ((0, b"12345"), (4, b"67")), ()), id="overlap"),
    pytest.param(OutFile("o", 10, ((8, b"123"),), ()), id="beyond-the-end"),
    pytest.param(OutFile("o", 10, (), ((5, run(0, 6)),)), id="payload-beyond-the-end"),
]


@pytest.mark.parametrize("file", BAD)
def test_pieces_that_do_not_fit_are_refused(file: OutFile) -> None:
    with pytest.raises(ValueError, match="overlap"):
        cut(file)
