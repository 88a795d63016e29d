"""One optimiser step: accumulation, clipping, what is drawn, and steps that are not finite."""

import multiprocessing
import os
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from vmamba.errors import UserError
from vmamba.runtime.distributed import World
from vmamba.runtime.step import OptimizerStep, parallelise, update_where

from .conftest import Tiny

BAD = (torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.long))


def test_accumulated_micro_batches_are_the_large_batch(tiny):
    large = tiny(model=nn.Linear(4, 3))
    parts = tiny("TRAIN.ACCUMULATION_STEPS", "4", model=nn.Linear(4, 3))
    parts.state.model.load_state_dict(large.weights())
    for index in range(3):
        inputs, targets = large.batch(index, 32)
        whole = large.one((inputs, targets))
        split = parts.one(*zip(inputs.chunk(4), targets.chunk(4), strict=True))
        assert split.loss == pytest.approx(whole.loss, rel=1e-6)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for name, weight in large.weights().items():
        torch.testing.assert_close(parts.weights()[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_the_gradient_is_clipped_and_its_norm_reported_before(tiny, clip):
    case = tiny("TRAIN.CLIP_GRAD", str(clip), "TRAIN.OPTIMIZER.NAME", "momentum", "TRAIN.WEIGHT_DECAY", "0")
    case.state.schedule.set_rate = lambda step: None  # keep the rate of 0.1
    before = case.weights()
    report = case.train(1)[0]
    moved = sum((case.weights()[name] - before[name]).pow(2).sum() for name, _ in case.state.model.named_parameters())
    expected = 0.1 * min(report.grad_norm, clip or torch.inf)
    assert moved.sqrt().item() == pytest.approx(expected, rel=1e-3)
    assert report.grad_norm > 0.01


def test_in_float16_the_gradient_is_clipped_without_its_scale(tiny):
    """Clipping before the scale is taken off would shrink every step to nothing."""
    options = ("TRAIN.CLIP_GRAD", "0.01", "TRAIN.OPTIMIZER.NAME", "momentum", "TRAIN.WEIGHT_DECAY", "0")
    case = tiny("AMP.ENABLE", "True", "AMP.DTYPE", "float16", *options)
    case.state.schedule.set_rate = lambda step: None
    before = case.weights()
    case.train(1)
    assert case.state.scaler.get_scale() > 1
    moved = sum((case.weights()[name] - before[name]).pow(2).sum() for name, _ in case.state.model.named_parameters())
    assert moved.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-2)


def test_what_the_model_draws_depends_on_the_step_alone(tiny):
    one, other = tiny(), tiny()
    other.state.step = 7
    reports = [case.one(one.batch(0)) for case in (one, other)]
    assert reports[0].loss != reports[1].loss  # another step, another dropout
    again = tiny()
    torch.rand(100)
    assert again.one(one.batch(0)).loss == reports[0].loss


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_is_skipped_without_a_trace_and_counted(tiny, same, late):
    case = tiny("TRAIN.EMA.ENABLE", "True", late=late)
    case.train(2)
    parts = ("model", "model_ema", "optimizer")
    before = deepcopy({name: case.state.state_dict()[name] for name in parts})
    report = case.one(BAD)
    assert not torch.isfinite(torch.tensor(report.loss))
    after = {name: case.state.state_dict()[name] for name in parts}
    for group in (*before["optimizer"]["param_groups"], *after["optimizer"]["param_groups"]):
        del group["lr"]
    assert same(before, after)  # running statistics of the batch norm included
    assert (case.state.step, case.state.bad_steps, case.state.bad_steps_in_a_row) == (3, 1, 1)
    case.train(1)
    assert (case.state.bad_steps, case.state.bad_steps_in_a_row, case.state.round_good_steps) == (1, 0, 3)


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_that_is_not_finite_is_a_bad_step_too(tiny, late):
    case = tiny(model=nn.Linear(4, 3), late=late)
    case.state.model.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = case.weights()
    report = case.train(1)[0]
    assert torch.isfinite(torch.tensor(report.loss))
    assert case.state.bad_steps == 1
    assert torch.equal(case.weights()["weight"], before["weight"])


def test_too_many_bad_steps_in_a_row_end_the_run(tiny):
    case = tiny("TRAIN.MAX_BAD_STEPS", "3")
    for batch in (BAD, BAD, case.batch(0), BAD, BAD):
        case.one(batch)
    with pytest.raises(UserError, match="not finite in 3 steps in a row, up to step 6"):
        case.one(BAD)


@pytest.mark.parametrize("late", [False, True])
def test_an_overflow_of_float16_halves_the_scale_and_is_no_bad_step(tiny, late):
    case = tiny("AMP.ENABLE", "True", "AMP.DTYPE", "float16", "TRAIN.MAX_BAD_STEPS", "1", late=late)
    case.state.scaler.load_state_dict(case.state.scaler.state_dict() | {"scale": 2.0**40})
    before = case.weights()["0.weight"]
    case.train(1)
    assert case.state.scaler.get_scale() == 2.0**39
    assert (case.state.bad_steps, case.state.bad_steps_in_a_row) == (1, 0)
    assert torch.equal(case.weights()["0.weight"], before)
    case.state.scaler.load_state_dict(case.state.scaler.state_dict() | {"scale": 2.0**10})
    case.train(1)
    assert case.state.bad_steps == 1
    assert not torch.equal(case.weights()["0.weight"], before)


def test_where_the_optimiser_skips_by_itself_a_report_comes_a_step_later(tiny, same):
    """Steps whose reports nobody waits for end as those with all of them, bad ones among them."""
    late, waited = tiny("TRAIN.EMA.ENABLE", "True", late=True), tiny("TRAIN.EMA.ENABLE", "True", late=True)
    batches = [late.batch(0), late.batch(1), BAD, late.batch(3), BAD, BAD, late.batch(6)]
    reports = []
    for number, batch in enumerate(batches):
        reports += late.step(late.state, [batch], stop=number == 4)
        assert len(reports) == number and late.state.step == number + 1
    assert late.state.bad_steps == 3 and late.state.round_good_steps == 3
    reports += late.step.settle(late.state)
    assert late.step.settle(late.state) == []
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6, 7]
    assert [report.good for report in reports] == [True, True, False, True, False, False, True]
    assert [report.stop for report in reports] == [number == 4 for number in range(7)]
    again = [waited.one(batch) for batch in batches]
    assert same(late.state.state_dict(), waited.state.state_dict())
    assert [(report.lr, report.loss) for report in reports if report.good] == [
        (report.lr, report.loss) for report in again if report.good
    ]


