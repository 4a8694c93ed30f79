"""fp8 weights into live models: the bits of converting first, and never without their factors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dcpconv import convert
from dcpconv.core.errors import CoverageError, FormatError
from dcpconv.loading import staging
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.checkpoints import tiles
from support.checkpoints.families import RIGHT, assert_same, difference, hf_tensors, load_hf
from support.checkpoints.scaled_blocks import multiplied_out, published, quantised, rewrite
from support.models.hf_models import tiny
from support.worlds.sharded_models import build, lingua_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = [
    pytest.param(torch.float32, "fp32", id="fp32"),
    pytest.param(torch.bfloat16, None, id="bf16"),
    pytest.param(torch.float16, "fp32", id="fp16"),
]
"""Of a model, and the ``--dtype`` of the conversion that loses nothing on the way to it."""

MODELS = ("llama", "phi3", "mixtral", "qwen3_moe", "deepseek_v3")

FACTOR = "model.layers.1.self_attn.q_proj.weight_scale_inv"


def hugging_face(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of transformers on the meta device."""
    with torch.device("meta"):
        like = tiny(model_type)
        made: nn.Module = type(like)._from_config(like.config, attn_implementation="eager")
    return made.eval().to(dtype)


def lingua(_model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Lingua's model on the meta device."""
    return build(meta=True, dtype=dtype)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "between"), DTYPES)
@pytest.mark.parametrize(
    ("make", "model_type"), [*((hugging_face, name) for name in MODELS), (lingua, "llama")]
)
def test_loading_gives_the_bits_of_converting_first(
    tmp_path: Path,
    make: Callable[..., nn.Module],
    model_type: str,
    dtype: torch.dtype,
    between: str | None,
) -> None:
    source, _ = published(tmp_path, model_type)
    once, twice = make(model_type, dtype), make(model_type, dtype)
    report = load_init_weights(once, source, dequantize=True)

    convert(source, tmp_path / "between", form="hf", dequantize=True, dtype=between)
    load_init_weights(twice, tmp_path / "between")
    assert_same(parameters(once), parameters(twice))
    assert not report.lossy
    assert any(old == "f8e4m3 in scaled blocks" for old, _, _ in report.casts)


@pytest.mark.parametrize(
    ("make", "model_type"), [*((hugging_face, name) for name in MODELS), (lingua, "llama")]
)
def test_the_model_computes_what_its_tensors_are_worth(
    tmp_path: Path, make: Callable[..., nn.Module], model_type: str
) -> None:
    source, worth = published(tmp_path, model_type)
    model = make(model_type)
    load_init_weights(model, source, dequantize=True)
    assert difference(model.eval(), load_hf(rewrite(tmp_path / "plain", worth))) < RIGHT


def test_as_stored_is_as_they_are_multiplied_out(tmp_path: Path) -> None:
    source, worth = published(tmp_path, "llama")
    model = hugging_face("llama", torch.bfloat16)
    report = load_init_weights(model, source, dequantize=True, dtype="source")
    assert_same(parameters(model), worth)
    assert report.nbytes == sum(tensor.nbytes for tensor in worth.values())
    stored = [tensor for key, tensor in hf_tensors(source).items() if "_scale_inv" not in key]
    assert report.nbytes_read == sum(tensor.nbytes for tensor in stored)


