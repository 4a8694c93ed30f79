"""DeepSpeed checkpoints laid out as version 0.19.8 does it: every tensor back, or an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dcpconv import check, convert, open_checkpoint
from dcpconv.core.errors import DcpconvError, FormatError
from support.checkpoints.zero_files import Run, names_of_deepspeed, write_zero


def _random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


MATRICES = _random({"embed.weight": (11, 5), "a.weight": (3, 7), "stack": (2, 3, 5)})
VECTORS = _random({"a.bias": (7,), "scale": (), "norm.weight": (5,)}, seed=1)


def _run(stage: int, ranks: int, **more: Any) -> Run:
    return Run(
        groups=[MATRICES, VECTORS],
        frozen={"frozen.weight": _random({"w": (5, 3)}, seed=2)["w"].bfloat16()},
        buffers={"calls": torch.tensor([1.5, 2.5])},
        tied={"head.weight": "embed.weight"},
        stage=stage,
        ranks=ranks,
        **more,
    )


def _expected(run: Run) -> dict[str, torch.Tensor]:
    weights = {**run.weights, **run.frozen, **run.buffers}
    return weights | {key: weights[owner] for key, owner in run.tied.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_tensor_comes_back(stage: int, ranks: int, tmp_path: Path) -> None:
    run = _run(stage, ranks)
    write_zero(tmp_path / "run", run)
    convert(tmp_path / "run", tmp_path / "out.pth")

    found = torch.load(tmp_path / "out.pth")

    expected = _expected(run)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_the_directory_of_the_step_is_the_same_source(form: Any, tmp_path: Path) -> None:
    at = write_zero(tmp_path / "run", _run(3, 3))
    convert(at, tmp_path / "out", form=form, chunks=2 if form == "dcp" else 1)
    convert(tmp_path / "out", tmp_path / "out.pth")

    found = torch.load(tmp_path / "out.pth")

    assert torch.equal(found["embed.weight"], MATRICES["embed.weight"])


def test_tied_and_split_tensors_are_told(tmp_path: Path) -> None:
    write_zero(tmp_path, _run(3, 2))

    catalog = open_checkpoint(tmp_path)

    assert catalog.form == "ranks"
    assert catalog.tied == {"head.weight": "embed.weight"}
    assert [c.extent.file for c in catalog.tensors["scale"].chunks] == [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    ]
    assert catalog.notes == ("fp32 weights of 2 ranks of DeepSpeed ZeRO-3 are read as one model",)


def test_without_optimizer_files_the_weights_of_the_forward_pass_are_read(tmp_path: Path) -> None:
    at = write_zero(tmp_path, _run(2, 2))
    for file in at.glob("*_optim_states.pt"):
        file.unlink()

    catalog = open_checkpoint(tmp_path)

    assert catalog.tensors["embed.weight"].dtype.name == "bfloat16"
    assert "not fp32" in catalog.notes[0]


def test_a_pickle_may_name_whatever_the_trainer_had_in_it(tmp_path: Path) -> None:
    class Settings(dict):  # type: ignore[type-arg]
        """Of the user's own script, which no reader can import."""

    at = write_zero(tmp_path, _run(2, 2))
    file = at / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=True)
    Settings.__qualname__ = "Settings"
    globals()["Settings"] = Settings
    try:
        torch.save(states | {"client": [Settings(lr=1), Path("out")]}, file)
    finally:
        del globals()["Settings"]

    assert open_checkpoint(tmp_path).tensors["embed.weight"].shape == (11, 5)


Damage = Callable[[Path], object]
OPTIM = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def _lose(name: str) -> Damage:
    return lambda at: (at / name).unlink()


def _truncate(name: str) -> Damage:
    return lambda at: (at / name).write_bytes((at / name).read_bytes()[:-500])


