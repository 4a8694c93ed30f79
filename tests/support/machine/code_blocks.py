"""Python in Markdown: the blocks of a page, run in order with what the page takes for granted.

All blocks of a page share one namespace and a directory that ``prepare`` of ``transcripts`` fills.
"""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard

import dcpconv
from lingua_model import LinguaModel
from support.checkpoints.rank_files import distributed, save_verl
from support.checkpoints.scaled_blocks import published
from support.models.hf_models import tiny
from support.runs.training import MiniMindRun
from support.versions import save_alone
from support.worlds.sharded_models import params

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


def run_page(text: str, names: Names) -> Names:
    """Run all blocks; returns the namespace as they leave it.

    Args:
        text: The page.
        names: What the blocks take for granted.
    """
    for number, found in enumerate(BLOCK.finditer(text)):
        exec(compile(found.group(1), f"block {number}", "exec"), names)
    return names


def _lingua(directory: Path, *, meta: bool = True) -> Names:
    """A trainer that starts from ``weights/Llama-3-8B``."""
    del directory
    with torch.device("meta" if meta else "cpu"):
        model = LinguaModel(params(tied=True))
    return {
        "model": model,
        "args": params(tied=True),
        "LMTransformer": LinguaModel,
        "Transformer": LinguaModel,
        "torch": torch,
    }


def _loading(directory: Path) -> Names:
    model = _lingua(directory, meta=False)["model"]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    run = {"model": weights, "optim": moments, "step": 4000}
    save_alone(run, checkpoint_id=directory / "runs/step-4000")
    return _lingua(directory) | {"state_dict": _lingua(directory, meta=False)["model"].state_dict()}


def _saving(directory: Path) -> Names:
    from transformers import TrainerCallback

    model = _lingua(directory, meta=False)["model"]
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return {
        "model": model,
        "weights": weights,
        "moments": moments,
        "TrainerCallback": TrainerCallback,
    }


def _adapters(directory: Path) -> Names:
    for name in ("sft", "style"):
        shutil.copytree(directory / "out/checkpoint-500", directory / name)
    model = tiny("llama", tie_word_embeddings=True)
    return _live(directory / "weights/tiny-llama", model) | {"target": directory / "out/merged"}


def _quantised(directory: Path) -> Names:
    source, _ = published(directory, "llama")
    return _live(source, tiny("llama")) | {"source": source, "target": directory / "out/bf16"}


def _live(source: Path, model: Any) -> Names:
    """A model of transformers, and the functions that pages show without their imports."""
    return {
        "base": source,
        "model": model,
        "state_dict": {key: held.detach().clone() for key, held in model.named_parameters()},
        "dcp": state_dict_loader,
        "CheckpointReader": dcpconv.CheckpointReader,
        "convert": dcpconv.convert,
        "load_init_weights": dcpconv.load_init_weights,
    }


def _rank_files(directory: Path) -> Names:
    model = tiny("llama")
    tensors: Mapping[str, Tensor] = model.state_dict()
    save_verl(
        directory / "global_step_100/actor",
        distributed(tensors, [Shard(0)]),
        shape=(8,),
        config=model.config.to_dict(),
    )
    return _live(directory, model)


def _runs(directory: Path) -> Names:
    del directory
    taken: list[Any] = []

    def train(*, resume_from_checkpoint: str | None) -> None:
        taken.append(resume_from_checkpoint)

    trainer = Namespace(train=train)
    return {"args": Namespace(resume="latest", output_dir="run"), "trainer": trainer}


def _training_state(directory: Path) -> Names:
    del directory
    run = MiniMindRun.begin("gen3")
    return {
        "model": run.model,
        "optimizer": run.optimizer,
        "scaler": run.scaler,
        "dcp": state_dict_loader,
        "get_state_dict": get_state_dict,
        "set_state_dict": set_state_dict,
    }


GIVEN: Mapping[str, Callable[[Path], Names]] = {
    "README.md": _lingua,
    "docs/adapters.md": _adapters,
    "docs/check.md": _lingua,
    "docs/loading.md": _loading,
    "docs/quantised.md": _quantised,
    "docs/rank-files.md": _rank_files,
    "docs/runs.md": _runs,
    "docs/saving.md": _saving,
    "docs/training-state.md": _training_state,
}
"""By page: makes what its blocks take for granted."""
