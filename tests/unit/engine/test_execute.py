"""execute() and fill(): promises that are not about which bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError, LossyCastError, NoSpaceError
from dcpconv.core.outline import BlockScale, Fill, OutFile, Outline, Part
from dcpconv.engine.desks import Pool
from dcpconv.engine.execute import CastLoss, execute, fill
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM
from support.checkpoints.engine_cases import contiguous, slow_file, store
from support.machine.mounts import tmpfs

KIB, MIB = 1 << 10, 1 << 20
U8, BF16, FP16, FP32 = (BY_NAME[name] for name in ("uint8", "bfloat16", "float16", "float32"))
FP8 = BY_NAME["float8_e4m3fn"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "dcpconv"]
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == files


def one_run(nbytes: int, *, offset: int = 0) -> Outline:
    payload = Fill(U8, U8, nbytes, (contiguous("a", offset, nbytes),))
    return Outline((OutFile("o", nbytes, (), ((0, payload),)),))


def relabelled(nbytes: int) -> Fill:
    """A box of 1 KiB rows, evens before odds in the source."""
    rows = nbytes // KIB
    loops = ((rows // 2, KIB, 2 * KIB), (2, nbytes // 2, KIB), (KIB, 1, 1))
    return Fill(U8, U8, nbytes, (Part("a", 0, 0, loops),))


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_buffers_stay_within_the_budget(tmp_path: Path, target: Path, jobs: int) -> None:
    nbytes = 6 * MIB
    source = store(tmp_path / "source", {"a": bytes(nbytes)})
    loops = ((768, 1, 8192), (8192, 768, 1))
    transposed = Fill(U8, U8, nbytes, (Part("a", 0, 0, loops),))
    wider = Fill(BF16, FP32, 2 * MIB, (contiguous("a", 0, 2 * MIB),))
    files = (
        OutFile("rows", nbytes, (), ((0, relabelled(nbytes)),)),
        OutFile("transposed", nbytes, (), ((0, transposed),)),
        OutFile("wider", 8 * MIB, (), ((0, wider),)),
    )
    moved = execute(Outline(files), source=source, target=target, jobs=jobs, budget=MIB)

    assert 0 < moved.peak_buffer <= MIB


def test_factors_are_held_within_the_budget(tmp_path: Path, target: Path) -> None:
    """A transposed matrix needs all of its factors for every few columns."""
    rows, columns = 500, 400
    torch.manual_seed(0)
    stored = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    factors = torch.rand(rows, columns)
    files = {
        name: t.view(torch.uint8).numpy().tobytes() for name, t in [("a", stored), ("f", factors)]
    }
    scale = BlockScale("a", 0, rows * columns, columns, (1, 1), "f", 0, FP32, (rows, columns))
    loops = ((columns, 1, rows), (rows, columns, 1))
    payload = Fill(FP8, FP32, rows * columns, (Part("a", 0, 0, loops),), scales=(scale,))
    outline = Outline((OutFile("o", payload.nbytes, (), ((0, payload),)),))
    budget = 48 * KIB
    source = store(tmp_path / "source", files)
    tracemalloc.start()
    moved = execute(outline, source=source, target=target, jobs=1, budget=budget)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 0 < moved.peak_buffer <= budget
    assert peak < len(files["f"]) // 4
    expected = (stored.float() * factors).T.contiguous()
    assert (target / "o").read_bytes() == expected.view(torch.uint8).numpy().tobytes()


def test_a_pool_refuses_to_exceed_its_budget() -> None:
    pool = Pool(100)
    first = pool.take(60)
    with pytest.raises(AssertionError, match="60 \\+ 50 bytes exceed 100"):
        pool.take(50)
    pool.give(first)

    assert len(pool.take(100)) == 100
    assert pool.peak == 100


def test_a_budget_too_small_to_work_with_is_refused(target: Path) -> None:
    with pytest.raises(ValueError, match="at least 49152 bytes"):
        execute(Outline(()), source=target, target=target, budget=1000)


def test_files_are_created_even_when_empty(target: Path) -> None:
    outline = Outline((OutFile("a", 0, (), ()), OutFile("sub/b", 5000, (), ())))
    moved = execute(outline, source=target, target=target)

    assert (target / "a").read_bytes() == b""
    assert (target / "sub/b").read_bytes() == bytes(5000)
    assert moved.peak_buffer == 0


def test_an_existing_file_is_never_written_over(target: Path) -> None:
    (target / "o").write_bytes(b"precious")
    with pytest.raises(Exception, match="cannot be written"):
        execute(Outline((OutFile("o", 3, ((0, b"abc"),), ()),)), source=target, target=target)
    assert (target / "o").read_bytes() == b"precious"


@pytest.mark.parametrize("nbytes", [100, 300 * KIB], ids=["gathered", "kernel-copied"])
def test_a_truncated_source_is_named(tmp_path: Path, target: Path, nbytes: int) -> None:
    source = store(tmp_path / "source", {"a": bytes(nbytes - 1)})
    with pytest.raises(FormatError, match=f"expected  {nbytes} bytes, found {nbytes - 1}"):
        execute(one_run(nbytes), source=source, target=target)


def test_a_missing_source_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(FormatError, match=str(tmp_path / "source" / "a")):
        execute(one_run(100), source=tmp_path / "source", target=target)


@pytest.mark.parametrize("rung", ["clone", "copy", "pwrite"])
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, target: Path, rung: str) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(*_: object) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, "no")

    system = replace(SYSTEM, clone=refused, copy=refused)
    system = replace(system, **{rung: full})
    source = store(tmp_path / "source", {"a": bytes(MIB)})
    with pytest.raises(NoSpaceError, match="the source is untouched") as caught:
        execute(one_run(MIB), source=source, target=target, system=system)
    assert ("file", target / "o") in caught.value.facts


def test_a_small_disk_really_fills_up(tmp_path: Path) -> None:
    source = store(tmp_path / "source", {"a": os.urandom(8 * MIB)})
    with tmpfs(tmp_path / "disk", "4m") as disk, pytest.raises(NoSpaceError):
        execute(one_run(8 * MIB), source=source, target=disk)


def test_what_progress_raises_is_not_taken_for_a_failed_write(tmp_path: Path, target: Path) -> None:
    def progress(nbytes: int) -> None:
        raise BrokenPipeError(errno.EPIPE, f"nobody hears about {nbytes} bytes")

    source = store(tmp_path / "source", {"a": bytes(100)})
    with pytest.raises(BrokenPipeError):
        execute(one_run(100), source=source, target=target, progress=progress)


def test_the_first_error_stops_the_others(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.units.UNIT", MIB)
    source = store(tmp_path / "source", {"a": bytes(64 * MIB)})
    calls = []

    def progress(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        execute(one_run(64 * MIB), source=source, target=target, jobs=2, progress=progress)
    assert len(calls) <= 5


@pytest.mark.parametrize(
    "names", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float8_e4m3fn")]
)
def test_a_cast_is_torchs_own(tmp_path: Path, target: Path, names: tuple[str, str]) -> None:
    source_dtype, target_dtype = (BY_NAME[name] for name in names)
    torch.manual_seed(0)
    before = torch.randn(3, 700, 333).to(getattr(torch, names[0]))
    after = before.transpose(0, 1).contiguous().to(getattr(torch, names[1]))
    source = store(tmp_path / "source", {"a": before.view(torch.uint8).numpy().tobytes()})
    loops = ((700, 333, 3 * 333), (3, 700 * 333, 333), (333, 1, 1))
    payload = Fill(source_dtype, target_dtype, before.numel(), (Part("a", 0, 0, loops),))
    file = OutFile("o", 100 + payload.nbytes, ((0, b"header"),), ((100, payload),))
    moved = execute(Outline((file,)), source=source, target=target, budget=MIB)

    assert (target / "o").read_bytes()[100:] == after.view(torch.uint8).numpy().tobytes()
    assert moved.cast == payload.nbytes


def test_every_tensor_that_overflows_is_listed(tmp_path: Path, target: Path) -> None:
    numel = 100_000
    values = torch.ones(3, numel)
    values[0, ::1000] = 1e30
    values[2, 5] = -1e6
    values[2, 6] = 1e-30
    source = store(tmp_path / "source", {"a": values.numpy().tobytes()})
    payloads = tuple(
        (row * numel * 2, Fill(FP32, FP16, numel, (contiguous("a", row * numel * 4, numel),)))
        for row in range(3)
    )
    outline = Outline((OutFile("o", 3 * numel * 2, (), payloads),))
    labels = {("o", 0): "embed.weight"}
    with pytest.raises(LossyCastError) as caught:
        execute(outline, source=source, target=target, labels=labels, budget=MIB)
    assert caught.value.facts == (
        ("overflow", "embed.weight  100 values"),
        ("overflow", f"o at byte {2 * numel * 2}  1 values"),
    )

    (target / "o").unlink()
    moved = execute(outline, source=source, target=target, allow_overflow=True, budget=MIB)
    assert moved.losses == (
        CastLoss("o", 0, overflowed=100, underflowed=0),
        CastLoss("o", 2 * numel * 2, overflowed=1, underflowed=1),
    )


def test_fill_takes_any_c_contiguous_memory(tmp_path: Path) -> None:
    data = os.urandom(MIB)
    source = store(tmp_path, {"a": data})
    box = relabelled(MIB)
    file = OutFile("o", MIB, (), ((0, box),))
    shaped = torch.zeros(4, 128, 1024, dtype=torch.int16).numpy()
    with Sources(source) as sources:
        fill(box, source=sources, into=memoryview(shaped.data))

    assert shaped.tobytes() == slow_file(file, {"a": data})


def test_fill_refuses_memory_of_another_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="into holds 99 bytes, but the box has 102400"):
        fill(relabelled(100 * KIB), source=tmp_path, into=memoryview(bytearray(99)))


def test_a_box_that_no_source_holds_is_its_own_bytes(tmp_path: Path, target: Path) -> None:
    derived = Fill(U8, U8, 6, (), b"scales")
    into = bytearray(6)
    fill(derived, source=tmp_path / "absent", into=memoryview(into))
    execute(Outline((OutFile("o", 8, (), ((2, derived),)),)), source=tmp_path, target=target)

    assert into == b"scales"
    assert (target / "o").read_bytes() == b"\0\0scales"


def test_fill_of_nothing_reads_nothing(tmp_path: Path) -> None:
    fill(Fill(U8, U8, 0, ()), source=tmp_path / "absent", into=memoryview(bytearray()))


INTERRUPTED = """
import sys, threading
from pathlib import Path
from dcpconv.core.dtypes import BY_NAME
from dcpconv.engine.execute import execute
from dcpconv.core.outline import Fill, OutFile, Outline, Part
import dcpconv.engine.units
dcpconv.engine.units.UNIT = 1 << 20
u8 = BY_NAME["uint8"]
fill = Fill(u8, u8, 1 << 26, (Part("a", 0, 0, ((1 << 26, 1, 1),)),))
pause = threading.Event()
def progress(nbytes):
    sys.stdout.write("going\\n")
    sys.stdout.flush()
    pause.wait(0.2)
try:
    execute(Outline((OutFile("o", 1 << 26, (), ((0, fill),)),)), source=Path(sys.argv[1]),
            target=Path(sys.argv[2]), progress=progress)
except KeyboardInterrupt:
    print("stopped", threading.active_count(), flush=True)
"""


def test_ctrl_c_stops_every_thread(tmp_path: Path, target: Path) -> None:
    source = store(tmp_path / "source", {"a": bytes(1 << 26)})
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(source), str(target)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        for _ in range(5):  # by then every thread is up
            assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=280)
    assert rest.splitlines()[-1] == "stopped 1"
    assert rest.count("going") < 50  # of 64 units; a busy machine delivers the signal late


def test_a_lossless_conversion_does_not_import_torch(tmp_path: Path, target: Path) -> None:
    program = INTERRUPTED.replace("pause.wait(0.2)", "pass") + "\nprint('torch' in sys.modules)"
    source = store(tmp_path / "source", {"a": bytes(1 << 26)})
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
