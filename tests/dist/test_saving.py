"""Ranks save what they hold: the bytes of ``convert``, the trainer's logits, or nothing at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dcpconv import fingerprint, open_checkpoint, save_weights
from support.checkpoints.stock import assert_same_bits, flat, nested_of_dcp
from support.worlds import load_scenes, lost_savers, saving_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.ranks import run_ranks
from support.worlds.saving_scenes import SCENES
from support.worlds.sharded_models import expected

RIGHT = 1e-4
"""Largest |logit difference| in fp32."""

SAVES = [
    pytest.param(ranks, scene.removeprefix("saves/"), id=f"{ranks}-{scene}")
    for ranks, scenes in SCENES.items()
    for scene in scenes
    if scene.startswith("saves/")
]


IN_EVERY_FORM = [case for case in SAVES if case.values[1] in saving_scenes.IN_EVERY_FORM]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saving")
    load_scenes.prepare(directory, ())
    return directory


@pytest.fixture(scope="module")
def worlds(sources: Path) -> dict[int, list[dict[str, Outcome]]]:
    return {ranks: launch(saving_scenes.__file__, ranks, sources) for ranks in SCENES}


Worlds = dict[int, list[dict[str, Outcome]]]


def values(worlds: Worlds, scene: str, ranks: int = 2) -> list[Any]:
    found = [world[scene] for world in worlds[ranks]]
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


def failure(worlds: Worlds, scene: str) -> Outcome:
    """How a scene failed: alike on all ranks."""
    found = [world[scene] for world in worlds[2]]
    assert len({(outcome.error, outcome.text) for outcome in found}) == 1, found
    return found[0]


def is_absent(target: Path) -> bool:
    return not target.exists() and not list(target.parent.glob(".*dcpconv-staging"))


def contents(directory: Path, *, pads: bool = False) -> dict[str, bytes]:
    """Every file's bytes, without the blanks behind a header where these may differ."""
    found = {}
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        if pads and file.suffix == ".safetensors":
            (nbytes,) = struct.unpack("<Q", data[:8])
            data = data[8 : 8 + nbytes].rstrip() + data[8 + nbytes :]
        found[file.name] = data
    return found


@pytest.mark.parametrize(("ranks", "name"), SAVES)
def test_hf_files_are_those_of_convert(
    worlds: Worlds, sources: Path, ranks: int, name: str
) -> None:
    for heard in values(worlds, f"saves/{name}", ranks):
        assert heard["hf"] == {"tensors": 29 if "tied" in name else 30, "written": True}
    every = ("hf", "hf-small-files", "hf-bf16")
    for form in every if name in saving_scenes.IN_EVERY_FORM else every[:1]:
        pads = form == "hf-small-files"  # a file of few tensors can line up with its source
        saved = contents(sources / f"saved-{form}-{ranks}" / name, pads=pads)
        assert saved == contents(sources / f"converted-{form}-{ranks}" / name, pads=pads)
        assert ("model.safetensors.index.json" in saved) == (form == "hf-small-files")


@pytest.mark.parametrize(("ranks", "name"), IN_EVERY_FORM)
def test_other_forms_hold_what_convert_gives(
    worlds: Worlds, sources: Path, ranks: int, name: str
) -> None:
    values(worlds, f"saves/{name}", ranks)
    saved, made = (sources / f"{kind}-lingua-dcp-{ranks}" / name for kind in ("saved", "converted"))
    assert_same_bits(flat(nested_of_dcp(saved)), flat(nested_of_dcp(made)))
    assert (saved / "params.json").read_bytes() == (made / "params.json").read_bytes()
    saved, made = (
        sources / f"{kind}-meta.pth-{ranks}" / f"{name}.pth" for kind in ("saved", "converted")
    )
    one, other = (torch.load(path, weights_only=True, mmap=True) for path in (saved, made))
    assert_same_bits(one, other)
    # Nothing but the place of a payload may differ, and that follows its source.
    assert list(one) == list(other)


@pytest.mark.parametrize(("ranks", "name"), SAVES)
def test_the_result_has_the_trainers_logits(
    worlds: Worlds, sources: Path, ranks: int, name: str
) -> None:
    values(worlds, f"saves/{name}", ranks)
    tokens = torch.arange(20)[None]
    model = AutoModelForCausalLM.from_pretrained(sources / f"saved-hf-{ranks}" / name)
    with torch.no_grad():
        found = model(tokens).logits
        right = expected(sources, tied="tied" in name, device="cpu")(tokens)
    assert float((found - right).abs().max()) < RIGHT


def test_a_model_of_transformers_brings_its_config(worlds: Worlds, sources: Path) -> None:
    for files in values(worlds, "live"):
        assert files == ["config.json", "generation_config.json", "model.safetensors"]
    target = sources / "live-2/hf"
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(target)
    right = torch.load(sources / "live.pt").detach()
    with torch.no_grad():
        found = model(torch.arange(12)[None]).logits
    assert float((found - right).abs().max()) < RIGHT


def test_one_writer_saves_step_after_step(worlds: Worlds, sources: Path) -> None:
    for left in values(worlds, "by-dcp"):
        assert [Path(path).name for path in left] == ["step-1", "step-2"]
    saved = load_file(sources / "steps-2/step-2/model.safetensors")
    assert saved.keys() == load_file(sources / "steps-2/step-1/model.safetensors").keys()
    stock = flat(nested_of_dcp(sources / "steps-2/stock"))
    assert torch.equal(saved["model.norm.weight"], stock["model.norm.weight"])


def test_an_async_save_keeps_what_was_staged(worlds: Worlds, sources: Path) -> None:
    assert values(worlds, "async") == [True, True]
    assert_same_bits(
        load_file(sources / "async-2/hf/model.safetensors"),
        load_file(sources / "saved-hf-2/fsdp2/model.safetensors"),
    )


