"""The CI examples: valid where they will be read, and their commands do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from support.checkpoints.check_cases import CONFIG, llama_shapes, write_hf

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "ci"
LOST = "model.layers.3.self_attn.o_proj.weight"


def read_yaml(path: Path) -> Any:
    # BaseLoader keeps `on:` a string; YAML 1.1 would read it as true.
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


@pytest.fixture(params=[True, False], ids=["fits", "does-not-fit"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    """A repository with a config, a key list and weights; and whether they fit."""
    shapes = llama_shapes()
    write_hf(tmp_path / "agreed", shapes)
    run(f"dcpconv keys {tmp_path / 'agreed'} -o expected.json", tmp_path)
    if not request.param:
        del shapes[LOST]
    write_hf(tmp_path / "weights", shapes)
    return tmp_path, request.param


def run(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def steps_of(workflow: Any) -> list[dict[str, Any]]:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert step.keys() <= {"uses", "run", "with", "name", "if", "env", "shell"}
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@v\d+", step["uses"])
    return steps


def test_github_workflow(project: tuple[Path, bool]) -> None:
    directory, fits = project
    workflow = read_yaml(EXAMPLES / "github.yml")
    assert {"name", "on", "jobs"} <= workflow.keys()
    assert {"pull_request", "schedule"} == workflow["on"].keys()
    commands = [
        step["run"] for step in steps_of(workflow) if "dcpconv check" in step.get("run", "")
    ]
    assert len(commands) == 2
    summary = directory / "summary.md"
    environment = {"WEIGHTS": "weights", "GITHUB_STEP_SUMMARY": str(summary)}
    runs = [run(command, directory, **environment) for command in commands]
    assert [r.returncode for r in runs] == ([0, 0] if fits else [1, 1])
    assert ("::error" in runs[0].stdout) != fits
    assert summary.read_text().startswith("### dcpconv check: ")
    failures = ET.parse(directory / "check.xml").findall(".//failure")
    assert [LOST in (failure.text or "") for failure in failures] == ([] if fits else [True])


def test_gitlab_job(project: tuple[Path, bool]) -> None:
    directory, fits = project
    pipeline = read_yaml(EXAMPLES / "gitlab.yml")
    (job,) = pipeline.values()
    assert {"image", "script", "artifacts", "variables", "before_script"} == job.keys()
    assert job["artifacts"]["when"] == "always"
    runs = [run(command, directory, WEIGHTS="weights") for command in job["script"]]
    assert [r.returncode for r in runs] == ([0, 0] if fits else [1, 1])
    report = ET.parse(directory / job["artifacts"]["reports"]["junit"])
    assert bool(report.findall(".//failure")) != fits


def test_pre_commit_hook(project: tuple[Path, bool]) -> None:
    directory, fits = project
    (repo,) = read_yaml(EXAMPLES / "pre-commit.yml")["repos"]
    assert repo["repo"] == "local"
    (hook,) = repo["hooks"]
    assert {"id", "name", "entry", "language"} <= hook.keys()
    assert hook["pass_filenames"] == "false"
    for name, is_watched in (("config.json", True), ("a/expected.json", True), ("x.json", False)):
        assert bool(re.search(hook["files"], name)) == is_watched
    layers = 5 if fits else 6
    write_hf(directory, {}, config={**CONFIG, "num_hidden_layers": layers})
    done = run(hook["entry"], directory)
    assert done.returncode == (0 if fits else 1)
    assert ("layers.5." in done.stdout) != fits


def test_pytest_file(project: tuple[Path, bool]) -> None:
    directory, fits = project
    registered = any(
        e.value == "dcpconv.testing.pytest_plugin" for e in entry_points(group="pytest11")
    )
    plugin = "" if registered else "-p dcpconv.testing.pytest_plugin"
    (directory / "test_weights.py").write_text((EXAMPLES / "test_weights.py").read_text())
    command = f"python -m pytest -q -p no:cacheprovider {plugin} test_weights.py"
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    done = run(command, directory, WEIGHTS="weights", PYTHONPATH=path)
    assert done.returncode == (0 if fits else 1), done.stdout
    assert ("missing   layers.3.attention.wo.weight" in done.stdout) != fits


def test_action(project: tuple[Path, bool]) -> None:
    directory, fits = project
    action = read_yaml(ROOT / "action.yml")
    assert action["runs"]["using"] == "composite"
    steps = action["runs"]["steps"]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert ("shell" in step) == ("run" in step)
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", (ROOT / "action.yml").read_text()))
    assert used == action["inputs"].keys()
    step = steps[-1]
    assert "${{" not in step["run"]  # no input becomes part of a script
    for inputs in ({"TO": "lingua", "AGAINST": ""}, {"TO": "", "AGAINST": "expected.json"}):
        done = run(step["run"], directory, SOURCE="weights", **inputs)
        assert done.returncode == (0 if fits else 1), done.stderr
        assert ("::error" in done.stdout) != fits


def test_action_installs_everything_a_check_needs() -> None:
    steps = read_yaml(ROOT / "action.yml")["runs"]["steps"]
    (install,) = [step["run"] for step in steps if "pip install" in step.get("run", "")]
    project = (ROOT / "pyproject.toml").read_text()
    stated = project[
        project.index("dependencies = [") : project.index("]", project.index("dependencies = ["))
    ]
    needed = {re.match(r"[\w-]+", name) for name in re.findall(r'"([^"]+)"', stated)}
    names = {found[0] for found in needed if found} - {"torch", "numpy", "tomli"}
    assert set(install.split("--quiet ")[-1].split()) == names
