"""Numbers become names: the order tables against the modules themselves."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.families.keymaps import keymaps
from dcpconv.plan.training.order import by_decay, by_fqn, parameters_in_order
from dcpconv.runs.carrying import OptimizerError
from dcpconv.sources.recognition import Weights
from support.models.hf_models import tiny
from support.models.minimind import GenerationName, MiniMind, MiniMindConfig

GENERATIONS: list[tuple[GenerationName, int]] = [
    (generation, experts) for generation in ("gen1", "gen2", "gen3", "gen4") for experts in (0, 3)
]


@pytest.mark.parametrize(("generation", "experts"), GENERATIONS)
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_minimind_parameters_are_in_the_order_of_the_module(
    generation: GenerationName, experts: int, head: str
) -> None:
    tied = head == "tied"
    model = MiniMind(MiniMindConfig(generation=generation, experts=experts, tied=tied, n_layers=11))
    names = [name for name, _ in model.named_parameters()]
    table = keymaps()[f"minimind{generation[-1]}"]

    assert parameters_in_order(table, random.Random(0).sample(names, len(names))) == names


FAMILIES = {
    "llama": "hf-llama",
    "mistral": "hf-llama",
    "qwen2": "hf-qwen2",
    "qwen3": "hf-qwen3",
    "phi3": "hf-phi3",
    "gemma2": "hf-gemma2",
    "olmo2": "hf-olmo2",
    "glm": "hf-glm",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_trainer_groups_parameters_as_we_think(model_type: str) -> None:
    from transformers import Trainer

    model = tiny(model_type, num_hidden_layers=11)
    names = [name for name, _ in model.named_parameters()]
    decay = set(Trainer.get_decay_parameter_names(None, model))

    keys = random.Random(0).sample(names, len(names))
    found = by_decay(parameters_in_order(keymaps()[FAMILIES[model_type]], keys))

    assert found == ([n for n in names if n in decay], [n for n in names if n not in decay])


def test_an_unknown_order_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(OptimizerError, match="order of the parameters of lingua") as caught:
        parameters_in_order(keymaps()["lingua"], ["norm.weight"])

    assert ("known", "hf-llama") in caught.value.facts


def weights(**shapes: tuple[int, ...]) -> Weights:
    entries = {key: TensorEntry(key, BY_LABEL["fp32"], shape, ()) for key, shape in shapes.items()}
    catalog = Catalog("torch", Path(), Path("run.pth"), {}, entries)
    return Weights(catalog, entries, {}, None, "", ())


def moment(*shape: int) -> dict[str, TensorEntry]:
    kinds = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    return {kind: TensorEntry(kind, BY_LABEL["fp32"], size, ()) for kind, size in kinds.items()}


def test_shapes_choose_between_orders() -> None:
    state: dict[object, object] = {0: moment(2, 3), 1: moment(4)}
    known = weights(a=(2, 3), b=(4,))

    moments, groups = by_fqn(
        state, [{"lr": 0.1, "params": [0, 1]}], [[["b", "a"]], [["a", "b"]]], known
    )

    assert groups[0].params == ("a", "b")
    assert groups[0].values == {"lr": 0.1}
    entry = moments["b"]["exp_avg"]
    assert isinstance(entry, TensorEntry)
    assert entry.shape == (4,)


def test_orders_that_fit_alike_are_an_error_that_names_the_parameters() -> None:
    state: dict[object, object] = {0: moment(3), 1: moment(3)}

    with pytest.raises(OptimizerError, match="several parameters") as caught:
        by_fqn(state, [{"params": [0, 1]}], [[["a", "b"]], [["b", "a"]]], weights(a=(3,), b=(3,)))

    assert ("ambiguous", "0 is a or b") in caught.value.facts


def test_names_in_the_groups_are_believed() -> None:
    optimizer = torch.optim.AdamW([("b", torch.nn.Parameter(torch.ones(3)))])
    group = optimizer.state_dict()["param_groups"][0]
    assert group["param_names"] == ["b"]

    _, groups = by_fqn({0: moment(3)}, [group], [], weights(a=(3,), b=(3,)))

    assert groups[0].params == ("b",)
    assert "param_names" not in groups[0].values


UNFIT = [
    pytest.param({0: moment(7)}, [0], "1 parameters", id="fewer"),
    pytest.param({0: moment(3), 1: moment(5)}, [0, 1], "b: exp_avg [5]", id="other-shape"),
]


@pytest.mark.parametrize(("state", "ids", "said"), UNFIT)
def test_what_does_not_fit_is_told(state: dict[object, object], ids: list[int], said: str) -> None:
    with pytest.raises(OptimizerError, match="not of these parameters") as caught:
        by_fqn(state, [{"params": ids}], [[["a", "b"]]], weights(a=(3,), b=(4,)))

    assert any(said in str(value) for _, value in caught.value.facts)
