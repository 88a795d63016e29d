"""The story of a run of any task: build model, data and state; train, evaluate or time.  The doors call `run`."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from tqdm import tqdm
from yacs.config import CfgNode

from vmamba.config import output_folder, save_config
from vmamba.data.loaders import Loader, TrainLoader
from vmamba.errors import UserError
from vmamba.models.pretrained import load_checkpoint, load_pretrained, read_weights
from vmamba.runtime import report
from vmamba.runtime.checkpoint import BEST, LAST, newest_checkpoint, read_training_state, save_checkpoint
from vmamba.runtime.distributed import World, on_main, processes, share_buffers, sum_over_processes
from vmamba.runtime.lock import FolderLock
from vmamba.runtime.logging import Pace, create_logger, log_the_end, memory_mb, progress
from vmamba.runtime.optim import Schedule, build_optimizer
from vmamba.runtime.plan import Plan, build_plan
from vmamba.runtime.precision import autocast, build_scaler, set_up_precision
from vmamba.runtime.records import Records
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep, StepReport, parallelise, to_device
from vmamba.runtime.stop import Stopped, StopRequest
from vmamba.runtime.task import Results, Task, open_task
from vmamba.timing import elapsed


@dataclass(frozen=True)
class Run:
    """What every function here needs to know."""

    config: CfgNode
    task: Task
    world: World
    logger: logging.Logger
    request: StopRequest = field(default_factory=StopRequest)

    @property
    def folder(self) -> Path:
        return output_folder(self.config)


def run(config: CfgNode) -> Results:
    """Train, or only evaluate (EVAL_MODE) or time (THROUGHPUT_MODE), and return the last numbers.

    Raises UserError for what the user can mend, and Stopped when a signal ended training after its state was saved.
    """
    folder = None if config.THROUGHPUT_MODE else output_folder(config)
    with processes(config.DEVICE) as world, _only_writer(config, folder):
        logger = create_logger(world, folder)
        try:
            return _run(Run(config, open_task(config), world, logger), folder)
        except BaseException as error:
            log_the_end(logger, error)
            raise


@contextmanager
def _only_writer(config: CfgNode, folder: Path | None) -> Iterator[None]:
    """The run's folder is held by one run that trains; others may evaluate from it."""
    if folder is None or config.EVAL_MODE:
        yield
        return
    lock = FolderLock(folder)
    on_main(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _run(run: Run, folder: Path | None) -> Results:
    config, world = run.config, run.world
    for line in report.describe_start(config, folder):
        run.logger.info(line)
    set_up_precision(config, world.device)
    random_seed(config.SEED)
    model = run.task.build_model().to(world.device)
    run.logger.info(report.describe_model(config, world, run.task, model))
    if config.THROUGHPUT_MODE:
        return throughput(run, model)
    if config.EVAL_MODE:
        return evaluate_file(run, model)
    return train(run, model)


# ------------------------------------------------------------------------------------------------ training


def train(run: Run, model: nn.Module) -> Results:
    """From where the run's folder stands to the plan's last step, saving on the way."""
    train_loader, eval_loader = run.task.train_loader(run.world), run.task.eval_loader(run.world)
    plan = build_plan(run.config, train_loader.steps_per_epoch)
    state = build_state(run, model, plan)
    run.logger.info(run.task.describe_data(train_loader, eval_loader))
    run.logger.info(report.describe_training(run.config, run.world, plan, state))
    warn_of_the_warmup(run, plan)
    source = resume(run, state)
    if state.recorded >= plan.steps:
        run.logger.info(f"nothing to train: {state.step} of {plan.steps} steps are done")
        return finish(run, state, evaluate_state(run, state, eval_loader))
    on_main(lambda: save_config(run.config, run.folder / "config.yaml"))
    if source is not None and source != run.folder / LAST:
        save(run, state, LAST)  # what a run leaves does not depend on which of its files it went on from
    records = Records(run.folder, run.task.panels)
    step = OptimizerStep(run.config, run.world, parallelise(model, run.config, run.world), run.task.loss)
    rounds = Rounds(run, plan, state, step, train_loader, eval_loader, records)
    with run.request:
        while state.recorded < plan.steps:
            rounds.one()
    on_main(records.draw)
    return finish(run, state, rounds.results or evaluate_state(run, state, eval_loader))


def finish(run: Run, state: TrainState, results: Results) -> Results:
    run.logger.info(
        f"{report.counted(state.step, 'step')} are trained; {report.summary(run.task, results)}"
        f"{report.best_so_far(run.task, state)}"
    )
    return results


def build_state(run: Run, model: nn.Module, plan: Plan) -> TrainState:
    """The state at the very start."""
    config, ema = run.config, run.config.TRAIN.EMA
    global_batch = config.DATA.BATCH_SIZE * run.world.size * config.TRAIN.ACCUMULATION_STEPS
    optimizer = build_optimizer(config, model, global_batch)
    start = config.TRAIN.START_EPOCH * plan.steps_per_epoch
    return TrainState(
        model=model,
        ema=ModelEmaV3(model, decay=ema.DECAY, use_warmup=ema.WARMUP) if ema.ENABLE else None,
        optimizer=optimizer,
        schedule=Schedule(config, optimizer, plan),
        scaler=build_scaler(config, run.world.device),
        steps_per_epoch=plan.steps_per_epoch,
        config=yaml.safe_load(config.dump()),
        step=start,
        recorded=start,
    )


def warn_of_the_warmup(run: Run, plan: Plan) -> None:
    if 0 < plan.steps <= plan.warmup_steps:
        run.logger.warning(
            f"the warm-up takes {plan.warmup_steps} steps and the run has {plan.steps}: the rate never reaches "
            f"TRAIN.BASE_LR; lower TRAIN.WARMUP_EPOCHS, which is {run.config.TRAIN.WARMUP_EPOCHS}"
        )


class Rounds:
    """Training by rounds: the steps of one, its evaluation where one is due, its record."""

    def __init__(
        self,
        run: Run,
        plan: Plan,
        state: TrainState,
        step: OptimizerStep,
        train_loader: TrainLoader,
        eval_loader: Loader,
        records: Records,
    ):
        self.run, self.plan, self.state, self.step, self.records = run, plan, state, step, records
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.results: Results = {}  # of the last evaluation, while the weights are the same
        self.seconds_to_evaluate = 0.0

    def one(self) -> None:
        """What remains of the round in progress."""
        start, first, end = time.time(), self.state.step, self.plan.round_end(self.state.recorded)
        self._train_to(end)
        trained = time.time()
        save_last(self.run, self.state, end)  # an evaluation that fails costs no training
        self.results = {}
        if self.plan.evaluates(end):
            self.results = evaluate_state(self.run, self.state, self.eval_loader)
            self.seconds_to_evaluate = time.time() - trained
        rate = (self.state.step - first) * self._images_per_step() / (trained - start)
        self._finish(rate if self.state.step > first else None, time.time() - start)

    def _train_to(self, end: int) -> None:
        """Raises Stopped, the state being saved, when a signal asks for it."""
        run, state, config = self.run, self.state, self.run.config
        if state.step >= end:  # stopped after the last step, before the evaluation
            return
        state.model.train()
        batches = Pace(self._batches(end), state.step)
        title = (
            f"epoch {state.step // self.plan.steps_per_epoch + 1}/{-(-self.plan.steps // self.plan.steps_per_epoch)}"
        )
        with progress(range(state.step, end), run.world, title) as bar:
            for _ in bar:
                outcome = self.step(state, islice(batches, config.TRAIN.ACCUMULATION_STEPS), stop=run.request.noted)
                if (state.step % self.plan.steps_per_epoch) % config.PRINT_FREQ == 0 or state.step == end:
                    self._tell(outcome, batches, bar)
                if outcome.stop:
                    stop(run, state)
                if config.TRAIN.SAVE_STEPS and state.step % config.TRAIN.SAVE_STEPS == 0:
                    save(run, state, LAST)
        tell_skipped(run, self.train_loader)

    def _batches(self, end: int) -> Iterator[Any]:
        """The micro-batches of the steps from here to `end`, through as many epochs as they lie in."""
        step = self.state.step
        while step < end:
            epoch, first = divmod(step, self.plan.steps_per_epoch)
            last = min(end - epoch * self.plan.steps_per_epoch, self.plan.steps_per_epoch)
            self.train_loader.set_epoch(epoch, first, last)
            yield from self.train_loader
            step += last - first

    def _images_per_step(self) -> int:
        data, train = self.run.config.DATA, self.run.config.TRAIN
        return data.BATCH_SIZE * self.run.world.size * train.ACCUMULATION_STEPS

    def _tell(self, outcome: StepReport, batches: Pace, bar: tqdm) -> None:
        run, state = self.run, self.state
        seconds, waiting = batches.lap(state.step)
        left = seconds * (self.plan.steps - state.step)
        left += self.seconds_to_evaluate * self.plan.evaluations_left(state.step)
        scale, memory = state.scaler.get_scale(), memory_mb(run.world.device)
        run.logger.debug(report.step_line(state, self.plan, scale, outcome, left, seconds, waiting, memory))
        bar.set_postfix_str(f"loss {state.mean_loss:.4f}", refresh=False)
        events = {
            "train/loss": outcome.loss,
            **{f"train/{name}": value for name, value in outcome.parts.items()},
            "train/grad_norm": outcome.grad_norm,
            "train/lr": state.optimizer.param_groups[0]["lr"],
            "train/loss_scale": scale,
            "speed/images_per_second": self._images_per_step() / seconds,
            "speed/seconds_a_step_for_data": waiting,
            "speed/memory_mb": memory,
        }
        if run.world.main:
            self.records.write_events(events, state.step)

    def _finish(self, images_per_second: float | None, seconds: float) -> None:
        """Record the round just trained, count it, and save."""
        run, state, results = self.run, self.state, self.results
        entry = {
            "epoch": self.plan.epoch(state.step),
            "step": state.step,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": state.mean_loss,
            **results,
            "grad_norm": state.mean_grad_norm,
            "bad_steps": state.bad_steps,
            "images_per_second": images_per_second and round(images_per_second, 1),
            "memory_mb": round(memory_mb(run.world.device)),
            "seconds": round(seconds, 2),
        }
        improved = self._rank(results)
        state.finish_round()
        events = {f"eval/{name}": value for name, value in results.items()}
        on_main(lambda: self.records.write(entry, events))
        if improved:
            save(run, state, BEST)
        save_last(run, state, state.step)
        told = f"; {report.summary(run.task, results)}" if results else ""
        run.logger.info(
            f"epoch {entry['epoch']:.6g}/{self.plan.epoch(self.plan.steps):.6g} in {seconds:.1f}s: "
            f"training loss {entry['train_loss']:.4f}{told}{report.best_so_far(run.task, state)}"
        )

    def _rank(self, results: Results) -> bool:
        """Whether the evaluation just made is the best so far; a loss or a result that is not finite never is."""
        state, name = self.state, self.run.task.headline
        if not results:
            return False
        infinite = [f"{key} {value}" for key, value in results.items() if not math.isfinite(value)]
        if infinite:
            self.run.logger.warning(f"this evaluation does not count: {', '.join(infinite)}")
            return False
        kinds = {"model": name, "ema": f"ema_{name}"}
        state.best_weights = max(
            (kind for kind in kinds if kinds[kind] in results), key=lambda kind: results[kinds[kind]]
        )
        improved = results[kinds[state.best_weights]] > max(state.best.values(), default=-math.inf)
        for key in set(kinds.values()) & results.keys():
            state.best[key] = max(state.best.get(key, -math.inf), results[key])
        return improved


# ------------------------------------------------------------------------------------------------ starting and saving


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
    saved = read_training_state(path) if path else None
    if saved:
        state.load_state_dict(saved, path)
        state.restore_random_state(run.world.rank)
        position = f"epoch {state.step // state.steps_per_epoch + 1}, step {state.step % state.steps_per_epoch}"
        run.logger.info(f"resumed {path} at {position}")
        for change in report.changes(saved["config"], state.config):
            run.logger.info(f"changed since: {change}")
        if state.best and not (run.folder / BEST).exists():
            run.logger.info(
                f"the best so far lies elsewhere{report.best_so_far(run.task, state)}; here it is sought anew"
            )
            state.best = {}
        return Path(path)
    if path or config.MODEL.PRETRAINED:
        start_from_weights(run, state, path or config.MODEL.PRETRAINED)
    elif config.MODEL.DROP_HEAD:
        raise UserError("--drop-head keeps the head of no weights, and none are given; name some with --pretrained")
    return None


def asked_for(run: Run) -> str:
    """MODEL.RESUME, and for the folder of a run the furthest state in it."""
    asked = run.config.MODEL.RESUME
    if not asked or not Path(asked).is_dir():
        return asked
    path, _ = on_main(lambda: newest_checkpoint(asked))
    if path is None:
        raise UserError(f"MODEL.RESUME '{asked}' is a folder without the state of a run; name a checkpoint")
    return str(path)


def start_from_weights(run: Run, state: TrainState, path: str | Path) -> None:
    run.task.start_from(state.model, load_checkpoint(path, run.config.MODEL.WEIGHTS))
    if state.ema:
        state.ema.set(state.model)
    run.logger.info(f"starting from the weights in {path}")


def newest(run: Run) -> Path | None:
    """The furthest state in the run's folder.  Raises UserError when AUTO_RESUME would ignore one."""
    path, passed_over = on_main(lambda: newest_checkpoint(run.folder))
    for sentence in passed_over:
        run.logger.warning(f"skipped a checkpoint: {sentence}")
    if path and not (run.config.TRAIN.AUTO_RESUME or run.config.EVAL_MODE):
        raise UserError(
            f"'{path}' is of an earlier run, and TRAIN.AUTO_RESUME is off; choose another --tag to start over beside it"
        )
    return path


def save(run: Run, state: TrainState, name: str) -> None:
    state.gather_random_states()
    on_main(lambda: save_checkpoint(state, run.folder / name))


def save_last(run: Run, state: TrainState, step: int) -> None:
    """At the end of a round: where SAVE_FREQ epochs are full, or the run ends."""
    plan = state.schedule.plan
    if step >= plan.steps or step % (run.config.SAVE_FREQ * plan.steps_per_epoch) == 0:
        save(run, state, LAST)


def stop(run: Run, state: TrainState) -> None:
    """Raises Stopped, the state being saved; all processes call it."""
    save(run, state, LAST)
    raise Stopped(run.request.agreed_signal(), run.folder / LAST)


# ------------------------------------------------------------------------------------------------ evaluation and timing


def evaluate_state(run: Run, state: TrainState, loader: Loader) -> Results:
    """The plain weights and the EMA's where there are, or those of them that EVAL_WEIGHTS names.

    Raises Stopped, the state being saved, when a signal asks for it.
    """
    kinds = {"": state.model} | ({"ema_": state.ema.module} if state.ema else {})
    only = {"model": "", "ema": "ema_"}.get(run.config.EVAL_WEIGHTS)
    results = {}
    for prefix, model in kinds.items():
        if only is not None and prefix != only and only in kinds:
            continue
        found = evaluate(run, model, loader)
        if found is None:
            stop(run, state)
        results |= {f"{prefix}{name}": value for name, value in found.items()}
    return results


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, loader: Loader) -> Results | None:
    """The task's numbers over all processes' shares of the data; None when a signal asked any of them to stop."""
    share_buffers(model)
    model.eval()
    meter = run.task.meter(run.world)
    for batch in progress(loader, run.world, "evaluating"):
        if run.request.noted:
            break
        with autocast(run.config, run.world.device):
            meter.add(model, to_device(batch, run.world.device))
    if run.request.noted_by_any(run.world):
        return None
    tell_skipped(run, loader)
    return meter.results()


