"""Hub ids against a server that speaks the hub's protocol: headers travel, weights do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpconv import check, convert
from dcpconv.core.errors import FormatError, NotACheckpointError, TargetExistsError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.adapters.reading import read_adapter
from dcpconv.sources.packing import pack, unpack
from dcpconv.sources.understanding import understand
from dcpconv.stores.hub import HubError
from dcpconv.stores.local import Sources
from dcpconv.stores.schemes import is_hub_id, path_of
from support.checkpoints.adapters import assert_near, factors, merged, peft_tensors, save_peft
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.hub_server import COMMIT, Hub, point_to, serving

BIG = {"vocab_size": 40_000}
SHAPES = {
    key: (40_000, shape[1]) if shape[0] == 131 else shape for key, shape in llama_shapes().items()
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    source = write_hf(tmp_path / "repo", SHAPES, files=3, config={**CONFIG, **BIG})
    with serving(source) as hub:
        point_to(hub, monkeypatch)
        yield hub


@pytest.mark.parametrize(
    "name", ["org/tiny", "hf://org/tiny", f"org/tiny@{COMMIT}", "org/tiny@main"]
)
def test_only_headers_travel(name: str, hub: Hub) -> None:
    coverage = check(name, to="lingua")
    assert coverage
    assert coverage.read.path == name
    assert coverage.read.files == 3
    shard_files = [file for file in hub.directory.iterdir() if file.suffix == ".safetensors"]
    weights = sum(file.stat().st_size for file in shard_files)
    travelled = sum(hub.served.get(file.name, 0) for file in shard_files)
    assert weights > 10_000_000
    assert 0 < travelled <= 3 * 64 * 1024


def test_the_catalog_is_that_of_the_same_files_here(hub: Hub) -> None:
    remote = open_checkpoint("org/tiny")
    local = open_checkpoint(hub.directory)
    assert remote.tensors == local.tensors
    assert remote.files == local.files


def test_a_header_longer_than_the_first_read_is_fetched_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"layers.{n}.some_long_name_of_a_module.weight": (2, 3) for n in range(3000)}
    with serving(write_hf(tmp_path / "repo", shapes, config=None)) as hub:
        point_to(hub, monkeypatch)
        remote = open_checkpoint("org/tiny")
        assert remote.tensors == open_checkpoint(hub.directory).tensors
        assert hub.served["model.safetensors"] > 64 * 1024


def test_a_hub_id_is_a_target_too(hub: Hub) -> None:
    assert check(hub.directory, against="org/tiny")
    changed = write_hf(hub.directory.parent / "changed", llama_shapes())
    assert {f.key for f in check(changed, against="org/tiny").misshapen} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_a_truncated_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "repo", llama_shapes(), files=3)
    name = "model-00002-of-00003.safetensors"
    size = (source / name).stat().st_size
    with serving(source, reported={name: size - 1000}) as hub:
        point_to(hub, monkeypatch)
        coverage = check("org/tiny")
        assert [name in problem for problem in coverage.problems] == [True]
        with pytest.raises(FormatError):
            open_checkpoint("org/tiny")


@pytest.mark.parametrize("cache", [False, True], ids=["from-afar", "cached"])
def test_a_conversion_reads_weights_and_config_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    source = write_hf(tmp_path / "repo", {}, config=CONFIG)
    tensors = {key: torch.randn(shape).bfloat16() for key, shape in llama_shapes().items()}
    save_file(tensors, source / "model.safetensors")
    (source / "notes.pdf").write_bytes(b"x" * 5000)
    (source / "consolidated.safetensors").write_bytes(b"x" * 5000)
    with serving(source) as hub:
        point_to(hub, monkeypatch)
        convert("org/tiny", tmp_path / "out.pth", to="lingua", cache=cache)
        assert "notes.pdf" not in hub.served
        assert "consolidated.safetensors" not in hub.served
    assert (tmp_path / "cache").exists() == cache
    stored = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    key = "layers.4.attention.wo.weight"
    assert torch.equal(stored[key], tensors["model.layers.4.self_attn.o_proj.weight"])


@pytest.mark.parametrize("is_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "beside-a-model"])
def test_an_adapter_is_read_without_the_model_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_bin: bool, with_model: bool
) -> None:
    base = write_hf(tmp_path / "base", {}, config=CONFIG)
    tensors = {key: torch.randn(shape) for key, shape in llama_shapes().items()}
    save_file(tensors, base / "model.safetensors")
    pairs = factors(tensors, ["o_proj"])
    adapter = save_peft(tmp_path / "adapter", peft_tensors(pairs), is_bin=is_bin)
    if with_model:
        (adapter / "model.safetensors").write_bytes(b"x" * 5000)
    (adapter / "optimizer.pt").write_bytes(b"x" * 5000)
    with serving(adapter) as hub:
        point_to(hub, monkeypatch)
        convert(base, tmp_path / "out", form="hf", adapter="org/tiny@main:0.5")
        assert not hub.served.keys() & {"model.safetensors", "optimizer.pt"}
        if not with_model:
            assert check("org/tiny", against=base)
            convert("org/tiny", tmp_path / "alone")
    assert_near(load_file(tmp_path / "out" / "model.safetensors"), merged(tensors, pairs, 1.25))
    if not with_model:
        assert load_file(tmp_path / "alone/adapter_model.safetensors").keys() == (
            peft_tensors(pairs).keys()
        )


def test_a_repository_without_an_adapter_is_declined_with_what_it_has(hub: Hub) -> None:
    del hub
    with pytest.raises(NotACheckpointError, match="this is no adapter"):
        read_adapter(path_of("org/tiny"))


@pytest.mark.parametrize("name", ["org/absent", "org/tiny@no-such-revision"])
def test_what_is_not_there_is_one_clear_error(name: str, hub: Hub) -> None:
    del hub
    with pytest.raises(HubError) as error:
        check(name)
    assert ("name", name) in error.value.facts
    assert error.value.hint


def test_a_repository_of_another_form_is_read_from_afar_and_never_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    tensors = {key: torch.randn(shape) for key, shape in llama_shapes().items()}
    torch.save(tensors, tmp_path / "repo" / "pytorch_model.bin")
    with serving(tmp_path / "repo") as hub:
        point_to(hub, monkeypatch)
        remote, local = open_checkpoint("org/tiny"), open_checkpoint(hub.directory)
        assert remote.tensors == local.tensors
        with pytest.raises(NotACheckpointError, match="no safetensors") as error:
            convert("org/tiny", tmp_path / "out", cache=True)
        assert "pytorch_model.bin" in str(error.value)


def test_a_server_that_is_not_there_is_could_not_tell(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dcpconv", "check", "org/tiny"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "HF_ENDPOINT" in run.stderr


def test_the_command_line_honours_hf_endpoint(tmp_path: Path, hub: Hub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "dcpconv", "check", "org/tiny", "--report", "json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["source"]["keys"] == len(SHAPES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", True),
        ("org/name@v1.0", True),
        ("hf://org/name", True),
        ("org/name/more", False),
        ("./name", False),
        ("/org/name", False),
        ("name", False),
        ("../name", False),
    ],
)
def test_what_counts_as_a_hub_id(name: str, expected: bool) -> None:  # noqa: FBT001
    assert is_hub_id(name) == expected


def test_a_path_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")
    assert path_of("org/name") == Path("org/name")


@pytest.mark.parametrize(("count", "most"), [(1, 2), (7, 9)])
def test_a_check_takes_two_round_trips_and_one_for_each_file(
    count: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"layers.{n}.weight": (3, 5) for n in range(300)}
    with serving(write_hf(tmp_path / "repo", shapes, files=count, config=None)) as hub:
        point_to(hub, monkeypatch)
        assert check("hf://org/tiny")
        assert len(hub.asked) == most


def test_a_data_set_and_a_file_in_a_repository_are_read(hub: Hub) -> None:
    for name in ("hf://datasets/org/tiny", "hf://org/tiny@main", "hf://models/org/tiny"):
        assert open_checkpoint(name).tensors.keys() == SHAPES.keys()
    file = "model-00002-of-00003.safetensors"
    there, here = open_checkpoint(f"hf://org/tiny/{file}"), open_checkpoint(hub.directory / file)
    assert there.tensors == here.tensors


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A repository with nothing but what the hub itself puts there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".gitattributes").write_text("*.safetensors filter=lfs")
    with serving(tmp_path / "new") as hub:
        point_to(hub, monkeypatch)
        yield hub


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the client's own
def test_a_result_is_one_commit(empty: Hub, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", SHAPES, config={**CONFIG, **BIG})
    convert(model, "hf://org/tiny", form="hf", max_file_size=4 << 20)
    convert(model, tmp_path / "here", form="hf", max_file_size=4 << 20)
    written = {file.name: file.read_bytes() for file in empty.directory.iterdir()}
    written.pop(".gitattributes")
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    assert sum("/commit/" in asked for asked in empty.asked) == 1
    with pytest.raises(TargetExistsError):
        convert(model, "hf://org/tiny", to="lingua")
    convert(model, "hf://org/tiny", form="dcp", to="lingua", overwrite=True)
    names = {file.name for file in empty.directory.iterdir()}
    assert ".metadata" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert sum("/commit/" in asked for asked in empty.asked) == 2


@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # the client's own
def test_a_repository_that_somebody_else_wrote_to_stays_as_it_is(
    empty: Hub, tmp_path: Path
) -> None:
    model = write_hf(tmp_path / "model", llama_shapes())
    empty.has_moved = True
    with pytest.raises(TargetExistsError, match="somebody else wrote"):
        convert(model, "hf://org/tiny", form="hf")
    assert [file.name for file in empty.directory.iterdir()] == [".gitattributes"]


def test_another_rank_reads_what_the_first_has_listed_and_lists_nothing(hub: Hub) -> None:
    source = understand(path_of("org/tiny"))
    packed = pack(source)
    hub.asked.clear()
    there, _ = unpack(packed)
    assert str(there.catalog.path) == "org/tiny"
    assert there.catalog.tensors == source.catalog.tensors
    entry = next(iter(there.catalog.tensors.values()))
    extent = entry.chunks[0].extent
    with Sources.of(there.catalog) as sources, sources.open(extent.file) as file:
        data = bytearray(extent.nbytes)
        file.read(extent.offset, [memoryview(data)], len(data))
        sources.require_unchanged()
    whole = (hub.directory / extent.file).read_bytes()
    assert data == whole[extent.offset : extent.offset + extent.nbytes]
    assert hub.asked == [f"GET /org/tiny/resolve/{COMMIT}/{extent.file}"]