def test_a_target_is_replaced_only_when_asked(worlds: Worlds, sources: Path) -> None:
    assert failure(worlds, "overwrites").error == "TargetExistsError"
    once = load_file(sources / "saved-hf-2/fsdp2/model.safetensors")
    twice = load_file(sources / "overwritten-2/hf/model.safetensors")
    assert_same_bits(twice, {key: tensor * 2 for key, tensor in once.items()})


def test_without_a_config_nothing_is_written(worlds: Worlds, sources: Path) -> None:
    found = failure(worlds, "without-config")
    assert "--spec heads=N,kv_heads=M says it" in found.text
    assert is_absent(sources / "nothing-2/hf")


def test_a_model_that_does_not_fit_its_config_is_refused(worlds: Worlds, sources: Path) -> None:
    found = failure(worlds, "misfit")
    assert found.error == "CoverageError", found.text
    assert is_absent(sources / "misfit-2/hf")


def test_an_overflow_names_the_tensor(worlds: Worlds, sources: Path) -> None:
    found = failure(worlds, "overflows")
    assert found.error == "LossyCastError"
    assert "model.layers.1.self_attn.o_proj.weight  1 values" in found.text
    assert is_absent(sources / "overflow-2/hf")


def test_names_of_one_tensor_with_two_values_are_refused(worlds: Worlds, sources: Path) -> None:
    found = failure(worlds, "unequal-ties")
    assert "lm_head.weight is tied to model.embed_tokens.weight" in found.text
    assert 'spec="tied=false"' in found.text
    assert is_absent(sources / "ties-2/hf")
    assert values(worlds, "apart") == [30, 30]
    config = json.loads((sources / "apart-2/hf/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in open_checkpoint(sources / "apart-2/hf").tensors


def test_a_rank_that_fails_leaves_nothing(worlds: Worlds, sources: Path) -> None:
    found = failure(worlds, "fails")
    assert "Input/output error" in found.text
    assert is_absent(sources / "fails-2/hf")


def test_what_is_not_supported_is_said(worlds: Worlds, sources: Path) -> None:
    for text in values(worlds, "objects"):
        assert "values that are no tensors" in text
        assert "step" in text
    assert is_absent(sources / "objects-2/dcp")
    for first, second in values(worlds, "cached"):
        assert not first
        assert "enable_plan_caching" in second
    assert is_absent(sources / "cached-2/2")


def test_a_group_saves_by_itself(worlds: Worlds, sources: Path) -> None:
    assert values(worlds, "halves", 4) == [30] * 4
    for half in ("hf-0", "hf-1"):
        assert contents(sources / "halves-4" / half) == contents(sources / "saved-hf-2/fsdp2")


def test_every_byte_is_written_once(worlds: Worlds, sources: Path) -> None:
    counted = values(worlds, "bytes", 4)
    assert (
        sum(one["written"] for one in counted) == open_checkpoint(sources / "counted-4/hf").nbytes
    )
    assert sum(one["held"] for one in counted) > 1.9 * sum(one["written"] for one in counted)


@pytest.mark.parametrize("ranks", [2, 4])
def test_files_written_by_one_rank_each_are_the_same(
    worlds: Worlds, sources: Path, ranks: int
) -> None:
    heard = values(worlds, "whole-files", ranks)
    for form in heard[0]:
        kinds = [sources / f"{kind}-{form}-{ranks}" for kind in ("whole", "saved")]
        whole, saved = (kind / f"fsdp2{Path(form).suffix}" for kind in kinds)
        if whole.is_file():
            assert whole.read_bytes() == saved.read_bytes()
        else:
            names = {"params.json"}  # it names the directory
            assert {k: v for k, v in contents(whole).items() if k not in names} == {
                k: v for k, v in contents(saved).items() if k not in names
            }
        # An element on the border of two windows is sent for both.
        assert sum(one[form] for one in heard) >= open_checkpoint(whole).nbytes


def test_rank_0_reads_what_others_wrote_for_the_fingerprint(worlds: Worlds, sources: Path) -> None:
    """The chunk of a tensor that two ranks write is read as a whole."""
    heard, other = values(worlds, "fingerprint")
    read = {}
    for name, (found, nbytes, total) in heard.items():
        assert found == fingerprint(sources / f"fingerprint-{name}-2/hf").digest
        read[name] = nbytes / total
    assert read["boxes"] == 1
    assert read["one"] == 0
    assert 0 < read["some"] < 0.8
    assert not any(found for found, _, _ in other.values())


def test_a_file_system_that_wants_whole_files_gets_them(worlds: Worlds, sources: Path) -> None:
    for notes in values(worlds, "wants-whole-files"):
        assert any("every file was written by one rank" in note for note in notes)
    assert contents(sources / "ordered-2/hf") == contents(sources / "saved-hf-2/fsdp2")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_leaves_nothing_that_looks_whole(tmp_path: Path, victim: int) -> None:
    (tmp_path / "victim").write_text(str(victim))
    run_ranks(lost_savers.__file__, 2, tmp_path, timeout_s=120)

    heard = json.loads((tmp_path / "heard.json").read_text())
    assert heard["error"] == "DcpconvError", heard
    assert "a rank was lost while saving; nothing was saved" in heard["text"]
    assert not (tmp_path / "out/hf").exists()
    model = torch.nn.Sequential(torch.nn.Linear(300, 7), torch.nn.Linear(7, 300))
    save_weights(model, tmp_path / "out/hf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hf"]
    assert_same_bits(load_file(tmp_path / "out/hf/model.safetensors"), model.state_dict())
