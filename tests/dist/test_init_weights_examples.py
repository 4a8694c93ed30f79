"""The trainers in ``examples/`` start from Hugging Face weights, logits and all, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcpconv.families import configs
from support.models.hf_models import save_hf, tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def torchrun(ranks: int, script: str, *arguments: str | Path) -> list[float]:
    """Run an example; returns the losses it printed."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
            *(str(ranks), EXAMPLES / script, *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        float(loss) for loss in re.findall(r"^step +\d+ +loss ([\d.]+)$", done.stdout, re.MULTILINE)
    ]


def close(found: Path, right: Tensor) -> None:
    difference = (torch.load(found) - right).abs().max()
    assert difference < 1e-4


def test_tensor_parallel_inside_fsdp2(tmp_path: Path) -> None:
    from lingua_style_trainer import fixed_batch

    model = tiny("llama")
    save_hf(model, tmp_path / "hf")
    params = configs.to_text(configs.write_config("lingua", configs.read_spec(tmp_path / "hf")))
    file, logits = tmp_path / "params.json", tmp_path / "logits.pt"
    file.write_text(params)
    losses = torchrun(
        4,
        "tp_trainer.py",
        *(
            tmp_path / "hf",
            "--params",
            tmp_path / "params.json",
            "--logits",
            tmp_path / "logits.pt",
        ),
        *("--steps", "6", "--seq-len", "32"),
    )
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        close(logits, model(fixed_batch(131, seq_len=32)).logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_minimind_with_ddp(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type, tie_word_embeddings=True)
    save_hf(model, tmp_path / "hf")
    losses = torchrun(
        2,
        "minimind_finetune_ddp.py",
        *(tmp_path / "hf", "--save", tmp_path / "out", "--logits", tmp_path / "logits.pt"),
        *("--steps", "8", "--seq-len", "32", "--lr", "2e-3"),
    )
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        close(tmp_path / "logits.pt", model(torch.arange(32)[None]).logits)
    saved = torch.load(tmp_path / "out" / "full_sft_96.pth")
    assert set(saved) == set(model.state_dict())
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