def test_progress_ends_at_the_bytes_of_the_report(tmp_path: Path) -> None:
    source, _ = published(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    report = load_init_weights(
        lingua("llama"),
        source,
        dequantize=True,
        progress=lambda done, total: seen.append((done, total)),
        jobs=1,
    )
    assert seen[-1] == (report.nbytes, report.nbytes)


def test_products_too_large_for_the_parameter_are_counted(tmp_path: Path) -> None:
    source, _ = published(tmp_path, "llama")
    stored = hf_tensors(source)
    stored[FACTOR] *= 1e6
    rewrite(source, stored)
    report = load_init_weights(lingua("llama", torch.float16), source, dequantize=True)
    key = FACTOR.removesuffix("_scale_inv")
    worth = multiplied_out(stored[key], stored[FACTOR])
    assert [(one.key, one.overflowed) for one in report.lossy] == [
        ("layers.1.attention.wq.weight", int(worth.half().isinf().sum()))
    ]


def test_a_large_matrix_needs_no_more_than_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tiles.taken(monkeypatch)
    source, worth = published(tmp_path, "llama", vocab_size=30011)
    key = "model.embed_tokens.weight"
    stored = hf_tensors(source)
    stored[key], factors = quantised(stored[key])
    rewrite(source, {**stored, f"{key}_scale_inv": factors})
    model = nn.Module()
    turned = torch.zeros(96, 30011).t()
    model.register_parameter("embed", nn.Parameter(turned))
    table = tmp_path / "mine.toml"
    table.write_text(
        'name = "mine"\ntitle = "M"\nsource = "here"\n\n[keys]\n"embed" = ["embed", "V d"]\n'
    )

    load_init_weights(model, source, dequantize=True, to="mine", keymap=table, strict=False)

    assert torch.equal(turned, multiplied_out(stored[key], factors))
    assert not torch.equal(turned, worth[key])
    assert len(sizes) > 1
    assert max(sizes) <= staging.BUFFER


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="strict"),
        pytest.param({"strict": False}, id="not strict"),
        pytest.param({"ignore": ["*_scale_inv"]}, id="factors ignored"),
        pytest.param({"dtype": "source", "strict": False}, id="source dtype"),
        pytest.param({"read": "rank0", "strict": False}, id="rank0"),
    ],
)
@pytest.mark.parametrize(
    ("make", "model_type", "tensors"),
    [
        pytest.param(hugging_face, "llama", 21, id="equal names"),
        pytest.param(hugging_face, "deepseek_v3", 28, id="experts stacked"),
        pytest.param(lingua, "llama", 21, id="relabelled"),
    ],
)
def test_elements_without_their_factors_are_refused(
    tmp_path: Path,
    make: Callable[..., nn.Module],
    model_type: str,
    tensors: int,
    options: dict[str, Any],
) -> None:
    source, _ = published(tmp_path, model_type)
    model = make(model_type, torch.bfloat16)
    with pytest.raises(CoverageError) as caught:
        load_init_weights(model, source, **options)
    text = str(caught.value)
    assert text.startswith(f"the checkpoint does not fit the model: {tensors} scaled")
    assert len(re.findall(r"(?m)^  scaled +\S+  needs model\S+_scale_inv", text)) == tensors
    assert "unexpected" not in text
    assert "hint      dequantize=True" in text
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("shape", [(50, 70), (3, 50, 70)], ids=["matrix", "stack"])
def test_names_alone_do_not_hide_factors_of_any_kind(
    tmp_path: Path, shape: tuple[int, ...], suffix: str, dtype: torch.dtype
) -> None:
    stored = torch.ones(shape).to(dtype)
    rewrite(tmp_path, {"a.weight": stored, f"a.weight{suffix}": torch.ones(())})
    model = nn.Module()
    model.register_module("a", nn.Module())
    model.get_submodule("a").register_parameter("weight", nn.Parameter(torch.zeros(shape)))
    with pytest.raises(CoverageError, match=rf"scaled +a\.weight  needs a\.weight{suffix}"):
        load_init_weights(model, tmp_path, strict=False)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_factors_by_any_name_are_multiplied_in(tmp_path: Path, suffix: str) -> None:
    source, worth = published(tmp_path, "llama")
    stored = hf_tensors(source)
    rewrite(source, {key.replace("_scale_inv", suffix): one for key, one in stored.items()})
    state = wanted(worth, torch.float32)
    dcp_load(state, storage_reader=CheckpointReader(source, dequantize=True))
    assert_same(state, {key: tensor.float() for key, tensor in worth.items()})


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_lack_their_factors_are_not_taken(tmp_path: Path, strict: bool) -> None:  # noqa: FBT001
    source, _ = published(tmp_path, "llama")
    stored = hf_tensors(source)
    key = "model.layers.1.self_attn.q_proj.weight"
    rewrite(source, {name: one for name, one in stored.items() if name != f"{key}_scale_inv"})
    with pytest.raises(CoverageError, match=rf"misshapen +{key}  .*no factors are beside it"):
        load_init_weights(lingua("llama"), source, dequantize=True, strict=strict)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
