"""The wheel of the sdist is whole, in an environment that has nothing else of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from support.models.hf_models import save_hf, tiny

ROOT = Path(__file__).parents[3]
CONSUMER = """
from dcpconv import check, convert, load_init_weights, open_checkpoint, save_weights

reveal_type(convert("a", "b"))
reveal_type(open_checkpoint("a").tensors)
reveal_type(load_init_weights)
convert("a", "b", form="nothing")
"""


def run(*command: str | Path, directory: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and what it depends on by a path."""
    directory = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory, directory=ROOT)
    (sdist,) = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    (unpacked,) = (directory / "unpacked").iterdir()
    run(
        sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory,
        directory=unpacked,
    )  # fmt: skip
    (wheel,) = directory.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", directory / "venv", directory=directory)
    python = directory / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, directory=directory)
    # A path file's own path files are not followed, so the package being tested is not found there.
    (site,) = (directory / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_package_is_the_installed_one(clean: Path, tmp_path: Path) -> None:
    said = run(clean, "-c", "import dcpconv; print(dcpconv.__file__)", directory=tmp_path)
    installed = Path(said.strip()).parent
    assert installed.is_relative_to(clean.parents[1])
    ours = {
        path.relative_to(ROOT / "dcpconv").as_posix()
        for path in (ROOT / "dcpconv").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    assert not ours - found


def test_the_installed_command_converts(clean: Path, tmp_path: Path) -> None:
    save_hf(tiny("llama"), tmp_path / "hf")
    command = clean.parent / "dcpconv"
    assert "convert" in run(command, "--help", directory=tmp_path)
    said = run(
        command, "convert", "hf", "out", "--to", "lingua", "--json", "-q", directory=tmp_path
    )
    assert json.loads(said)["target"]["family"] == "lingua"
    assert "yes" in run(command, "check", "out", "--against", "hf", directory=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_user_of_the_package_gets_its_types(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--python-executable", str(clean)),
            *("--cache-dir", str(tmp_path / "cache"), "--config-file", os.devnull, "consumer.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert any("ConversionReport" in line for line in lines), done.stdout
    assert any("TensorEntry" in line for line in lines), done.stdout
    assert sum(line.startswith("error") for line in lines) == 1, done.stdout
    assert any("error" in line and "'nothing'" in line for line in lines), done.stdout
