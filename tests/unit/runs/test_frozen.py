"""Optimizers of only some parameters: their numbers are of the trained ones, or it is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.families.keymaps import keymaps
from dcpconv.plan.training.frozen import readings_of
from dcpconv.plan.training.order import by_fqn, parameters_in_order
from dcpconv.runs.carrying import OptimizerError, convert_run, read_training_state
from dcpconv.sources.recognition import Weights
from support.checkpoints.stock import flat, nested_of_dcp
from support.models.chatglm import ChatGLM, ChatGLMConfig
from support.models.hf_models import save_hf, tiny
from support.models.minimind import MiniMind
from support.runs.training import MiniMindRun


def weights(**shapes: tuple[int, ...]) -> Weights:
    entries = {key: TensorEntry(key, BY_LABEL["fp32"], shape, ()) for key, shape in shapes.items()}
    catalog = Catalog("torch", Path(), Path("run.pth"), {}, entries)
    return Weights(catalog, entries, {}, None, "", ())


def moments(*shapes: tuple[int, ...] | None) -> dict[object, object]:
    return {
        number: {"exp_avg": TensorEntry("m", BY_LABEL["fp32"], shape, ())}
        for number, shape in enumerate(shapes)
        if shape is not None
    }


MODEL = weights(a=(5, 2), b=(2, 2), c=(2, 2), d=(2,), e=(5, 2))
ROWS = [
    pytest.param([(2, 2), (2, 2), (2,)], [["b", "c", "d"]], id="both-of-a-shape"),
    pytest.param([(2,), (5, 2)], [["d", "e"]], id="the-order-decides"),
    pytest.param([(2, 2), (2,)], [["b", "d"], ["c", "d"]], id="one-of-two"),
    pytest.param([(5, 2)], [["a"], ["e"]], id="first-or-last"),
    pytest.param([(2, 2), None, (2,)], [["b", "c", "d"]], id="one-has-no-state-yet"),
    pytest.param([(2, 2), None, (5, 2)], [["b", "c", "e"], ["c", "d", "e"]], id="which-has-none"),
    pytest.param([(2,), (2, 2)], [], id="not-in-this-order"),
]


@pytest.mark.parametrize(("shapes", "expected"), ROWS)
def test_numbers_are_of_some_parameters_in_order(
    shapes: list[tuple[int, ...] | None], expected: list[list[str]]
) -> None:
    ids: list[object] = [*range(len(shapes))]

    found = readings_of([ids], [[[*"abcde"]]], moments(*shapes), MODEL)

    assert [reading[0] for reading in found] == expected


def test_an_order_that_leaves_nothing_out_counts_before_those_that_do() -> None:
    orders = [[["b", "c", "d"]], [["b", "c"]]]

    assert readings_of([[0, 1]], orders, moments((2, 2), (2, 2)), MODEL) == [[["b", "c"]]]


def test_an_ambiguous_choice_lists_all_numbers_and_says_what_helps() -> None:
    with pytest.raises(OptimizerError, match="several parameters") as caught:
        by_fqn(moments((2, 2), (5, 2)), [{"params": [0, 1]}], [[[*"abcde"]]], MODEL)

    assert [fact for fact in caught.value.facts if fact[0] == "ambiguous"] == [
        ("ambiguous", "0 is b or c")
    ]
    assert "named_parameters" in str(caught.value.hint)


def telling(named: list[tuple[str, nn.Parameter]], groups: list[Any] | None = None) -> Any:
    """AdamW whose moments tell their parameter: its value, and its value plus one."""
    optimizer = torch.optim.AdamW(groups or [p for _, p in named], lr=1e-3)
    for _, parameter in named:
        value = parameter.detach()
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": value.clone(),
            "exp_avg_sq": value + 1,
        }
    return optimizer


def assert_follow(dcp: Path, expected: dict[str, torch.Tensor]) -> None:
    found = flat(nested_of_dcp(dcp))
    state = {key: value for key, value in found.items() if ".state." in key}
    assert len(state) == 3 * len(expected)
    for key, value in expected.items():
        assert torch.equal(state[f"optim.state.{key}.exp_avg"], value), key
        assert torch.equal(state[f"optim.state.{key}.exp_avg_sq"], value + 1), key
    groups = read_training_state(dcp).groups
    assert [name for group in groups for name in group.params] == [*expected]


FROZEN = [
    pytest.param(lambda name: "norm" not in name, id="norms-frozen"),
    pytest.param(lambda name: "mlp" in name or "embed" in name, id="attention-and-norms-frozen"),
]


@pytest.mark.parametrize("which", FROZEN)
def test_minimind_with_frozen_parameters(which: Callable[[str], bool], tmp_path: Path) -> None:
    run = MiniMindRun.begin("gen3")
    some = [(name, p) for name, p in run.model.named_parameters() if which(name)]
    run.optimizer = telling(some)
    run.save(tmp_path / "a_resume.pth", half=False)

    convert_run(tmp_path / "a_resume.pth", tmp_path / "out", to="dcp")

    assert_follow(tmp_path / "out", {name: p.detach() for name, p in some})


def add_lora(model: MiniMind, rank: int = 4) -> list[tuple[str, nn.Parameter]]:
    """Factors on square matrices, as MiniMind hangs them on.

    Source: jingyaogong/minimind@d65ef2c ``model/model_lora.py``, ``trainer/train_lora.py``.
    """
    torch.manual_seed(5)
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        if module.weight.shape[0] == module.weight.shape[1]:
            lora = nn.Module()
            lora.A = nn.Linear(module.in_features, rank, bias=False)
            lora.B = nn.Linear(rank, module.out_features, bias=False)
            module.lora = lora
    return [(name, p) for name, p in model.named_parameters() if "lora" in name]


def test_minimind_s_lora_run_goes_by_name(tmp_path: Path) -> None:
    run = MiniMindRun.begin("gen3")
    lora = add_lora(run.model)
    run.optimizer = telling(lora)
    run.save(tmp_path / "lora_resume.pth", half=False)

    convert_run(tmp_path / "lora_resume.pth", tmp_path / "out", to="dcp")

    assert len(lora) > 4
    assert_follow(tmp_path / "out", {name: p.detach() for name, p in lora})


def _chatglm_with_prefix() -> ChatGLM:
    torch.manual_seed(2)
    model = ChatGLM(ChatGLMConfig())
    encoder = nn.Module()
    encoder.embedding = nn.Embedding(8, 40)
    encoder.trans = nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40))
    model.transformer.prefix_encoder = encoder
    return model


def test_chatglm3_s_parameters_are_in_the_order_of_its_modules() -> None:
    names = [name for name, _ in _chatglm_with_prefix().named_parameters()]

    assert parameters_in_order(keymaps()["chatglm3"], sorted(names)) == names


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", ["whole", "prefix"])
def test_chatglm3_s_p_tuning_trains_the_prefix_alone(what: str, name: str, tmp_path: Path) -> None:
    model = _chatglm_with_prefix()
    named = list(model.named_parameters())
    some = [(key, p) for key, p in named if what == "whole" or "prefix_encoder" in key]
    step = tmp_path / "checkpoint-7"
    step.mkdir()
    fields = {**model.config.as_json(), "pre_seq_len": 8, "prefix_projection": True}
    (step / "config.json").write_text(json.dumps(fields))
    state = model.state_dict()
    if name.endswith(".bin"):
        torch.save(state, step / name)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, step / name)
    plain = [key for key, _ in some if "bias" in key or "layernorm" in key]
    groups = [
        {"params": [p for key, p in some if key not in plain]},
        {"params": [p for key, p in some if key in plain], "weight_decay": 0.0},
    ]
    torch.save(telling(some, groups).state_dict(), step / "optimizer.pt")
    (step / "trainer_state.json").write_text('{"global_step": 7}')

    convert_run(step, tmp_path / "out", to="dcp")

    order = [key for key, _ in some if key not in plain] + plain
    assert_follow(tmp_path / "out", {key: dict(some)[key].detach() for key in order})


@pytest.mark.parametrize("step", [7, 7.0], ids=["int", "float"])
def test_a_step_may_be_a_number(step: float, tmp_path: Path) -> None:
    run = MiniMindRun.begin("gen3")
    named = list(run.model.named_parameters())
    run.optimizer = telling(named)
    for state in run.optimizer.state.values():
        state["step"] = step
    run.save(tmp_path / "a_resume.pth", half=False)

    convert_run(tmp_path / "a_resume.pth", tmp_path / "out", to="dcp")

    found = flat(nested_of_dcp(tmp_path / "out"))
    for name, _ in named:
        assert torch.equal(found[f"optim.state.{name}.step"], torch.tensor(7.0))


def test_a_trainer_that_froze_one_of_two_like_layers_is_asked(tmp_path: Path) -> None:
    """LISA trains a choice of layers, and nothing in the files says which."""
    model = tiny("llama", num_hidden_layers=3)
    save_hf(model, tmp_path)
    some = [(name, p) for name, p in model.named_parameters() if ".layers.1." in name]
    plain = [name for name, _ in some if "layernorm" in name]
    groups = [
        {"params": [p for name, p in some if name not in plain]},
        {"params": [p for name, p in some if name in plain]},
    ]
    torch.save(telling(some, groups).state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text("{}")

    with pytest.raises(OptimizerError, match="several parameters") as caught:
        read_training_state(tmp_path)

    told = [value for label, value in caught.value.facts if label == "ambiguous"]
    assert len(told) == len(some)
    assert "0 is model.layers.0.self_attn.q_proj.weight or model.layers.2" in str(told[0])
