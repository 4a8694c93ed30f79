"""Keys that the real code of MiniMind, ChatGLM3 and torchtitan stores: the tables know them all."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import keymaps, resolve_family
from dcpconv.families.keymaps.table import Pattern
from dcpconv.plan.matching import cover
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import understand

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LISTS = tomllib.loads((Path(__file__).parent / "key_lists.toml").read_text(encoding="utf-8"))
EACH = [pytest.param(told, id=name) for name, told in LISTS.items()]


def catalog_of(told: dict[str, Any]) -> Catalog:
    """A checkpoint with these keys and shapes, and no bytes."""
    tensors = {}
    for text, shape in told["keys"].items():
        pattern = Pattern(text)
        for values in product(*(range(told["numbers"][name]) for name in pattern.names)):
            key = pattern.key(dict(zip(pattern.names, values, strict=True)))
            tensors[key] = TensorEntry(key, BY_NAME["float16"], tuple(shape), ())
    return Catalog("torch", Path(), Path("list"), {}, tensors, tied=told["tied"])


def _settled(catalog: Catalog, told: dict[str, Any]) -> tuple[Weights, ModelSpec | None]:
    found = understand(
        catalog.source, Said.parse(from_=told["family"], spec=told["spec"]), catalog=catalog
    )
    return found.weights, found.spec


@pytest.mark.parametrize("told", EACH)
def test_every_key_is_accounted_for_and_none_is_missed(told: dict[str, Any]) -> None:
    catalog = catalog_of(told)
    assert len(catalog.tensors) == told["count"]
    weights, spec = _settled(catalog, told)
    table = weights.require_keymap()
    assert all(table.match(key) for key in catalog.tensors)
    coverage = cover(weights, table, spec=spec)
    assert coverage, list(coverage.facts())
    used = {piece.entry.key for target in coverage.targets for piece in target.pieces}
    seconds = {key for key, _ in coverage.tied} | {t.key for t in coverage.targets if t.tied_to}
    ignored = {fault.key for fault in coverage.ignored}
    assert used | seconds | ignored == set(catalog.tensors)
    assert not used & ignored


@pytest.mark.parametrize(
    "told", [case for name, case in zip(LISTS, EACH, strict=True) if "torchtitan" not in name]
)
def test_every_key_has_a_place_in_a_class_of_transformers(told: dict[str, Any]) -> None:
    weights, spec = _settled(catalog_of(told), told)
    assert spec is not None
    coverage = cover(weights, resolve_family("hf", spec.architecture), spec=spec, omit_ties=True)
    assert coverage, list(coverage.facts())


@pytest.mark.parametrize("told", EACH)
def test_the_family_is_among_those_that_the_keys_speak_for(told: dict[str, Any]) -> None:
    weights = recognise(catalog_of(told))
    assert weights.keymap is not None
    named = {weights.keymap.name, *(table.name for table in weights.alternatives)}
    same = next((line for line in weights.evidence if line.startswith("the same bytes as ")), "")
    assert told["family"] in named | set(same.removeprefix("the same bytes as ").split(", "))


BY_THE_PACKAGE = {
    "torchtitan-gpt_oss": "test_torchtitan_gpt_oss.py",
    "torchtitan-kimi_k2_7": "test_torchtitan_towers.py",
    "torchtitan-muse_glimmer": "test_torchtitan_towers.py",
    "torchtitan-qwen3_5": "test_torchtitan_qwen3_5.py",
}
"""Namings whose keys are compared with the modules of the package itself, in ``tests/laws``."""


def test_every_generation_and_release_is_listed() -> None:
    families = {told["family"] for told in LISTS.values()}
    ours = {name for name in keymaps() if name.startswith(("minimind", "torchtitan"))}
    assert ours | {"chatglm3"} == families | BY_THE_PACKAGE.keys()
    assert not families & BY_THE_PACKAGE.keys()
    laws = Path(__file__).parents[1] / "laws"
    for name, file in BY_THE_PACKAGE.items():
        assert f'"{name}"' in (laws / file).read_text()
