"""Bad input to ``convert``: one clear error, the right exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv.cli.app import app
from support.models.hf_models import save_hf, tiny

LLAMA3_SCALING = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several shard files."""
    return save_hf(tiny("llama"), tmp_path_factory.mktemp("sound") / "hf", max_shard_size="60KB")


@pytest.fixture
def source(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "source"))


def edit_config(source: Path, **fields: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))


def first_shard(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


def empty(source: Path) -> None:
    for file in source.iterdir():
        file.unlink()


def lose_a_shard_file(source: Path) -> None:
    first_shard(source).unlink()


def truncate(source: Path) -> None:
    os.truncate(first_shard(source), first_shard(source).stat().st_size - 100)


def index_an_absent_key(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.norm.bias"'))


def contradict_the_tensors(source: Path) -> None:
    edit_config(source, intermediate_size=160)


def break_the_config(source: Path) -> None:
    edit_config(source, num_attention_heads="six", hidden_size=-4)


def pointer_of_git_lfs(source: Path) -> None:
    first_shard(source).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


CASES = [
    pytest.param(empty, 2, ["this is no checkpoint", "an empty directory"], id="empty"),
    pytest.param(
        lose_a_shard_file, 2, ["is named by the index but absent"], id="missing shard file"
    ),
    pytest.param(
        truncate, 2, ["shorter than its header says", "expected", "fetch"], id="truncated"
    ),
    pytest.param(
        index_an_absent_key, 2, ["puts model.norm.bias into", "does not hold it"], id="absent key"
    ),
    pytest.param(
        contradict_the_tensors,
        1,
        [
            "9 misshapen",
            "model.layers.0.mlp.down_proj.weight  [96, 160] expected, [96, 152] found",
            "model.layers.2.mlp.up_proj.weight",
            "is it the right one?",
        ],
        id="config contradicts tensors",
    ),
    pytest.param(break_the_config, 2, ["num_attention_heads", "hidden_size"], id="broken config"),
    pytest.param(pointer_of_git_lfs, 2, ["is no safetensors file", "Git LFS"], id="lfs pointer"),
]


@pytest.mark.parametrize(("harm", "code", "words"), CASES)
def test_one_error_and_nothing_written(
    source: Path, tmp_path: Path, harm: Callable[[Path], None], code: int, words: list[str]
) -> None:
    harm(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}

    found = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "out"), "--to", "lingua"]
    )

    assert found.exit_code == code, found.output
    for word in words:
        assert word in found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_all_reasons_at_once_when_lingua_cannot_hold_it(source: Path, tmp_path: Path) -> None:
    edit_config(source, rope_parameters=LLAMA3_SCALING, attention_bias=True, mlp_bias=True)

    found = CliRunner().invoke(
        app, ["convert", str(source), str(tmp_path / "out"), "--to", "lingua"]
    )

    assert found.exit_code == 1
    for name in ("rope_scaling: llama3, factor 32.0", "qkv_bias", "o_bias", "mlp_bias"):
        assert name in found.stderr
    assert not (tmp_path / "out").exists()


def test_allow_overrules_by_name_and_leaves_a_trace(source: Path, tmp_path: Path) -> None:
    edit_config(source, rope_parameters=LLAMA3_SCALING)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "lingua"]

    found = CliRunner().invoke(app, [*arguments, "--allow", "rope_scaling"])

    assert found.exit_code == 0, found.stderr
    assert "allowed   rope_scaling" in found.stdout
    assert "rope_scaling is not expressible in lingua and was left out" in found.stderr
    params = json.loads((tmp_path / "out/params.json").read_text())
    assert params["dcpconv"]["left_out"]["rope_scaling"].startswith("llama3, factor 32.0")


def test_an_existing_target_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("kept")

    found = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out")])

    assert found.exit_code == 2
    assert "--overwrite" in found.stderr
    assert (tmp_path / "out/precious").read_text() == "kept"


def test_a_new_target_inside_the_source_changes_nothing_of_it(source: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}

    found = CliRunner().invoke(app, ["convert", str(source), str(source / "out")])

    assert found.exit_code == 0, found.stderr
    assert (source / "out/.metadata").is_file()
    assert {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()} == before


def test_a_part_of_the_source_is_no_target(source: Path) -> None:
    part = source / "tokenizer.bin"
    part.write_text("kept")

    found = CliRunner().invoke(
        app, ["convert", str(source), str(part), "--form", "torch", "--overwrite"]
    )

    assert found.exit_code == 2
    assert "part of the source" in found.stderr
    assert part.read_text() == "kept"


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        pytest.param("--form", "onnx", "hf, torch or dcp", id="form"),
        pytest.param("--to", "gpt", "there is no family 'gpt'", id="family"),
        pytest.param("--dtype", "int4", "one of", id="dtype"),
        pytest.param("--max-file-size", "huge", "5GB", id="size"),
        pytest.param("--keymap", "absent.toml", "cannot read the keymap", id="keymap"),
        pytest.param("--only", "optimizer", "nothing in the checkpoint", id="only"),
    ],
)
def test_a_wrong_option_says_what_is_right(
    source: Path, tmp_path: Path, option: str, value: str, word: str
) -> None:
    found = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), option, value])

    assert found.exit_code == 2
    assert word in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        found = CliRunner().invoke(app, ["convert", str(source), str(small / "out")])
        left = list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)

    assert found.exit_code == 2
    assert "NoSpaceError" in found.stderr
    assert left == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The source is large enough to be caught in the middle; its data are holes, read as zeros
    because the cast needs every one of them."""
    from bench.data import header

    source = tmp_path / "hf"
    source.mkdir()
    head, nbytes = header({f"w{n}": (4096, 16384) for n in range(40)})
    with (source / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
    command = [sys.executable, "-m", "dcpconv", "convert", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--dtype", "fp32"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not any(path.name.startswith(".out") for path in tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=280)

    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
