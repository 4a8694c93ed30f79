"""The four reports: each is valid in its own grammar and holds exactly the keys at fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpconv import Coverage, check
from dcpconv.checking.reports import KINDS, render
from dcpconv.checking.reports.folding import fold
from dcpconv.checking.reports.github import commands
from dcpconv.checking.reports.matrix import picture
from dcpconv.plan.coverage import MISFITS as LABELS
from dcpconv.plan.coverage import Fault
from support.checkpoints.check_cases import CONFIG, MISFITS, Misfit, llama_shapes, write_hf


def strict(schema: Any) -> Any:
    """A schema that also refuses fields it does not name: ours must all be documented."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: strict(value) for key, value in schema.items()}
    return {**inner, "additionalProperties": False} if schema.get("type") == "object" else inner


SCHEMA = strict(json.loads((Path(__file__).parents[3] / "docs" / "check.schema.json").read_text()))
COMMAND = re.compile(r"::(error|notice) title=([^:,\r\n]*)::([^\r\n]*)")
KEY = re.compile(r"\S*\.\S+")


def unfolded(key: str) -> set[str]:
    """The keys that ``a.{0..2,5}.b`` stands for, by another way than the one that folds."""
    parts = re.split(r"(\{[^}]*\})", key)
    choices: list[list[str]] = []
    for part in parts:
        if not part.startswith("{"):
            choices.append([part])
            continue
        numbers: list[str] = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return {"".join(combination) for combination in product(*choices)}


def in_text(report: str) -> Iterator[tuple[str, str]]:
    for line in report.splitlines():
        label, _, rest = line.partition(" ")
        if label in {"problem", *LABELS}:
            yield label.replace("problem", "problems"), rest.strip()


def in_json(report: str) -> Iterator[tuple[str, str]]:
    value = json.loads(report)
    jsonschema.validate(value, SCHEMA)
    for label in LABELS:
        for fault in value[label]:
            yield label, fault if label == "problems" else fault["key"]


def in_junit(report: str) -> Iterator[tuple[str, str]]:
    root = ET.fromstring(report)
    assert root.tag == "testsuites"
    (suite,) = root
    cases = list(suite)
    assert {case.tag for case in cases} == {"testcase"}
    assert int(suite.attrib["tests"]) == len(cases)
    failed = [case for case in cases if case.find("failure") is not None]
    assert int(suite.attrib["failures"]) == len(failed)
    assert int(suite.attrib["skipped"]) == sum(case.find("skipped") is not None for case in cases)
    assert len({case.attrib["name"] for case in cases}) == len(cases)
    for case in failed:
        failure = case.find("failure")
        assert failure is not None
        assert failure.attrib["message"]
        for line in (failure.text or "").splitlines():
            label, _, rest = line.partition(" ")
            if case.attrib["name"] == "files":
                yield "problems", line
            elif label in LABELS:
                yield label, rest


def in_github(report: str) -> Iterator[tuple[str, str]]:
    for line in report.splitlines():
        found = COMMAND.fullmatch(line)
        assert found, line
        title = found[2].replace("%3A", ":")
        label = title.removeprefix("dcpconv: ").replace("problem", "problems")
        if found[1] == "error" and label in LABELS:
            yield label, found[3].replace("%25", "%")


def in_summary(report: str) -> Iterator[tuple[str, str]]:
    for line in report.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) == 5 and cells[1] in {"problem", *LABELS}:
            yield cells[1].replace("problem", "problems"), cells[2].strip("`")


READERS = {
    "text": in_text,
    "json": in_json,
    "junit": in_junit,
    "github": in_summary,
    "commands": in_github,
}


def shown(coverage: Coverage, kind: str) -> str:
    return "\n".join(commands(coverage)) if kind == "commands" else render(coverage, kind)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_every_report_holds_exactly_the_keys_at_fault(
    kind: str, misfit: Misfit, tmp_path: Path
) -> None:
    misfit.damage(tmp_path)
    coverage = check(tmp_path, to=misfit.to)
    told = list(READERS[kind](shown(coverage, kind)))
    if misfit.label == "problems":
        problems = [text for label, text in told if label == "problems"]
        assert len(problems) == 1
        assert misfit.keys[0] in problems[0]
        return
    assert {label for label, _ in told} == {misfit.label}
    keys = {key for _, text in told for key in unfolded(text.split("  ")[0])}
    assert keys == set(misfit.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_has_no_failures_in_any_report(kind: str, tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes()), to="lingua")
    assert list(READERS[kind](render(coverage, kind))) == []


