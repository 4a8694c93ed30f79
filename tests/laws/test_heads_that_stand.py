"""Which class a checkpoint is of follows from its config and its heads; no reading of its keys
hides one that is missing or unknown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from dcpconv import check, convert
from dcpconv.core.errors import NotExpressibleError
from dcpconv.plan.coverage import MISFITS, Coverage
from support.checkpoints.families import assert_same, hf_tensors, torch_tensors
from support.models.hf_models import save_hf, tiny
from support.models.layers import randomise

LM, BASE = "LlamaForCausalLM", "LlamaModel"
TEXTS, TOKENS, ANSWERS = (
    f"LlamaFor{what}"
    for what in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
)
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "norm.weight"


def bare(key: str) -> str:
    return key.removeprefix("model.")


def prefixed(key: str) -> str:
    return f"model.{key}"


def same(key: str) -> str:
    return key


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what is wrong with it.

    Attributes:
        name: The class that saves it.
        named: What its config names; nothing for no ``architectures``.
        spelled: What becomes of every key.
        lost: Keys that are then left out.
        new: Keys that are added.
        tied: Whether its embedding is its head.
        told: What ``check`` tells of it in its own naming.
        in_lingua: The same for Lingua's.
    """

    name: str
    named: str | None = None
    spelled: Callable[[str], str] = same
    lost: Sequence[str] = ()
    new: Sequence[str] = ()
    tied: bool = False
    told: dict[str, list[str]] = field(default_factory=dict)
    in_lingua: dict[str, list[str]] = field(default_factory=dict)


NO_OUTPUT = {"missing": ["output.weight"]}
NO_HEAD = {"refused": ["no_head"]}
CASES = {
    "whole": Case(LM),
    "no-head": Case(LM, lost=[HEAD], told={"missing": [HEAD]}, in_lingua=NO_OUTPUT),
    "tied": Case(LM, tied=True),
    "tied-and-surplus": Case(
        LM,
        tied=True,
        new=["surplus"],
        told={"unknown": ["surplus"]},
        in_lingua={"unknown": ["surplus"]},
    ),
    "no-head-and-surplus": Case(
        LM,
        lost=[HEAD],
        new=["surplus"],
        told={"missing": [HEAD], "unknown": ["surplus"]},
        in_lingua={**NO_OUTPUT, "unknown": ["surplus"]},
    ),
    "no-prefix": Case(LM, spelled=bare),
    "no-prefix-tied": Case(LM, spelled=bare, tied=True),
    "no-prefix-no-head": Case(
        LM, spelled=bare, lost=[HEAD], told={"missing": [HEAD]}, in_lingua=NO_OUTPUT
    ),
    "no-prefix-tied-and-surplus": Case(
        LM,
        spelled=bare,
        tied=True,
        new=["surplus"],
        told={"unknown": ["surplus"]},
        in_lingua={"unknown": ["surplus"]},
    ),
    "base": Case(BASE, named=BASE, in_lingua=NO_HEAD),
    "base-of-no-named-class": Case(BASE, named="", in_lingua=NO_HEAD),
    "base-with-prefix": Case(BASE, named=BASE, spelled=prefixed, in_lingua=NO_HEAD),
    "base-with-a-head": Case(
        LM, named=BASE, told={"unknown": [HEAD]}, in_lingua={**NO_HEAD, "unknown": [HEAD]}
    ),
    "base-lost-and-surplus": Case(
        BASE,
        named=BASE,
        lost=[NORM],
        new=["surplus"],
        told={"missing": [NORM], "unknown": ["surplus"]},
        in_lingua={**NO_HEAD, "missing": [NORM], "unknown": ["surplus"]},
    ),
    "answers-lost-and-surplus": Case(
        ANSWERS,
        named=ANSWERS,
        lost=["qa_outputs.bias"],
        new=["surplus"],
        told={"missing": ["qa_outputs.bias"], "unknown": ["surplus"]},
        in_lingua={"refused": ["spans"], "unknown": ["surplus", "qa_outputs.weight"]},
    ),
    "scores-lost": Case(
        TEXTS,
        named=TEXTS,
        lost=["score.weight"],
        told={"missing": ["score.weight"]},
        in_lingua={"refused": ["score"]},
    ),
}


def model_of(name: str, *, tied: bool = False) -> Any:
    config = tiny("llama", tie_word_embeddings=tied).config
    config.num_labels, config.pad_token_id = 2 if name == ANSWERS else 3, 0
    model = getattr(transformers, name)(config)
    randomise(model)
    return model.eval()


