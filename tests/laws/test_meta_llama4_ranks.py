"""Meta's releases in several files: cut as Meta's own code cuts, and joined to the same bits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcpconv import convert, load_init_weights
from dcpconv.core.errors import CoverageError, FormatError
from dcpconv.formats.opening import open_checkpoint
from laws.test_meta_llama4 import NAMINGS
from support.checkpoints.families import RIGHT, assert_same, hf_tensors, logits, torch_tensors
from support.models.hf_models import save_hf, tiny
from support.worlds import meta_ranks
from support.worlds.ranks import run_ranks

pytest.importorskip("fairscale", reason="needs .[interop]")
pytest.importorskip("llama_models", reason="needs .[interop]")

TWO: dict[str, Any] = {"vocab_size": 132}
EIGHT: dict[str, Any] = {
    "vocab_size": 136,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 56,
}
THETA = {"rope_theta": 1e4, "rope_type": "default"}
CASES = [
    pytest.param(2, TWO, id="two"),
    pytest.param(2, {**TWO, "num_local_experts": 11, "num_experts_per_tok": 3}, id="experts"),
    pytest.param(2, {**TWO, "interleave_moe_layer_step": 1}, id="experts-everywhere"),
    pytest.param(2, {**TWO, "num_hidden_layers": 12}, id="twelve-layers"),
    pytest.param(2, {**TWO, "rope_parameters": THETA}, id="small-theta"),
    pytest.param(8, EIGHT, id="eight"),
]


def released(tmp_path: Path, ranks: int, to: str = "meta-llama4", **overrides: Any) -> Any:
    """A model of Hugging Face below ``hf``, in one file, and in several below ``release``."""
    model = tiny("llama4_text", **overrides)
    save_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole.pth", form="torch", to=to)
    convert(tmp_path / "hf", tmp_path / "release", form="torch", to=to, model_parallel=ranks)
    return model


def files(directory: Path) -> list[dict[str, Tensor]]:
    return [torch_tensors(file) for file in sorted(directory.glob("*.pth"))]


def resharded(whole: dict[str, Tensor], ranks: int, experts: int) -> list[dict[str, Tensor]]:
    """What Meta's own code makes of one file on each of several ranks."""
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    stacked = convert_moe_weights(dict(whole), experts)
    each = [reshard_mp([stacked], size=ranks, rank=rank) for rank in range(ranks)]
    return [
        {key: t.flatten(0, 1) if "moe_w" in key else t for key, t in one.items()} for one in each
    ]


@pytest.mark.parametrize(("ranks", "overrides"), CASES)
def test_files_are_those_of_metas_own_code(
    tmp_path: Path, ranks: int, overrides: dict[str, Any]
) -> None:
    released(tmp_path, ranks, **overrides)
    whole = torch_tensors(tmp_path / "whole.pth")
    found = files(tmp_path / "release")
    right = resharded(whole, ranks, overrides.get("num_local_experts", 5))
    assert len(found) == ranks
    for one, other in zip(found, right, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("to", NAMINGS)
@pytest.mark.parametrize(("ranks", "overrides"), CASES)
def test_files_are_joined_bit_for_bit(
    tmp_path: Path, ranks: int, overrides: dict[str, Any], to: str
) -> None:
    model = released(tmp_path, ranks, to, **overrides)
    convert(tmp_path / "release", tmp_path / "joined.pth")
    assert_same(torch_tensors(tmp_path / "joined.pth"), torch_tensors(tmp_path / "whole.pth"))

    convert(tmp_path / "release", tmp_path / "back", form="hf", to="hf-llama4_text")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))

    with torch.device("meta"):
        fresh = type(model)(model.config)
    load_init_weights(fresh, tmp_path / "release", to="hf-memory")
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("to", NAMINGS)
def test_two_ranks_of_metas_own_code_compute_the_same(tmp_path: Path, to: str) -> None:
    model = released(tmp_path, 2, to, **TWO)
    run_ranks(meta_ranks.__file__, 2, tmp_path, timeout_s=120)
    found = torch.load(tmp_path / "logits.pt")
    assert (found - logits(model)).abs().max() < RIGHT


def test_two_ranks_of_llama_3_compute_the_same(tmp_path: Path) -> None:
    theta = {"rope_theta": 5e5, "rope_type": "default"}
    model = tiny("llama", vocab_size=132, rope_parameters=theta)
    source = save_hf(model, tmp_path / "hf")
    convert(source, tmp_path / "release", form="torch", to="meta", model_parallel=2)
    run_ranks(meta_ranks.__file__, 2, tmp_path, timeout_s=120)
    found = torch.load(tmp_path / "logits.pt")
    assert (found - logits(model)).abs().max() < RIGHT


def test_what_the_files_hold_besides_weights_is_left_out(tmp_path: Path) -> None:
    """Releases keep empty states of Transformer Engine, and counts of how experts were chosen."""
    released(tmp_path, 2, **TWO)
    for file in sorted((tmp_path / "release").glob("*.pth")):
        more: dict[str, object] = {
            "layers.1.feed_forward.global_gate_stats_3E": torch.zeros(3, 5),
            "layers.1.feed_forward.running_gate_stats_3E": torch.zeros(3, 5),
            "layers.1.feed_forward.expert_activation_DE": torch.zeros(96, 5),
            "layers.1.attention.wqkv._extra_state": io.BytesIO(b"state"),
            "rope.freqs": torch.zeros(8),
        }
        torch.save({**torch_tensors(file), **more}, file)
    report = convert(tmp_path / "release", tmp_path / "back", form="hf", to="hf-llama4_text")
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))
    assert {reason for _, reason in report.ignored} == {
        "statistics of training",
        "recomputed from the RoPE theta",
    }


