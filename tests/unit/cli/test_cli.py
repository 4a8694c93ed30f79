"""The command line's promises: aligned results on stdout, notes on stderr, no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dcpconv.cli.app import app
from dcpconv.cli.words import count, parse_size, size
from support.models.hf_models import save_hf, tiny
from support.models.minimind import MiniMind, MiniMindConfig, save_pth


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tiny("llama", tie_word_embeddings=True), tmp_path_factory.mktemp("cli") / "hf")


def test_the_report_is_aligned_and_complete(hf: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / "out"), "--to", "lingua"])

    assert found.exit_code == 0, found.stderr
    lines = found.stdout.splitlines()
    assert re.fullmatch(
        r"source    hf     hf-llama   +1 file +29 keys +\S+ KiB  fp32  .*", lines[0]
    )
    assert re.fullmatch(
        r"target    dcp    lingua     +1 file +30 keys +\S+ KiB  fp32  .*", lines[1]
    )
    assert lines[2] == "copied    24 tensors as they are"
    assert "relabel   3 tensors  (h two p) d -> (h p two) d" in lines
    assert "relabel   3 tensors  (g two p) d -> (g p two) d" in lines
    assert "tied      output.tied_module.weight = tok_embeddings.weight" in lines
    assert "beside    params.json" in lines
    assert re.fullmatch(r"time      \d+\.\d\d s", lines[-1])
    assert found.stderr.startswith("note: no tokenizer.model beside the source")


def test_a_dry_run_writes_nothing(hf: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        app, ["convert", str(hf), str(tmp_path / "out"), "--to", "lingua", "--dry-run"]
    )

    assert found.exit_code == 0
    assert "nothing was written (--dry-run)" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_json_mirrors_the_python_result(hf: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(hf), str(tmp_path / "out"), "--to", "lingua", "--json"]

    report = json.loads(CliRunner().invoke(app, arguments).stdout)

    assert report["target"]["family"] == "lingua"
    assert report["target"]["tensors"] == 30
    assert report["tied"] == [["output.tied_module.weight", "tok_embeddings.weight"]]
    assert sum(report["moved"].values()) == report["target"]["nbytes"]


def test_quiet_is_quiet(hf: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / "out"), "-q"])

    assert (found.exit_code, found.stdout, found.stderr) == (0, "", "")


def test_inspect_shows_every_key_of_every_form(hf: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    runner.invoke(
        app, ["convert", str(hf), str(tmp_path / "dcp"), "--to", "lingua", "--chunks", "2"]
    )
    runner.invoke(app, ["convert", str(hf), str(tmp_path / "x.pth"), "--to", "lingua"])

    for path, family in (
        (hf, "hf-llama"),
        (tmp_path / "dcp", "lingua"),
        (tmp_path / "x.pth", "lingua"),
    ):
        found = runner.invoke(app, ["inspect", str(path)])
        assert found.exit_code == 0, found.stderr
        assert re.search(rf"^family    {family}", found.stdout, re.MULTILINE)
    dcp = runner.invoke(app, ["inspect", str(tmp_path / "dcp")]).stdout
    assert re.search(r"^model\.norm\.weight +fp32 +\[96\] +384 B +2 chunks$", dcp, re.MULTILINE)
    as_json = json.loads(runner.invoke(app, ["inspect", str(tmp_path / "dcp"), "--json"]).stdout)
    assert as_json["tensors"]["model.norm.weight"]["chunks"][1]["offsets"] == [48]
    assert as_json["family"] == "lingua"


def test_params_go_there_and_back(hf: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["params", str(hf), "--to", "lingua", "-o", str(tmp_path / "params.json")])

    back = json.loads(
        runner.invoke(app, ["params", str(tmp_path / "params.json"), "--to", "hf"]).stdout
    )

    origin = json.loads((hf / "config.json").read_text())
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "head_dim",
    ):
        assert back[field] == origin[field]
    assert back["rope_parameters"] == origin["rope_parameters"]
    assert back["rope_theta"] == origin["rope_parameters"]["rope_theta"]


def test_families_lists_the_tables_and_shows_one() -> None:
    runner = CliRunner()

    assert re.search(r"^lingua +Meta Lingua", runner.invoke(app, ["families"]).stdout, re.MULTILINE)
    table = runner.invoke(app, ["families", "lingua"]).stdout
    assert re.search(r"layers\.\{L\}\.attention\.wq\.weight +layer\.q +\(h p two\) d", table)


def test_families_of_a_model_type_are_those_that_list_it() -> None:
    runner = CliRunner()
    lines = runner.invoke(app, ["families", "smollm3"]).stdout.splitlines()
    assert {"hf-smollm3", "lingua", "meta"} <= {line.split()[0] for line in lines}
    assert all("smollm3" in line.partition("  for ")[2].split(", ") for line in lines)
    assert runner.invoke(app, ["families", "no_such_model"]).exit_code != 0


def test_families_are_found_by_a_word_of_the_model_card() -> None:
    runner = CliRunner()
    lines = runner.invoke(app, ["families", "Pythia"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["hf-gpt_neox", "hf-memory-gpt_neox"]
    found = runner.invoke(app, ["families", "deepseek-v3"]).stdout
    assert {"hf-deepseek_v3", "torchtitan-deepseek_v3"} <= {
        line.split()[0] for line in found.splitlines()
    }
    group = runner.invoke(app, ["families", "hf"]).stdout.splitlines()
    assert all(line.startswith("hf-") for line in group)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param("convert {hf} {out} --to lingua", id="convert"),
        pytest.param("convert {hf} {out}.pth", id="convert to torch"),
        pytest.param("inspect {hf}", id="inspect"),
        pytest.param("params {hf}", id="params"),
        pytest.param("families", id="families"),
        pytest.param("--help", id="help"),
    ],
)
def test_torch_is_never_imported(hf: Path, tmp_path: Path, arguments: str) -> None:
    words = arguments.format(hf=hf, out=tmp_path / "out").split()
    code = (
        "import sys\nfrom dcpconv.cli.app import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_version_names_the_package() -> None:
    assert re.fullmatch(r"dcpconv \d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).stdout)


@pytest.mark.parametrize("command", ["convert", "inspect", "params", "families"])
def test_help_of_every_command_says_what_it_does(command: str) -> None:
    found = CliRunner().invoke(app, [command, "--help"])

    assert found.exit_code == 0
    assert len(found.stdout.splitlines()) > 8


def test_sizes_read_and_written() -> None:
    assert [parse_size(text) for text in ("1", "5GB", "512MiB", "1.5 k")] == [
        1,
        5_000_000_000,
        512 << 20,
        1500,
    ]
    assert size(3 << 40) == "3.00 TiB"
    assert count(1, "entry", "entries") == "1 entry"


def test_head_counts_that_no_file_states_come_from_spec(tmp_path: Path) -> None:
    """A bare MiniMind file: 6 heads over 2 are in no shape, and RoPE needs them."""
    file = tmp_path / "full_sft_96.pth"
    save_pth(MiniMind(MiniMindConfig(generation="gen2")), file)
    arguments = ["convert", str(file), str(tmp_path / "hf"), "--form", "hf", "--to", "hf-llama"]

    without = CliRunner().invoke(app, arguments)
    heads = ["--spec", "heads=6,kv_heads=2"]
    unsure = CliRunner().invoke(app, [*arguments, *heads])
    found = CliRunner().invoke(app, [*arguments, *heads, "--from", "minimind2"])

    assert without.exit_code == 2
    assert "--spec" in without.stderr
    assert unsure.exit_code == 2
    assert "fits      minimind1: norm_eps 1e-05, rope_theta 10000" in unsure.stderr
    assert "fits      minimind2: norm_eps 1e-05, rope_theta 1e+06" in unsure.stderr
    assert found.exit_code == 0, found.stderr
    assert "relabel   3 tensors  (h p two) d -> (h two p) d" in found.stdout.splitlines()
