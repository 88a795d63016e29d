"""Evaluating and timing a model, in the middle of a run or by itself."""

import json
import logging
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from vmamba.config import get_config
from vmamba.data.loaders import Loader
from vmamba.errors import UserError
from vmamba.files import make_folder, write_atomically, write_text
from vmamba.models.formats import as_one_file
from vmamba.models.pretrained import open_checkpoint, read_weights
from vmamba.runtime import report
from vmamba.runtime.distributed import World, on_main, share_buffers, sum_over_processes
from vmamba.runtime.feed import Feed
from vmamba.runtime.logging import megabytes, memory_mb, progress
from vmamba.runtime.precision import autocast
from vmamba.runtime.run import Run
from vmamba.runtime.sharding import gathered
from vmamba.runtime.start import asked_for, newest
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import parallelise
from vmamba.runtime.stop import Stopped
from vmamba.runtime.task import Meter, Results, open_task
from vmamba.text import counted
from vmamba.timing import elapsed


def evaluate_state(run: Run, state: TrainState, loader: Loader) -> Results:
    """The plain weights and the EMA's where there are, or those of them that EVAL_WEIGHTS names.

    Raises Stopped, the state being saved, when a signal that was noted asks for it.
    """
    kinds = {"": state.model} | ({"ema_": state.ema.module} if state.ema else {})
    only = {"model": "", "ema": "ema_"}.get(run.config.EVAL_WEIGHTS)
    kinds = {only: kinds[only]} if only in kinds else kinds
    meters = evaluate(run, list(kinds.values()), loader)
    if meters is None:
        run.stop(state)
    results = {}
    for prefix, meter in zip(kinds, meters, strict=True):
        results |= {f"{prefix}{name}": value for name, value in meter.results().items()}
    return results


@torch.no_grad()
def evaluate(run: Run, models: Sequence[nn.Module], loader: Loader, folder: Path | None = None) -> list[Meter] | None:
    """What the task measures of each model on all processes' shares of the data, which are loaded once; None when a
    signal asked any of them to stop.

    `folder`: where the files go that the task makes of the predictions, of one model.
    """
    meters = [run.task.meter(run.world) for _ in models]
    batches = progress(loader, run.world, "evaluating")
    with ExitStack() as whole:
        for model in models:
            share_buffers(model)
            model.eval()
            whole.enter_context(gathered(model))
        for batch in Feed(batches, run.world.device, loader.finish, loader.ahead):
            if run.request.noted:
                break
            for model, meter in zip(models, meters, strict=True):
                with autocast(run.config, run.world.device):
                    meter.add(model, batch)
                if folder:
                    save_files(meter, folder)
    if run.request.noted_by_any(run.world):
        return None
    tell_skipped(run, loader)
    return meters


def evaluate_alone(config: CfgNode, model: nn.Module, device: torch.device) -> Results:
    """`model` on the held-out data of `config`, outside of any run."""
    run = Run(config, open_task(config), World(0, 1, 0, device), logging.getLogger("vmamba"))
    (meter,) = evaluate(run, [model.to(device)], run.task.eval_loader(run.world))
    return meter.results()


def evaluate_file(run: Run, model: nn.Module) -> Results:
    """The weights, plain and EMA, of the file that `to_evaluate` finds."""
    path = to_evaluate(run)
    if Path(path).is_dir():
        raise UserError(as_one_file(path))
    loader = run.task.eval_loader(run.world)
    chosen = run.config.MODEL.WEIGHTS
    wanted = read_weights(path) if chosen == "auto" else {chosen: open_checkpoint(path, chosen)}
    parallelise(model, run.config, World(0, 1, 0, run.world.device))  # compiled where training would be
    results: Results = {}
    details: dict[str, Any] = {}
    for kind, checkpoint in wanted.items():
        run.task.load(model, checkpoint)
        prefix = "ema_" if kind == "ema" and len(wanted) > 1 else ""
        folder = run.folder / f"{prefix}predictions"
        with run.request.noting():
            meters = evaluate(run, [model], loader, folder)
        if meters is None:
            raise Stopped(run.request.agreed_signal())
        (meter,) = meters
        results |= {f"{prefix}{name}": value for name, value in meter.results().items()}
        details |= {f"{prefix}{name}": value for name, value in meter.details().items()}
        on_main(partial(save_files, meter, folder))
    told = {
        "checkpoint": str(path),
        "data": data_of(run.config),
        "results": results,
        "details": details,
        "by": run.history.facts,
    }
    on_main(lambda: write_text(run.folder / "evaluation.json", as_json(told)))
    run.logger.info(f"{path}: {report.summary(run.task, results)}")
    return results


