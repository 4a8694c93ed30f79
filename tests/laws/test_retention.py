"""Retention as a law: whatever the steps and rules, what must stay stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpconv.core.errors import DcpconvError
from dcpconv.runs import Best, FoundStep, Retention

numbers = st.lists(st.integers(0, 60), unique=True, max_size=25)


@st.composite
def runs(draw: st.DrawFn) -> tuple[FoundStep, ...]:
    return tuple(
        FoundStep(
            step=number,
            path=Path(f"checkpoint-{number}"),
            layout="hf-trainer",
            form="hf",
            weights=Path(f"checkpoint-{number}"),
            problems=draw(st.sampled_from([(), (), ("interrupted",)])),
            is_link=draw(st.sampled_from([False, False, True])),
            modified=draw(st.floats(0, 1e9)),
        )
        for number in draw(numbers)
    )


rules = st.builds(
    Retention, keep_last=st.integers(1, 6), keep_every=st.integers(0, 7), keep_best=st.just(())
)


@given(steps=runs(), retention=rules)
def test_every_step_stays_or_goes_and_only_for_a_reason(
    steps: tuple[FoundStep, ...], retention: Retention
) -> None:
    decision = retention.decide(steps)

    kept = [row.step for row in decision.kept]
    assert sorted([*kept, *decision.removed], key=lambda s: s.order) == sorted(
        steps, key=lambda s: s.order
    )
    assert all(row.reasons for row in decision.kept)
    assert all(step.is_complete and not step.is_link for step in decision.removed)

    complete = sorted(step.step or 0 for step in steps if step.is_complete)
    stay = set(complete[-retention.keep_last :])
    stay |= {n for n in complete if retention.keep_every and n % retention.keep_every == 0}
    assert not stay & {step.step for step in decision.removed}
    unneeded = {step.step for step in kept if step.is_complete and not step.is_link} - stay
    assert not unneeded


@given(steps=runs(), retention=rules)
def test_deciding_again_about_what_is_left_changes_nothing(
    steps: tuple[FoundStep, ...], retention: Retention
) -> None:
    left = tuple(row.step for row in retention.decide(steps).kept)

    assert retention.decide(left).removed == ()


@given(steps=runs(), seed=st.randoms(use_true_random=False), sign=st.sampled_from(["min", "max"]))
def test_the_best_and_the_newest_stay(
    steps: tuple[FoundStep, ...], seed: object, sign: str
) -> None:
    values = {step.step or 0: {"loss": seed.random()} for step in steps}  # type: ignore[attr-defined]
    complete = [step.step or 0 for step in steps if step.is_complete]
    retention = Retention(keep_best=(Best("loss", sign),))  # type: ignore[arg-type]
    if not complete:
        with pytest.raises(DcpconvError):
            retention.decide(steps, values)
        return

    removed = {step.step for step in retention.decide(steps, values).removed}

    best = (min if sign == "min" else max)(values[n]["loss"] for n in complete)
    assert any(values[n]["loss"] == best for n in complete if n not in removed)
    assert max(complete) not in removed


@pytest.mark.parametrize("rule", [{}, {"keep_last": -1}, {"keep_last": 1, "keep_every": -5}])
def test_rules_that_keep_nothing_are_refused(rule: dict[str, int]) -> None:
    with pytest.raises(DcpconvError):
        Retention(**rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["eval_loss", ":min", "eval_loss:least", "eval_loss:", ""])
def test_a_metric_without_direction_is_refused(text: str) -> None:
    with pytest.raises(DcpconvError, match="METRIC:min"):
        Best.parse(text)
