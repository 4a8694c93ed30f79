"""load_init_weights() in one process: what it finds by itself, what it refuses, what it reports."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcpconv.core import errors
from dcpconv.loading import agreement, staging
from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.shares import share_out
from support.checkpoints import tiles
from support.models.hf_models import MODEL_TYPES, save_hf, tiny
from support.worlds.sharded_models import build, lingua_weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tiny("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def right() -> dict[str, Tensor]:
    return lingua_weights(tiny("llama").state_dict())


class Odd(nn.Module):
    """One of everything that is unusual, under names that no table knows."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(3, 0))
        self.turned = nn.Parameter(torch.zeros(7, 4).t())
        self.blocks = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))
        self.blocks[1].register_parameter("weight", self.blocks[0].get_parameter("weight"))
        self.register_buffer("table", torch.zeros(6), persistent=False)

    def reset_parameters(self) -> None:
        self.table.copy_(torch.arange(6))


def filled(seed: int = 0) -> Odd:
    generator = torch.Generator().manual_seed(seed)
    model = Odd()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        model.get_buffer("norm.num_batches_tracked").fill_(41)
    return model


def equal(model: nn.Module, right: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert set(found) == set(right)
    for key, tensor in right.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("meta", [True, False], ids=["meta", "live"])
@pytest.mark.parametrize("container", ["", "model", "state_dict"], ids=["bare", "model", "state"])
def test_names_decide_where_no_table_knows_them(tmp_path: Path, container: str, meta: bool) -> None:  # noqa: FBT001
    source = filled().state_dict()
    torch.save({container: source, "step": 3} if container else source, tmp_path / "odd.pth")
    with torch.device("meta" if meta else "cpu"):
        model = Odd()
    model.get_parameter("blocks.0.weight").requires_grad = False

    report = load_init_weights(model, tmp_path / "odd.pth")

    equal(model, source)
    tied = model.get_parameter("blocks.0.weight")
    assert model.get_submodule("blocks.1").weight is tied
    assert not tied.requires_grad
    assert report.family == report.target == "as stored"
    assert report.tied == (("blocks.0.weight", "blocks.1.weight"),)
    if meta:
        assert report.computed_buffers == ("table",)
        assert torch.equal(model.table, torch.arange(6.0))


def test_the_naming_follows_from_names_and_a_prefix_is_no_matter(
    llama: Path, right: dict[str, Tensor]
) -> None:
    outer = nn.Module()
    outer.add_module("model", build(meta=True))

    report = load_init_weights(outer, llama)

    assert (report.family, report.target) == ("hf-llama", "lingua")
    equal(outer, {f"model.{key}": tensor for key, tensor in right.items()})


def test_a_table_of_ones_own(llama: Path, tmp_path: Path, right: dict[str, Tensor]) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(
        'name = "mine"\ntitle = "Mine"\nsource = "here"\n\n[keys]\n'
        '"embed" = ["embed", "d V"]\n"final" = ["final_norm", "d"]\n'
    )
    model = nn.Module()
    model.register_parameter("embed", nn.Parameter(torch.zeros(96, 131)))
    model.register_parameter("final", nn.Parameter(torch.zeros(96)))

    load_init_weights(model, llama, to="mine", keymap=table, strict=False)

    equal(model, {"embed": right["tok_embeddings.weight"].t(), "final": right["norm.weight"]})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_hugging_face_model_from_the_meta_device(
    tmp_path: Path,
    model_type: str,
    tied: bool,  # noqa: FBT001
) -> None:
    right = tiny(model_type, tie_word_embeddings=tied)
    save_hf(right, tmp_path)
    with torch.device("meta"):
        model = type(right)._from_config(right.config, attn_implementation="eager").eval()

    load_init_weights(model, tmp_path)

    tokens = torch.arange(34).reshape(2, 17)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, right(tokens).logits)


