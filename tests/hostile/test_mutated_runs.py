"""Run directories with a few bytes wrong: whatever they are, the answer is ours."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from dcpconv import find_checkpoints
from support.runs import run_dirs
from support.runs.asked import only_our_errors

MAKERS: dict[str, run_dirs.Maker] = {
    **run_dirs.MAKERS,
    **run_dirs.WITH_TRACKERS,
    "hf-zero": run_dirs.hf_zero,
    "minimind": run_dirs.minimind,
}
LAYOUTS = sorted(MAKERS)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are wrong in one of the ways in which bytes are."""
    place = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]
        case 2:
            return bytes(len(data))
        case 3:
            return data[:place] + data[place + rng.randrange(1, 40) :]
        case 4:
            number = struct.pack("<Q", rng.choice([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1]))
            return data[:place] + number + data[place + 8 :]
        case 5:
            words = [b"[" * 5000, b"1e999", b"9" * 5000, b"null", b'"', b"\\ud800", b"\x1b]0;t\x07"]
            return data[:place] + rng.choice(words) + data[place:]
        case _:
            return rng.randbytes(len(data))


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> int:
    """Runs that are mutated per layout: 300 in all, or as many as ``--fuzz`` says."""
    return -(-int(request.config.getoption("--fuzz", default=300)) // len(LAYOUTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_error_leaves_for_any_mutation(layout: str, inputs: int, tmp_path: Path) -> None:
    for seed in range(inputs):
        rng = random.Random(f"{layout} {seed}")
        run = tmp_path / str(seed)
        for step in (1, 2):
            MAKERS[layout](run, step)
        whole = [step.step for step in find_checkpoints(run) if step.is_complete]
        assert whole
        files = sorted(path for path in run.rglob("*") if path.is_file())
        for path in rng.sample(files, min(len(files), rng.randrange(1, 4))):
            path.write_bytes(mutated(path.read_bytes(), rng))

        only_our_errors(run)

        count = 1 if layout == "minimind" else 2
        assert len(find_checkpoints(run)) == count, seed
