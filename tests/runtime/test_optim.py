"""The optimiser: which parameters are decayed, how rates scale, what every step's rate is."""

import math

import pytest
import timm
import torch
from timm.optim import list_optimizers
from torch import nn

from vmamba import create_model
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime.optim import Schedule, build_optimizer, hidden_matrices, parameter_groups, rate_factor, rate_scale
from vmamba.runtime.plan import build_plan


class Scan(nn.Module):
    """The names that state-space models give their parameters."""

    def __init__(self):
        super().__init__()
        self.x_proj_weight = nn.Parameter(torch.ones(2, 2))
        self.dt_projs_bias = nn.Parameter(torch.ones(2))
        self.A_logs = nn.Parameter(torch.ones(2, 2))
        self.Ds = nn.Parameter(torch.ones(2))
        self.norm = nn.LayerNorm(2)
        self.linear = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


class Selective(Scan):
    def no_weight_decay(self):
        return {"Ds"}


def decayed_names(model, **options):
    decayed, undecayed = parameter_groups(model, 0.05, **options)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(undecayed["params"]) == 8
    return {names[id(parameter)] for parameter in decayed["params"]}


def test_decay_goes_by_role():
    always = {"x_proj_weight", "dt_projs_bias", "linear.weight"}
    assert decayed_names(Scan()) == {*always, "A_logs", "Ds"}
    assert decayed_names(Selective()) == {*always, "A_logs"}
    assert decayed_names(Selective(), decay_ssm=False) == always


def test_pytorchs_fused_adamw_moves_the_weights_on_a_cpu_the_same_for_any_number_of_threads():
    torch.manual_seed(0)
    start, gradient, ends = torch.randn(10_001), torch.randn(10_001), []
    for threads in (1, 2, 3):
        parameter = nn.Parameter(start.clone())
        model = nn.ParameterList([parameter])
        optimizer = build_optimizer(get_config(None), model, 512)
        assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for step in range(3):
            parameter.grad = (step - 1) * gradient
            optimizer.step()
        torch.set_num_threads(before)
        ends.append(parameter.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(("images", "reference", "scale"), [(1024, 512, 2.0), (128, 512, 0.25), (64, 0, 1.0)])
def test_rates_scale_with_the_global_batch(images, reference, scale):
    config = get_config(None, ["TRAIN.LR_REFERENCE_BATCH", str(reference), "TRAIN.BASE_LR", "1e-3"])
    optimizer = build_optimizer(config, Scan(), images)
    assert rate_scale(config, images) == scale
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * scale)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("adamw", torch.optim.AdamW), ("SGD", torch.optim.SGD), ("lamb", None), ("lookahead_adam", None)],
)
def test_any_optimiser_of_timm_moves_the_weights(name, expected):
    model = Scan()
    optimizer = build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", name]), model, 512)
    assert expected is None or isinstance(optimizer, expected)
    before = model.linear.weight.detach().clone()
    model.linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.linear.weight, before)


def test_the_configs_betas_eps_and_momentum_arrive():
    options = ["TRAIN.OPTIMIZER.BETAS", "[0.8, 0.95]", "TRAIN.OPTIMIZER.EPS", "1e-6", "TRAIN.OPTIMIZER.MOMENTUM", "0.7"]
    adamw = build_optimizer(get_config(None, options), Scan(), 512)
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    sgd = build_optimizer(get_config(None, [*options, "TRAIN.OPTIMIZER.NAME", "sgd"]), Scan(), 512)
    assert sgd.defaults["momentum"] == 0.7


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (["TRAIN.OPTIMIZER.BETAS", "[0.9]"], r"TRAIN.OPTIMIZER.BETAS is \[0.9\] and adamw takes 2"),
        (["TRAIN.OPTIMIZER.BETAS", "[0.9, 0.99]", "TRAIN.OPTIMIZER.NAME", "adan"], "adan takes 3; null: its own"),
        (["TRAIN.OPTIMIZER.NAME", "adahessian"], "adahessian needs second derivatives"),
        (["TRAIN.OPTIMIZER.NAME", "bnbadamw"], "bnbadamw cannot be had here"),
        (["TRAIN.OPTIMIZER.NAME", "fusedadam"], "fusedadam cannot be had here"),
    ],
)
def test_an_optimiser_that_cannot_be_is_a_sentence(opts, sentence):
    with pytest.raises(UserError, match=sentence):
        build_optimizer(get_config(None, opts), Scan(), 512)


