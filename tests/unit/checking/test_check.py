"""check(): every misfit is told, exactly and all at once, whatever it is checked against."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcpconv import Coverage, check
from dcpconv.core.errors import FormatError, KeymapError, LayoutError, NotACheckpointError
from dcpconv.plan.coverage import MISFITS as LABELS
from lingua_model import LinguaModel, LinguaParams
from support.checkpoints.check_cases import (
    CONFIG,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MISFITS,
    VOCAB,
    Misfit,
    llama_shapes,
    write_hf,
)
from support.models.hf_models import tiny

HEAD = "lm_head.weight"


def lingua(**changes: Any) -> torch.nn.Module:
    sizes = {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "ffn_dim_multiplier": 0.59,
        "multiple_of": 8,
    }
    with torch.device("meta"):
        model: torch.nn.Module = LinguaModel(LinguaParams(**{**sizes, **changes}))
    return model


def told(coverage: Coverage) -> dict[str, list[str]]:
    """Keys of every kind of fault that occurs."""
    labels = [label for label in LABELS if label != "problems"]
    found = {label: [fault.key for fault in getattr(coverage, label)] for label in labels}
    return {label: keys for label, keys in found.items() if keys}


def test_a_whole_checkpoint_fits_its_own_family(tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes(), files=3))
    assert coverage
    assert {target.key for target in coverage.targets} == llama_shapes().keys()
    assert {target.how for target in coverage.targets} == {"copied"}
    assert coverage.read.keys == len(llama_shapes())
    assert coverage.read.files == 3


def test_every_target_key_says_where_it_comes_from(tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes()), to="lingua")
    assert coverage
    made = {target.key: target for target in coverage.targets}
    assert made.keys() == lingua().state_dict().keys()
    query = made["layers.3.attention.wq.weight"]
    assert query.how == "derived"
    assert [p.entry.key for p in query.pieces] == ["model.layers.3.self_attn.q_proj.weight"]
    assert made["layers.3.attention.wo.weight"].how == "copied"


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_told_with_exactly_its_keys(misfit: Misfit, tmp_path: Path) -> None:
    misfit.damage(tmp_path)
    coverage = check(tmp_path, to=misfit.to)
    assert not coverage
    if misfit.label == "problems":
        assert len(coverage.problems) == 1
        assert misfit.keys[0] in coverage.problems[0]
    else:
        assert told(coverage) == {misfit.label: list(misfit.keys)}
        assert not coverage.problems


def test_a_lost_file_leaves_the_rest_of_the_account(tmp_path: Path) -> None:
    MISFITS["truncated"].damage(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = {key for key, name in index.items() if name == "model-00002-of-00003.safetensors"}
    coverage = check(tmp_path)
    assert {fault.key for fault in coverage.missing} == lost
    assert {t.key for t in coverage.targets} == llama_shapes().keys() - lost


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    shapes = llama_shapes()
    del shapes["model.layers.1.mlp.up_proj.weight"]
    shapes["model.layers.2.mlp.down_proj.weight"] = (1, 2)
    shapes["surplus"] = (3,)
    config = {**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    write_hf(tmp_path, shapes, files=3, config=config)
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"")
    coverage = check(tmp_path, to="lingua")
    assert told(coverage) == {
        "refused": ["rope_scaling"],
        "missing": ["layers.1.feed_forward.w3.weight"],
        "unknown": ["surplus"],
        "misshapen": ["model.layers.2.mlp.down_proj.weight"],
    }
    assert len(coverage.problems) == 1
    assert coverage.counts() == "1 problem, 1 refused, 1 missing, 1 unknown, 1 misshapen"


def test_a_shape_fault_says_what_was_expected_and_found(tmp_path: Path) -> None:
    MISFITS["misshapen"].damage(tmp_path)
    (fault,) = check(tmp_path).misshapen
    assert fault.expected == f"[{FFN}, {HIDDEN}]"
    assert fault.found == f"[{FFN}, {HIDDEN + 1}]"
    assert fault.slots == ("layer.up",)


def test_an_allowed_feature_is_no_misfit(tmp_path: Path) -> None:
    MISFITS["refused"].damage(tmp_path)
    assert check(tmp_path, to="lingua", allow=["rope_scaling"])


def test_ignored_keys_are_told_with_their_reason(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    coverage = check(write_hf(tmp_path, {**llama_shapes(), key: (8,)}), to="lingua")
    assert coverage
    assert [(fault.key, bool(fault.why)) for fault in coverage.ignored] == [(key, True)]


def _keylist(source: Path, path: Path) -> Path:
    command = [sys.executable, "-m", "dcpconv", "keys", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


TARGETS = {
    "checkpoint": lambda path: write_hf(path / "target", llama_shapes(), files=2),
    "config": lambda path: write_hf(path / "target", llama_shapes()) / "config.json",
    "keylist": lambda path: _keylist(write_hf(path / "t", llama_shapes()), path / "keys.json"),
    "module-of-another-family": lambda _: lingua(),
    "state-dict": lambda _: lingua().state_dict(),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("changed", ["nothing", "missing", "misshapen", "unknown"])
def test_against_any_target(target: Any, changed: str, tmp_path: Path) -> None:
    shapes = llama_shapes()
    key = "model.layers.2.mlp.up_proj.weight"
    expected: dict[str, list[str]] = {}
    against = target(tmp_path)
    is_lingua = not isinstance(against, Path)
    if changed == "missing":
        del shapes[key]
        name = "layers.2.feed_forward.w3.weight" if is_lingua else key
        expected = {"missing": [name]}
    elif changed == "misshapen":
        shapes[key] = (FFN + 1, HIDDEN)
        expected = {"misshapen": [key]}
    elif changed == "unknown":
        shapes["model.layers.2.rotor.weight"] = (3,)
        expected = {"unknown": ["model.layers.2.rotor.weight"]}
    coverage = check(write_hf(tmp_path / "source", shapes), against=against)
    assert told(coverage) == expected
    assert bool(coverage) == (not expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"n_layers": LAYERS + 1}, {"missing"}, id="deeper"),
        pytest.param({"n_layers": LAYERS - 1}, {"unknown"}, id="shallower"),
        pytest.param({"vocab_size": VOCAB + 1}, {"misshapen"}, id="wider"),
    ],
)
def test_a_model_that_changed_no_longer_fits(
    changes: dict[str, int], expected: set[str], tmp_path: Path
) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes()), against=lingua(**changes))
    assert told(coverage).keys() == expected
    assert len(told(coverage)[expected.copy().pop()]) == (2 if "vocab_size" in changes else 9)


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "omitted"])
def test_a_tied_head_is_covered_by_the_embedding(tmp_path: Path, *, is_stored: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    source = write_hf(tmp_path, llama_shapes(head=is_stored), config=config)
    state: dict[str, Any] = {
        key: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for key, shape in llama_shapes(head=False).items()
    }
    state[HEAD] = state["model.embed_tokens.weight"]
    assert check(source, against=state)
    assert check(source, to="lingua")


def test_an_untied_model_wants_its_head(tmp_path: Path) -> None:
    source = write_hf(tmp_path, llama_shapes(head=False))
    state = {
        key: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for key, shape in llama_shapes().items()
    }
    assert told(check(source, against=state)) == {"missing": [HEAD]}


def test_element_types_are_notes_until_they_are_asked_for(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes(), dtype="F32")
    target = write_hf(tmp_path / "b", llama_shapes())
    for against in (None, target):
        loose = check(source, against=against)
        assert loose
        assert any("fp32" in note and "bf16" in note for note in loose.notes)
        strict = check(source, against=against, dtypes=True)
        assert not strict
        assert {(f.expected, f.found) for f in strict.misshapen} == {("bf16", "fp32")}
    vectors = [key for key, shape in llama_shapes().items() if len(shape) == 1]
    told_by_config = {fault.key for fault in check(source, dtypes=True).misshapen}
    assert told_by_config == llama_shapes().keys() - set(vectors)  # norms often stay in fp32


def test_keys_no_table_knows_are_an_answer_not_an_error(tmp_path: Path) -> None:
    shapes = {f"blocks.{n}.mixer.weight": (3, 4) for n in range(3)}
    source = write_hf(tmp_path / "a", shapes, config=None)
    coverage = check(source, to="lingua")
    assert told(coverage) == {"unknown": list(shapes)}
    alone = check(source)
    assert alone
    assert any("only the files were checked" in note for note in alone.notes)
    assert check(source, against=write_hf(tmp_path / "b", shapes, config=None))


def test_without_a_config_the_account_says_so(tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes(), config=None))
    assert coverage
    assert any("no config" in note for note in coverage.notes)


def test_a_config_alone_can_be_the_target_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    assert check(write_hf(tmp_path / "source", llama_shapes()), against=tmp_path / "model")


def test_a_coverage_is_frozen_and_names_its_version(tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        coverage.notes = ()  # type: ignore[misc]
    assert coverage.to_json()["schema"] == 1


@pytest.mark.parametrize(
    ("source", "options", "error"),
    [
        pytest.param("absent/or/not", {}, NotACheckpointError, id="no-source"),
        pytest.param("good", {"to": "nonsense"}, KeymapError, id="no-family"),
        pytest.param("good", {"against": "absent/or/not"}, NotACheckpointError, id="no-target"),
        pytest.param("good", {"against": "damaged"}, FormatError, id="damaged-target"),
        pytest.param("no-config", {"to": "hf"}, LayoutError, id="no-sizes"),
    ],
)
def test_what_cannot_be_told_is_an_error(
    source: str,
    options: dict[str, str],
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(Path("good"), llama_shapes())
    MISFITS["truncated"].damage(Path("damaged"))
    state = {k: tuple(v.shape) for k, v in lingua().state_dict().items()}
    write_hf(Path("no-config"), state, config=None)
    with pytest.raises(error):
        check(source, **options)  # type: ignore[arg-type]


def test_a_check_of_files_never_imports_torch(tmp_path: Path) -> None:
    write_hf(tmp_path / "a", llama_shapes())
    script = (
        "import sys\n"
        "from dcpconv import check\n"
        "from dcpconv.checking.reports import KINDS, render\n"
        f"coverage = check({str(tmp_path / 'a')!r}, to='lingua')\n"
        "[render(coverage, kind) for kind in KINDS]\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"]


def test_numbers_that_a_conversion_will_ask_for_are_a_note(tmp_path: Path) -> None:
    torch.save(tiny("llama").state_dict(), tmp_path / "bare.pth")
    coverage = check(tmp_path / "bare.pth", to="lingua", spec="heads=6,kv_heads=2")
    assert coverage
    assert any("norm_eps, rope_theta" in note for note in coverage.notes)
    told = check(tmp_path / "bare.pth", to="lingua", spec="heads=6,kv_heads=2,theta=1e4,eps=1e-5")
    assert not any("rope_theta" in note for note in told.notes)