def data_of(config: CfgNode) -> dict[str, Any]:
    """Which images results are of."""
    names = ("DATASET", "DATA_PATH", "CLASS_MAP")
    return {f"DATA.{name}": config.DATA[name] for name in names if name in config.DATA}


def to_evaluate(run: Run) -> str | Path:
    """MODEL.RESUME; else MODEL.PRETRAINED, unless the run of the folder began with it; else its furthest state.

    Weights to start from with a new head (DROP_HEAD) are not a model that could be evaluated.
    Raises UserError where there is none.
    """
    settings = run.config.MODEL
    weights = "" if settings.DROP_HEAD else settings.PRETRAINED
    path = asked_for(run)
    if not path and (not weights or on_main(lambda: began_with(run.folder, weights))):
        path = newest(run)
    path = path or weights
    if not path:
        raise UserError(f"nothing to evaluate: '{run.folder}' holds no checkpoint; name one with --resume")
    began = f", what this run came to from {weights}" if weights and path != weights and not settings.RESUME else ""
    run.logger.info(f"evaluating {path}{began}")
    return path


def began_with(folder: Path, weights: str) -> bool:
    """Whether the run in a folder is of the same MODEL.PRETRAINED."""
    config = folder / "config.yaml"
    return config.is_file() and weights == get_config(config).MODEL.PRETRAINED


def save_files(meter: Meter, folder: Path) -> None:
    for name, content in meter.files().items():
        make_folder((folder / name).parent)
        write_atomically(folder / name, lambda file, content=content: file.write(content))


def tell_skipped(run: Run, loader: Loader) -> None:
    if loader.skipped:
        run.logger.warning(f"rank {run.world.rank}: {counted(loader.skipped, 'unreadable image')} skipped in this pass")


@torch.no_grad()
def throughput(run: Run, model: nn.Module) -> Results:
    """Images a second of all processes together and peak memory, in batches of DATA.BATCH_SIZE, after a warm-up."""
    config, device, batch = run.config, run.world.device, run.config.DATA.BATCH_SIZE
    warm_up, steps = (50, 30) if device.type == "cuda" else (2, 5)
    example = run.task.example(run.world)
    model = parallelise(model.eval(), config, World(0, 1, 0, device))
    run.logger.info(f"timing {counted(steps, 'batch', 'batches')} of {batch} after {warm_up} to warm up")
    with autocast(config, device):
        for _ in progress(range(warm_up), run.world, "warming up"):
            model(*example)
        seconds = elapsed(lambda: [model(*example) for _ in range(steps)], device) / steps
    rate = sum_over_processes(torch.tensor(batch / seconds, device=device)).item()
    memory = memory_mb(device)
    run.logger.info(f"throughput {rate:.1f} images/s, batch {batch} a process, peak memory {megabytes(memory)}")
    return {"images_per_second": rate, "peak_memory_mb": memory}


def as_json(told: Any) -> str:
    """Indented, but the innermost lists, such as a row of a matrix, on a line each; null for what is not finite."""
    text = json.dumps(_without_nan(told), indent=1)
    return re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _without_nan(told: Any) -> Any:
    """For JSON, which has no word for what is not finite: null in its place."""
    if isinstance(told, dict):
        return {name: _without_nan(value) for name, value in told.items()}
    if isinstance(told, list):
        return [_without_nan(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told
