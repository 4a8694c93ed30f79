"""A check is fast enough for every commit.

The limits are CPU seconds of a whole process, three times what one takes alone on a small machine:
tests run beside others.  What they catch is a quadratic loop, or an import that crept in.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints.check_cases import CONFIG, Shapes, llama_shapes, write_hf

EXPERTS, MOE_LAYERS, MOE_FFN = 512, 59, 52


def mixture() -> Shapes:
    """91,000 tensors under Qwen3-MoE's names."""
    shapes = {
        key: shape
        for key, shape in llama_shapes(MOE_LAYERS).items()
        if ".mlp." not in key and "self_attn" not in key
    }
    for layer in range(MOE_LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (96, 96),
            f"{at}self_attn.k_proj.weight": (32, 96),
            f"{at}self_attn.v_proj.weight": (32, 96),
            f"{at}self_attn.o_proj.weight": (96, 96),
            f"{at}self_attn.q_norm.weight": (16,),
            f"{at}self_attn.k_norm.weight": (16,),
            f"{at}mlp.gate.weight": (EXPERTS, 96),
        }
        for expert in range(EXPERTS):
            inner = f"{at}mlp.experts.{expert}."
            shapes[f"{inner}gate_proj.weight"] = (MOE_FFN, 96)
            shapes[f"{inner}up_proj.weight"] = (MOE_FFN, 96)
            shapes[f"{inner}down_proj.weight"] = (96, MOE_FFN)
    return shapes


MIXTURE_CONFIG = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": MOE_LAYERS,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": MOE_FFN,
}


def cpu_seconds(*arguments: str) -> float:
    """CPU time of ``dcpconv check`` in a process of its own, bytecode cached."""
    command = [sys.executable, "-m", "dcpconv", "check", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("to", [(), ("--to", "lingua")], ids=["own-family", "to-lingua"])
def test_300_tensors_take_a_blink(
    to: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "pyc"))
    source = write_hf(
        tmp_path / "source", llama_shapes(33), config={**CONFIG, "num_hidden_layers": 33}
    )
    assert cpu_seconds(str(source), *to) < 0.9


def test_91_000_tensors_in_163_files_take_seconds(tmp_path: Path) -> None:
    shapes = mixture()
    assert len(shapes) > 91_000
    source = write_hf(tmp_path, shapes, files=163, config=MIXTURE_CONFIG)
    command = [sys.executable, "-m", "dcpconv", "check", str(source)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert f"{len(shapes):,} keys ({len(shapes):,} copied)" in run.stdout
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 15
