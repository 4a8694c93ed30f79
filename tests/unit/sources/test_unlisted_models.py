"""Models that no table is for: what works says the error, and a table of the user's is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dcpconv import check, convert
from dcpconv.cli.app import app
from dcpconv.core.errors import AmbiguousFamilyError
from dcpconv.families.keymaps.building import TABLES
from support.models.hf_models import save_hf, tiny


@pytest.fixture
def unlisted(tmp_path: Path) -> Path:
    """A llama whose config names a model of which nobody here has heard."""
    directory = save_hf(tiny("llama"), tmp_path / "in")
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "model_type": "novel"}))
    return directory


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The user's own table for it."""
    text = (TABLES / "hf-llama.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("name", "architectures"))]
    lines = ['name = "mine"', 'architectures = ["novel"]', *lines]
    file = tmp_path / "my.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_another_naming_is_refused_with_what_works_instead(unlisted: Path, tmp_path: Path) -> None:
    with pytest.raises(AmbiguousFamilyError, match="no naming table is for novel") as refused:
        convert(unlisted, tmp_path / "out", to="lingua")
    told = str(refused.value)
    for works in ("--to stored", "leave --to out", "--keymap", "--from NAME"):
        assert works in told
    assert f"dcpconv families new {unlisted}" in told


def test_its_draft_names_the_model(unlisted: Path) -> None:
    result = CliRunner().invoke(app, ["families", "new", str(unlisted)])
    assert result.exit_code == 0
    assert 'architectures = ["novel"]' in result.stdout


def test_a_table_for_a_new_model_is_sound_and_says_that_it_is_new(table: Path) -> None:
    result = CliRunner().invoke(app, ["families", "check", str(table)])
    assert result.exit_code == 0, result.stderr
    assert "own model  novel" in result.stdout


def test_a_table_that_lists_the_model_is_used_without_from(
    unlisted: Path, table: Path, tmp_path: Path
) -> None:
    convert(unlisted, tmp_path / "found", to="lingua", keymap=table)
    convert(unlisted, tmp_path / "said", to="lingua", keymap=table, from_="mine")
    assert check(tmp_path / "found", against=tmp_path / "said")
    assert check(unlisted, to="lingua", keymap=table)


def test_a_table_that_lists_the_model_changes_no_names_unasked(
    unlisted: Path, table: Path, tmp_path: Path
) -> None:
    for form in ("dcp", "hf"):
        convert(unlisted, tmp_path / form, form=form, keymap=table)
    assert check(tmp_path / "dcp", against=unlisted, to="stored")
    convert(tmp_path / "dcp", tmp_path / "back", form="hf", keymap=table)
    want = load_file(unlisted / "model.safetensors")
    for name in ("hf", "back"):
        assert load_file(tmp_path / name / "model.safetensors").keys() == want.keys()


def test_a_table_that_does_not_list_the_model_is_not_used(
    unlisted: Path, table: Path, tmp_path: Path
) -> None:
    table.write_text(table.read_text().replace('["novel"]', '["other"]'))
    with pytest.raises(AmbiguousFamilyError, match="no naming table is for novel"):
        convert(unlisted, tmp_path / "out", to="lingua", keymap=table)


@pytest.mark.parametrize("family", ["lingua", "hf"])
def test_stored_keeps_the_keys_of_a_naming_that_we_know(tmp_path: Path, family: str) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "in", form="dcp", to=family)
    convert(tmp_path / "in", tmp_path / "out", to="stored")
    convert(tmp_path / "out", tmp_path / "again", form="dcp", to="stored")
    assert check(tmp_path / "again", to="stored", against=tmp_path / "in")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    keys = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any("attention.wq" in key for key in keys) == (family == "lingua")


def test_check_of_stored_keys_finds_other_names(tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    convert(source, tmp_path / "lingua", form="dcp", to="lingua")
    assert check(source, against=tmp_path / "lingua")
    assert not check(source, against=tmp_path / "lingua", to="stored")
    assert check(source, to="stored")