def test_progress_ends_at_the_bytes_of_the_report(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = load_init_weights(
        build(meta=True), llama, progress=lambda done, total: seen.append((done, total)), jobs=1
    )
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_report_prints_what_was_done(llama: Path) -> None:
    report = load_init_weights(build(meta=True, dtype=torch.bfloat16), llama)
    lines = str(report).splitlines()
    assert lines[0] == f"source     {llama}  hf  hf-llama"
    assert lines[1] == "model      30 tensors loaded  lingua"
    assert "cast       30 tensors fp32 -> bf16" in lines
    assert "computed   rope_embeddings.freqs_cis" in lines


def test_source_dtype_replaces_that_of_the_model(llama: Path, right: dict[str, Tensor]) -> None:
    model = build(meta=False, dtype=torch.bfloat16)
    report = load_init_weights(model, llama, dtype="source")
    equal(model, right)
    assert not report.casts


def test_a_cast_needs_no_more_than_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tiles.taken(monkeypatch)
    source = torch.randn(3000, 2000)
    torch.save({"w": source, "v": source}, tmp_path / "w.pth")
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(3000, 2000, dtype=torch.float64)))
    model.register_parameter("v", nn.Parameter(torch.zeros(2000, 3000, dtype=torch.float64).t()))

    load_init_weights(model, tmp_path / "w.pth")

    assert torch.equal(model.get_parameter("w"), source.double())
    assert torch.equal(model.get_parameter("v"), source.double())
    assert len(sizes) >= 12
    assert max(sizes) <= 2 * staging.BUFFER  # a float64 tile of float32 is twice as long


class TestBuffers:
    """Tables that no checkpoint has."""

    def model(self, reset: Any = None) -> nn.Module:
        inner = nn.Module()
        inner.register_buffer("table", torch.empty(4, device="meta"), persistent=False)
        if reset is not None:
            inner.reset_parameters = lambda: reset(inner)  # type: ignore[assignment]
        outer = nn.Linear(3, 2, device="meta")
        outer.add_module("rope", inner)
        return outer

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pth")
        return tmp_path / "w.pth"

    @pytest.mark.parametrize(
        "reset",
        [
            pytest.param(None, id="no-hook"),
            pytest.param(lambda module: None, id="hook-does-nothing"),  # noqa: ARG005
            pytest.param(lambda module: module.table[:3].zero_(), id="hook-leaves-one-out"),
        ],
    )
    def test_garbage_is_an_error(self, source: Path, reset: Any) -> None:
        model = self.model(reset)
        with pytest.raises(errors.CoverageError) as caught:
            load_init_weights(model, source)
        assert ("garbage", "rope.table") in [(k, str(v).split()[0]) for k, v in caught.value.facts]
        assert model.get_parameter("weight").is_meta

    def test_garbage_is_only_reported_if_the_caller_says_so(self, source: Path) -> None:
        report = load_init_weights(self.model(), source, strict=False)
        assert report.uninitialised_buffers == ("rope.table",)
        assert "garbage    rope.table" in str(report)

    def test_a_hook_computes_the_table(self, source: Path) -> None:
        model = self.model(lambda module: module.table.fill_(3))
        report = load_init_weights(model, source)
        assert report.computed_buffers == ("rope.table",)
        assert model.get_buffer("rope.table").tolist() == [3.0] * 4

    def test_computing_a_table_leaves_values_beside_it_alone(self, tmp_path: Path) -> None:
        model = nn.Linear(3, 2, device="meta")
        model.bias = nn.Parameter(torch.tensor([1.0, 2.0]))  # has memory on the meta device, too
        model.register_buffer("table", torch.empty(4, device="meta"), persistent=False)

        def reset() -> None:
            model.get_buffer("table").fill_(3)
            model.bias.fill_(9)

        model.reset_parameters = reset  # type: ignore[method-assign]
        torch.save({"weight": torch.ones(2, 3)}, tmp_path / "w.pth")
        report = load_init_weights(model, tmp_path / "w.pth", strict=False)
        assert report.computed_buffers == ("table",)
        assert model.get_buffer("table").tolist() == [3.0] * 4
        assert model.bias.tolist() == [1.0, 2.0]
        assert model.weight.tolist() == [[1.0] * 3] * 2

    def test_garbage_of_to_empty_is_computed_again(self, llama: Path) -> None:
        model = build(meta=False)
        expected = model.rope_embeddings.freqs_cis.clone().fill_(9)
        model.rope_embeddings.freqs_cis.copy_(expected)
        load_init_weights(model, llama)
        assert model.rope_embeddings.freqs_cis.abs().max() <= 1


