"""One record per family answers for all its tables."""

from __future__ import annotations

from importlib import import_module

import pytest

from dcpconv.families.configs.model_types import MODULES
from dcpconv.families.family import FAMILIES, family_of, family_of_fields, parameter_orders
from dcpconv.families.keymaps import keymaps


@pytest.mark.parametrize("name", keymaps())
def test_every_table_that_names_a_config_is_of_one_family(name: str) -> None:
    config = keymaps()[name].config

    assert len([family for family in FAMILIES if family.has(config)]) == bool(config)
    family = family_of(config)
    if family is not None:
        assert callable(family.configs.refusals)
        assert (family.file is None) or callable(family.configs.write)
        assert (family.file is None) or callable(family.reading.read)


def test_orders_are_of_tables() -> None:
    assert set(parameter_orders()) <= set(keymaps())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": {}}, "lingua"),
        ({"model_type": "minimind"}, "minimind1"),
        ({"model_type": "chatglm"}, "chatglm3"),
        ({"dim": 8, "n_layers": 2}, "meta"),
        ({"model_type": "llama"}, "hf"),
        ({"architectures": ["LlamaForCausalLM"]}, "hf"),
        ({"dim": 96, "n_layers": 3, "ffn_exp": 4, "moe_args": {}}, "meta-llama4"),
    ],
)
def test_fields_tell_the_family(fields: dict[str, object], name: str) -> None:
    found = family_of_fields(fields)

    assert found is not None
    assert found.names[0] == name
    assert family_of_fields({"vocab": 3}) is None


@pytest.mark.parametrize("module", sorted(set(MODULES.values())))
def test_a_module_of_classes_knows_those_that_are_said_to_be_there(module: str) -> None:
    found = import_module(f"dcpconv.families.configs.{module}")
    said = [name for name, where in MODULES.items() if where == module]
    assert said == list(getattr(found, module.upper()))
