"""What a run says of itself: at its start, every few steps, after an evaluation."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from vmamba.models.ss2d import SSD2D, Mixer2D
from vmamba.runtime.average import Mean
from vmamba.runtime.distributed import World
from vmamba.runtime.logging import megabytes
from vmamba.runtime.optim import rate_scale
from vmamba.runtime.plan import Plan
from vmamba.runtime.precision import compute_dtype, describe_precision
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import StepReport
from vmamba.runtime.task import Results, Task
from vmamba.text import counted
from vmamba_kernels import Call, choice


def describe_start(facts: Mapping[str, Any], folder: Path | None) -> list[str]:
    """Where, by what command, with which code and seed: see `history.facts`."""
    versions = {name: number for name, number in facts["versions"].items() if number and name != "cuda"}
    ours, python = versions.pop("vmamba", "(not installed)"), versions.pop("python")
    commit = (facts["commit"] or "unknown")[:8] + (" with changes" if facts["changed"] else "")
    return [
        f"{facts['command']}  (on {', '.join(facts['hosts'])}, seed {facts['seed']}"
        + (f", folder {folder})" if folder else ")"),
        f"vmamba {ours}, commit {commit}; Python {python}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]


def describe_model(config: CfgNode, world: World, task: Task, model: nn.Module) -> str:
    """Model, device, precision and backend of a run.  Raises BackendError when MODEL.BACKEND cannot serve here."""
    device = world.device
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {counted(threads, 'thread')}"
    options = ", ".join(f"{name} {value}" for name, value in config.MODEL.OPTIONS.items())
    backends = scan_backends(config, model, device)
    return (
        f"{config.MODEL.NAME}{f' with {options}' if options else ''}: "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {task.cost(model)}; "
        f"{counted(world.size, 'process', 'processes')} on {name}; {describe_precision(config)}"
        + (f"; scan backend {', '.join(backends)}" if backends else "")
    )


def describe_data(config: CfgNode, images: int, held_out: int) -> str:
    """What is trained on."""
    data = config.DATA
    place = f" in {data.DATA_PATH}" if data.DATA_PATH else ""
    return (
        f"{data.DATASET}{place}: {images:,} images to train on, {held_out:,} held out, "
        f"{config.MODEL.NUM_CLASSES:,} classes"
    )


def describe_training(config: CfgNode, world: World, plan: Plan, state: TrainState) -> str:
    """Steps, rates and optimiser as they come out of the config."""
    batch = config.DATA.BATCH_SIZE * world.size * config.TRAIN.ACCUMULATION_STEPS
    scale = rate_scale(config, batch)
    rate = f"{config.TRAIN.BASE_LR * scale:.3g}"
    if scale != 1:
        rate += f" ({config.TRAIN.BASE_LR:.3g} x {batch} / {config.TRAIN.LR_REFERENCE_BATCH})"
    ema = f", EMA {config.TRAIN.EMA.DECAY}" if state.ema else ""
    if isinstance(state.ema, Mean):
        ema = f", mean of the weights over the last {counted(state.ema.epochs, 'epoch')}"
    return (
        f"{counted(plan.steps_per_epoch, 'step')} an epoch of {counted(batch, 'image')}, {counted(plan.steps, 'step')} "
        f"in all, {plan.warmup_steps} of warm-up; {config.TRAIN.OPTIMIZER.NAME} at rate {rate}, "
        f"{config.TRAIN.LR_SCHEDULER.NAME}, weight decay {config.TRAIN.WEIGHT_DECAY}{ema}"
    )


def scan_backends(config: CfgNode, model: nn.Module, device: torch.device) -> list[str]:
    """What serves the model's scans and why nothing faster does; more than one only where its stages differ."""
    names = []
    for mixer in filter(lambda module: isinstance(module, Mixer2D), model.modules()):
        operator = "cross_ssd" if isinstance(mixer, SSD2D) else "cross_selective_scan"
        dtype = torch.float32 if mixer.scan_float32 else compute_dtype(config)
        call = Call(operator, device, dtype, dtype, mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.routes)
        names.append(str(choice(call, mixer.backend)))
    return list(dict.fromkeys(names))


def changes(saved: dict, config: dict, prefix: str = "") -> list[str]:
    """What differs between two configs as plain values, "KEY before -> now"; a key that one lacks is no change."""
    lines = []
    for key in sorted(saved.keys() & config.keys()):
        before, now = saved[key], config[key]
        if isinstance(before, dict) and isinstance(now, dict):
            lines += changes(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key} {before} -> {now}")
    return lines


def step_line(
    state: TrainState, plan: Plan, report: StepReport, left: float, seconds: float, waiting: float, memory: float
) -> str:
    """Where training stood after a step: `left` seconds to the end, `seconds` a step, of which `waiting` went by for
    data."""
    decay = state.optimizer.param_groups[0]["weight_decay"]
    epoch, step = divmod(report.step - 1, plan.steps_per_epoch)
    skipped = f" skipped {state.bad_steps}" if state.bad_steps else ""
    parts = "".join(f" {name} {value:.4f}" for name, value in report.parts.items())
    return (
        f"train [{epoch + 1}/{plan.epochs}][{step + 1}/{plan.steps_per_epoch}] eta {timedelta(seconds=int(left))} "
        f"lr {report.lr:.3e} wd {decay:.4f} time {seconds:.3f} data {waiting:.3f} "
        f"loss {report.loss:.4f} ({state.mean_loss:.4f}){parts} grad_norm {report.grad_norm:.4f} "
        f"loss_scale {report.loss_scale:g} mem {megabytes(memory)}{skipped}"
    )


def describe_loading(seconds_an_image: float, images: float, seconds: float, waited: float) -> str:
    """How long the device of this process waited for data, and how many cores would have loaded it in time.

    Args:
        seconds_an_image: of one core, to load it.
        images: this process has trained on in `seconds`, in `waited` of which its device had nothing to compute.
    """
    rate = images / max(seconds - waited, 1e-9)
    return (
        f"training waited {waited:.1f} of {seconds:.1f} s for data; an image takes {1000 * seconds_an_image:.2f} ms of "
        f"a core to load, and each process could train {rate:,.0f} images/s: that needs "
        f"{rate * seconds_an_image:.1f} cores for loading"
    )


def summary(task: Task, results: Results) -> str:
    """The results of each set of weights in words."""
    plain = {name: value for name, value in results.items() if not name.startswith("ema_")}
    averaged = {name.removeprefix("ema_"): value for name, value in results.items() if name.startswith("ema_")}
    return "; ".join(f"{title}{task.describe(each)}" for title, each in (("", plain), ("EMA ", averaged)) if each)


def best_so_far(task: Task, state: TrainState) -> str:
    """The headline's best; "" before there is one."""
    return f"; best {task.headline} {max(state.best.values()):.2f}" if state.best else ""


def impatience(state: TrainState) -> str:
    """Why training ends, where TRAIN.PATIENCE ends it."""
    patience = state.config["TRAIN"]["PATIENCE"]
    return f"no result was better in {counted(state.unimproved, 'evaluation')} (TRAIN.PATIENCE {patience})"
