"""What moves the weights: groups by weight decay, any optimiser timm names, the learning rate of every step."""

import math

from timm.models import group_parameters
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from vmamba.errors import UserError, unknown
from vmamba.runtime.plan import Plan

FUSED = ("cuda", "cpu")  # devices that PyTorch's fused optimisers are for
# What of an optimiser's groups is the config's and not training's own: it survives loading a state.
CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "fused")


def check_optimizer(config: CfgNode) -> OptimInfo:
    """What timm knows of TRAIN.OPTIMIZER.NAME.  Raises UserError for one that there is not, or that this loop cannot
    use."""
    options = config.TRAIN.OPTIMIZER
    name = options.NAME.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        raise unknown("optimiser", options.NAME, list_optimizers())
    info = get_optimizer_info(name)
    if info.second_order:
        raise UserError(f"TRAIN.OPTIMIZER.NAME {options.NAME} needs second derivatives, which this loop does not take")
    return info


def build_optimizer(config: CfgNode, model: nn.Module, global_batch: int) -> Optimizer:
    """config.TRAIN.OPTIMIZER over the model's parameters; `global_batch` images an optimiser step set its rate."""
    options, info, arguments = config.TRAIN.OPTIMIZER, check_optimizer(config), {}
    name = options.NAME.lower()
    if info.has_eps:
        arguments["eps"] = options.EPS
    if info.has_betas and options.BETAS is not None:
        if info.num_betas != len(options.BETAS):
            raise UserError(
                f"TRAIN.OPTIMIZER.BETAS is {options.BETAS} and {options.NAME} takes {info.num_betas}; null: its own"
            )
        arguments["betas"] = tuple(options.BETAS)
    if name.removeprefix("lookahead_") in ("adam", "adamw") and next(model.parameters()).device.type in FUSED:
        arguments["fused"] = True  # one call for dozens of parameters, a third to a fifth of the time (docs/log.md)
    rate = config.TRAIN.BASE_LR * rate_scale(config, global_batch)
    groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.DECAY_SSM)
    if name.removeprefix("lookahead_").endswith("muon"):
        groups = parted_for_muon(groups, hidden_matrices(model))
    try:
        return create_optimizer_v2(
            with_layer_decay(groups, layer_scales(model, config.TRAIN.LAYER_DECAY), rate),
            name,
            lr=rate,
            weight_decay=config.TRAIN.WEIGHT_DECAY,
            momentum=options.MOMENTUM,
            **arguments,
        )
    except ValueError as error:
        raise UserError(
            f"TRAIN.OPTIMIZER.NAME {options.NAME} does not take these settings: {error}; change TRAIN.OPTIMIZER or "
            f"TRAIN.WEIGHT_DECAY, or choose another"
        ) from error
    except Exception as error:  # those of other packages say in many ways that these, or a GPU, are missing
        raise UserError(
            f"TRAIN.OPTIMIZER.NAME {options.NAME} cannot be had here: {str(error) or type(error).__name__}; install "
            f"what it needs, or choose another such as adamw"
        ) from error


def rate_scale(config: CfgNode, global_batch: int) -> float:
    """The factor on all learning rates: linear in the images of a step, accumulation and processes included."""
    reference = config.TRAIN.LR_REFERENCE_BATCH
    return global_batch / reference if reference else 1.0


