"""Real process groups load into a model under every parallelism, and fail alike or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from support.worlds import load_scenes
from support.worlds.dist_worlds import Outcome, launch
from support.worlds.load_scenes import SCENES, prepare

Worlds = dict[int, list[dict[str, Outcome]]]

WHOLE = 923_520
"""Bytes of the model's weights in fp32."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    sources = tmp_path_factory.mktemp("sources")
    prepare(sources, SCENES)
    return {ranks: launch(load_scenes.__file__, ranks, sources) for ranks in SCENES}


def outcomes(worlds: Worlds, ranks: int, scene: str) -> list[Outcome]:
    return [world[scene] for world in worlds[ranks]]


def values(worlds: Worlds, ranks: int, scene: str) -> list[Any]:
    found = outcomes(worlds, ranks, scene)
    for outcome in found:
        assert not outcome.error, outcome.text
    return [outcome.value for outcome in found]


def rows(prefix: str) -> list[Any]:
    return [
        pytest.param(ranks, scene, id=f"{ranks}-{scene}")
        for ranks, scenes in SCENES.items()
        for scene in scenes
        if scene.startswith(prefix)
    ]


@pytest.mark.parametrize(("ranks", "scene"), rows("wrap/"))
def test_every_rank_gets_its_shards(worlds: Worlds, ranks: int, scene: str) -> None:
    found = values(worlds, ranks, scene)
    assert all(one["tensors"] == 30 for one in found)
    read = sum(one["read"] for one in found)
    if scene.endswith("/all"):
        assert all((one["read"], one["received"]) == (one["bytes"], 0) for one in found)
    elif scene.endswith("/rank0"):
        assert [one["read"] for one in found] == [WHOLE] + [0] * (ranks - 1)
    else:
        assert read == WHOLE
        assert all(one["received"] >= one["bytes"] - one["read"] for one in found)


@pytest.mark.parametrize(("ranks", "scene"), rows("from/"))
def test_every_form_is_a_source(worlds: Worlds, ranks: int, scene: str) -> None:
    form = {"hf": "hf", "li": "torch", "dc": "dcp"}[scene.removeprefix("from/")[:2]]
    tied = [["tok_embeddings.weight", "output.tied_module.weight"]] if "-tied" in scene else []
    for value in values(worlds, ranks, scene):
        assert (value["form"], value["tied"]) == (form, tied)


@pytest.mark.parametrize(
    ("ranks", "scene"), [row for row in rows("dcp/") if "truncated" not in str(row.id)]
)
def test_stock_dcp_load_reads_through_us(worlds: Worlds, ranks: int, scene: str) -> None:
    values(worlds, ranks, scene)


def test_stock_dcp_load_fails_on_every_rank(worlds: Worlds) -> None:
    for outcome in outcomes(worlds, 2, "dcp/truncated"):
        assert outcome.error == "RuntimeError"
        assert "file is shorter than its header says" in outcome.text


def test_casts_are_counted_where_they_lose_values(worlds: Worlds) -> None:
    first, second = values(worlds, 2, "casts")
    assert first["casts"] == second["casts"] == [["fp32", "fp16", 30]]
    assert (first["lossy"], second["lossy"]) == ([["norm.weight", 1, 0]], [["norm.weight", 0, 1]])


def test_a_hugging_face_model_gets_its_tie_and_its_rope_table(worlds: Worlds) -> None:
    for value in values(worlds, 2, "hugging-face"):
        assert value["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
        assert "model.rotary_emb.inv_freq" in value["buffers"]


def test_with_pipeline_parallelism_nothing_is_unexpected(worlds: Worlds) -> None:
    assert [value["loaded"] for value in values(worlds, 2, "pipeline")] == [10, 20]


def test_what_is_missing_is_left_alone_or_handed_over(worlds: Worlds) -> None:
    extra = ["layers.0.attention.extra.weight", "layers.0.attention.extra.bias"]
    for value in values(worlds, 2, "adds"):
        assert value["seen"] == value["missing"] == extra
        assert value["alone"] == ["layers.1.attention.wq.weight", "norm.weight"]
        assert value["ignored"] == ["tok_embeddings.weight"]


FAILURES = {
    "missing": ("CoverageError", ("2 missing", "layers.1.attention.wq.weight", "norm.weight")),
    "misshapen": ("CoverageError", ("layers.2.ffn_norm.weight  [96] in the model, [95]",)),
    "unexpected": ("CoverageError", ("layers.0.attention.wq.bias",)),
    "other-family": ("NotExpressibleError", ("refused   qk_norm",)),
    "wrong-table": ("CoverageError", ("30 missing, 30 unexpected", "to=NAME")),
    "no-such-family": ("KeymapError", ("'llama-lingua'",)),
    "absent": ("NotACheckpointError", ("nothing/here",)),
    "truncated-on-one-rank": ("FormatError", ("shorter than its header", "on ranks  {last} of")),
    "different-on-one-rank": ("FormatError", ("ranks see different checkpoints", "rank {last} ")),
    "garbage": ("CoverageError", ("garbage   layers.1.table", "reset_parameters()")),
    "tied": ("CoverageError", ("1 tied", "output.weight  differs from tok_embeddings.weight")),
    "tied/rank0": ("CoverageError", ("1 tied", "output.weight  differs from tok_embeddings")),
    "unlike/read": ("DcpconvError", ("read='auto' on rank 0", "read='once' on rank {last}")),
    "unlike/engine": ("DcpconvError", ("engine='auto' on rank 0", "'torch' on rank {last}")),
    "unlike/strict": ("DcpconvError", ("strict=True on rank 0", "strict=False on rank {last}")),
    "shrinks/all": ("SourceChangedError", ("undefined now", "on ranks  {last} of")),
    "shrinks/once": ("SourceChangedError", ("undefined now", "on ranks  {last} of")),
    "shrinks/rank0": ("SourceChangedError", ("undefined now", "on ranks  0 of")),
}


@pytest.mark.parametrize("ranks", SCENES)
@pytest.mark.parametrize("fault", FAILURES)
def test_every_rank_fails_alike_and_waits_for_none(worlds: Worlds, ranks: int, fault: str) -> None:
    found = outcomes(worlds, ranks, f"hostile/{fault}")
    error, texts = FAILURES[fault]
    # A rank that waited in vain for another would have ended with LostRankError.
    assert {outcome.error for outcome in found} == {error}, found[0].text
    assert len({outcome.text for outcome in found}) == 1
    for text in texts:
        assert text.format(last=ranks - 1) in found[0].text