class TestMissing:
    """``strict=False``."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        torch.save({"weight": torch.ones(2, 3)}, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    def test_no_parameter_is_left_without_memory(self, source: Path) -> None:
        model = nn.Linear(3, 2, device="meta")
        with pytest.raises(errors.CoverageError, match="1 missing") as caught:
            load_init_weights(model, source, strict=False)
        assert "init_missing" in str(caught.value)

    def test_ignored_parameters_may_stay_on_meta_and_are_told(self, source: Path) -> None:
        model = nn.Linear(3, 2, device="meta")
        report = load_init_weights(model, source, ignore=["b*"])
        assert report.on_meta == ("bias",)
        assert model.weight.eq(1).all()

    def test_the_caller_fills_them(self, source: Path) -> None:
        model = nn.Linear(3, 2, device="meta")
        report = load_init_weights(
            model, source, strict=False, init_missing=lambda _fqn, tensor: tensor.fill_(5)
        )
        assert report.initialised == ("bias",)
        assert model.bias.tolist() == [5.0, 5.0]


def test_what_the_naming_cannot_say_needs_to_be_allowed(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(errors.NotExpressibleError, match="nothing was loaded"):
        load_init_weights(build(meta=True), tmp_path)
    report = load_init_weights(build(meta=True), tmp_path, allow=["rope_scaling"])
    assert any("rope_scaling" in note for note in report.notes)


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"read": "rank1"}], ids=["dtype", "read"])
def test_words_it_does_not_know_are_refused(llama: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*expected one of"):
        load_init_weights(build(meta=True), llama, **options)


def test_a_state_dict_is_no_model(llama: Path) -> None:
    state: Any = build(meta=True).state_dict()
    with pytest.raises(TypeError, match=r"dcp\.load\(state_dict, storage_reader="):
        load_init_weights(state, llama)


@pytest.mark.parametrize("container", ["model_state", "MODEL_STATE", "net", "student.backbone"])
def test_keys_lie_in_whatever_container_has_them_all(tmp_path: Path, container: str) -> None:
    state: dict[str, Any] = dict(filled().state_dict())
    for part in reversed(container.split(".")):
        state = {part: state}
    torch.save({**state, "epoch": 3}, tmp_path / "saved.pt")
    model = Odd()
    load_init_weights(model, tmp_path / "saved.pt")
    assert all(
        torch.equal(tensor, model.state_dict()[key])
        for key, tensor in filled().state_dict().items()
    )


def test_two_containers_leave_a_choice_to_the_user(tmp_path: Path) -> None:
    torch.save(
        {"net": filled().state_dict(), "ema_net": filled(1).state_dict()}, tmp_path / "saved.pt"
    )
    with pytest.raises(errors.CoverageError, match="unexpected net"):
        load_init_weights(Odd(), tmp_path / "saved.pt")


class Pair(nn.Module):
    """An embedding and a head, one tensor or two."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("engine", ["direct", "torch"])
def test_two_tensors_are_not_one_unless_they_are_equal(tmp_path: Path, engine: Any) -> None:
    state = Pair(tied=False).state_dict()
    save_file(state, tmp_path / "two.safetensors")
    save_file({key: state["embed.weight"].clone() for key in state}, tmp_path / "one.safetensors")

    model = Pair(tied=True)
    with pytest.raises(errors.CoverageError, match=r"head\.weight  differs from embed\.weight"):
        load_init_weights(model, tmp_path / "two.safetensors", engine=engine)
    loose = load_init_weights(model, tmp_path / "two.safetensors", engine=engine, strict=False)
    assert any("head.weight differs from embed.weight" in note for note in loose.notes)

    load_init_weights(model, tmp_path / "one.safetensors", engine=engine)
    assert torch.equal(model.head.weight, state["embed.weight"])
    load_init_weights(Pair(tied=False), tmp_path / "two.safetensors", engine=engine)


def test_the_collector_rests_while_ranks_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(filled().state_dict(), tmp_path / "odd.pt")
    seen: list[bool] = []

    def shared_out(*arguments: Any, **options: Any) -> Any:
        seen.append(gc.isenabled())
        return share_out(*arguments, **options)

    monkeypatch.setattr(agreement, "share_out", shared_out)
    gc.enable()
    load_init_weights(Odd(), tmp_path / "odd.pt")
    assert seen == [False]
    assert gc.isenabled()