def made(directory: Path, case: Case) -> dict[str, Tensor]:
    save_hf(model_of(case.name, tied=case.tied), directory)
    tensors = {case.spelled(key): tensor for key, tensor in hf_tensors(directory).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in case.lost}
    tensors |= {key: torch.ones(3) for key in case.new}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [case.name]
    if case.named is not None:
        config["architectures"] = [case.named] if case.named else []
        (directory / "config.json").write_text(json.dumps(config))
    return tensors


def weights(file: Path) -> dict[str, Tensor]:
    stored: dict[str, Any] = torch_tensors(file)
    found: dict[str, Tensor] = stored.get("model", stored)
    return found


def told(coverage: Coverage) -> dict[str, list[str]]:
    assert not coverage.problems
    found = {label: [fault.key for fault in getattr(coverage, label, ())] for label in MISFITS}
    return {label: keys for label, keys in found.items() if keys and label != "problems"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_wrong_is_told_and_nothing_else(tmp_path: Path, case: Case) -> None:
    made(tmp_path / "in", case)
    assert told(check(tmp_path / "in")) == case.told
    assert told(check(tmp_path / "in", to="lingua")) == case.in_lingua


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_container_changes_nothing(tmp_path: Path, case: Case) -> None:
    tensors = made(tmp_path / "in", case)
    (tmp_path / "in/model.safetensors").unlink()
    torch.save({"model": tensors, "step": torch.tensor(7)}, tmp_path / "in/step.pt")
    assert told(check(tmp_path / "in/step.pt")) == case.told


@pytest.mark.parametrize("name", [BASE, TEXTS, TOKENS, ANSWERS])
def test_without_a_config_the_keys_say_which_head_there_is(tmp_path: Path, name: str) -> None:
    tensors = made(tmp_path / "in", Case(name))
    (tmp_path / "in/config.json").unlink()
    features = {BASE: {"no_head"}, TEXTS: {"score"}, TOKENS: {"score", "score_bias"}}
    spec = "heads=6,kv_heads=2,theta=1e4,eps=1e-6"
    assert check(tmp_path / "in", from_="hf-llama", spec=spec)
    refused = check(tmp_path / "in", from_="hf-llama", to="lingua", spec=spec).refused
    assert {fault.key for fault in refused} == features.get(name, {"spans"})

    convert(tmp_path / "in", tmp_path / "out", form="hf", to="hf-smollm3", spec=spec)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == [name.replace("Llama", "SmolLM3")]
    convert(tmp_path / "out", tmp_path / "back", form="hf", to="hf-llama")
    assert_same(hf_tensors(tmp_path / "back"), tensors)


@pytest.mark.parametrize("key", ["surplus", NORM])
def test_without_a_config_one_key_too_many_or_too_few_is_no_base_model(
    tmp_path: Path, key: str
) -> None:
    case = Case(BASE, new=["surplus"]) if key == "surplus" else Case(BASE, lost=[key])
    made(tmp_path / "in", case)
    (tmp_path / "in/config.json").unlink()
    assert check(tmp_path / "in").source == "as stored"
    assert not check(tmp_path / "in", to="lingua")


@pytest.mark.parametrize(
    ("name", "allow"),
    [
        pytest.param(TEXTS, ("score",), id="texts"),
        pytest.param(TOKENS, ("score", "score_bias"), id="tokens"),
        pytest.param(ANSWERS, ("spans",), id="answers"),
    ],
)
@pytest.mark.parametrize("to", ["lingua", "meta", "torchtitan-llama3"])
def test_a_head_that_may_be_lost_leaves_the_rest(
    tmp_path: Path, name: str, allow: tuple[str, ...], to: str
) -> None:
    model = model_of(name, tied=True)
    save_hf(model, tmp_path / "in")
    report = convert(tmp_path / "in", tmp_path / "out.pth", to=to, allow=allow)
    heads = {key for key in model.state_dict() if key.startswith(("score", "qa_outputs"))}
    assert {key for key, _ in report.ignored} >= heads

    base = getattr(model, model.base_model_prefix)
    save_hf(base, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "expected.pth", to=to)
    assert_same(weights(tmp_path / "out.pth"), weights(tmp_path / "expected.pth"))


def test_what_is_left_of_an_untied_model_has_no_head(tmp_path: Path) -> None:
    save_hf(model_of(TEXTS), tmp_path / "in")
    with pytest.raises(NotExpressibleError) as raised:
        convert(tmp_path / "in", tmp_path / "out.pth", to="lingua", allow=["score"])
    refused = [str(value) for name, value in raised.value.facts if name == "refused"]
    assert [text.split(":")[0] for text in refused] == ["no_head"]
    convert(tmp_path / "in", tmp_path / "out.pth", to="lingua", allow=["score", "no_head"])
    assert "output.weight" not in weights(tmp_path / "out.pth")