def evaluate_file(run: Run, model: nn.Module) -> Results:
    """The weights, plain and EMA, in MODEL.RESUME or MODEL.PRETRAINED, else in the furthest state of the folder.

    Weights to start from with a new head (DROP_HEAD) are not a model that could be evaluated.
    """
    settings = run.config.MODEL
    path = asked_for(run) or (settings.PRETRAINED if not settings.DROP_HEAD else "") or newest(run)
    if not path:
        raise UserError(f"nothing to evaluate: '{run.folder}' holds no checkpoint; name one with --resume")
    loader = run.task.eval_loader(run.world)
    chosen = settings.WEIGHTS
    wanted = read_weights(path) if chosen == "auto" else {chosen: load_checkpoint(path, chosen)}
    results = {}
    for kind, checkpoint in wanted.items():
        load_pretrained(model, checkpoint)
        prefix = "ema_" if kind == "ema" and len(wanted) > 1 else ""
        results |= {f"{prefix}{name}": value for name, value in evaluate(run, model, loader).items()}
    run.logger.info(f"{path}: {report.summary(run.task, results)}")
    return results


def tell_skipped(run: Run, loader: Loader) -> None:
    if loader.skipped:
        run.logger.warning(
            f"rank {run.world.rank}: {report.counted(loader.skipped, 'unreadable image')} skipped in this pass"
        )


@torch.no_grad()
def throughput(run: Run, model: nn.Module) -> Results:
    """Images a second of all processes together and peak memory, in batches of DATA.BATCH_SIZE, after a warm-up."""
    config, device, batch = run.config, run.world.device, run.config.DATA.BATCH_SIZE
    warm_up, steps = (50, 30) if device.type == "cuda" else (2, 5)
    example = run.task.example(run.world)
    model = parallelise(model.eval(), config, World(0, 1, 0, device))
    run.logger.info(f"timing {report.counted(steps, 'batch', 'batches')} of {batch} after {warm_up} to warm up")
    with autocast(config, device):
        for _ in progress(range(warm_up), run.world, "warming up"):
            model(*example)
        seconds = elapsed(lambda: [model(*example) for _ in range(steps)], device) / steps
    rate = sum_over_processes(torch.tensor(batch / seconds, device=device)).item()
    memory = memory_mb(device)
    run.logger.info(f"throughput {rate:.1f} images/s, batch {batch} a process, peak memory {memory:.0f} MB")
    return {"images_per_second": rate, "peak_memory_mb": memory}
