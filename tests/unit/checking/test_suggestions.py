"""What is offered where keys do not fit: the likely cause, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dcpconv import Coverage, check
from dcpconv.core.errors import NotACheckpointError
from support.checkpoints.check_cases import llama_shapes, write_hf

Shapes = Mapping[str, tuple[int, ...]]


def suggested(coverage: Coverage) -> str:
    assert not coverage
    return "\n".join(coverage.suggestions)


def renamed(old: str, new: str) -> Shapes:
    return {key.replace(old, new): shape for key, shape in llama_shapes().items()}


PREFIXED = {f"net.trunk.{n}.weight": (3, 4) for n in range(4)}
PLAIN = {f"trunk.{n}.weight": (3, 4) for n in range(4)}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        pytest.param(PREFIXED, PLAIN, "4 source keys carry the prefix 'net.'", id="carried"),
        pytest.param(PLAIN, PREFIXED, "4 source keys lack the prefix 'net.'", id="lacking"),
    ],
)
def test_a_prefix_on_one_side_is_named(
    source: Shapes, target: Shapes, expected: str, tmp_path: Path
) -> None:
    one = write_hf(tmp_path / "a", source, config=None)
    other = write_hf(tmp_path / "b", target, config=None)
    assert expected in suggested(check(one, against=other))


def test_a_module_prefix_needs_no_suggestion_where_tables_know_the_keys(tmp_path: Path) -> None:
    wrapped = {f"module.{key}": shape for key, shape in llama_shapes().items()}
    assert check(write_hf(tmp_path, wrapped), to="lingua")


def test_the_right_family_is_offered_for_a_wrong_one(tmp_path: Path) -> None:
    source = write_hf(tmp_path, llama_shapes())
    assert "did you mean family hf-llama?" in suggested(check(source, to="meta", from_="chatglm3"))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("o_proj", "out_proj"), ("down_proj", "down_projection"), ("input_layernorm", "input_norm")],
)
def test_a_likely_rename_is_offered(wrong: str, right: str, tmp_path: Path) -> None:
    hint = suggested(check(write_hf(tmp_path, renamed(wrong, right))))
    assert f"{wrong}.weight? the source has" in hint
    assert f"{right}.weight" in hint


def test_keys_that_only_share_their_place_are_no_rename(tmp_path: Path) -> None:
    shapes = dict(llama_shapes())
    del shapes["model.layers.1.self_attn.o_proj.weight"]
    shapes["model.layers.3.self_attn.rotary.weight"] = (3,)
    assert "did you mean" not in suggested(check(write_hf(tmp_path, shapes)))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        pytest.param("_fsdp_wrapped_module._flat_param", "FSDP1 flat parameters", id="fsdp1"),
        pytest.param("base.layers.0.q.lora_A.weight", "PEFT adapter", id="peft"),
        pytest.param("layers.0.q.qweight", "GPTQ", id="gptq"),
        pytest.param("layers.0.q.weight.quant_state.nf4", "bitsandbytes", id="bnb"),
    ],
)
def test_known_formats_are_named(key: str, expected: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path, {key: (3,)}, config=None)
    assert expected in suggested(check(source, to="lingua"))


def test_an_accelerate_directory_names_the_one_to_use(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(NotACheckpointError) as error:
        check(tmp_path)
    assert str(tmp_path / "pytorch_model_fsdp_0") in str(error.value.hint)


def test_nothing_is_suggested_where_everything_fits(tmp_path: Path) -> None:
    assert check(write_hf(tmp_path, llama_shapes())).suggestions == ()
