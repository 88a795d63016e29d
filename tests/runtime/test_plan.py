"""Where a run pauses: by epochs, by steps, evaluated and saved every so many rounds."""

import pytest

from vmamba.config import get_config
from vmamba.runtime.optim import rate_factor
from vmamba.runtime.plan import build_plan


def plan_of(*opts, steps_per_epoch=10):
    return build_plan(get_config(None, list(map(str, opts))), steps_per_epoch)


def pauses(plan):
    """(end of a round, evaluated, saved) of every round."""
    step, found = 0, []
    while step < plan.steps:
        step = plan.round_end(step)
        found.append((step, plan.evaluates(step), plan.saves(step)))
    return found


def test_by_epochs():
    plan = plan_of("TRAIN.EPOCHS", 5, "EVAL_FREQ", 2, "SAVE_FREQ", 3)
    assert pauses(plan) == [
        (10, False, False),
        (20, True, False),
        (30, False, True),
        (40, True, False),
        (50, True, True),  # the last is evaluated and saved whatever divides it
    ]
    assert plan.round_end(13) == 20 and plan.epoch(15) == 1.5 and plan.epoch(20) == 2


def test_by_steps():
    """As segmentation counts: rounds that end anywhere in an epoch."""
    plan = plan_of("TRAIN.STEPS", 40, "EVAL_STEPS", 16, "TRAIN.EPOCHS", 0, "TRAIN.WARMUP_STEPS", 3)
    assert pauses(plan) == [(16, True, True), (32, True, True), (40, True, True)]
    assert (plan.warmup_steps, plan.evaluations_left(0), plan.evaluations_left(20), plan.evaluations_left(39)) == (
        3,
        3,
        2,
        1,
    )


def test_the_schedule_follows_the_steps():
    opts = ("TRAIN.BASE_LR", 1, "TRAIN.MIN_LR", 0, "TRAIN.WARMUP_LR", 0.001, "TRAIN.LR_SCHEDULER.NAME", "linear")
    config = get_config(None, list(map(str, (*opts, "TRAIN.STEPS", 1600, "TRAIN.WARMUP_STEPS", 100))))
    plan = build_plan(config, 7)
    factors = [rate_factor(config, plan, step) for step in (0, 50, 100, 850, 1600)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 0.5, 0])
