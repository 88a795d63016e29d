"""The story of a run of any task: build model, data and state; train, evaluate or time.  The doors call `run`."""

import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from timm.utils import random_seed
from torch import nn
from tqdm import tqdm
from yacs.config import CfgNode

from vmamba.config import output_folder, save_config
from vmamba.data.loaders import EvalLoader, TrainLoader
from vmamba.errors import UserError
from vmamba.extensions import import_modules
from vmamba.models import freezing
from vmamba.runtime import dry, report
from vmamba.runtime.average import check_average
from vmamba.runtime.checkpoint import BEST, LAST
from vmamba.runtime.distributed import World, on_main, processes
from vmamba.runtime.evaluation import evaluate_file, evaluate_state, tell_skipped, throughput
from vmamba.runtime.feed import Feed
from vmamba.runtime.history import History, facts
from vmamba.runtime.lifeline import PeerLost
from vmamba.runtime.lock import FolderLock
from vmamba.runtime.logging import (
    Pace,
    cause,
    create_logger,
    log_the_end,
    memory_mb,
    progress,
    story,
    take_over_the_log,
)
from vmamba.runtime.optim import check_optimizer
from vmamba.runtime.plan import Plan, build_plan
from vmamba.runtime.precision import set_up_precision
from vmamba.runtime.profiling import Profile
from vmamba.runtime.records import Records, check_online
from vmamba.runtime.run import Run
from vmamba.runtime.sharding import is_sharded
from vmamba.runtime.start import build_state, resume
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep, StepReport, parallelise, synchronised
from vmamba.runtime.stop import Stopped
from vmamba.runtime.task import Results, open_task
from vmamba.text import counted

Laps = dict[int, tuple[float, float]]  # of steps that the log will tell of: seconds, and of them waiting for data

_one_at_a_time = threading.Lock()


