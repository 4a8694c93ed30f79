"""The tests under another Python and another torch than those of ``make test``.

    make matrix MATRIX_ARGS="--python python3.10 --torch 2.6.0"

Makes an environment below ``out/matrix``, installs the package with its test dependencies as
``constraints.txt`` has them, but for torch, runs the tests and prints a row of the table in
``docs/versions.md``.  Words after ``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ASK = """
import platform, torch, transformers
print(platform.python_version(), torch.__version__.partition("+")[0], transformers.__version__)
"""


def main() -> int:
    """Returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter to make it with")
    parser.add_argument("--torch", required=True, help="version of torch, as 2.6.0")
    parser.add_argument("words", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    python = environment(options.python, options.torch)
    log = python.parents[1] / "pytest.log"
    words = ["-m", "pytest", "-n", "2", "--dist", "loadfile", *options.words]
    with log.open("w") as file:
        code = subprocess.run(
            [python, *words],
            check=False,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    said = subprocess.run([python, "-c", _ASK], check=True, capture_output=True, text=True).stdout
    sys.stdout.write(row(said.split(), log.read_text()) + f"\nsee {log.relative_to(ROOT)}\n")
    return code


def environment(interpreter: str, torch: str) -> Path:
    """The Python of an environment with this torch, made on first use."""
    version = subprocess.run(
        [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    directory = ROOT / f"out/matrix/python{version}-torch{torch}"
    python, installed = directory / "bin/python", directory / ".installed"
    if not installed.exists():
        directory.mkdir(parents=True, exist_ok=True)
        pins = directory / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        kept = [line for line in lines if not line.startswith("torch==")]
        pins.write_text("\n".join([*kept, f"torch=={torch}"]) + "\n")
        subprocess.run([interpreter, "-m", "venv", directory], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "install", "-c", str(pins)]
        subprocess.run([*pip, f"torch=={torch}"], check=True)
        subprocess.run([*pip, "--editable", f"{ROOT}[test]"], check=True)
        installed.touch()
    return python


def row(versions: list[str], log: str) -> str:
    """A row of the table: versions, and pytest's counts."""
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    last = log.rstrip().splitlines()[-1]
    for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last):
        counts[kind] = int(number)
    failed = counts["failed"] + counts["error"]
    cells = [*versions, f"{counts['passed']:,}", f"{failed:,}", f"{counts['skipped']:,}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
