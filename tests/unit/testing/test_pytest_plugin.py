"""assert_covers and its fixture, as a team's own test run meets them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from dcpconv.testing import assert_covers
from support.checkpoints.check_cases import llama_shapes, write_hf

TEST = """
def test_weights(assert_covers):
    assert_covers({target!r}, {source!r})
"""


def run_pytest(directory: Path) -> subprocess.CompletedProcess[str]:
    registered = any(
        e.value == "dcpconv.testing.pytest_plugin" for e in entry_points(group="pytest11")
    )
    plugin = [] if registered else ["-p", "dcpconv.testing.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-q"]
    return subprocess.run(
        [*command, str(directory)], cwd=directory, capture_output=True, text=True, check=False
    )


def write_test(directory: Path, source: Path, target: Path) -> None:
    text = TEST.format(source=str(source), target=str(target))
    (directory / "test_weights.py").write_text(text)


def test_the_fixture_passes_where_the_checkpoint_fits(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes())
    write_test(tmp_path, source, source)
    run = run_pytest(tmp_path)
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


def test_the_fixture_fails_with_the_report_and_the_line_of_the_test(tmp_path: Path) -> None:
    shapes = llama_shapes()
    target = write_hf(tmp_path / "b", shapes)
    for layer in range(5):
        del shapes[f"model.layers.{layer}.self_attn.o_proj.weight"]
    write_test(tmp_path, write_hf(tmp_path / "a", shapes), target)
    run = run_pytest(tmp_path)
    assert run.returncode == 1
    assert "missing   model.layers.{0..4}.self_attn.o_proj.weight  5 keys" in run.stdout
    assert "does not fit: 5 missing" in run.stdout
    # The frame shown is the test's own; ours is hidden.
    assert "assert_covers(" in run.stdout
    assert "raise AssertionError" not in run.stdout


def test_the_account_is_returned_for_further_questions(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "a", llama_shapes())
    coverage = assert_covers(source, source)
    assert len(coverage.targets) == len(llama_shapes())


def test_an_assertion_error_carries_every_reason(tmp_path: Path) -> None:
    shapes = {**llama_shapes(), "surplus": (3,)}
    del shapes["model.norm.weight"]
    target = write_hf(tmp_path / "b", llama_shapes())
    with pytest.raises(AssertionError) as error:
        assert_covers(target, write_hf(tmp_path / "a", shapes))
    assert "missing   model.norm.weight" in str(error.value)
    assert "unknown   surplus" in str(error.value)


def test_the_project_file_registers_the_plugin() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\ndcpconv = "dcpconv.testing.pytest_plugin"' in text


def test_loading_the_plugin_costs_other_test_runs_nothing() -> None:
    script = "import sys, pytest\nbefore = set(sys.modules)\nimport dcpconv.testing.pytest_plugin\n"
    script += "print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert set(run.stdout.split()) == {
        "dcpconv",
        "dcpconv.testing",
        "dcpconv.testing.pytest_plugin",
    }
