"""Trainers write Hugging Face directories themselves: a hook of three lines for each.

Every hook has to run in every rank, since every rank writes what it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dcpconv import save_weights


class SaveAsHF(TrainerCallback):  # type: ignore[misc]
    """HF Trainer (FSDP included): beside every ``checkpoint-N``, the model as ``hf-N``."""

    def on_save(self, args: Any, state: Any, _control: Any, *, model: Any, **_: Any) -> None:
        """After a checkpoint."""
        save_weights(model, Path(args.output_dir) / f"hf-{state.global_step}", overwrite=True)


def save_accelerated(accelerator: Any, model: Any, target: Path) -> None:
    """accelerate: whatever ``prepare`` has wrapped the model in."""
    save_weights(accelerator.unwrap_model(model), target, overwrite=True)
    accelerator.wait_for_everyone()


def save_every(trainer: Any, *, steps: int, target: Path) -> None:
    """torchtitan: call it behind ``train_step``; ``model_parts`` are this rank's part of the model,
    and ``hf_assets_path`` is where torchtitan reads the config and the tokenizer."""
    if trainer.step % steps == 0:
        assets = trainer.config.hf_assets_path
        save_weights(trainer.model_parts, target / f"hf-{trainer.step}", to="hf", assets=assets)
