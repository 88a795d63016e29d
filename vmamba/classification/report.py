"""What a run says of itself: at its start, every few steps, after an evaluation."""

from datetime import timedelta

import torch
from yacs.config import CfgNode

from vmamba.config import image_size
from vmamba.models.flops import complexity
from vmamba.models.ss2d import SSD2D, Mixer2D
from vmamba.models.vssm import VSSM
from vmamba.runtime.distributed import World
from vmamba.runtime.precision import compute_dtype, describe_precision
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import StepReport
from vmamba_kernels.registry import Call, choose

Results = dict[str, float]  # loss, acc1, acc5 (percent); ema_loss, ema_acc1, ema_acc5 where there is an EMA


def describe(config: CfgNode, world: World, model: VSSM) -> str:
    """Model, device, precision and backend of a run.  Raises BackendError when MODEL.BACKEND cannot serve here."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    height, width = image_size(config)
    counted = complexity(model, (height, width))
    return (
        f"{config.MODEL.NAME}: {counted.parameters:,} parameters, {counted.macs / 1e9:.3g} GFLOPs (multiply-adds) "
        f"at {height} x {width} pixels; "
        f"{world.size} process{'es' * (world.size > 1)} on {name}; {describe_precision(config)}; "
        f"scan backend {scan_backends(config, model, device)}; torch {torch.__version__}"
    )


def scan_backends(config: CfgNode, model: VSSM, device: torch.device) -> str:
    """What serves the model's scans; more than one name only where its stages differ."""
    names = []
    for mixer in filter(lambda module: isinstance(module, Mixer2D), model.modules()):
        operator = "cross_ssd" if isinstance(mixer, SSD2D) else "cross_selective_scan"
        dtype = torch.float32 if mixer.scan_float32 else compute_dtype(config)
        call = Call(operator, device, dtype, dtype, mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.routes)
        names.append(choose(call, mixer.backend))
    return ", ".join(dict.fromkeys(names))


def changes(saved: dict, config: dict, prefix: str = "") -> list[str]:
    """What differs between two configs as plain values, "KEY before -> now"."""
    lines = []
    for key in sorted(saved.keys() | config.keys()):
        before, now = saved.get(key), config.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += changes(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key} {before} -> {now}")
    return lines


def step_line(
    config: CfgNode, state: TrainState, report: StepReport, seconds: float, waiting: float, memory_mb: float
) -> str:
    """Where training stands; `seconds` is the time of a step, of which `waiting` went by for data."""
    group = state.optimizer.param_groups[0]
    left = timedelta(seconds=int(seconds * (config.TRAIN.EPOCHS * state.steps_per_epoch - state.step)))
    skipped = f" skipped {state.bad_steps}" if state.bad_steps else ""
    return (
        f"train [{state.epoch + 1}/{config.TRAIN.EPOCHS}][{state.step_in_epoch}/{state.steps_per_epoch}] eta {left} "
        f"lr {group['lr']:.3e} wd {group['weight_decay']:.4f} time {seconds:.3f} data {waiting:.3f} "
        f"loss {report.loss:.4f} ({state.mean_loss:.4f}) grad_norm {report.grad_norm:.4f} "
        f"loss_scale {state.scaler.get_scale():g} mem {memory_mb:.0f}MB{skipped}"
    )


def summary(results: Results) -> str:
    plain = f"loss {results['loss']:.4f}, top-1 {results['acc1']:.2f}%, top-5 {results['acc5']:.2f}%"
    if "ema_acc1" not in results:
        return plain
    ema = [results[f"ema_{name}"] for name in ("loss", "acc1", "acc5")]
    return "{}; EMA loss {:.4f}, top-1 {:.2f}%, top-5 {:.2f}%".format(plain, *ema)