def run(config: CfgNode) -> Results:
    """Train, or only evaluate (EVAL_MODE) or time (THROUGHPUT_MODE), and return the last numbers.

    Raises UserError for what the user can mend, and Stopped when a signal ended it; training has saved its state then.
    A second run at the same time in one process is refused: they would draw from the same generators.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise UserError("another run goes on in this process; wait for its end, or start a process for each")
    try:
        return _run_alone(config)
    finally:
        _one_at_a_time.release()


def _run_alone(config: CfgNode) -> Results:
    import_modules(config.IMPORT)  # again where the config comes from another process
    if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        check_optimizer(config)
        check_average(config)
        open_task(config).check()
    with (
        processes(config.DEVICE, config.TIMEOUT) as world,
        _telling_the_others(world),
        dry.tried(config, world) as config,
        _only_writer(config) as folder,
    ):
        logger = create_logger(world, folder)
        trains = world.main and not (config.EVAL_MODE or config.THROUGHPUT_MODE)
        run = Run(config, open_task(config), world, logger, history=History(folder if trains else None))
        # Weakly: in a cycle, of which the world is a part, the loading processes would outlive the run.
        world.lifeline.on_loss = partial(_write_down_the_end, weakref.proxy(run))
        try:
            try:
                with run.request, world.lifeline.explaining():
                    return _run(run, folder)
            except PeerLost as lost:  # the other was stopped where it does not wait for us, and so were we
                if not run.request.noted:
                    raise
                raise Stopped(run.request.signum) from lost
        except BaseException as error:
            if not isinstance(error, PeerLost):  # which is written down when it is heard of
                _write_down_the_end(run, error)
            raise


def _write_down_the_end(run: Run, error: BaseException) -> None:
    loss = run.world.lifeline.loss
    if loss and isinstance(error, Stopped):  # by the launcher, which ends all where one has ended
        error = PeerLost(loss)
    if loss and loss.rank == 0 and run.world.rank == 1 and not run.config.THROUGHPUT_MODE:
        take_over_the_log(run.logger, run.folder)
    log_the_end(run.logger, error)
    run.history.end(cause(error))


@contextmanager
def _telling_the_others(world: World) -> Iterator[None]:
    """Let the other processes know why this one ends, where they do not end with it."""
    try:
        with world.lifeline.explaining():
            yield
    except Stopped as stop:
        if stop.checkpoint:
            world.lifeline.leave()  # which all have agreed on
        else:
            world.lifeline.fail(cause(stop))
        raise
    except BaseException as error:
        world.lifeline.fail(cause(error), story(error))
        raise


@contextmanager
def _only_writer(config: CfgNode) -> Iterator[Path | None]:
    """The run's folder, which is held by one run that trains; others may evaluate from it.  None where only speed is
    measured."""
    folder = None if config.THROUGHPUT_MODE else output_folder(config)
    if folder is None or config.EVAL_MODE:
        yield folder
        return
    lock = FolderLock(folder)
    on_main(lock.acquire)
    try:
        yield folder
    finally:
        lock.release()


def _run(run: Run, folder: Path | None) -> Results:
    config, world = run.config, run.world
    run.history.begin(facts(config, world))
    if world.main:
        for line in report.describe_start(run.history.facts, folder):
            run.logger.info(line)
    set_up_precision(config, world.device)
    random_seed(config.SEED)
    model = synchronised(run.task.build_model(), config, world).to(world.device)
    run.logger.info(report.describe_model(config, world, run.task, model))
    if config.THROUGHPUT_MODE:
        return throughput(run, model)
    if config.EVAL_MODE:
        return evaluate_file(run, model)
    return train(run, model)


def train(run: Run, model: nn.Module) -> Results:
    """From where the run's folder stands to the plan's last step, saving on the way."""
    config, world, task = run.config, run.world, run.task
    check_online(config)
    train_loader, eval_loader = task.train_loader(world), task.eval_loader(world)
    plan = build_plan(config, train_loader.steps_per_epoch)
    state = build_state(run, model, plan)
    state.data = {"train": train_loader.contents(), "held_out": eval_loader.contents()}
    state.classes = train_loader.class_names()
    task.average = state.ema.module if state.ema else None
    run.logger.info(report.describe_data(config, train_loader.images, eval_loader.images))
    run.logger.info(report.describe_training(config, world, plan, state))
    warn_of_the_warmup(run, plan)
    source = resume(run, state)
    records = Records(run.folder, task.panels, config)
    if source is None or source.resolve().parent != run.folder.resolve():
        on_main(records.start_over)
    if source == run.folder / LAST:
        run.saver.last_step = state.step
    if source and source.resolve().parent == run.folder.resolve() and source.stem == "best":
        run.save(state, LAST)  # killed between the two: what a run leaves does not depend on where
    if config.DRY_RUN:
        plan = dry.shortened(plan, state.recorded)
    trains = state.recorded < plan.steps and not state.out_of_patience
    if not trains:
        why = f", and {report.impatience(state)}" if state.out_of_patience else ""
        run.logger.info(f"nothing is left to train, {state.step} of {plan.steps} steps are done{why}")
        with run.request.noting():
            results = evaluate_state(run, state, eval_loader)
    else:
        on_main(lambda: save_config(config, run.folder / "config.yaml"))
        step = OptimizerStep(config, world, parallelise(model, config, world), task.loss)
        profile = Profile(config.PROFILE if world.main else 0, run.folder)
        rounds = Rounds(run, plan, state, step, train_loader, eval_loader, records, profile)
        try:
            with run.request.noting():
                while state.recorded < plan.steps and not state.out_of_patience:
                    rounds.one()
            run.finish_saving()
        finally:
            records.close()
            profile.close()
            run.saver.close()
        results = rounds.results
        if rounds.steps:
            run.logger.info(rounds.describe_loading())
    on_main(records.draw)
    best = report.best_so_far(task, state)
    run.logger.info(f"{counted(state.step, 'step')} trained; {report.summary(task, results)}{best}")
    why = report.impatience(state) if state.out_of_patience else "finished"
    run.history.end(f"{why}, {state.step} of {plan.steps} steps")
    if config.DRY_RUN:
        run.logger.info(dry.describe(run.folder, trains))
    return results


def warn_of_the_warmup(run: Run, plan: Plan) -> None:
    if 0 < plan.steps <= plan.warmup_steps:
        train = run.config.TRAIN
        key = "WARMUP_STEPS" if train.WARMUP_STEPS else "WARMUP_EPOCHS"
        run.logger.warning(
            f"the warm-up takes {plan.warmup_steps} steps and the run has {plan.steps}: the rate never reaches "
            f"TRAIN.BASE_LR; lower TRAIN.{key}, which is {train[key]}"
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
        eval_loader: EvalLoader,
        records: Records,
        profile: Profile,
    ):
        self.profile = profile
        self.run, self.plan, self.state, self.step, self.records = run, plan, state, step, records
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.results: Results = {}  # of the last evaluation, while the weights are the same
        self.seconds_to_evaluate = 0.0
        # Trained here without the first, in which kernels compile; how long that took, and waited for data.
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.compiled = False

    def one(self) -> None:
        """What remains of the round in progress."""
        start, first, end = time.time(), self.state.step, self.plan.round_end(self.state.recorded)
        self._train_to(end)
        trained = time.time()
        self.results = {}
        if self.plan.evaluates(end):
            if self._saves():
                self.run.save(self.state, LAST)  # an evaluation that fails costs no training
            self.results = evaluate_state(self.run, self.state, self.eval_loader)
            self.seconds_to_evaluate = time.time() - trained
        rate = (self.state.step - first) * self._images_per_step() / (trained - start)
        self._finish(rate if self.state.step > first else None, time.time() - start)

    def describe_loading(self) -> str:
        images = self.steps * self._images_per_step() / self.run.world.size
        return report.describe_loading(self.train_loader.seconds_an_image, images, self.seconds, self.waited)

    def _train_to(self, end: int) -> None:
        """Raises Stopped, the state being saved, when a signal asks for it."""
        run, state, config = self.run, self.state, self.run.config
        if state.step >= end:  # stopped after the last step, before the evaluation
            return
        freezing.train(state.model)
        batches = Pace(self._batches(end), state.step)
        ready = Feed(batches, run.world.device, self.train_loader.finish, self.train_loader.ahead)
        title = f"epoch {state.step // self.plan.steps_per_epoch + 1}/{self.plan.epochs}"
        laps: Laps = {}
        first, start, waited = state.step, time.perf_counter(), 0.0
        with progress(range(state.step, end), run.world, title) as bar:
            for _ in bar:
                outcomes = self.step(state, islice(ready, config.TRAIN.ACCUMULATION_STEPS), stop=run.request.noted)
                if (state.step % self.plan.steps_per_epoch) % config.PRINT_FREQ == 0 or state.step == end:
                    laps[state.step] = batches.lap(state.step)
                self._tell(outcomes, laps, bar)
                self.profile.step()
                if not self.compiled:
                    self.compiled = True
                    first, start, waited = state.step, time.perf_counter(), ready.waited()
                saves = config.TRAIN.SAVE_STEPS and state.step % config.TRAIN.SAVE_STEPS == 0
                saves = saves and not (state.step == end and self._saves())  # which comes next
                if saves or state.step == end or any(outcome.stop for outcome in outcomes):
                    rest = self.step.settle(state)
                    self._tell(rest, laps, bar)
                    outcomes += rest
                if any(outcome.stop for outcome in outcomes):
                    run.stop(state)
                if saves:
                    run.save(state, LAST)
        self.waited += ready.waited() - waited
        self.seconds += time.perf_counter() - start
        self.steps += state.step - first
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

    def _saves(self) -> bool:
        return self.plan.saves(self.state.step) or self.state.out_of_patience

    def _images_per_step(self) -> int:
        data, train = self.run.config.DATA, self.run.config.TRAIN
        return data.BATCH_SIZE * self.run.world.size * train.ACCUMULATION_STEPS

    def _tell(self, outcomes: Sequence[StepReport], laps: Laps, bar: tqdm) -> None:
        """Log those of the steps in `laps`, and take them out there."""
        for outcome in outcomes:
            if outcome.step in laps:
                self._tell_step(outcome, *laps.pop(outcome.step), bar)

    def _tell_step(self, outcome: StepReport, seconds: float, waiting: float, bar: tqdm) -> None:
        run, state = self.run, self.state
        left = seconds * (self.plan.steps - outcome.step)
        left += self.seconds_to_evaluate * self.plan.evaluations_left(outcome.step)
        memory = memory_mb(run.world.device)
        run.logger.debug(report.step_line(state, self.plan, outcome, left, seconds, waiting, memory))
        bar.set_postfix_str(f"loss {state.mean_loss:.4f}", refresh=False)
        events = {
            "train/loss": outcome.loss,
            **{f"train/{name}": value for name, value in outcome.parts.items()},
            "train/grad_norm": outcome.grad_norm,
            "train/lr": outcome.lr,
            "train/loss_scale": outcome.loss_scale,
            "speed/images_per_second": self._images_per_step() / seconds,
            "speed/seconds_a_step_for_data": waiting,
            "speed/memory_mb": memory,
        }
        if run.world.main:
            self.records.write_events(events, outcome.step)

    def _finish(self, images_per_second: float | None, seconds: float) -> None:
        """Record the round just trained, count it, and save."""
        run, state, results = self.run, self.state, self.results
        entry = {
            "epoch": self.plan.epoch(state.step),
            "step": state.step,
            "lr": state.rate,
            "train_loss": state.mean_loss,
            **results,
            "grad_norm": state.mean_grad_norm,
            "bad_steps": state.bad_steps,
            "images_per_second": images_per_second and round(images_per_second, 1),
            "memory_mb": round(memory_mb(run.world.device), 1),
            "seconds": round(seconds, 2),
        }
        improved = self._rank(results)
        if results:
            state.unimproved = 0 if improved else state.unimproved + 1
        if run.config.TRAIN.PATIENCE:
            entry["unimproved"] = state.unimproved
        state.finish_round()
        events = {f"eval/{name}": value for name, value in results.items()}
        on_main(lambda: self.records.write(entry, events))
        several = run.config.KEEP_BEST > 1 and state.headline is not None and not is_sharded(state.model)
        names = [BEST] if improved or several else []
        names += [LAST] if self._saves() else []
        if names:
            run.save(state, *names)
        told = f"; {report.summary(run.task, results)}" if results else ""
        run.logger.info(
            f"epoch {entry['epoch']:.6g}/{self.plan.epoch(self.plan.steps):.6g} in {seconds:.1f}s: "
            f"training loss {entry['train_loss']:.4f}{told}{report.best_so_far(run.task, state)}"
        )
        if state.out_of_patience:
            run.logger.info(f"{report.impatience(state)}: training ends {self.plan.steps - state.step} steps early")

    def _rank(self, results: Results) -> bool:
        """Whether the evaluation just made is the best so far; a loss or a result that is not finite never is."""
        state, name = self.state, self.run.task.headline
        if not results:
            return False
        infinite = [f"{key} {value}" for key, value in results.items() if not math.isfinite(value)]
        if infinite:
            self.run.logger.warning(f"this evaluation does not count: {', '.join(infinite)}")
            return False
        kinds = {"ema": f"ema_{name}", "model": name}  # of two that are equally good the average is taken
        state.best_weights = max(
            (kind for kind in kinds if kinds[kind] in results), key=lambda kind: results[kinds[kind]]
        )
        state.headline = results[kinds[state.best_weights]]
        improved = state.headline > max(state.best.values(), default=-math.inf)
        for key in set(kinds.values()) & results.keys():
            state.best[key] = max(state.best.get(key, -math.inf), results[key])
        return improved