def test_an_unknown_optimiser_names_the_nearest():
    with pytest.raises(UserError, match="unknown optimiser 'adamvw'; did you mean 'adamw'"):
        build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "adamvw"]), Scan(), 512)


def schedule_config(name, **options):
    train = {"EPOCHS": 10, "WARMUP_EPOCHS": 2, "BASE_LR": 1e-2, "WARMUP_LR": 1e-4, "MIN_LR": 1e-3}
    keys = {f"TRAIN.{key}": value for key, value in train.items()} | {"TRAIN.LR_SCHEDULER.NAME": name}
    keys |= {f"TRAIN.LR_SCHEDULER.{key}": value for key, value in options.items()}
    return get_config(None, [str(part) for item in keys.items() for part in item])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cosine", {}, {2: 1, 4: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 6: 0.55, 10: 0.1, 12: 0.1}),
        ("linear", {}, {2: 1, 4: 0.775, 6: 0.55, 10: 0.1}),
        ("step", {"DECAY_EPOCHS": 3, "DECAY_RATE": 0.5}, {2: 1, 2.9: 1, 3: 0.5, 6: 0.25, 9.5: 0.125}),
        ("multistep", {"MULTISTEPS": "[4, 8]", "DECAY_RATE": 0.1}, {2: 1, 3.9: 1, 4: 0.1, 8: 0.01, 9.9: 0.01}),
    ],
)
def test_schedules_at_known_epochs(name, options, expected):
    config = schedule_config(name, **options)
    for epoch, factor in {0: 0.01, 1: 0.505, **expected}.items():
        assert rate_factor(config, build_plan(config, 10), 10 * epoch) == pytest.approx(factor), epoch


def test_the_rate_is_set_for_every_step_and_group():
    config = schedule_config("cosine")
    optimizer = build_optimizer(config, Scan(), 1024)
    schedule = Schedule(config, optimizer, build_plan(config, steps_per_epoch=5))
    rates = []
    for step in (0, 5, 10, 30, 50):
        schedule.set_rate(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [pytest.approx([rate, rate]) for rate in (2e-4, 1.01e-2, 2e-2, 1.1e-2, 2e-3)]


@pytest.mark.skipif("muon" not in list_optimizers(), reason=f"timm {timm.__version__} has no Muon")
@pytest.mark.parametrize("name", ["muon", "adamuon", "nmuon"])
def test_muon_moves_hidden_matrices_alone(name):
    """The rest has AdamW, or NAdamW, with its decay and its rate by layer."""
    torch.manual_seed(0)
    model = create_model("vmamba_digits", depths=(1, 1), dims=16, num_classes=5)
    opts = ["TRAIN.OPTIMIZER.NAME", name, "TRAIN.LAYER_DECAY", 0.5, "TRAIN.WEIGHT_DECAY", 0.0]
    optimizer = build_optimizer(get_config(None, opts), model, 512)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    optimizer.step()
    by_muon = {key for key, weight in model.named_parameters() if "momentum_buffer" in optimizer.state[weight]}
    ends = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "downsample.1.weight")
    assert by_muon == {"patch_embed.5.weight", *(key for key in before if key.endswith(ends))}
    assert all("exp_avg" in optimizer.state[weight] for key, weight in model.named_parameters() if key not in by_muon)
    if name == "muon":  # the gradient's nearest orthogonal matrix, as long as AdamW's step (arXiv 2502.16982)
        weight = model.layers[1].blocks[0].op.in_proj.weight
        step = (before["layers.1.blocks.0.op.in_proj.weight"] - weight).detach()
        rate = next(group["lr"] for group in optimizer.param_groups if any(weight is each for each in group["params"]))
        left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
        expected = rate * 0.2 * max(weight.shape) ** 0.5 * left @ right
        assert torch.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.98
        assert step.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)


def test_of_models_around_a_backbone_nothing_is_asked_for_a_head():
    matrices = hidden_matrices(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)))
    assert [tuple(weight.shape) for weight in matrices] == [(2, 4)]