def _change(name: str, change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(at: Path) -> None:
        states = torch.load(at / name, weights_only=False)
        change(states)
        torch.save(states, at / name)

    return damage


def _shorter(key: str) -> Callable[[dict[str, Any]], None]:
    def change(states: dict[str, Any]) -> None:
        states["optimizer_state_dict"][key][0] = states["optimizer_state_dict"][key][0][:-3].clone()

    return change


def _renumbered(name: str, new: str) -> Damage:
    def damage(at: Path) -> None:
        shutil.copy(at / name, at / new)

    return damage


def _point_elsewhere(at: Path) -> None:
    (at.parent / "latest").write_text("global_step9")


DAMAGES = [
    pytest.param(2, _lose(OPTIM.format(1)), OPTIM.format(1), id="zero2-lost-rank"),
    pytest.param(3, _lose(OPTIM.format(2)), OPTIM.format(2), id="zero3-lost-last-rank"),
    pytest.param(3, _lose(MODEL.format(1)), MODEL.format(1), id="zero3-lost-model-file"),
    pytest.param(
        2, _lose("mp_rank_00_model_states.pt"), "mp_rank_00_model_states.pt", id="no-model-file"
    ),
    pytest.param(2, _truncate(OPTIM.format(1)), OPTIM.format(1), id="zero2-cut-short"),
    pytest.param(3, _truncate(MODEL.format(2)), MODEL.format(2), id="zero3-model-cut-short"),
    pytest.param(
        3,
        _change(MODEL.format(1), lambda states: states.update(global_steps=9)),
        MODEL.format(1),
        id="another-step",
    ),
    pytest.param(
        3,
        _change(MODEL.format(0), lambda states: states.update(dp_world_size=4)),
        "4 optimizer files",
        id="another-world",
    ),
    pytest.param(
        2,
        _change("mp_rank_00_model_states.pt", lambda states: states.update(mp_world_size=2)),
        "tensor",
        id="tensor-parallel",
    ),
    pytest.param(
        2, _renumbered(OPTIM.format(0), OPTIM.format(3)), OPTIM.format(3), id="one-too-many"
    ),
    pytest.param(
        2,
        _renumbered(OPTIM.format(0), OPTIM.format(0).removeprefix("bf16_")),
        OPTIM.format(0),
        id="two-of-one-rank",
    ),
    pytest.param(
        2,
        _renumbered(OPTIM.format(0), OPTIM.format(0).replace("mp_rank_00", "mp_rank_01")),
        "mp_rank_01",
        id="model-parallel-file",
    ),
    pytest.param(
        2, lambda at: (at.parent / "latest").write_text("global_step9"), "latest", id="pointer"
    ),
]


@pytest.mark.parametrize(("stage", "damage", "named"), DAMAGES)
def test_damage_is_an_error_that_names_the_file(
    stage: int, damage: Damage, named: str, tmp_path: Path
) -> None:
    at = write_zero(tmp_path / "run", _run(stage, 3))
    damage(at)

    with pytest.raises(FormatError) as caught:
        convert(tmp_path / "run", tmp_path / "out", form="dcp")

    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "key"), [(2, "single_partition_of_fp32_groups"), (3, "fp32_flat_groups")]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_short_partition_is_named(stage: int, key: str, rank: int, tmp_path: Path) -> None:
    at = write_zero(tmp_path, _run(stage, 3))
    with names_of_deepspeed():
        _change(OPTIM.format(rank), _shorter(key))(at)

    with pytest.raises(FormatError, match="not as long") as caught:
        open_checkpoint(tmp_path)

    assert OPTIM.format(rank) in str(caught.value)


def test_a_vector_that_lacks_one_element_is_no_padding(tmp_path: Path) -> None:
    at = write_zero(tmp_path, _run(2, 1))

    def shorten(states: dict[str, Any]) -> None:
        flat = states["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        flat[1] = flat[1][:-1].clone()

    with names_of_deepspeed():
        _change(OPTIM.format(0), shorten)(at)

    with pytest.raises(FormatError, match="do not add up") as caught:
        open_checkpoint(tmp_path)

    assert OPTIM.format(0) in str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_that_do_not_add_up_are_refused(stage: int, tmp_path: Path) -> None:
    at = write_zero(tmp_path, _run(stage, 1))
    file = at / ("mp_rank_00_model_states.pt" if stage == 2 else MODEL.format(0))
    states = torch.load(file, weights_only=True)
    states["param_shapes"][0]["more"] = torch.Size((40, 2))
    torch.save(states, file)

    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)

    assert OPTIM.format(0) in str(caught.value)


ALONE = [
    pytest.param(3, MODEL.format(0), id="zero3-model-file"),
    pytest.param(3, OPTIM.format(0), id="zero3-optimizer"),
    pytest.param(2, OPTIM.format(1), id="zero2-optimizer"),
]
WAYS = [
    pytest.param({"form": "dcp"}, id="stream"),
    pytest.param({"form": "dcp", "engine": "torch"}, id="torch"),
    pytest.param({"form": "hf", "engine": "torch", "trust": True}, id="torch-trust"),
]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("stage", "name"), ALONE)
@pytest.mark.parametrize("place", ["in-place", "moved"])
def test_one_rank_file_alone_is_refused(
    stage: int, name: str, how: Any, place: str, tmp_path: Path
) -> None:
    file = write_zero(tmp_path / "run", _run(stage, 2)) / name
    if place == "moved":
        file = file.rename(tmp_path / "model.pt")

    with pytest.raises(FormatError, match="one rank's file") as caught:
        convert(file, tmp_path / "out", **how)

    hint = "global_step directory" if place == "moved" else str(file.parent)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DcpconvError, match="one rank's file"):
        check(file)


def test_the_model_file_of_zero2_is_a_model(tmp_path: Path) -> None:
    run = _run(2, 2)
    at = write_zero(tmp_path / "run", run)
    convert(at / "mp_rank_00_model_states.pt", tmp_path / "out", form="hf")

    found = load_file(tmp_path / "out/model.safetensors")

    assert torch.equal(found["embed.weight"], MATRICES["embed.weight"].bfloat16())
    assert found.keys() == _expected(run).keys()


def test_several_steps_without_latest_leave_a_choice(tmp_path: Path) -> None:
    write_zero(tmp_path, _run(2, 2, step=4))
    write_zero(tmp_path, _run(2, 2, step=8))
    (tmp_path / "latest").unlink()

    with pytest.raises(FormatError, match="several steps") as caught:
        open_checkpoint(tmp_path)

    assert "global_step8" in (caught.value.hint or "")


def test_live_models_and_stock_dcp_load_take_the_rank_files(tmp_path: Path) -> None:
    from torch import nn
    from torch.distributed.checkpoint.state_dict_loader import load

    from dcpconv import CheckpointReader, load_init_weights

    weights = _random({"0.weight": (13, 7), "0.bias": (13,), "2.weight": (5, 13), "2.bias": (5,)})
    write_zero(tmp_path, Run(groups=[weights], ranks=8, stage=3))
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    load_init_weights(model, tmp_path)
    state = {key: torch.zeros_like(value) for key, value in weights.items()}
    load(state, storage_reader=CheckpointReader(tmp_path))

    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(state[key], value), key
