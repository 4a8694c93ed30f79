"""Steps of one file per rank: every file that is missing is named, and the step is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpconv import convert, find_checkpoints, find_latest_checkpoint, resolve_checkpoint
from dcpconv.formats.opening import open_checkpoint
from dcpconv.runs import verify_checkpoints
from support.runs.run_dirs import WITH_TRACKERS, dcp_files, hf_zero, saved, verl, write, zero


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_trainers_step_under_deepspeed_is_complete(stage: int, ranks: int, tmp_path: Path) -> None:
    hf_zero(tmp_path, 4, stage=stage, ranks=ranks)

    (step,) = find_checkpoints(tmp_path)

    assert step.problems == ()
    assert {"weights", "optimizer", "rng"} <= set(step.holds)


OPTIM = "global_step8/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
PART = "global_step8/zero_pp_rank_{}_mp_rank_00_model_states.pt"
BROKEN = [
    pytest.param(2, {OPTIM.format(1): None}, "rank_1_mp_rank_00_optim_states.pt is missing"),
    pytest.param(2, {OPTIM.format(0): None}, "rank_0_mp_rank_00_optim_states.pt is missing"),
    pytest.param(3, {OPTIM.format(2): None}, "rank_2_mp_rank_00_optim_states.pt is missing"),
    pytest.param(3, {PART.format(2): None}, "rank_2_mp_rank_00_model_states.pt is missing"),
    pytest.param(3, {PART.format(0): None}, "rank_0_mp_rank_00_model_states.pt is missing"),
    pytest.param(
        2, {OPTIM.format(r): None for r in range(3)}, "no optimizer states", id="no optimizer"
    ),
    pytest.param(
        2, {"global_step8/mp_rank_00_model_states.pt": None}, "no model states", id="no model"
    ),
    pytest.param(2, {"latest": None}, "no latest", id="no latest"),
    pytest.param(2, {"latest": b"global_step6"}, "latest names 'global_step6'", id="stale latest"),
    pytest.param(2, {"latest": b""}, "latest names ''", id="empty latest"),
    pytest.param(2, {"latest": b"\x00\xff" * 9999}, "latest names", id="odd latest"),
    pytest.param(2, {OPTIM.format(1): saved()[:-30]}, "rank_1_mp_rank_00_optim", id="cut short"),
    pytest.param(2, {OPTIM.format(1): bytes(999)}, "is zeros", id="zeros"),
    pytest.param(2, {OPTIM.format(1): b""}, "is empty", id="empty"),
    pytest.param(2, {"rng_state_3.pth": saved()}, "rank_3_mp_rank_00_optim", id="more rng states"),
]


@pytest.mark.parametrize(("stage", "changes", "why"), BROKEN)
def test_what_deepspeed_could_not_load_is_incomplete(
    stage: int, changes: dict[str, bytes | None], why: str, tmp_path: Path
) -> None:
    older, newer = (hf_zero(tmp_path, step, stage=stage, ranks=3) for step in (4, 8))
    for name, data in changes.items():
        (newer / name).unlink() if data is None else (newer / name).write_bytes(data)

    problems = find_checkpoints(tmp_path)[1].problems
    latest = find_latest_checkpoint(tmp_path)

    assert any(why in problem for problem in problems), problems
    assert latest is not None
    assert latest.path == older


def test_an_empty_tag_directory_is_no_step(tmp_path: Path) -> None:
    path = hf_zero(tmp_path, 4)
    for file in (path / "global_step4").iterdir():
        file.unlink()

    (step,) = find_checkpoints(tmp_path)

    assert step.problems[0].startswith("global_step4 holds no model states")


def test_without_zero_the_optimizer_is_in_the_models_file(tmp_path: Path) -> None:
    path = zero(tmp_path, 4)
    for file in path.glob("*_optim_states.pt"):
        file.unlink()
    state = {"module": {"w": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(state, path / "mp_rank_00_model_states.pt")

    assert find_checkpoints(tmp_path)[0].problems == ()


@pytest.mark.parametrize("ranks", [3, 300, 70_000])
def test_the_models_file_says_how_many_ranks_there_were(ranks: int, tmp_path: Path) -> None:
    path = zero(tmp_path, 4, ranks=2)
    state = {"module": {"w": torch.ones(2)}, "dp_world_size": ranks, "mp_world_size": 1}
    torch.save(state, path / "mp_rank_00_model_states.pt")

    problems = find_checkpoints(tmp_path)[0].problems

    assert problems[0] == "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt is missing"
    assert len(problems) == min(8, ranks - 2)


def test_tensor_parallel_ranks_each_have_their_files(tmp_path: Path) -> None:
    path = zero(tmp_path, 4)
    for file in list(path.iterdir()):
        write(path, {file.name.replace("mp_rank_00", "mp_rank_01"): file.read_bytes()})
    assert find_checkpoints(tmp_path)[0].problems == ()

    (path / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()

    (problem,) = find_checkpoints(tmp_path)[0].problems
    assert problem == "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt is missing"


@pytest.mark.parametrize("layout", WITH_TRACKERS)
def test_a_run_of_rank_files_alone(layout: str, tmp_path: Path) -> None:
    paths = [WITH_TRACKERS[layout](tmp_path, step) for step in (2, 4, 10)]

    steps = find_checkpoints(tmp_path)

    assert [(step.step, step.layout, step.problems) for step in steps] == [
        (2, layout, ()),
        (4, layout, ()),
        (10, layout, ()),
    ]
    latest = resolve_checkpoint("latest", tmp_path, verify=True)
    assert latest is not None
    assert latest.path == paths[2]


@pytest.mark.parametrize("layout", WITH_TRACKERS)
def test_a_step_that_the_run_does_not_name_yet_was_interrupted(layout: str, tmp_path: Path) -> None:
    WITH_TRACKERS[layout](tmp_path, 4)
    (tracker,) = (path for path in tmp_path.iterdir() if path.is_file())
    before = tracker.read_bytes()
    WITH_TRACKERS[layout](tmp_path, 8)
    tracker.write_bytes(before)

    first, second = find_checkpoints(tmp_path)
    assert first.is_complete
    assert second.problems == (f"{tracker.name} says 4: the save was interrupted",)

    tracker.unlink()
    assert not any(step.is_complete for step in find_checkpoints(tmp_path))


LOST = [
    ({"actor/model_world_size_2_rank_1.pt": None}, "actor/model_world_size_2_rank_1.pt is missing"),
    ({"actor/optim_world_size_2_rank_0.pt": None}, "actor/optim_world_size_2_rank_0.pt is missing"),
    ({"critic/model_world_size_2_rank_1.pt": None}, "critic/model_world_size_2_rank_1.pt is mis"),
    ({"actor/model_world_size_4_rank_0.pt": saved()}, "actor holds files of 2 and of 4 ranks"),
    ({"actor/optim_world_size_2_rank_1.pt": saved()[:-9]}, "optim_world_size_2_rank_1.pt: "),
    (
        {f"{role}/model_world_size_2_rank_{rank}.pt": None for role in ("actor", "critic")
         for rank in range(2)},
        "no model_world_size_N_rank_R.pt",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "why"), LOST, ids=[row[1] for row in LOST])
def test_a_file_that_verl_needs_is_named(
    changes: dict[str, bytes | None], why: str, tmp_path: Path
) -> None:
    older, newer = (verl(tmp_path, step, roles=("actor", "critic")) for step in (4, 8))
    for name, data in changes.items():
        (newer / name).unlink() if data is None else (newer / name).write_bytes(data)

    problems = find_checkpoints(tmp_path)[1].problems
    latest = find_latest_checkpoint(tmp_path)

    assert any(why in problem for problem in problems), problems
    assert latest is not None
    assert latest.path == older


def test_a_step_of_verls_megatron_workers(tmp_path: Path) -> None:
    files = {f"actor/dist_ckpt/{name}": data for name, data in dcp_files().items()}
    path = write(tmp_path / "global_step_4", {**files, "data.pt": saved()})
    write(tmp_path, {"latest_checkpointed_iteration.txt": "4"})
    assert find_checkpoints(tmp_path)[0].problems == ()

    (path / "actor/dist_ckpt/__1_0.distcp").unlink()

    problems = find_checkpoints(tmp_path)[0].problems
    assert problems == ("actor/dist_ckpt/__1_0.distcp is missing",)


def test_a_step_named_by_its_path_is_judged_by_itself(tmp_path: Path) -> None:
    for make in (zero, verl):
        path = make(tmp_path / make.__name__, 4)
        moved = path.rename(tmp_path / f"best-{make.__name__}")
        step = resolve_checkpoint(moved, "elsewhere")
        assert step is not None
        assert step.layout == ("deepspeed" if make is zero else "verl")


def test_deepspeeds_own_files(tmp_path: Path) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="needs .[interop]")
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    names = {
        engine._get_rank_zero_ckpt_name(Namer(engine), tmp_path, "global_step8", 0, rank, True)
        for rank in range(3)
    }

    assert {Path(name).relative_to(tmp_path).as_posix() for name in names} == {
        OPTIM.format(rank) for rank in range(3)
    }


class Namer:
    """As much of DeepSpeed's engine as gives a file its name."""

    def __init__(self, engine: type) -> None:
        self.engine = engine

    def _get_zero_ckpt_prefix(self, dp_rank: int, bf16_mode: bool) -> str:  # noqa: FBT001
        name: str = self.engine._get_zero_ckpt_prefix(self, dp_rank, bf16_mode)  # type: ignore[attr-defined]
        return name


