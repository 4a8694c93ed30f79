"""Containers around the weights are found, shown and taken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcpconv import convert
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.containers import candidate_roots, nested_root
from dcpconv.sources.recognition import recognise
from support.checkpoints.stock import assert_same_bits, stock_load
from support.models.hf_models import save_hf, tiny


def llama(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    return source, stock_load(source, "hf")


STRANGE = {"0.weight": torch.arange(6.0).view(2, 3), "1.bias": torch.arange(3.0)}
"""A model whose names no table knows."""


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def composer(weights: dict[str, Tensor]) -> dict[str, Any]:
    state = {"model": prefixed(weights, "model."), "run_name": "pretrain", "seed": 17}
    optimizer = {"AdamW": {"state": {"model.0.weight": {"exp_avg": torch.ones(2, 3)}}}}
    return {"state": {**state, "optimizers": optimizer}, "rng": [{"python": 1}]}


def lightning(weights: dict[str, Tensor], attribute: str) -> dict[str, Any]:
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": prefixed(weights, f"{attribute}."),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
    }


def ddp(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"model_state_dict": prefixed(weights, "module."), "epoch": 3}


@pytest.mark.parametrize(
    ("wrap", "root"),
    [
        pytest.param(composer, "state.model.model.", id="composer"),
        pytest.param(lambda w: lightning(w, "model"), "state_dict.model.", id="lightning"),
        pytest.param(lambda w: lightning(w, "llm"), "state_dict.llm.", id="lightning-llm"),
        pytest.param(ddp, "model_state_dict.module.", id="ddp"),
    ],
)
def test_known_weights_come_under_clean_names(tmp_path: Path, wrap: Any, root: str) -> None:
    source, weights = llama(tmp_path)
    torch.save(wrap(weights), tmp_path / "in.ckpt")
    found = recognise(open_checkpoint(tmp_path / "in.ckpt"))
    assert (found.root, found.keymap is not None) == (root, True)
    assert root in found.evidence[0]
    convert(tmp_path / "in.ckpt", tmp_path / "out", form="hf", assets=source)
    assert_same_bits(stock_load(tmp_path / "out", "hf"), weights)


@pytest.mark.parametrize(
    ("wrap", "root"),
    [
        pytest.param(composer, "state.model.model.", id="composer"),
        pytest.param(lambda w: lightning(w, "model"), "state_dict.model.", id="lightning"),
        pytest.param(ddp, "model_state_dict.", id="ddp"),
    ],
)
def test_weights_that_no_table_knows(tmp_path: Path, wrap: Any, root: str) -> None:
    torch.save(wrap(STRANGE), tmp_path / "in.ckpt")
    found = recognise(open_checkpoint(tmp_path / "in.ckpt"))
    assert found.root == root
    assert any(repr(root) in reason for reason in found.evidence)
    convert(tmp_path / "in.ckpt", tmp_path / "out", form="hf")
    kept = STRANGE if root != "model_state_dict." else prefixed(STRANGE, "module.")
    assert_same_bits(stock_load(tmp_path / "out", "hf"), kept)


def test_composers_sharded_directory(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    source, weights = llama(tmp_path)
    save(composer(weights), checkpoint_id=tmp_path / "ep1-ba1")
    convert(tmp_path / "ep1-ba1", tmp_path / "out", form="hf", assets=source)
    assert_same_bits(stock_load(tmp_path / "out", "hf"), weights)


def test_an_attribute_is_kept_without_a_trainer_that_says_so() -> None:
    """``model.`` may be the first component of the model's own keys."""
    paths = [("state_dict", "model.norm.weight")]
    keys = ["state_dict.model.norm.weight"]
    assert nested_root(keys, paths, ["epoch"]) == "state_dict."
    assert nested_root(keys, paths, ["pytorch-lightning_version"]) == "state_dict.model."


def test_several_attributes_are_the_models_own() -> None:
    keys = ["state_dict.model.norm", "state_dict.head.weight"]
    paths = [("state_dict", "model.norm"), ("state_dict", "head.weight")]
    assert nested_root(keys, paths, ["pytorch-lightning_version"]) == "state_dict."
    assert "state_dict.head." not in candidate_roots([key.split(".") for key in keys])


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning", reason="needs .[interop]")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.1, "sizes": [4, 3]})
            self.model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))

        def training_step(self, batch: Any, _index: int) -> Tensor:
            found: Tensor = self.model(batch[0]).sum()
            return found

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    return Module()


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_that_lightning_wrote(tmp_path: Path) -> None:
    module = lightning_module()
    import lightning

    data = torch.utils.data.TensorDataset(torch.randn(4, 4))
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "out", form="hf")
    expected = {key: tensor.detach() for key, tensor in module.model.state_dict().items()}
    assert_same_bits(stock_load(tmp_path / "out", "hf"), expected)


@pytest.mark.filterwarnings("ignore")
def test_sharded_directory_of_lightning(tmp_path: Path) -> None:
    """As ``FSDPStrategy(state_dict_type="sharded")`` saves it: a DCP, and the rest in meta.pt."""
    pytest.importorskip("lightning", reason="needs .[interop]")
    from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save

    directory = tmp_path / "epoch=0"
    directory.mkdir()
    weights = prefixed(STRANGE, "model.")
    optimizer = {"state": {"model.0.weight": {"exp_avg": torch.ones(2, 3)}}}
    _distributed_checkpoint_save({"model": weights, "optimizer_0": optimizer}, directory)
    torch.save({"pytorch-lightning_version": "2.6.0", "epoch": 0}, directory / "meta.pt")
    convert(directory, tmp_path / "out", form="hf")
    assert_same_bits(stock_load(tmp_path / "out", "hf"), STRANGE)