def test_a_late_report_tells_the_parts_of_its_own_step(tiny):
    """As detection and segmentation have them."""
    late, waited = tiny(late=True), tiny(late=True)
    for case in (late, waited):
        whole = case.step.loss
        case.step.loss = lambda *batch, step, part, whole=whole: {
            "first": (loss := whole(*batch, step=step, part=part)) * (step + 1) / 8,
            "second": loss * (7 - step) / 8,
        }
    reports = [report for number in range(4) for report in late.step(late.state, [late.batch(number)])]
    reports += late.step.settle(late.state)
    assert reports == [waited.one(waited.batch(number)) for number in range(4)]
    for number, report in enumerate(reports):
        assert report.parts == pytest.approx(
            {
                "first": report.loss * (number + 1) / 8,
                "second": report.loss * (7 - number) / 8,
            }
        )


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_average_that_only_the_device_can_skip_is_timms_to_the_bit(warm_up):
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    ours, theirs = (ModelEmaV3(model, decay=0.97, use_warmup=warm_up) for _ in range(2))
    for step in range(1, 8):
        for value in (*model.parameters(), *model.buffers()):
            value.data += torch.randn(value.shape).to(value.dtype) if value.is_floating_point() else 1
        if step % 3:
            theirs.update(model, step=step if warm_up else None)
        counts = model[1].num_batches_tracked.clone()
        if not step % 3:
            model[1].num_batches_tracked.copy_(theirs.module[1].num_batches_tracked)  # put back after a bad step
        update_where(torch.tensor(step % 3 != 0), ours, model, step if warm_up else None)
        model[1].num_batches_tracked.copy_(counts)
    for one, other in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def steps_of_one_of_two(rank, store, told):
    """Steps of which the third is bad on rank 1 alone; rank 0 alone is asked to stop at the fourth."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    world = World(rank, 2, rank, torch.device("cpu"))
    for late in (False, True):
        torch.manual_seed(0)
        case = Tiny("TRAIN.EMA.ENABLE", "True", model=nn.Linear(4, 3), late=late)
        state, model = case.state, parallelise(case.state.model, case.config, world)
        step = OptimizerStep(case.config, world, model, case.loss)
        step.reads_late = case.step.reads_late
        reports = []
        for number in range(5):
            batch = BAD if (number, rank) == (2, 1) else case.batch(2 * number + rank)
            reports += step(state, [batch], stop=(number, rank) == (3, 0))
        reports += step.settle(state)
        weights = (state.model.state_dict(), state.ema.module.state_dict())
        sums = [sum(value.double().sum().item() for value in each.values()) for each in weights]
        flags = [[report.good for report in reports], [report.stop for report in reports]]
        told.put((late, rank, [*flags, state.bad_steps, state.round_good_steps], sums))
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_step_that_is_bad_on_one_process_is_skipped_and_counted_on_all(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [
        context.Process(target=steps_of_one_of_two, args=(rank, tmp_path / "store", told)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [told.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join(60)
    good, stop = [True, True, False, True, True], [False, False, False, True, False]
    assert sorted((late, rank) for late, rank, *_ in found) == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert all(counts == [good, stop, 1, 4] for _, _, counts, _ in found)
    assert all(sums == pytest.approx(found[0][-1], rel=1e-6) for *_, sums in found)  # the same was left out
