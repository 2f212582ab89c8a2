"""Lengths, schedules against closed forms, and optimizers against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from methods.config import Clock, Length
from methods.optim import OptimizerConfig, ScheduleConfig, build_optimizer

LENGTH = TypeAdapter(Length)


def length(text: str) -> Length:
    return LENGTH.validate_python(text)


# ---- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("200 steps", 200, "steps"), ("1 step", 1, "steps"), ("0.5 epochs", 0.5, "epochs"), ("1 epoch", 1, "epochs"), ("1e3 steps", 1000, "steps")],
)  # fmt: skip
def test_length_reads_text(text: str, value: float, unit: str) -> None:
    assert length(text) == Length(value=value, unit=unit)


@given(st.one_of(st.integers(0, 10**12), st.floats(0, 1e9)), st.sampled_from(["steps", "epochs"]))
def test_length_reads_back_what_it_writes(value: float, unit: str) -> None:
    """Every digit: 1,234,567 steps once came back as 1,234,570."""
    before = Length(value=value, unit=unit)
    text = before.model_dump(mode="json")
    assert isinstance(text, str) and length(text) == before


@pytest.mark.parametrize(
    "bad", ["3", 3, None, "", "3 weeks", "three epochs", "3 epochs long", "-1 steps", "nan steps", "inf epochs"]
)
def test_length_refuses(bad: object) -> None:
    with pytest.raises(ValidationError) as caught:
        LENGTH.validate_python(bad)
    assert len(caught.value.errors()) == 1


def test_length_arithmetic() -> None:
    assert length("2.5 epochs").steps(10) == 25 and length("7 steps").steps(10) == 7
    assert length("0.01 epochs").steps(10) == 1, "at least one step"
    assert (
        length("8 steps").fraction_done(Clock(2, 0.9)) == 0.25
        and length("8 epochs").fraction_done(Clock(2, 0.4)) == 0.05
    )
    assert length("0.3 epochs").fraction_done(Clock(3, 0.1 + 0.2)) == 1.0, "never more than 1"
    assert length("0.3 epochs").fraction_done(Clock(3, 0.3 - 1e-12)) == 1.0, "rounding does not add a step"
    assert length("0 steps").fraction_done(Clock()) == 1.0


# ---- schedules -------------------------------------------------------------------------------------------------------

STEPS_PER_EPOCH = 10


def clock(step: int) -> Clock:
    return Clock(step, step / STEPS_PER_EPOCH)


def cosine(step: int, total: int = 100, floor: float = 0.0) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2


SCHEDULES = {
    "constant": ({}, lambda s: 1.0),
    "cosine": ({"kind": "cosine"}, cosine),
    "cosine to a floor": ({"kind": "cosine", "floor": 0.1}, lambda s: cosine(s, floor=0.1)),
    "step every 30 steps": ({"kind": "step", "every": "30 steps", "gamma": 0.1}, lambda s: 0.1 ** (s // 30)),
    "step every 3 epochs": ({"kind": "step", "every": "3 epochs"}, lambda s: 0.5 ** (s // 30)),
    "step at milestones": ({"kind": "step", "milestones": ["4 epochs", "70 steps"], "gamma": 0.2}, lambda s: 0.2 ** ((s >= 40) + (s >= 70))),
    "step, both": ({"kind": "step", "every": "50 steps", "milestones": ["20 steps"]}, lambda s: 0.5 ** ((s >= 20) + s // 50)),
    "warm-up in steps": ({"warmup": "20 steps"}, lambda s: min(1, (s + 1) / 20)),
    "warm-up in epochs": ({"warmup": "2 epochs"}, lambda s: min(1, s / 20)),
    "warm-up of a cosine": ({"kind": "cosine", "warmup": "5 steps"}, lambda s: cosine(s) * min(1, (s + 1) / 5)),
}  # fmt: skip


@pytest.mark.parametrize("total", ["100 steps", "10 epochs"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_follows_its_closed_form(name: str, total: str) -> None:
    values, expected = SCHEDULES[name]
    schedule = ScheduleConfig.model_validate(values)
    for step in range(101):
        assert schedule.factor(clock(step), length(total)) == pytest.approx(expected(step), abs=1e-12), step


def test_decays_fall_on_the_very_step_whatever_the_rounding() -> None:
    """0.3 / 0.1 is 2.9999999999999996; the third decay still comes at step 3 of 10."""
    schedule = ScheduleConfig.model_validate({"kind": "step", "every": "0.1 epochs"})
    assert [schedule.factor(clock(s), length("100 epochs")) for s in range(30)] == [0.5**s for s in range(30)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "step"}, "needs `every` or `milestones`"),
        ({"kind": "step", "every": "0 steps"}, "longer than 0"),
        ({"every": "3 epochs"}, "belong to kind: step"),  # else a decay that was asked for would never come
        ({"kind": "cosine", "milestones": ["3 epochs"]}, "belong to kind: step"),
        ({"kind": "linear"}, "'constant', 'cosine' or 'step'"),
        ({"gamma": 0}, "greater than 0"),
        ({"floor": 1.5}, "less than or equal to 1"),
    ],
)
def test_schedule_refuses(values: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ScheduleConfig.model_validate(values)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def parameters(values: list[float]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))]


TORCH = {
    "adamw": ({}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3)),
    "adam": ({"betas": [0.8, 0.9], "eps": 1e-3}, lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)),
    "sgd": ({"momentum": 0.9, "nesterov": True}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3)),
    "radam": ({"decoupled": True}, lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_each_name_is_torchs_optimizer(name: str) -> None:
    extra, make = TORCH[name]
    config = OptimizerConfig.model_validate({"name": name, "lr": 0.1, "weight_decay": 0.3, **extra})
    ours, theirs = parameters([1.0, -2.0]), parameters([1.0, -2.0])
    built, reference = build_optimizer(config, {"trunk": ours}), make(theirs)
    assert type(built.inner) is type(reference)
    for step in range(4):
        for side in (ours, theirs):
            side[0].grad = torch.tensor([0.3 * step, -1.0], dtype=torch.float64)
        built.step(clock(step), length("10 steps"))
        reference.step()
    assert torch.equal(ours[0], theirs[0])


def test_groups_have_their_own_rates_and_follow_one_schedule() -> None:
    config = OptimizerConfig.model_validate(
        {"name": "sgd", "lr": 0.1, "head_lr_multiplier": 10, "loss_lr_multiplier": 100, "schedule": {"kind": "cosine"}}
    )
    groups = {name: parameters([0.0]) for name in ("trunk", "head", "loss", "other")}
    optimizer = build_optimizer(config, {**groups, "empty": []})
    assert [g["name"] for g in optimizer.inner.param_groups] == list(groups)
    for step in (0, 50, 100):
        for (p,) in groups.values():
            p.data.zero_()
            p.grad = -torch.ones(1, dtype=torch.float64)
        optimizer.step(clock(step), length("100 steps"))
        factor = cosine(step)
        assert [p.item() for (p,) in groups.values()] == pytest.approx(
            [0.1 * factor, factor, 10 * factor, 0.1 * factor]
        )


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({}, [3.0, 4.0, 12.0]),
        ({"clip_value": 3.5}, [3.0, 3.5, 3.5]),
        ({"clip_norm": 1.3}, [0.3, 0.4, 1.2]),  # one norm over both groups: 13
        ({"clip_norm": 100.0}, [3.0, 4.0, 12.0]),
    ],
)
def test_clipping(clip: dict, expected: list[float]) -> None:
    trunk, head = parameters([0.0, 0.0]), parameters([0.0])
    optimizer = build_optimizer(OptimizerConfig(name="sgd", lr=1, **clip), {"trunk": trunk, "head": head})
    trunk[0].grad, head[0].grad = (
        -torch.tensor([3.0, 4.0], dtype=torch.float64),
        -torch.tensor([12.0], dtype=torch.float64),
    )
    optimizer.step(Clock(), length("1 steps"))
    assert torch.cat([trunk[0], head[0]]).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "adamw", "momentum": 0.9}, "belong to sgd"),
        ({"name": "adam", "nesterov": True}, "belong to sgd"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs a momentum"),
        ({"name": "adam", "decoupled": True}, "belongs to radam"),
        ({"betas": [1.5, 0.9]}, "expected 0 <= beta < 1"),
        ({"name": "lion"}, "'adamw', 'adam', 'sgd' or 'radam'"),
        ({"lr": 0}, "greater than 0"),
        ({"lr": math.inf}, "finite"),
        ({"lr": math.nan}, "finite"),
        ({"weight_decay": -1}, "greater than or equal to 0"),
        ({"clip_value": 0}, "greater than 0"),
        ({"clip_norm": -1}, "greater than 0"),
        ({"head_lr_multiplier": 0}, "greater than 0"),
        ({"learning_rate": 1}, "Extra inputs"),
    ],
)
def test_optimizer_refuses(values: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        OptimizerConfig.model_validate(values)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OptimizerConfig().lr = 1.0


def test_staircase_changes_at_the_start_of_an_epoch() -> None:
    plain, stairs = (ScheduleConfig(kind="cosine", staircase=flag) for flag in (False, True))
    total = length("4 epochs")
    for epoch in (0.0, 0.3, 1.0, 1.99, 3 * (1 / 3) + 1, 3.5):
        assert stairs.factor(Clock(7, epoch), total) == plain.factor(Clock(7, float(int(epoch + 1e-9))), total)
    with pytest.raises(ValueError, match="counted in epochs"):
        ScheduleConfig(kind="cosine", staircase=True, warmup=length("20 steps"))
