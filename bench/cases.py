"""What is measured: our conversions, and what people use today."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.data import header
from bench.measure import Cost, run_python
from dcpconv import convert, open_checkpoint
from dcpconv.engine.execute import execute
from dcpconv.formats import dcp
from dcpconv.formats.boxes import Region
from dcpconv.plan.coverage import cover_as_stored
from dcpconv.plan.fills import make_plan
from dcpconv.sources.recognition import recognise

RANKS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """One row.

    Attributes:
        name: As printed.
        source: Name of the source that ``prepare`` made.
        code: Python to run with source and target as arguments.
        suffix: Of the target: ``.pth`` for a torch file.
        target: Ratio to the floor to reach; ``None`` for a peer.
        against: Row whose wall time this peer is compared with, and the ratio to stay below.
    """

    name: str
    source: str
    code: str
    suffix: str = ""
    target: float | None = None
    against: tuple[str, float] | None = None

    def run(self, source: Path) -> Callable[[Path], Cost]:
        """The case for one source; called with the path to write."""
        return lambda out: run_python(self.code, source, out)


def _ours(arguments: str = "") -> str:
    return (
        f"import sys\nfrom dcpconv import convert\nconvert(sys.argv[1], sys.argv[2], {arguments})\n"
    )


_TORCH = "import os, sys\nimport torch, torch.distributed.checkpoint as dcp\n"

CASES = (
    Case("hf -> dcp", "hf", _ours('form="dcp"'), target=1.00),
    Case("hf -> dcp --to lingua", "hf", _ours('form="dcp", to="lingua"'), target=1.20),
    Case("hf -> dcp --chunks 8", "hf", _ours('form="dcp", chunks=8'), target=1.10),
    Case("hf -> torch", "hf", _ours('form="torch"'), target=1.15),
    Case("torch -> dcp", "torch", _ours('form="dcp"'), target=1.15),
    Case("dcp -> torch", "dcp", _ours('form="torch"'), target=1.15),
    Case("dcp -> hf", "dcp", _ours('form="hf"'), target=1.15),
    Case("dcp (8 row shards) -> hf", "rows", _ours('form="hf"'), target=1.20),
    Case("dcp (8 column shards) -> hf", "columns", _ours('form="hf"'), target=1.60),
    Case("sharded hf (8 ranks) -> hf", "sharded-hf", _ours('form="hf"'), target=1.20),
    Case("ZeRO-3 (8 ranks) -> hf", "zero3", _ours('form="hf"'), target=1.30),
)

PEERS = (
    Case(
        "torch: torch_save_to_dcp",
        "torch",
        _TORCH + "from torch.distributed.checkpoint.format_utils import torch_save_to_dcp\n"
        "torch_save_to_dcp(sys.argv[1], sys.argv[2])\nos.sync()\n",
        against=("torch -> dcp", 0.4),
    ),
    Case(
        "torch: dcp_to_torch_save",
        "dcp",
        _TORCH + "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save\n"
        "dcp_to_torch_save(sys.argv[1], sys.argv[2])\nos.sync()\n",
        against=("dcp -> torch", 0.4),
    ),
    Case(
        "safetensors load_file + dcp.save",
        "hf",
        _TORCH + "from safetensors.torch import load_file\n"
        "state = load_file(sys.argv[1] + '/model.safetensors')\n"
        "dcp.save(state, checkpoint_id=sys.argv[2], no_dist=True)\nos.sync()\n",
        against=("hf -> dcp", 0.4),
    ),
    Case(
        "torch: consolidate_safetensors_files",
        "sharded-hf",
        _TORCH + "from torch.distributed.checkpoint._consolidate_hf_safetensors import (\n"
        "    consolidate_safetensors_files)\nimport json, struct\n"
        "keys = {}\n"
        "for name in os.listdir(sys.argv[1]):\n"
        "    if name.endswith('.safetensors'):\n"
        "        with open(os.path.join(sys.argv[1], name), 'rb') as file:\n"
        "            head = json.loads(file.read(struct.unpack('<Q', file.read(8))[0]))\n"
        "        keys |= {key: 1 for key in head if key != '__metadata__'}\n"
        "os.makedirs(sys.argv[2])\n"
        "consolidate_safetensors_files(sys.argv[1], sys.argv[2], keys, num_threads=2)\nos.sync()\n",
        against=("sharded hf (8 ranks) -> hf", 0.2),
    ),
    Case(
        "DeepSpeed: zero_to_fp32",
        "zero3",
        "import os, sys\nfrom deepspeed.utils import zero_to_fp32\n"
        "zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(\n"
        "    sys.argv[1], sys.argv[2], safe_serialization=True)\nos.sync()\n",
        against=("ZeRO-3 (8 ranks) -> hf", 0.4),
    ),
)


def prepare(hf: Path, work: Path) -> dict[str, Path]:
    """The other sources, made from an HF directory with one file."""
    sources = {"hf": hf}
    for name, make in (
        ("torch", lambda out: convert(hf, out, form="torch")),
        ("dcp", lambda out: convert(hf, out, form="dcp")),
        ("rows", lambda out: convert(hf, out, form="dcp", chunks=RANKS)),
        ("columns", lambda out: _write_columns(hf, out)),
        ("sharded-hf", lambda out: _write_sharded(hf, out)),
        ("zero3", lambda out: _write_zero3(hf, out)),
    ):
        sources[name] = work / (f"{name}.pth" if name == "torch" else name)
        make(sources[name])
    os.sync()
    return sources


def _columns(shape: tuple[int, ...]) -> list[Region]:
    """Matrices split over their last dim, as tensor parallelism shards ``o_proj``."""
    if len(shape) < 2:
        return [((0,) * len(shape), shape)]
    width = -(-shape[-1] // RANKS)
    return [
        (
            (*(0,) * (len(shape) - 1), start),
            (*shape[:-1], min(width, shape[-1] - start)),
        )
        for start in range(0, shape[-1], width)
    ]


def _write_columns(hf: Path, out: Path) -> None:
    coverage = cover_as_stored(recognise(open_checkpoint(hf)))
    tensors = make_plan(coverage, path_of=lambda key: (key,), regions=_columns)
    outline = dcp.outline(tensors, {})
    out.mkdir()
    execute(outline, source=hf, target=out)
    for name, data in outline.commit:
        (out / name).write_bytes(data)


def _write_sharded(hf: Path, out: Path) -> None:
    """What torch's ``HuggingFaceStorageWriter`` leaves before consolidation: local rows under full
    names, offsets in the header.

    Source: torch 2.13 ``distributed/checkpoint/hf_storage.py`` and ``_hf_utils.py``.
    """
    catalog = open_checkpoint(hf)
    out.mkdir()
    (out / "config.json").write_bytes((hf / "config.json").read_bytes())
    for rank in range(RANKS):
        shapes, offsets, extents = {}, {}, []
        for key, entry in catalog.tensors.items():
            rows = -(-entry.shape[0] // RANKS)
            start = rank * rows
            size = min(rows, entry.shape[0] - start)
            if size <= 0:
                continue
            shapes[key] = (size, *entry.shape[1:])
            offsets[key] = [start, *(0,) * (len(entry.shape) - 1)]
            row_nbytes = entry.nbytes // entry.shape[0]
            extent = entry.chunks[0].extent
            extents.append((extent.file, extent.offset + start * row_nbytes, size * row_nbytes))
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        with (out / name).open("wb") as file:
            file.write(_with_offsets(header(shapes)[0], offsets))
            for origin, offset, nbytes in extents:
                with (hf / origin).open("rb") as source:
                    source.seek(offset)
                    file.write(source.read(nbytes))


def _write_zero3(hf: Path, out: Path) -> None:
    """fp32 masters without moments, in DeepSpeed's files of stage 3: as many bytes as the result.

    Source: deepspeed 0.19.8 ``runtime/zero/stage3.py`` (``_rigid_state_dict``).
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    weights = load_file(hf / "model.safetensors")
    at = out / "global_step1"
    at.mkdir(parents=True)
    (out / "latest").write_text(at.name)
    (out / "config.json").write_bytes((hf / "config.json").read_bytes())
    model = {
        "module": {key: torch.empty(0) for key in weights},
        "buffer_names": [],
        "param_shapes": [{key: value.shape for key, value in weights.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "dp_world_size": RANKS,
        "ds_version": "0.19.8",
    }
    for rank in range(RANKS):
        cuts = []
        for value in weights.values():
            part = -(-value.numel() // RANKS)
            cut = value.flatten()[rank * part : (rank + 1) * part].float()
            cuts.append(torch.nn.functional.pad(cut, (0, part - cut.numel())))
        flat = {"zero_stage": 3, "partition_count": RANKS, "fp32_flat_groups": [torch.cat(cuts)]}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model, at / f"{name}_model_states.pt")
        torch.save(
            {"optimizer_state_dict": flat, "ds_version": "0.19.8"}, at / f"{name}_optim_states.pt"
        )


def _with_offsets(head: bytes, offsets: dict[str, list[int]]) -> bytes:
    record = json.loads(head[8:])
    record["__metadata__"] = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(
            {key: {"saved_offsets": value} for key, value in offsets.items()}
        ),
    }
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
