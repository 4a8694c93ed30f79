"""Memory of a conversion from bucket to bucket: what is on its way, whatever the model's size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.fault_proxy import spoiling
from support.machine.s3_server import BUCKET, point_to, serving_s3

MIB = 1 << 20
ROWS = 350_000
"""Of the embeddings: a model of 135 MB in two long tensors."""

AHEAD, WINDOW, PART, ROOM = 12 * MIB, 2 * MIB, 5 * MIB, 10 * MIB
"""What is on its way in and out, so much smaller than the model that holding it would show."""

CONVERSION = """
import sys
from dcpconv import convert
from dcpconv.engine import uploading
from dcpconv.stores import ahead, buckets, fetching, objects
import obstore.store

def most():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

source, target, *numbers = sys.argv[1:]
ahead.AHEAD, ahead.WINDOW, uploading.PART, uploading._ROOM = map(int, numbers)
before = most()
convert(source, target, to="lingua", jobs=2)
print(most() - before)
"""


def test_a_conversion_between_buckets_holds_what_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks for no more ranges than the windows of the plan have."""
    shapes = {k: (ROWS, s[1]) if s[0] == 131 else s for k, s in llama_shapes().items()}
    model = write_hf(tmp_path / "model", shapes, config={**CONFIG, "vocab_size": ROWS})
    nbytes = (model / "model.safetensors").stat().st_size
    with serving_s3(monkeypatch) as bucket, spoiling(bucket.url) as proxy:
        source = bucket.upload(model, "model")
        point_to(proxy.url, monkeypatch)
        numbers = [str(number) for number in (AHEAD, WINDOW, PART, ROOM)]
        run = subprocess.run(
            [sys.executable, "-c", CONVERSION, source, f"s3://{BUCKET}/out", *numbers],
            # Every thread of the store's client would keep what it freed in an arena of its own.
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        ranges = len(proxy.gets(of="/model/model.safetensors"))
    # Two threads may hold a window each beside what is ahead, and four parts are sent at a time.
    on_its_way = AHEAD + 2 * WINDOW + ROOM + 4 * PART
    assert int(run.stdout) <= on_its_way + 64 * MIB < nbytes
    assert ranges <= 1 + -(-nbytes // WINDOW)
