"""Which models change their state dict, so that the direct path would not give what they want."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dcpconv.core.errors import DcpconvError
from dcpconv.loading.hooks import own_state_dict
from dcpconv.loading.init_weights import load_init_weights
from support.models.hf_models import tiny


def hook(*_args: Any, **_options: Any) -> None:
    """Changes nothing; whether it would, nobody can tell from outside."""


class Method:
    def hook(self, *_args: Any, **_options: Any) -> None: ...


def with_hook(register: Callable[[Any], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    register(model[0])
    return model


class Renames(nn.Linear):
    """Keeps its weight under another name, by overriding what is saved and loaded."""

    def state_dict(self, *args: Any, **options: Any) -> Any:
        prefix = options.get("prefix", "")
        found = super().state_dict(*args, **options)
        found[f"{prefix}kernel"] = found.pop(f"{prefix}weight")
        return found


class Pops(nn.Linear):
    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)


def patched() -> nn.Module:
    model = nn.Linear(2, 3)
    model.state_dict = hook  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: with_hook(lambda m: m.register_state_dict_post_hook(hook)),
            "has state dict hooks",
        ),
        (
            lambda: with_hook(lambda m: m.register_state_dict_pre_hook(hook)),
            "has state dict pre hooks",
        ),
        (
            lambda: with_hook(lambda m: m.register_load_state_dict_pre_hook(hook)),
            "has load state dict pre hooks",
        ),
        (
            lambda: with_hook(lambda m: m.register_load_state_dict_post_hook(hook)),
            "has load state dict post hooks",
        ),
        (
            lambda: with_hook(
                lambda m: m._register_load_state_dict_pre_hook(functools.partial(hook, 1))
            ),
            "has load state dict pre hooks",
        ),
        (
            lambda: with_hook(lambda m: m._register_state_dict_hook(Method().hook)),
            "has state dict hooks",
        ),
        (lambda: nn.Sequential(Renames(2, 3)), "overrides state_dict"),
        (lambda: nn.Sequential(Pops(2, 3)), "overrides _load_from_state_dict"),
        (patched, "overrides state_dict"),
    ],
)
def test_hooks_and_overrides_are_found(make: Callable[[], nn.Module], said: str) -> None:
    assert own_state_dict(make()).endswith(said)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2), nn.LSTM(2, 3)),
        lambda: checkpoint_wrapper(nn.Linear(2, 3)),
        lambda: torch.compile(nn.Linear(2, 3)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: tiny("llama"),
    ],
)
def test_what_torch_registers_itself_is_no_reason(make: Callable[[], Any]) -> None:
    assert own_state_dict(make()) == ""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_overridden_state_dict_is_loaded(tmp_path: Path) -> None:
    class Loads(Renames):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            if f"{prefix}kernel" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
            super()._load_from_state_dict(state, prefix, *rest)

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return super().state_dict(*args, **options)

    model = nn.Sequential(Loads(2, 3))
    weights: dict[str, Tensor] = {"0.kernel": torch.randn(3, 2), "0.bias": torch.randn(3)}
    torch.save(weights, tmp_path / "in.pt")
    report = load_init_weights(model, tmp_path / "in.pt")
    assert report.engine == "torch"
    assert torch.equal(model.get_parameter("0.weight"), weights["0.kernel"])
    assert torch.equal(model.get_parameter("0.bias"), weights["0.bias"])


@pytest.mark.parametrize("options", [{"dtype": "source"}, {"read": "rank0"}])
def test_what_the_stock_path_cannot_do_is_an_error(tmp_path: Path, options: Any) -> None:
    model = with_hook(lambda module: module.register_state_dict_post_hook(hook))
    with pytest.raises(DcpconvError) as caught:
        load_init_weights(model, tmp_path, **options)
    assert "Linear (0) has state dict hooks" in str(caught.value)
    assert "engine='direct'" in str(caught.value)
