"""What commands that read tensors show on a terminal, and what Ctrl-C leaves of it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv import check, diff, fingerprint
from dcpconv.cli.app import app
from support.checkpoints.check_cases import llama_shapes, write_hf

SLOW = """
import sys, time
import dcpconv.engine.boxes
read = dcpconv.engine.boxes.Box.read
def slowly(self, *args, **kwargs):
    time.sleep({seconds})
    return read(self, *args, **kwargs)
dcpconv.engine.boxes.Box.read = slowly
sys.argv = ["dcpconv", *sys.argv[1:]]
from dcpconv.cli.app import app
app()
"""
"""The command line, on a disk that takes its time."""

SHOW_CURSOR = b"\x1b[?25h"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    found = {name: str(write_hf(tmp_path / name, llama_shapes())) for name in ("a", "b")}
    manifest = tmp_path / "m.json"
    fingerprint(found["a"]).write(manifest)
    return {**found, "m": str(manifest)}


COMMANDS = {
    "fingerprint": ("fingerprint {a}", b"reading"),
    "diff": ("diff {a} {b}", b"comparing"),
    "check": ("check {a} --against {m} --data", b"reading"),
}


class Terminal:
    """A command whose stderr is a terminal."""

    def __init__(self, command: str, places: Mapping[str, str], *, seconds: float) -> None:
        leader, follower = pty.openpty()
        words = command.format(**places).split()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW.format(seconds=seconds), *words],
            stdout=subprocess.PIPE,
            stderr=follower,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(follower)
        self.shown = b""
        self.seen = threading.Condition()
        self.thread = threading.Thread(target=self._read, args=(leader,))
        self.thread.start()

    def _read(self, leader: int) -> None:
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # nobody has the other end open any more
                data = b""
            with self.seen:
                self.shown += data
                self.seen.notify_all()
            if not data:
                os.close(leader)
                return

    def wait_for(self, text: bytes) -> bool:
        with self.seen:
            return self.seen.wait_for(lambda: text in self.shown, timeout=120)

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=120)
        self.thread.join()
        return self.process.returncode, output.decode()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bar_on_a_terminal_and_the_same_result(places: dict[str, str], name: str) -> None:
    command, word = COMMANDS[name]
    plain = CliRunner().invoke(app, command.format(**places).split())

    terminal = Terminal(command, places, seconds=0.01)

    assert terminal.end() == (plain.exit_code, plain.stdout)
    assert word in terminal.shown
    assert terminal.shown.rstrip().rpartition(SHOW_CURSOR)[1]
    assert not plain.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_it_with_one_line(places: dict[str, str], name: str) -> None:
    command, word = COMMANDS[name]
    terminal = Terminal(command, places, seconds=1)
    assert terminal.wait_for(word)
    terminal.process.send_signal(signal.SIGINT)
    code, output = terminal.end()
    assert code == (130 if name == "fingerprint" else 2)  # 1 would be an answer
    assert not output
    assert b"Traceback" not in terminal.shown
    assert b"interrupted" in terminal.shown.rpartition(SHOW_CURSOR)[2]


def test_what_is_told_adds_up_to_what_there_is(places: dict[str, str]) -> None:
    a, b, m = Path(places["a"]), Path(places["b"]), Path(places["m"])
    with (b / "model.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(os.urandom(50))
    done: list[int] = []
    there: list[int] = []

    nbytes = fingerprint(a, progress=done.append, total=there.append).nbytes
    assert [sum(done)] == there == [nbytes]
    done.clear()
    there.clear()
    assert check(a, against=m, data=True, progress=done.append, total=there.append)
    assert [sum(done)] == there == [nbytes]
    done.clear()
    there.clear()
    found = diff(a, b, progress=done.append, total=there.append)
    (tensor,) = found.of("differs")
    assert there == [nbytes, nbytes + tensor.numel * 2]
    assert sum(done) == there[-1]
