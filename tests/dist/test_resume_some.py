"""Real Trainer runs that train only some parameters, carried and resumed with the same losses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv.runs.carrying import convert_run, read_training_state

AFTER, STEPS = 3, 6


def losses_of(model: Any, directory: Path, *, resume: Path | None = None) -> list[float]:
    """Losses of a stock Trainer after step ``AFTER``; a checkpoint of that step stays behind."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(3)
    data = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(0, 131, (64, 12), generator=generator)
    ]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        save_steps=AFTER,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    rows = [row for row in trainer.state.log_history if "loss" in row and row["step"] > AFTER]
    return [row["loss"] for row in rows]


def lora(**fields: Any) -> Any:
    """A Llama with an adapter whose factors are both random."""
    peft = pytest.importorskip("peft", reason="needs .[interop]")

    from support.models.hf_models import tiny

    torch.manual_seed(4)
    base = tiny("llama", seed=0, num_hidden_layers=2)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **fields)
    return peft.get_peft_model(base, config)


ADAPTERS = [
    pytest.param({"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}, id="matrices"),
    pytest.param({"r": 4, "target_modules": "all-linear", "use_dora": True}, id="dora"),
    pytest.param(
        {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        id="modules-to-save",
    ),
]


@pytest.mark.parametrize("fields", ADAPTERS)
def test_an_adapter_s_run_goes_on_alike(fields: Mapping[str, Any], tmp_path: Path) -> None:
    expected = losses_of(lora(**fields), tmp_path / "run")
    step = tmp_path / "run" / f"checkpoint-{AFTER}"

    convert_run(step, tmp_path / "dcp", to="dcp")
    report = convert_run(
        tmp_path / "dcp", tmp_path / "again" / f"checkpoint-{AFTER}", to="hf-trainer"
    )

    again = tmp_path / "again" / f"checkpoint-{AFTER}"
    assert losses_of(lora(**fields), tmp_path / "again", resume=again) == expected
    assert json.loads((again / "adapter_config.json").read_text())["r"] == 4
    assert report.moments == ("step", "exp_avg", "exp_avg_sq")
    same = [torch.load(path / "optimizer.pt", weights_only=True) for path in (step, again)]
    assert [*same[0]["state"]] == [*same[1]["state"]]
    for number, moments in same[0]["state"].items():
        for kind, value in moments.items():
            assert torch.equal(value, same[1]["state"][number][kind])


@pytest.mark.parametrize("fields", ADAPTERS)
def test_numbers_get_the_names_that_the_model_has(
    fields: Mapping[str, Any], tmp_path: Path
) -> None:
    model = lora(**fields)
    losses_of(model, tmp_path)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]

    state = read_training_state(tmp_path / f"checkpoint-{AFTER}")

    found = [name for group in state.groups for name in group.params]
    plain = [re.sub(r"(\.modules_to_save)?\.default", "", name) for name in trained]
    plain = [re.sub(r"(?<=lora_magnitude_vector)\.weight", "", name) for name in plain]
    assert sorted(found) == sorted(plain)
    assert [name for name in plain if name in state.groups[0].params] == [*state.groups[0].params]


def frozen(names: tuple[str, ...]) -> Any:
    from support.models.hf_models import tiny

    model = tiny("llama", seed=0, num_hidden_layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(part in name for part in names)
    return model


@pytest.mark.parametrize(
    "names", [("embed_tokens",), ("mlp", "lm_head"), ("norm",)], ids=["embedding", "mlp", "norms"]
)
def test_a_run_with_frozen_parameters_goes_on_alike(names: tuple[str, ...], tmp_path: Path) -> None:
    expected = losses_of(frozen(names), tmp_path / "run")
    again = tmp_path / "again" / f"checkpoint-{AFTER}"

    convert_run(tmp_path / "run" / f"checkpoint-{AFTER}", tmp_path / "dcp", to="dcp")
    convert_run(tmp_path / "dcp", again, to="hf-trainer")

    assert losses_of(frozen(names), tmp_path / "again", resume=again) == expected