def test_junit_has_one_test_case_per_slot(tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, llama_shapes()), to="lingua")
    names = [
        case.attrib["name"] for case in ET.fromstring(render(coverage, "junit")).iter("testcase")
    ]
    slots = {" | ".join(target.slots) for target in coverage.targets}
    assert sorted(names) == sorted({"files", "features", *slots})


def test_an_ignored_key_is_a_skipped_test(tmp_path: Path) -> None:
    keys = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (8,) for n in range(5)}
    coverage = check(write_hf(tmp_path, {**llama_shapes(), **keys}))
    skipped = ET.fromstring(render(coverage, "junit")).findall(".//testcase[skipped]")
    assert [case.attrib["name"] for case in skipped] == [
        "model.layers.{0..4}.self_attn.rotary_emb.inv_freq"
    ]


def test_one_missing_cell_is_seen_in_32_layers(tmp_path: Path) -> None:
    shapes = llama_shapes(32)
    del shapes["model.layers.13.self_attn.o_proj.weight"]
    config = {**CONFIG, "num_hidden_layers": 32}
    lines = list(picture(check(write_hf(tmp_path, shapes, config=config), to="lingua")))
    assert lines == [
        "embed .   final_norm .   head .",
        "",
        "layer   attn_norm  q  k  v  o  ffn_norm  gate  up  down",
        "0..12   .          ~  ~  .  .  .         .     .   .",
        "13      .          ~  ~  .  X  .         .     .   .",
        "14..31  .          ~  ~  .  .  .         .     .   .",
        "",
        "X missing  ~ derived  . copied",
    ]


def test_many_columns_get_staggered_heads_within_80_characters(tmp_path: Path) -> None:
    shapes = {
        f"blocks.{layer}.part_{part:02}.projection.weight": (3,)
        for layer in range(4)
        for part in range(40)
        if (layer, part) != (2, 31)
    }
    target = dict(shapes) | {"blocks.2.part_31.projection.weight": (3,)}
    source = write_hf(tmp_path / "a", shapes, config=None)
    against = write_hf(tmp_path / "b", target, config=None)
    lines = list(picture(check(source, against=against)))
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if "X" in line and line[0].isdigit()]
    assert row.startswith("2 ")
    heads = [line for line in lines if line.endswith("part_31.projection")]
    assert len(heads) == 1
    assert heads[0].index("part_31") == row.index("X")


numbers = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=40, unique=True
)


@given(members=numbers)
def test_folded_keys_stand_for_exactly_the_keys(members: list[tuple[int, int]]) -> None:
    faults = [Fault(f"a.{n}.b.{m}.c", f"needs x.{n}.y.{m}.z") for n, m in members]
    folded = fold(faults)
    keys = [key for item in folded for key in unfolded(item.key)]
    assert sorted(keys) == sorted(fault.key for fault in faults)
    assert sum(item.count for item in folded) == len(faults)
    for item in folded:
        assert item.why == "needs " + item.key.replace("a.", "x.").replace(".b.", ".y.").replace(
            ".c", ".z"
        )


def test_faults_of_different_reasons_are_not_folded_together() -> None:
    faults = [Fault("a.0.w", "[3] expected"), Fault("a.1.w", "[4] expected")]
    assert [item.key for item in fold(faults)] == ["a.0.w", "a.1.w"]


HOSTILE = [
    pytest.param("a.\n::error::owned", id="workflow-command"),
    pytest.param("a.\x1b[2Jb", id="terminal-escape"),
    pytest.param("a.]]><b>&\x00\ud800".encode("utf-8", "replace").decode(), id="xml"),
    pytest.param("a.`|` | x", id="markdown"),
    pytest.param("a.\u2028b\x85c", id="line-separators"),
]


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("kind", READERS)
def test_a_hostile_key_cannot_leave_its_place(kind: str, key: str, tmp_path: Path) -> None:
    coverage = check(write_hf(tmp_path, {**llama_shapes(), key: (3,)}))
    report = shown(coverage, kind)
    told = list(READERS[kind](report))
    assert [label for label, _ in told] == ["unknown"]
    if kind == "json":
        assert told == [("unknown", key)]
    else:
        assert not set(report) & {"\x1b", "\x00", "\x85", "\u2028"}


def test_github_shows_no_more_than_ten_annotations(tmp_path: Path) -> None:
    extra = {f"surplus_{name}.weight": (3,) for name in "abcdefghijklmnop"}
    coverage = check(write_hf(tmp_path, {**llama_shapes(), **extra}))
    errors = [line for line in commands(coverage) if line.startswith("::error")]
    assert len(errors) == 10
    assert errors[-1].endswith("and 7 more reasons; the job summary lists them")
