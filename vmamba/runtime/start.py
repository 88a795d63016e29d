"""Where a run starts: at the very beginning, from the state of a run, or from weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vmamba.errors import UserError
from vmamba.models.formats import PLAIN
from vmamba.models.freezing import freeze
from vmamba.models.pretrained import Checkpoint, calls_otherwise, open_checkpoint
from vmamba.models.ss2d import Mixer2D
from vmamba.runtime import report
from vmamba.runtime.average import build_average
from vmamba.runtime.checkpoint import BEST, SHARDED, is_there, newest_checkpoint, read_training_state
from vmamba.runtime.distributed import on_main
from vmamba.runtime.optim import Schedule, build_optimizer
from vmamba.runtime.plan import Plan
from vmamba.runtime.precision import build_scaler
from vmamba.runtime.run import Run
from vmamba.runtime.sharding import in_shares, is_sharded, shard
from vmamba.runtime.state import TrainState, of_today
from vmamba.text import counted


def build_state(run: Run, model: nn.Module, plan: Plan) -> TrainState:
    """The state at the very start."""
    config = run.config
    global_batch = config.DATA.BATCH_SIZE * run.world.size * config.TRAIN.ACCUMULATION_STEPS
    freeze(model, config.TRAIN.FREEZE)
    average = build_average(config, model, plan)
    if config.TRAIN.PARALLEL == "fsdp" and run.world.size > 1:
        if build_scaler(config, run.world.device).is_enabled():
            raise UserError(
                "TRAIN.PARALLEL is fsdp and AMP.DTYPE float16, whose loss scaler would go its own way on each process; "
                "use AMP.DTYPE bfloat16, or TRAIN.PARALLEL ddp"
            )
        on_cpu = run.world.device.type == "cpu" and config.MODEL.BACKEND != "reference"
        if on_cpu and any(isinstance(module, Mixer2D) for module in model.modules()):
            raise UserError(
                f"TRAIN.PARALLEL is fsdp and MODEL.BACKEND {config.MODEL.BACKEND}, whose scans on a CPU hold on to the "
                f"parameters' memory that FSDP frees; use MODEL.BACKEND reference"
            )
        for each in (model, average.module) if average else (model,):
            shard(each, run.world)
    optimizer = build_optimizer(config, model, global_batch)
    start = config.TRAIN.START_EPOCH * plan.steps_per_epoch
    if start and start >= plan.steps:
        raise UserError(
            f"TRAIN.START_EPOCH is {config.TRAIN.START_EPOCH}, {start} steps, and the run has {plan.steps}; start "
            f"before its end"
        )
    return TrainState(
        model=model,
        ema=average,
        optimizer=optimizer,
        schedule=Schedule(config, optimizer, plan),
        scaler=build_scaler(config, run.world.device),
        steps_per_epoch=plan.steps_per_epoch,
        config=yaml.safe_load(config.dump()),
        step=start,
        recorded=start,
    )


def resume(run: Run, state: TrainState) -> Path | None:
    """Go on from the furthest state in the run's folder, else from MODEL.RESUME, else start from MODEL.PRETRAINED.

    The folder comes first so that the same command, given again, loses nothing; TRAIN.AUTO_RESUME false turns that off.
    A file in MODEL.RESUME that is no state of a run is weights to start from.  Returns the file whose state it was.
    """
    config = run.config
    path = newest(run) if config.TRAIN.AUTO_RESUME or not config.MODEL.RESUME else None
    asked = asked_for(run)
    if path and asked and path.resolve() != Path(asked).resolve():
        run.logger.warning(
            f"going on from {path}, where this run stands, instead of {asked}; for a new start from there choose "
            f"another --tag"
        )
    path = path or asked
    saved = read_state(path, state) if path else None
    if saved:
        saved = of_today(saved, state.config)
        compare_data(run, saved["data"], state.data, path)
        tell_other_names(run, Path(path), saved["classes"], state)
        state.load_state_dict(saved, path)
        state.restore_random_state(run.world.rank)
        epochs, steps = divmod(state.step, state.steps_per_epoch)
        run.logger.info(f"resumed {path} after {counted(epochs, 'epoch')} and {counted(steps, 'step')}")
        for change in report.changes(saved["config"], state.config):
            run.logger.info(f"changed since: {change}")
        best = run.folder / BEST
        if state.best and not on_main(lambda: is_there(best) or is_there(best.with_suffix(SHARDED))):
            finished = state.recorded >= state.schedule.plan.steps
            here = "this run is finished and seeks none" if finished else "here it is sought anew"
            run.logger.info(f"the best so far lies elsewhere{report.best_so_far(run.task, state)}; {here}")
            state.best = {}
        return Path(path)
    if path or config.MODEL.PRETRAINED:
        start_from_weights(run, state, path or config.MODEL.PRETRAINED)
    elif config.MODEL.DROP_HEAD:
        raise UserError("--drop-head keeps the head of no weights, and none are given; name some with --pretrained")
    return None


def compare_data(run: Run, saved: dict[str, dict], found: dict[str, dict], path: str | Path) -> None:
    """Warn where the images are others than those of the state at `path`; an older one does not tell.

    Raises UserError where that makes images that were trained on held-out ones: those held out are drawn anew.
    """
    for part, what in (("train", "images to train on"), ("held_out", "images held out")):
        before, now = saved.get(part, {}), found.get(part, {})
        if any(key in now and before[key] != now[key] for key in ("images", "checksum") if key in before):
            how = f"{now['images']:,}, then {before['images']:,}"
            if now["images"] == before["images"]:
                how = f"{now['images']:,} as then, of other names or labels"
            if part == "held_out" and now.get("drawn_by"):
                raise UserError(
                    f"the {what} by {now['drawn_by']} are others than those of '{path}' ({how}), and among them may be "
                    "what was trained on; bring the images back as they were, hold out the same ones by a folder or a "
                    "file of labels, or start from the weights with --pretrained and another --tag"
                )
            run.logger.warning(f"the {what} are others than those of {path}: {how}")


def read_state(path: str | Path, state: TrainState) -> dict[str, Any] | None:
    """The state of a run at `path`, a file or a folder of shares, its tensors in shares where `state`'s are; None of
    another file.  All processes call it.  Raises UserError where it cannot be read."""
    if not is_sharded(state.model) and not Path(path).is_dir():
        return read_training_state(path)
    from vmamba.runtime.shares import distributed_as, read_folder

    like = state.shares() if is_sharded(state.model) else None
    if Path(path).is_dir():
        return read_folder(Path(path), like)
    saved = read_training_state(path)
    return distributed_as(saved, like) if saved and "optimizer" in saved else saved


def asked_for(run: Run) -> str:
    """MODEL.RESUME, and for the folder of a run the furthest state in it."""
    asked = run.config.MODEL.RESUME
    if not asked or not Path(asked).is_dir() or Path(asked, PLAIN).exists():
        return asked
    path, _ = on_main(lambda: newest_checkpoint(asked))
    if path is None:
        raise UserError(f"MODEL.RESUME '{asked}' is a folder without the state of a run; name a checkpoint")
    return str(path)


def start_from_weights(run: Run, state: TrainState, path: str | Path) -> None:
    model = run.task.build_model() if is_sharded(state.model) else state.model
    found = open_checkpoint(path, run.config.MODEL.WEIGHTS)
    run.task.start_from(model, found)
    if not run.config.MODEL.DROP_HEAD and found.config.get("TASK", run.config.TASK) == run.config.TASK:
        take_over_names(run, state, found)
    if model is not state.model:
        state.model.load_state_dict(in_shares(model.state_dict(), state.model))
    if state.ema:
        state.ema.set(state.model)
    run.logger.info(f"starting from the weights in {path}")


def take_over_names(run: Run, state: TrainState, found: Checkpoint) -> None:
    """What the file of a head that is kept calls the classes, where the data does not tell; a warning where it is
    something else."""
    if len(found.classes) == run.config.MODEL.NUM_CLASSES:
        state.classes = state.classes or list(found.classes)
    tell_other_names(run, found.path, found.classes, state)


def tell_other_names(run: Run, path: Path, theirs: Sequence[str], state: TrainState) -> None:
    """Warn where the file at `path` calls its classes otherwise than this run's data."""
    if other := calls_otherwise(path, theirs, state.classes):
        run.logger.warning(other)


def newest(run: Run) -> Path | None:
    """The furthest state in the run's folder.  Raises UserError when AUTO_RESUME would ignore one."""
    path, passed_over = on_main(lambda: newest_checkpoint(run.folder))
    for sentence in passed_over.values():
        run.logger.warning(f"skipped a checkpoint: {sentence}")
    if path and not (run.config.TRAIN.AUTO_RESUME or run.config.EVAL_MODE):
        raise UserError(
            f"'{path}' is of an earlier run, and TRAIN.AUTO_RESUME is off; choose another --tag to start over beside it"
        )
    return path
