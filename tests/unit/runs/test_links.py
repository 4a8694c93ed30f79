"""What a link in a run directory needs is never deleted, and a link and its target are one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcpconv import find_checkpoints
from dcpconv.runs import Best, Retention, prune, strip, verify_checkpoints
from support.runs import run_dirs
from support.runs.run_dirs import MAKERS, hf_trainer


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def dangling(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.is_symlink() and not path.exists()]


@pytest.mark.parametrize("layout", MAKERS)
def test_a_link_to_the_newest_step_does_not_count_beside_it(layout: str, tmp_path: Path) -> None:
    paths = [MAKERS[layout](tmp_path, step) for step in (8, 9, 10)]
    alias = paths[2].with_name(paths[2].name.replace("10", "11"))
    link(alias, paths[2].name)

    prune(tmp_path, Retention(keep_last=1), yes=True)
    assert names(tmp_path) == sorted([paths[2].name, alias.name])

    prune(tmp_path, Retention(keep_last=1), yes=True)
    assert [step.is_complete for step in find_checkpoints(tmp_path)] == [True, True]


def test_keep_last_counts_steps_and_not_their_links(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        hf_trainer(tmp_path, step)
    link(tmp_path / "checkpoint-31", "checkpoint-30")
    link(tmp_path / "checkpoint-32", tmp_path / "checkpoint-31")

    pruning = prune(tmp_path, Retention(keep_last=2), yes=True)

    assert [step.step for step in pruning.decision.removed] == [10]
    assert dangling(tmp_path) == []


LINKS = [
    pytest.param({"latest": "checkpoint-20"}, id="latest"),
    pytest.param({"best": "checkpoint-20"}, id="best"),
    pytest.param({"a": "b", "b": "c", "c": "checkpoint-20"}, id="chain"),
    pytest.param({"export/model": "../checkpoint-20"}, id="below"),
    pytest.param({"export/w": "../checkpoint-20/model.safetensors"}, id="to a file"),
    pytest.param({"checkpoint-40/model.safetensors": "../checkpoint-20/model.safetensors"},
                 id="from a step that stays"),
    pytest.param({"checkpoint-21": "checkpoint-20"}, id="with a step's name"),
    pytest.param({"best": "checkpoint-20/../checkpoint-20/."}, id="roundabout"),
]  # fmt: skip


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_what_a_link_needs_stays(links: dict[str, str], kind: str, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        hf_trainer(tmp_path, step)
    for name, target in links.items():
        path = tmp_path / name
        path.unlink(missing_ok=True)
        link(path, target if kind == "relative" else os.path.normpath(path.parent / target))

    said = prune(tmp_path, Retention(keep_last=1)).decision
    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert dangling(tmp_path) == []
    assert {"checkpoint-20", "checkpoint-40"} <= set(names(tmp_path))
    assert not {"checkpoint-10", "checkpoint-30"} & set(names(tmp_path))
    assert {row.step.step: row.reasons for row in said.kept}[20] == ("linked",)
    assert all(verify_checkpoints(tmp_path))


def test_a_link_that_goes_by_way_of_a_step_needs_both(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        hf_trainer(tmp_path, step)
    link(tmp_path / "checkpoint-10" / "better", "../checkpoint-20")
    link(tmp_path / "best", "checkpoint-10/better")

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert names(tmp_path) == ["best", "checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_links_inside_what_goes_need_nothing(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        hf_trainer(tmp_path, step)
    link(tmp_path / "checkpoint-20" / "base", "../checkpoint-10")

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert names(tmp_path) == ["checkpoint-30"]


def test_links_of_the_run_count_where_its_inner_directory_is_given(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        run_dirs.lingua(tmp_path / "checkpoints", step)
    link(tmp_path / "best", "checkpoints/0000000010")

    prune(tmp_path / "checkpoints", Retention(keep_last=1), yes=True)

    assert names(tmp_path / "checkpoints") == ["0000000010", "0000000030"]


def test_links_in_a_circle_protect_and_stop_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        hf_trainer(tmp_path, step)
    link(tmp_path / "a", "b")
    link(tmp_path / "b", "a")
    link(tmp_path / "checkpoint-7", "checkpoint-7")
    link(tmp_path / "checkpoint-20" / "loop", "..")

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert [step.step for step in find_checkpoints(tmp_path)] == [20]


DAMAGE = ["zeros", "cut", "no optimizer"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(keep_last=1), {15}),
        (Retention(keep_last=2), {10, 15}),
        (Retention(keep_every=10), {10, 15}),
        (Retention(keep_best=(Best("eval_loss", "min"),)), {15}),
    ],
    ids=["last", "last two", "every", "best"],
)
def test_a_damaged_step_neither_counts_nor_protects(
    retention: Retention, stay: set[int], damage: str, tmp_path: Path
) -> None:
    for step in (5, 10, 15, 20):
        hf_trainer(tmp_path, step, {"eval_loss": 1 / step})
    optimizer = tmp_path / "checkpoint-20" / "optimizer.pt"
    data = optimizer.read_bytes()
    if damage == "no optimizer":
        optimizer.unlink()
    else:
        optimizer.write_bytes(bytes(len(data)) if damage == "zeros" else data[: len(data) // 2])

    decision = prune(tmp_path, retention, yes=True).decision

    left = {step.step for step in find_checkpoints(tmp_path) if step.is_complete}
    assert left == stay
    assert {row.step.step: row.reasons for row in decision.kept}[20] == ("incomplete",)


def test_only_opening_shows_some_damage(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        run_dirs.lingua(tmp_path, step)
    newest = tmp_path / "0000000030" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-40])
    assert find_checkpoints(tmp_path)[2].is_complete  # by its names

    prune(tmp_path, Retention(keep_last=1), yes=True)

    assert names(tmp_path) == ["0000000020", "0000000030"]


def test_where_nothing_verifies_nothing_goes(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        path = run_dirs.lingua(tmp_path, step)
        (path / "__0_0.distcp").write_bytes(b"x")
    before = names(tmp_path)

    prune(tmp_path, Retention(keep_last=1), yes=True)
    strip(tmp_path, yes=True)

    assert names(tmp_path) == before
