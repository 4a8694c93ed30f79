"""File systems of one's own, where this process may mount them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _run(*command: str) -> str | None:
    """Why the command failed, or ``None``."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{command[0]}: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A memory disk of ``size`` (``8m``); skips the test where it may not be mounted."""
    directory.mkdir()
    with _mounted("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)):
        yield directory


@contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A file system with reflinks, in an image file; skips the test where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not shutil.which("mkfs.xfs"):
        pytest.skip("mkfs.xfs is not installed")
    image = directory.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(320 << 20)
    if reason := _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image)):
        pytest.skip(reason)
    directory.mkdir()
    with _mounted("mount", "-o", "loop", str(image), str(directory)):
        yield directory


@contextmanager
def _mounted(*command: str) -> Iterator[None]:
    if reason := _run(*command):
        pytest.skip(reason)
    try:
        yield
    finally:
        subprocess.run(["umount", command[-1]], check=True)
