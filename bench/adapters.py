"""``python -m bench.adapters``: merging rank 16 on all linear layers, ours and peft's in turn."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from pathlib import Path

from bench.data import header, llama_shapes, write_llama
from bench.measure import Cost, run_python, workplace

RANK = 16
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OURS = """
import sys
from dcpconv import convert
convert(sys.argv[1], sys.argv[3], form="hf", adapter=sys.argv[2])
"""

PEFT = """
import os, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
os.sync()
"""


def write_adapter(directory: Path, *, layers: int) -> Path:
    """A PEFT directory for ``llama_shapes``: small numbers, all alike."""
    shapes = {}
    for key, shape in llama_shapes(layers=layers).items():
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] in _LINEAR:
            shapes[f"base_model.model.{module}.lora_A.weight"] = (RANK, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], RANK)
    directory.mkdir(parents=True)
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(header(shapes, dtype="F32", itemsize=4)[0])
        for rows, columns in shapes.values():
            file.write(struct.pack("<f", 0.01) * (rows * columns))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": _LINEAR}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return directory


def main() -> None:
    """Measures both in turn and prints the best of each, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.5, help="size of the base, in GB")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each")
    parser.add_argument("--work", type=Path, default=Path("out"), help="directory to write in")
    options = parser.parse_args()
    costs: dict[str, list[Cost]] = {"dcpconv": [], "peft": []}
    with workplace(options.work) as work:
        base = write_llama(work / "base", gigabytes=options.gb)
        layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
        adapter = write_adapter(work / "adapter", layers=layers)
        for _ in range(options.pairs):
            for name, code in (("dcpconv", OURS), ("peft", PEFT)):
                costs[name].append(run_python(code, base, adapter, work / "made"))
                shutil.rmtree(work / "made")
    seconds = {name: min(c.seconds for c in some) for name, some in costs.items()}
    peaks = {name: max(c.peak for c in some) for name, some in costs.items()}
    for name, some in costs.items():
        cpu = min(cost.cpu for cost in some)
        sys.stdout.write(
            f"{name:<10} {seconds[name]:6.2f} s  {cpu:6.2f} cpu s  {peaks[name]:6.0f} MiB\n"
        )
    wall, memory = seconds["dcpconv"] / seconds["peft"], peaks["dcpconv"] / peaks["peft"]
    sys.stdout.write(f"ratio: wall {wall:.2f}, memory {memory:.3f}\n")


if __name__ == "__main__":
    main()
