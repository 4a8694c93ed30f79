"""How opening and converting grow with the number of ranks that wrote a file each.

The files are tiny, and real but for one thing: one rank's is written by torch and copied for the
others, with their number in it where it has one.
"""

from __future__ import annotations

import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.measure import run_python

WORLDS = (8, 128, 1024)
TENSORS = 300
SHAPE = (2048, 3)
"""Of every tensor: 1,024 ranks hold two rows each, and ZeRO-3 cuts them at even places."""

_OPEN = "import sys\nfrom dcpconv import open_checkpoint\nopen_checkpoint(sys.argv[1])\n"
_CONVERT = "import sys\nimport dcpconv\ndcpconv.convert(sys.argv[1], sys.argv[2], form='dcp')\n"


@dataclass(frozen=True, slots=True)
class Ranked:
    """One measurement.

    Attributes:
        what: Whose files, and what was done.
        ranks: How many there are.
        seconds: Wall time of the whole process.
        peak: ``VmHWM`` in MiB.
    """

    what: str
    ranks: int
    seconds: float
    peak: float

    def __str__(self) -> str:
        return (
            f"{self.what:<16} {self.ranks:>6,} ranks x {TENSORS} tensors"
            f" {self.seconds:>7.2f} s {self.peak:>6.0f} MiB"
        )


def rows(work: Path) -> list[Ranked]:
    """Both kinds of files, opened and converted, at every number of ranks."""
    found: list[Ranked] = []
    for name, write in (("FSDP", _write_fsdp), ("ZeRO-3", _write_zero3)):
        for ranks in WORLDS:
            source = write(work / f"{name}-{ranks}", ranks)
            for what, code in (("open", _OPEN), ("convert", _CONVERT)):
                cost = run_python(code, source, work / "out")
                found.append(Ranked(f"{name}, {what}", ranks, cost.seconds, cost.peak))
            shutil.rmtree(work / "out")
            shutil.rmtree(source)
    return found


def _keys() -> list[str]:
    return [f"model.layers.{n // 9}.mlp.part{n % 9}.weight" for n in range(TENSORS)]


def _write_fsdp(out: Path, ranks: int) -> Path:
    """``model_world_size_N_rank_R.pt``, the state dict of FSDP2."""
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    out.mkdir()
    last = out / f"model_world_size_{ranks}_rank_{ranks - 1}.pt"
    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    whole = torch.zeros(SHAPE)
    state = {k: distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) for k in _keys()}
    torch.save(state, last)
    dist.destroy_process_group()
    data = bytearray(last.read_bytes())
    number = data.index(b"_rankq") + len(b"_rankq") + 1  # behind its place in the memo
    form = {b"K"[0]: "<B", b"M"[0]: "<H"}[data[number]]
    for rank in range(ranks - 1):
        struct.pack_into(form, data, number + 1, rank)
        (out / f"model_world_size_{ranks}_rank_{rank}.pt").write_bytes(data)
    return out


def _write_zero3(out: Path, ranks: int) -> Path:
    """The files of DeepSpeed's stage 3.

    Source: deepspeed 0.19.8 ``runtime/zero/stage3.py`` (``_rigid_state_dict``).
    """
    import torch  # noqa: PLC0415

    at = out / "global_step1"
    at.mkdir(parents=True)
    (out / "latest").write_text(at.name)
    part = -(-torch.Size(SHAPE).numel() // ranks)
    flat = {
        "zero_stage": 3,
        "partition_count": ranks,
        "fp32_flat_groups": [torch.zeros(TENSORS * part)],
    }
    files: dict[str, object] = {
        "model": {
            "module": {key: torch.empty(0) for key in _keys()},
            "buffer_names": [],
            "param_shapes": [{key: torch.Size(SHAPE) for key in _keys()}],
            "frozen_param_shapes": None,
            "shared_params": {},
            "dp_world_size": ranks,
            "ds_version": "0.19.8",
        },
        "optim": {"optimizer_state_dict": flat, "ds_version": "0.19.8"},
    }
    for kind, value in files.items():
        first = at / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
        torch.save(value, first)
        for rank in range(1, ranks):
            shutil.copyfile(first, at / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    return out


def main() -> int:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as work:
        for row in rows(Path(work)):
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
