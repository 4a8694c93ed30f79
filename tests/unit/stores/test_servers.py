"""Static servers and fsspec: the same bytes by other ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcpconv import convert
from dcpconv.core.errors import SourceChangedError
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.schemes import path_of
from dcpconv.stores.store import StoreError
from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf
from support.machine.static_server import static
from support.versions import save_alone


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("count", [1, 3])
def test_a_directory_of_a_static_server_is_read(count: int, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "www" / "model", llama_shapes(), files=count, config=CONFIG)
    with static(tmp_path / "www") as url:
        assert open_checkpoint(f"{url}/model").tensors == open_checkpoint(model).tensors
        convert(f"{url}/model", tmp_path / "afar", to="lingua")
    convert(model, tmp_path / "here", to="lingua")
    assert files(tmp_path / "afar") == files(tmp_path / "here")


def test_a_file_and_a_dcp_of_a_static_server_are_read(tmp_path: Path) -> None:
    state = {key: torch.randn(shape) for key, shape in llama_shapes().items()}
    (tmp_path / "www").mkdir()
    torch.save(state, tmp_path / "www" / "model.pth")
    save_alone(state, checkpoint_id=tmp_path / "www" / "dcp")
    with static(tmp_path / "www") as url:
        for name in ("model.pth", "dcp"):
            here = tmp_path / "www" / name
            assert open_checkpoint(f"{url}/{name}").tensors == open_checkpoint(here).tensors


def test_a_file_that_changes_on_a_server_is_told(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "www" / "model", llama_shapes())
    with static(tmp_path / "www") as url:
        source = path_of(f"{url}/model")
        open_checkpoint(source)
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        with pytest.raises(SourceChangedError):
            convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_without_ranges_is_told(tmp_path: Path) -> None:
    write_hf(tmp_path / "www" / "model", llama_shapes(), config=None)
    with static(tmp_path / "www", ranges=False) as url, pytest.raises(StoreError) as caught:
        open_checkpoint(f"{url}/model")
    assert "range" in str(caught.value)


def test_what_only_fsspec_knows_is_read_through_it(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    model = write_hf(tmp_path / "model", llama_shapes(), files=2)
    memory = fsspec.filesystem("memory")
    for file in model.iterdir():
        memory.pipe_file(f"/tests/model/{file.name}", file.read_bytes())
    try:
        convert("memory://tests/model", tmp_path / "afar", to="lingua")
    finally:
        memory.rm("/tests", recursive=True)
    convert(model, tmp_path / "here", to="lingua")
    assert files(tmp_path / "afar") == files(tmp_path / "here")
    with pytest.raises(StoreError, match="not written to this store"):
        convert(model, "memory://tests/out", to="lingua")
