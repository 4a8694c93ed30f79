"""JUnit XML: one test case per slot, one for the files, one for the model's features.

Source: the elements that Jenkins' ``junit-10.xsd`` and GitLab's parser both know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree as ET

from dcpconv.checking.reports.folding import fold
from dcpconv.core.printing import printable, printable_lines
from dcpconv.families.keymaps import split_key
from dcpconv.plan.coverage import FAULTS, Coverage, Fault

# What XML 1.0 cannot hold, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(coverage: Coverage) -> str:
    """The XML document."""
    cases: dict[str, list[str]] = {"files": list(coverage.problems)}
    cases["features"] = [f"refused {folded}" for folded in fold(coverage.refused)]
    faults: dict[str, list[tuple[str, Fault]]] = {}
    for target in coverage.targets:
        cases.setdefault(_case(target.key, target.slots), [])
    for label in FAULTS[1:]:
        for fault in getattr(coverage, label):
            faults.setdefault(_case(fault.key, fault.slots), []).append((label, fault))
    for name, found in faults.items():
        for label in dict.fromkeys(label for label, _ in found):
            folded = fold(fault for kind, fault in found if kind == label)
            cases.setdefault(name, []).extend(f"{label} {item}" for item in folded)
    suite = ET.Element("testsuite", name=_legal(f"dcpconv check {coverage.read.path}"))
    family = f"dcpconv.{coverage.target}"
    for name, texts in cases.items():
        case = ET.SubElement(suite, "testcase", classname=family, name=_legal(name), time="0")
        if texts:
            head = texts[0] if len(texts) == 1 else f"{len(texts)} reasons: {texts[0]}, ..."
            failure = ET.SubElement(case, "failure", type="coverage", message=_legal(head))
            failure.text = _legal("\n".join([*map(printable, texts), *coverage.suggestions]))
    skipped = _skip(suite, family, coverage.ignored)
    failures = sum(bool(texts) for texts in cases.values())
    counts = {"tests": len(cases) + skipped, "failures": failures, "errors": 0, "skipped": skipped}
    for name, count in counts.items():
        suite.set(name, str(count))
    suite.set("time", "0")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(key: str, slots: tuple[str, ...]) -> str:
    return " | ".join(slots) if slots else split_key(key)[0].replace("{}", "N")


def _skip(suite: ET.Element, family: str, ignored: Iterable[Fault]) -> int:
    """Ignored keys are skipped tests: seen, not failed, with the reason."""
    folded = fold(ignored)
    for item in folded:
        case = ET.SubElement(suite, "testcase", classname=family, name=_legal(item.key), time="0")
        ET.SubElement(case, "skipped", message=_legal(item.why))
    return len(folded)


def _legal(text: str) -> str:
    return _ILLEGAL.sub("?", printable_lines(text))