def test_a_model_with_a_place_for_factors_gets_both_as_they_are(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source, _ = published(tmp_path, "llama")
    model = hugging_face("llama")
    stored = hf_tensors(source)
    for key, tensor in stored.items():
        module, _, name = key.rpartition(".")
        kind = dtype if tensor.dtype is torch.float8_e4m3fn else tensor.dtype
        made = nn.Parameter(torch.empty_like(tensor, dtype=kind), requires_grad=False)
        model.get_submodule(module).register_parameter(name, made)
    load_init_weights(model, source)
    for key, tensor in stored.items():
        assert torch.equal(model.get_parameter(key).float(), tensor.float()), key


@pytest.mark.parametrize("read", ["all", "once", "rank0"])
def test_matrices_stored_in_chunks_are_refused_before_any_weight_changes(
    tmp_path: Path, read: Any
) -> None:
    source, _ = published(tmp_path, "llama")
    convert(source, tmp_path / "dcp", chunks=3)
    model = lingua("llama")
    with pytest.raises(FormatError, match=r"(?s)not stored in one piece.*into an hf directory"):
        load_init_weights(model, tmp_path / "dcp", assets=source, dequantize=True, read=read)
    assert all(parameter.is_meta for parameter in model.parameters())


def wanted(worth: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    return {key: torch.zeros_like(tensor, dtype=dtype) for key, tensor in worth.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("to", [None, "lingua"])
def test_stock_dcp_load_multiplies_out(tmp_path: Path, to: str | None, dtype: torch.dtype) -> None:
    source, worth = published(tmp_path, "llama")
    right = lingua_weights(worth) if to else worth
    state = wanted(right, dtype)
    dcp_load(state, storage_reader=CheckpointReader(source, to=to, dequantize=True))
    assert_same(state, {key: tensor.to(dtype) for key, tensor in right.items()})


def test_stock_dcp_load_stacks_experts(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    right = hugging_face("deepseek_v3")
    load_init_weights(right, source, dequantize=True)
    state = wanted(parameters(right), torch.float32)
    dcp_load(state, storage_reader=CheckpointReader(source, to="hf-memory", dequantize=True))
    assert_same(state, parameters(right))


def test_the_metadata_has_no_factors_and_names_the_type_of_products(tmp_path: Path) -> None:
    source, worth = published(tmp_path, "llama")
    found = CheckpointReader(source, dequantize=True).read_metadata().state_dict_metadata
    assert set(found) == set(worth)
    types = {key: getattr(entry, "properties").dtype for key, entry in found.items()}  # noqa: B009
    assert types == {key: tensor.dtype for key, tensor in worth.items()}


@pytest.mark.parametrize("to", [None, "hf", "lingua"])
def test_stock_dcp_load_casts_no_elements_without_their_factors(
    tmp_path: Path, to: str | None
) -> None:
    source, worth = published(tmp_path, "llama")
    state = wanted(lingua_weights(worth) if to == "lingua" else worth, torch.bfloat16)
    with pytest.raises(CheckpointException) as caught:
        dcp_load(state, storage_reader=CheckpointReader(source, to=to))
    text = str(caught.value.failures[0][0])
    assert "_scale_inv" in text
    assert "hint      dequantize=True" in text


def test_stock_dcp_load_gives_elements_and_factors_as_they_are(tmp_path: Path) -> None:
    source, _ = published(tmp_path, "llama")
    stored = hf_tensors(source)
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in stored.items()}
    dcp_load(state, storage_reader=CheckpointReader(source))
    assert {key: found.dtype for key, found in state.items()} == {
        key: tensor.dtype for key, tensor in stored.items()
    }
    assert all(torch.equal(state[key].float(), tensor.float()) for key, tensor in stored.items())