def parameter_groups(model: nn.Module, weight_decay: float, decay_ssm: bool = True) -> list[dict]:
    """The trainable parameters, decayed and not.

    Decay goes by what a parameter is: not to biases, norms and Swin's maps of relative positions, nor to what the
    `no_weight_decay()` of the model, or of a model in it, names.
    `decay_ssm=False` spares the A_logs and Ds of the state-space models too, as Mamba asks.
    """
    spared: set[str] = set()
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        if hasattr(module, "no_weight_decay"):
            spared |= {f"{inside}{name}" for name in module.no_weight_decay()}
        for name, _ in module.named_parameters(recurse=False):
            is_norm = "Norm" in type(module).__name__
            is_ssm = name in ("A_logs", "Ds")
            if name in ("bias", "relative_position_bias_table") or is_norm or (is_ssm and not decay_ssm):
                spared.add(f"{inside}{name}")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = [parameter for name, parameter in trainable.items() if name not in spared]
    undecayed = [parameter for name, parameter in trainable.items() if name in spared]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """What Muon is for: the weights of linear layers and convolutions between the first convolution and the head of a
    classifier.

    Embeddings and heads are not (kellerjordan.github.io/posts/muon), nor depthwise convolutions, whose filters are no
    matrix, nor the projections of a scan, which are one matrix a route.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    head = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = head if isinstance(head, tuple) else (head,)  # DeiT's distilled ones have two
    ends = {id(part) for end in (first, *heads) if isinstance(end, nn.Module) for part in end.modules()}
    return {layer.weight for layer in layers if id(layer) not in ends and getattr(layer, "groups", 1) == 1}


def parted_for_muon(groups: list[dict], matrices: set[nn.Parameter]) -> list[dict]:
    """`groups` with what is no matrix left to timm's fallback, AdamW."""
    parted = []
    for group in groups:
        own = [parameter for parameter in group["params"] if parameter in matrices]
        others = [parameter for parameter in group["params"] if parameter not in matrices]
        parted += [{**group, "params": own}] if own else []
        parted += [{**group, "params": others, "use_fallback": True}] if others else []
    return parted


def layer_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """What each parameter's rate is multiplied with: `decay` to the power of the layers behind it (BEiT, arXiv
    2106.08254), which timm's `group_matcher` of the model, or of the one model in it that has one, counts.

    A head around such a model has the whole rate.  Raises UserError for a model that does not tell its layers.
    """
    if decay == 1:
        return {}
    tell = {path: module for path, module in model.named_modules() if hasattr(module, "group_matcher")}
    outermost = [path for path in tell if not any(_lies_in(path, other) for other in tell)]
    if len(outermost) != 1:
        raise UserError(f"TRAIN.LAYER_DECAY is {decay}, and the model does not tell its layers; leave it at 1")
    (path,), inside = outermost, f"{outermost[0]}." if outermost[0] else ""
    layers = group_parameters(tell[path], tell[path].group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    around = 1 if inside else 0  # a head behind the last layer
    return {model.get_parameter(inside + name): decay ** (last - layer + around) for name, layer in layers.items()}


def _lies_in(path: str, other: str) -> bool:
    """Whether a module lies in another one, by their paths."""
    return path != other and (not other or path.startswith(f"{other}."))


def with_layer_decay(groups: list[dict], scales: dict[nn.Parameter, float], rate: float) -> list[dict]:
    """`groups` parted by their parameters' scales, each with its rate."""
    if not scales:
        return groups
    parted = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        parted += [{**group, "params": own, "lr": rate * scale} for scale, own in sorted(by_scale.items())]
    return parted


class Schedule:
    """The learning rate of every optimiser step, a function of the config and the step alone: nothing to save."""

    def __init__(self, config: CfgNode, optimizer: Optimizer, plan: Plan):
        self.config, self.optimizer, self.plan = config, optimizer, plan
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def set_rate(self, step: int) -> None:
        """Put the rate of the step after `step` completed ones into the optimiser."""
        factor = rate_factor(self.config, self.plan, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def rate_factor(config: CfgNode, plan: Plan, step: float) -> float:
    """The learning rate after `step` steps, in units of TRAIN.BASE_LR.

    A linear warm-up from TRAIN.WARMUP_LR; then down to TRAIN.MIN_LR over the steps that remain (cosine, linear), or by
    DECAY_RATE at the epochs of the schedule (step, multistep), which count from the start of the run.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    lowest = train.MIN_LR / train.BASE_LR
    epoch, warmup, end = (number / plan.steps_per_epoch for number in (step, plan.warmup_steps, plan.steps))
    if epoch < warmup:
        start = train.WARMUP_LR / train.BASE_LR
        return start + (1 - start) * epoch / warmup
    done = min((epoch - warmup) / max(end - warmup, 1e-9), 1.0)
    if schedule.NAME == "cosine":
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2
    if schedule.NAME == "linear":
        return 1 - (1 - lowest) * done
    if schedule.NAME == "step":
        return schedule.DECAY_RATE ** (epoch // schedule.DECAY_EPOCHS)
    assert schedule.NAME == "multistep", schedule.NAME
    return schedule.DECAY_RATE ** sum(epoch >= milestone for milestone in schedule.MULTISTEPS)