def test_heads_are_not_cut(tmp_path: Path) -> None:
    source = save_hf(tiny("llama4_text", vocab_size=132), tmp_path / "hf")
    with pytest.raises(FormatError, match="4 equal parts") as raised:
        convert(source, tmp_path / "out", form="torch", to="meta-llama4", model_parallel=4)
    facts = dict(raised.value.facts)
    assert facts["n_heads"] == "6 heads, of which each is in one file whole"
    assert facts["n_kv_heads"] == "2 heads, of which each is in one file whole"
    assert "layers.0.attention.wo.weight" not in facts


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        pytest.param("layers.0.attention.wo.weight", (96, 200), id="more-queries-than-rows"),
        pytest.param("layers.0.attention.wo.weight", (96, 47), id="odd-rest"),
        pytest.param("layers.1.feed_forward.router_DE", (96, 7), id="experts-do-not-divide"),
        pytest.param("layers.1.feed_forward.router_DE", (96, 1 << 40), id="more-experts-than-rows"),
        pytest.param("layers.1.feed_forward.router_DE", None, id="no-router"),
    ],
)
def test_files_that_do_not_consist_of_equal_parts_are_refused(
    tmp_path: Path, key: str, shape: tuple[int, int] | None
) -> None:
    released(tmp_path, 2, **TWO)
    for file in sorted((tmp_path / "release").glob("*.pth")):
        state = torch_tensors(file)
        del state[key]
        if shape is not None:
            state[key] = torch.zeros(1).expand(shape)
        torch.save(state, file)
    with pytest.raises(FormatError, match="does not consist of equal parts") as raised:
        open_checkpoint(tmp_path / "release")
    assert (key, list(shape) if shape else "missing") in raised.value.facts


def test_the_parameters_stand_beside_the_files(tmp_path: Path) -> None:
    released(tmp_path, 2, **TWO)
    params = json.loads((tmp_path / "release/params.json").read_text())
    assert (params["dim"], params["moe_args"]["num_experts"]) == (96, 5)


def quantized(directory: Path, kept: dict[str, Tensor]) -> None:
    """Turns a release into fp8 as Meta's script does, one scale per row of a matrix turned over.

    Source: ``llama4/scripts/quantize.py`` of llama-models 0.3.0, whose kernel needs a GPU.

    Args:
        directory: Of the release.
        kept: Gets what the weights of every file are worth, by file and key.
    """
    names = {"moe_w_in_eD_F": "w1", "moe_w_out_eF_D": "w2", "moe_w_swiglu_eD_F": "w3"}
    for rank, file in enumerate(sorted(directory.glob("consolidated.*.pth"))):
        state, scales = torch_tensors(file), {}
        for key, weight in state.items():
            before, _, name = key.rpartition(".")
            if name in names:
                turned = weight.reshape(5, -1, weight.shape[-1]).transpose(1, 2).float()
                scale = turned.abs().amax(-1) / 448
                few = (turned / scale[..., None]).to(torch.float8_e4m3fn)
                worth = (few.float() * scale[..., None]).to(torch.bfloat16)
                state[key] = few.transpose(1, 2).flatten(0, 1).contiguous()
                kept[f"{file.name} {key}"] = worth.transpose(1, 2).flatten(0, 1).contiguous()
                scales[f"{before}.{names[name]}"] = scale
            else:
                state[key] = kept[f"{file.name} {key}"] = weight.bfloat16()
        torch.save(state, file)
        torch.save(scales, directory / f"fp8_scales_{rank}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_experts_are_multiplied_by_the_scales_beside_them(tmp_path: Path, ranks: int) -> None:
    released(tmp_path, 2, **TWO)
    if ranks == 1:
        for file in (tmp_path / "release").glob("consolidated.*.pth"):
            file.unlink()
        (tmp_path / "whole.pth").rename(tmp_path / "release/consolidated.00.pth")
    kept: dict[str, Tensor] = {}
    quantized(tmp_path / "release", kept)
    (tmp_path / "right").mkdir()
    for file in (tmp_path / "release").glob("consolidated.*.pth"):
        state = {key: kept[f"{file.name} {key}"] for key in torch_tensors(file)}
        torch.save(state, tmp_path / "right" / file.name)
    (tmp_path / "right/params.json").write_bytes((tmp_path / "release/params.json").read_bytes())
    convert(tmp_path / "right", tmp_path / "right-hf", form="hf", to="hf")

    report = convert(
        tmp_path / "release", tmp_path / "back", form="hf", to="hf", dequantize=True, dtype="bf16"
    )
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "right-hf"))
    assert ("2 model-parallel files are read as one model" in report.notes) == (ranks == 2)

    live = tiny("llama4_text", **TWO).to(torch.bfloat16)
    load_init_weights(live, tmp_path / "release", to="hf-memory", dequantize=True)
    assert_same(dict(live.state_dict()), hf_tensors(tmp_path / "right-hf"))


def test_fp8_experts_do_not_become_others_without_their_scales(tmp_path: Path) -> None:
    released(tmp_path, 2, **TWO)
    quantized(tmp_path / "release", {})
    with pytest.raises(CoverageError) as raised:
        convert(tmp_path / "release", tmp_path / "out", form="hf", to="hf")
    assert raised.value.hint == "--dequantize multiplies the experts by the scales beside them"

    (tmp_path / "release/fp8_scales_1.pt").unlink()
    with pytest.raises(FormatError, match="lacks scales") as lacking:
        open_checkpoint(tmp_path / "release")
    assert ("missing", "fp8_scales_1.pt") in lacking.value.facts