@pytest.mark.parametrize("stage", [2, 3])
def test_the_weights_of_rank_files_can_be_opened_and_converted(stage: int, tmp_path: Path) -> None:
    zero(tmp_path / "deepspeed", 4, stage=stage)
    hf_zero(tmp_path / "trainer", 4, stage=stage)
    verl(tmp_path / "verl", 4, roles=("critic", "actor"))
    for name in ("deepspeed", "trainer", "verl"):
        (step,) = find_checkpoints(tmp_path / name)
        assert step.form == ("hf" if (name, stage) == ("trainer", 2) else "ranks")
        assert open_checkpoint(step.weights).tensors
        assert all(verify_checkpoints(tmp_path / name))
        convert(step.weights, tmp_path / f"out-{name}.pth")
    assert step.weights == tmp_path / "verl/global_step_4/actor"


@pytest.mark.parametrize("name", ["deepspeed", "trainer"])
def test_verify_reads_what_ranks_say_of_each_other(name: str, tmp_path: Path) -> None:
    """Names, number and ends of the files are right: rank 1's is of another step."""
    if name == "deepspeed":
        path = zero(tmp_path / "run", 4)
        other = zero(tmp_path / "other", 8)
    else:
        path = hf_zero(tmp_path / "run", 4, stage=3) / "global_step4"
        other = hf_zero(tmp_path / "other", 8, stage=3) / "global_step8"
    file = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (path / file).write_bytes((other / file).read_bytes())
    (step,) = find_checkpoints(tmp_path / "run")
    assert step.is_complete
    (checked,) = verify_checkpoints(tmp_path / "run")
    assert not checked


def test_files_of_pipeline_stages_are_left_alone(tmp_path: Path) -> None:
    """No form of ours holds them, so they are judged by names, and verify does not fail."""
    path = zero(tmp_path, 4)
    (path / "layer_00-model_00-model_states.pt").write_bytes(saved())
    (step,) = find_checkpoints(tmp_path)
    assert step.form is None
    assert all(verify_checkpoints(tmp_path))
