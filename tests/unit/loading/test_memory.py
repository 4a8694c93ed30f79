"""Parameters that wrap their memory, and those that have none to be filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save

from dcpconv import convert, load_init_weights, save_weights
from dcpconv.core.errors import DcpconvError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "0.weight": torch.randn(48, 32, generator=generator).bfloat16(),
        "1.weight": torch.randn(16, 48, generator=generator).bfloat16(),
    }
    save_file(tensors, tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def plain() -> nn.Sequential:
    both = (nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False))
    return nn.Sequential(*both).bfloat16()


def gathered_in_fp8(*, device: str) -> nn.Sequential:
    """As torchtitan trains it: every weight in a wrapper that casts it while FSDP2 gathers."""
    float8 = pytest.importorskip("torchao.float8", reason="needs .[interop]")
    with torch.device(device):
        model = plain()
    config = float8.Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    float8.convert_to_float8_training(model, config=config)
    assert type(model[0].weight.data) is not Tensor
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_gathered_in_fp8_are_loaded_and_saved(
    tmp_path: Path, saved: Path, device: str
) -> None:
    model = gathered_in_fp8(device=device)
    load_init_weights(model, saved)
    save_weights(model, tmp_path / "out", form="hf")

    right, found = load_file(saved), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], right[key]) for key in right)


def test_a_dcp_of_weights_that_are_gathered_in_fp8(tmp_path: Path, saved: Path) -> None:
    model = gathered_in_fp8(device="cpu")
    load_init_weights(model, saved)
    save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "out", form="hf")

    right, found = load_file(saved), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], right[key]) for key in right)


def quantised(model: nn.Sequential) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs .[interop]")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))


def expanded(model: nn.Sequential) -> None:
    for layer in model:
        assert isinstance(layer, nn.Linear)
        row = torch.zeros(1, layer.in_features, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(row.expand(layer.out_features, -1))


def lazy(model: nn.Sequential) -> None:
    for index in (0, 1):
        model[index] = nn.LazyLinear(3, bias=False)


def inferring(model: nn.Sequential) -> None:
    with torch.inference_mode():
        for index, layer in enumerate(plain()):
            model[index] = layer


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (quantised, "Int8Tensor holds other elements than it shows"),
        (expanded, "elements share their memory"),
        (lazy, "has no shape before the module is called"),
        (inferring, "was made in inference mode"),
    ],
)
def test_what_cannot_be_filled_is_named_before_anything_is(
    saved: Path, change: Callable[[nn.Sequential], None], why: str
) -> None:
    model = plain()
    change(model)
    with pytest.raises(DcpconvError, match="nothing was loaded") as caught:
        load_init_weights(model, saved)
    assert [f"{fqn}.weight  {why}" in str(caught.value) for fqn in (0, 1)] == [True, True]


def test_inference_mode_loads_what_was_made_in_it(saved: Path) -> None:
    with torch.inference_mode():
        model = plain()
        load_init_weights(model, saved)
        assert torch.equal(model.get_parameter("0.weight"), load_file(saved)["0.weight"])
