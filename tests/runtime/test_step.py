"""One optimiser step: accumulation, clipping, what is drawn, and steps that are not finite."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from vmamba.errors import UserError

BAD = (torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.long))


def test_accumulated_micro_batches_are_the_large_batch(tiny):
    large = tiny(model=nn.Linear(4, 3))
    parts = tiny("TRAIN.ACCUMULATION_STEPS", "4", model=nn.Linear(4, 3))
    parts.state.model.load_state_dict(large.weights())
    for index in range(3):
        inputs, targets = large.batch(index, 32)
        whole = large.step(large.state, [(inputs, targets)])
        split = parts.step(parts.state, zip(inputs.chunk(4), targets.chunk(4), strict=True))
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
    reports = [case.step(case.state, [one.batch(0)]) for case in (one, other)]
    assert reports[0].loss != reports[1].loss  # another step, another dropout
    again = tiny()
    torch.rand(100)
    assert again.step(again.state, [one.batch(0)]).loss == reports[0].loss


def test_a_bad_step_is_skipped_without_a_trace_and_counted(tiny, same):
    case = tiny("TRAIN.EMA.ENABLE", "True")
    case.train(2)
    parts = ("model", "model_ema", "optimizer")
    before = deepcopy({name: case.state.state_dict()[name] for name in parts})
    report = case.step(case.state, [BAD])
    assert not torch.isfinite(torch.tensor(report.loss))
    after = {name: case.state.state_dict()[name] for name in parts}
    for group in (*before["optimizer"]["param_groups"], *after["optimizer"]["param_groups"]):
        del group["lr"]
    assert same(before, after)  # running statistics of the batch norm included
    assert (case.state.step, case.state.bad_steps, case.state.bad_steps_in_a_row) == (3, 1, 1)
    case.train(1)
    assert (case.state.bad_steps, case.state.bad_steps_in_a_row, case.state.round_good_steps) == (1, 0, 3)


def test_a_gradient_that_is_not_finite_is_a_bad_step_too(tiny):
    case = tiny(model=nn.Linear(4, 3))
    case.state.model.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = case.weights()
    report = case.train(1)[0]
    assert torch.isfinite(torch.tensor(report.loss))
    assert case.state.bad_steps == 1
    assert torch.equal(case.weights()["weight"], before["weight"])


def test_too_many_bad_steps_in_a_row_end_the_run(tiny):
    case = tiny("TRAIN.MAX_BAD_STEPS", "3")
    for batch in (BAD, BAD, case.batch(0), BAD, BAD):
        case.step(case.state, [batch])
    with pytest.raises(UserError, match="not finite in 3 steps in a row, up to step 6"):
        case.step(case.state, [BAD])


def test_an_overflow_of_float16_halves_the_scale_and_is_no_bad_step(tiny):
    case = tiny("AMP.ENABLE", "True", "AMP.DTYPE", "float16", "TRAIN.MAX_BAD_STEPS", "1")
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
