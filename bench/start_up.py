"""What a command costs before its first byte, against importing what prints its help.

Processes take turns, and the best of many counts: a start is so short that anything else on the
machine doubles it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data import write_safetensors
from bench.measure import run_python

RUNS = 15
FLOOR = "import typer, rich"
SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.mlp.down_proj.weight": (16, 32),
    "model.layers.0.mlp.gate_proj.weight": (32, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.norm.weight": (16,),
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
CASES = (("--help", 1.5), ("convert hf out --to hf", 2.5), ("convert hf out --to lingua", 2.5))


@dataclass(frozen=True, slots=True)
class Start:
    """One command; ``ratio`` is its time over that of the floor."""

    command: str
    seconds: float
    ratio: float
    target: float

    def __str__(self) -> str:
        verdict = "" if self.ratio <= self.target else "  above"
        return (
            f"dcpconv {self.command:<28} {self.seconds * 1000:6.0f} ms"
            f"  {self.ratio:4.2f} x  target {self.target:.1f}{verdict}"
        )


def rows(work: Path) -> list[Start]:
    """The best of many starts of every command."""
    directory = work / "start-up"
    (directory / "hf").mkdir(parents=True)
    (directory / "hf" / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(directory / "hf" / "model.safetensors", SHAPES)
    commands = [command for command, _ in CASES]
    best = dict.fromkeys([FLOOR, *commands], float("inf"))
    for _ in range(RUNS):
        best[FLOOR] = min(best[FLOOR], run_python(FLOOR).seconds)
        for command in commands:
            best[command] = min(best[command], _once(command, directory))
    return [Start(name, best[name], best[name] / best[FLOOR], target) for name, target in CASES]


def _once(command: str, directory: Path) -> float:
    words = [str(directory / word) if word in {"hf", "out"} else word for word in command.split()]
    words[-1] = command.rsplit(maxsplit=1)[-1]  # the family is no path
    shutil.rmtree(directory / "out", ignore_errors=True)
    code = "import sys\nsys.argv[0] = 'dcpconv'\nfrom dcpconv.cli import main\nmain()\n"
    return run_python(code, *words).seconds


def table(results: Sequence[Start]) -> str:
    """A line a command, after what it is compared with."""
    return "\n".join([f"floor: python -c {FLOOR!r}", *map(str, results)])
