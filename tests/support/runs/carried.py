"""Training checkpoints whose moments tell which parameter they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.models.hf_models import save_hf, tiny
from support.models.minimind import GenerationName
from support.runs.training import MiniMindRun

SIZES = {"n_heads": "6", "n_kv_heads": "2"}


def telling_optimizer(model: nn.Module, groups: object = None) -> torch.optim.AdamW:
    """AdamW whose moments tell their parameter: equal to it, and one more than it."""
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=0.25)  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(7.0),
                "exp_avg": parameter.detach().clone(),
                "exp_avg_sq": parameter.detach() + 1,
            }
    return optimizer


def minimind(path: Path, generation: GenerationName, **more: Any) -> MiniMindRun:
    run = MiniMindRun.begin(generation)
    run.optimizer = telling_optimizer(run.model)
    run.step = 7
    run.save(path, half=False, **more)
    return run


def hf_trainer(path: Path, model_type: str, **fields: Any) -> Any:
    """What Trainer leaves, but for its own pickles."""
    from transformers import Trainer

    model = tiny(model_type, **fields)
    save_hf(model, path)
    decay = set(Trainer.get_decay_parameter_names(None, model))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n in decay], "weight_decay": 0.5},
        {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = telling_optimizer(model, groups)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torch.save(scheduler.state_dict(), path / "scheduler.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 1.5}))
    return model
