"""CheckpointReader under stock ``dcp.load``, beside torch's own readers, in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from dcpconv.core.errors import DcpconvError
from dcpconv.loading import storage_reader
from dcpconv.loading.storage_reader import CheckpointReader
from support.models.hf_models import save_hf, tiny
from support.worlds.sharded_models import lingua_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    model = tiny("llama")
    save_hf(model, directory / "hf", max_shard_size="200KB")
    state = {"model": model.state_dict(), "step": 3, "names": ["a", "b"]}
    torch.save(state, directory / "all.pth")
    torch_save_to_dcp(directory / "all.pth", directory / "dcp")
    return directory


def zeros(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in like.items()}


def equal(found: dict[str, Any], right: dict[str, Tensor]) -> None:
    assert set(found) == set(right)
    for key, tensor in right.items():
        assert torch.equal(found[key], tensor), key


def test_a_dcp_reads_as_with_torch_own_reader(sources: Path) -> None:
    right = tiny("llama").state_dict()
    ours: dict[str, Any] = {"model": zeros(right), "step": 0, "names": None}
    theirs: dict[str, Any] = {"model": zeros(right), "step": 0, "names": None}
    load(ours, storage_reader=CheckpointReader(sources / "dcp"))
    load(theirs, storage_reader=FileSystemReader(sources / "dcp"))
    equal(ours["model"], theirs["model"])
    equal(ours["model"], right)
    assert (ours["step"], ours["names"]) == (theirs["step"], theirs["names"]) == (3, ["a", "b"])


def test_metadata_of_a_dcp_names_what_torch_does(sources: Path) -> None:
    ours = CheckpointReader(sources / "dcp").read_metadata()
    theirs = FileSystemReader(sources / "dcp").read_metadata()
    assert set(ours.state_dict_metadata) == set(theirs.state_dict_metadata)
    assert ours.planner_data == theirs.planner_data
    for key, entry in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[key]
        assert type(found) is type(entry)
        assert getattr(found, "size", None) == getattr(entry, "size", None)


@pytest.mark.parametrize(
    ("source", "root", "options"),
    [
        pytest.param("hf", "", {"to": "lingua"}, id="hf"),
        pytest.param("hf", "model", {"to": "lingua", "root": "model"}, id="hf-root"),
        pytest.param("all.pth", "", {"to": "lingua"}, id="pth"),
        pytest.param("dcp", "a.b", {"to": "lingua", "root": "a.b"}, id="dcp-deep-root"),
    ],
)
def test_another_naming(sources: Path, source: str, root: str, options: dict[str, str]) -> None:
    assets = {} if source == "hf" else {"assets": sources / "hf"}
    right = lingua_weights(tiny("llama").state_dict())
    prefix = f"{root}." if root else ""
    found = {prefix + key: tensor for key, tensor in zeros(right).items()}
    load(found, storage_reader=CheckpointReader(sources / source, **options, **assets))  # type: ignore[arg-type]
    equal({key.removeprefix(prefix): tensor for key, tensor in found.items()}, right)


def test_some_keys_strided_and_in_another_dtype(sources: Path) -> None:
    right = lingua_weights(tiny("llama").state_dict())
    keys = ("layers.1.attention.wk.weight", "layers.2.feed_forward.w2.weight")
    found = {
        keys[0]: torch.zeros(right[keys[0]].shape[::-1]).t(),
        keys[1]: torch.zeros(right[keys[1]].shape, dtype=torch.bfloat16),
    }
    load(dict(found), storage_reader=CheckpointReader(sources / "hf", to="lingua"))
    assert torch.equal(found[keys[0]], right[keys[0]])
    assert torch.equal(found[keys[1]], right[keys[1]].bfloat16())


class Copying(DefaultLoadPlanner):
    """Answers with a tensor of its own, and counts how many are on loan."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = 0
        self.most = 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        self.lent += 1
        self.most = max(self.most, self.lent)
        return torch.empty(tuple(read_item.lengths))

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.lent -= 1
        self.lookup_tensor(read_item.dest_index).copy_(tensor)


def test_a_planner_with_tensors_of_its_own_holds_a_batch(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_reader, "BATCH", 1 << 20)
    right = lingua_weights(tiny("llama").state_dict())
    found = zeros(right)
    planner = Copying()
    load(found, storage_reader=CheckpointReader(sources / "hf", to="lingua"), planner=planner)
    equal(found, right)
    assert planner.lent == 0
    assert 1 < planner.most < len(right)


def failure(state: dict[str, Any], reader: CheckpointReader) -> str:
    with pytest.raises(CheckpointException) as caught:
        load(state, storage_reader=reader)
    return repr(caught.value.failures)


@pytest.mark.parametrize(
    ("state", "options", "text"),
    [
        pytest.param({"absent": torch.zeros(1)}, {}, "absent", id="key"),
        pytest.param({"norm.weight": torch.zeros(95)}, {"to": "lingua"}, "95", id="shape"),
        pytest.param({"x": torch.zeros(1)}, {"to": "nobody"}, "no family 'nobody'", id="family"),
    ],
)
def test_faults_reach_the_caller(
    sources: Path, state: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    assert text in failure(state, CheckpointReader(sources / "hf", **options))


def test_why_there_is_no_metadata_is_logged(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the versions of torch that say nothing else."""
    logged: list[str] = []
    log = SimpleNamespace(error=lambda text, *values: logged.append(text % values))
    monkeypatch.setattr(storage_reader, "_log", log)
    with pytest.raises(DcpconvError, match="no family 'nobody'"):
        CheckpointReader(sources / "hf", to="nobody").read_metadata()
    assert len(logged) == 1
    assert "no family 'nobody'" in logged[0]


def test_a_damaged_checkpoint_is_no_checkpoint(sources: Path, tmp_path: Path) -> None:
    for file in (sources / "hf").iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[: 8000 if "00002" in file.name else None]
        )
    text = failure({"x": torch.zeros(1)}, CheckpointReader(tmp_path))
    assert "shorter than its header says" in text


def test_reset_forgets_what_was_read(sources: Path) -> None:
    reader = CheckpointReader(sources / "hf")
    assert reader.checkpoint_id == sources / "hf"
    keys = set(reader.read_metadata().state_dict_metadata)
    reader.reset(sources / "dcp")
    assert reader.checkpoint_id == sources / "dcp"
    assert set(reader.read_metadata().state_dict_metadata) > {f"model.{key}" for key in keys}
    assert CheckpointReader.validate_checkpoint_id(sources / "dcp")
    assert not CheckpointReader.validate_checkpoint_id(sources / "nothing")
