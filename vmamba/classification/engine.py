"""Classification as a story: build data, model and state; train, evaluate or time.  `run` is what the doors call."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import yaml
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.classification.data import Loader, TrainLoader, build_eval_loader, build_mixup, build_train_loader
from vmamba.classification.records import Records
from vmamba.classification.report import Results, changes, describe, step_line, summary
from vmamba.config import image_size, output_folder, save_config
from vmamba.errors import UserError
from vmamba.models.pretrained import load_checkpoint, load_pretrained, read_weights
from vmamba.models.variants import build_model
from vmamba.runtime.checkpoint import newest_checkpoint, read_training_state, save_checkpoint
from vmamba.runtime.distributed import World, on_main, processes, share_buffers, sum_over_processes
from vmamba.runtime.logging import Pace, create_logger, memory_mb, progress
from vmamba.runtime.optim import Schedule, build_optimizer
from vmamba.runtime.precision import autocast, build_scaler, set_up_precision
from vmamba.runtime.state import TrainState
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.stop import Stopped, StopRequest


@dataclass(frozen=True)
class Run:
    """What every function here needs to know."""

    config: CfgNode
    world: World
    logger: logging.Logger

    @property
    def folder(self) -> Path:
        return output_folder(self.config)


def run(config: CfgNode) -> Results:
    """Train, or only evaluate (EVAL_MODE) or time (THROUGHPUT_MODE), and return the last numbers.

    Raises UserError for what the user can mend, and Stopped when a signal ended training after its state was saved.
    """
    with processes(config.DEVICE) as world:
        logger = create_logger(world, None if config.THROUGHPUT_MODE else output_folder(config))
        run = Run(config, world, logger)
        set_up_precision(config, world.device)
        random_seed(config.SEED)
        model = build_model(config).to(world.device)
        logger.info(describe(config, world, model))
        if config.THROUGHPUT_MODE:
            return throughput(run, model)
        if config.EVAL_MODE:
            return evaluate_file(run, model)
        return train(run, model)


def train(run: Run, model: nn.Module) -> Results:
    """From where the run's folder stands to TRAIN.EPOCHS, saving on the way."""
    config, world = run.config, run.world
    train_loader = build_train_loader(config, rank=world.rank, world_size=world.size)
    eval_loader = build_eval_loader(config, rank=world.rank, world_size=world.size)
    state = build_state(run, model, train_loader.steps_per_epoch)
    resume(run, state)
    on_main(lambda: save_config(config, run.folder / "config.yaml"))
    records = Records(run.folder)
    step = build_step(run, state)
    results = None
    with StopRequest() as request:
        while state.epoch < config.TRAIN.EPOCHS:
            start = time.time()
            train_epoch(run, state, step, train_loader, request)
            save_last(run, state, state.epoch + 1)  # an evaluation that fails costs no training
            results = evaluate_state(run, state, eval_loader)
            finish_epoch(run, state, records, results, time.time() - start)
    on_main(records.draw)
    results = results or evaluate_state(run, state, eval_loader)
    run.logger.info(f"{config.TRAIN.EPOCHS} epochs are trained; {summary(results)}; best top-1 {state.best:.2f}%")
    return results


def build_state(run: Run, model: nn.Module, steps_per_epoch: int) -> TrainState:
    """The state at the very start."""
    config, ema = run.config, run.config.TRAIN.EMA
    global_batch = config.DATA.BATCH_SIZE * run.world.size * config.TRAIN.ACCUMULATION_STEPS
    optimizer = build_optimizer(config, model, global_batch)
    return TrainState(
        model=model,
        ema=ModelEmaV3(model, decay=ema.DECAY, use_warmup=ema.WARMUP) if ema.ENABLE else None,
        optimizer=optimizer,
        schedule=Schedule(config, optimizer, steps_per_epoch),
        scaler=build_scaler(config, run.world.device),
        steps_per_epoch=steps_per_epoch,
        config=yaml.safe_load(config.dump()),
        epoch=config.TRAIN.START_EPOCH,
        step=config.TRAIN.START_EPOCH * steps_per_epoch,
    )


def resume(run: Run, state: TrainState) -> None:
    """Go on from the newest checkpoint in the run's folder, else from MODEL.RESUME, else start from MODEL.PRETRAINED.

    The folder comes first so that the same command, given again, loses nothing; TRAIN.AUTO_RESUME false turns that off.
    A file in MODEL.RESUME that is not the state of a run is weights to start from.
    """
    config = run.config
    path = newest(run) if config.TRAIN.AUTO_RESUME or not config.MODEL.RESUME else None
    if path and config.MODEL.RESUME and Path(path).resolve() != Path(config.MODEL.RESUME).resolve():
        run.logger.warning(
            f"going on from {path}, where this run stands, instead of {config.MODEL.RESUME}; "
            f"for a new start from there choose another --tag"
        )
    path = path or config.MODEL.RESUME
    saved = read_training_state(path) if path else None
    if saved:
        state.load_state_dict(saved, path)
        state.restore_random_state(run.world.rank)
        run.logger.info(f"resumed {path} at epoch {state.epoch + 1}, step {state.step_in_epoch}")
        for change in changes(saved["config"], state.config):
            run.logger.info(f"changed since: {change}")
    elif path or config.MODEL.PRETRAINED:
        start_from_weights(run, state, path or config.MODEL.PRETRAINED)


def start_from_weights(run: Run, state: TrainState, path: str) -> None:
    config = run.config
    checkpoint = load_checkpoint(path, config.MODEL.WEIGHTS)
    load_pretrained(state.model, checkpoint, drop_head=config.MODEL.DROP_HEAD)
    if state.ema:
        state.ema.set(state.model)
    run.logger.info(f"starting from the weights in {path}")


def newest(run: Run) -> str | None:
    """The newest checkpoint in the run's folder that loads.  Raises UserError when AUTO_RESUME would ignore one."""
    path, skipped = on_main(lambda: newest_checkpoint(run.folder))
    for sentence in skipped:
        run.logger.warning(f"skipped a checkpoint: {sentence}")
    if path and not (run.config.TRAIN.AUTO_RESUME or run.config.EVAL_MODE):
        raise UserError(
            f"'{path}' is of an earlier run, and TRAIN.AUTO_RESUME is off; choose another --tag to start over beside it"
        )
    return path


def build_step(run: Run, state: TrainState) -> OptimizerStep:
    """What turns the micro-batches of a step into an update of `state`."""
    config, device = run.config, run.world.device
    model = parallelise(state.model, config, run.world)
    mixup = build_mixup(config)
    smoothing = 0.0 if mixup else config.MODEL.LABEL_SMOOTHING  # mixup smooths the targets it makes

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)  # (B, C, H, W), (B,)
        if mixup:
            images, targets = mixup(images, targets, step=state.step)
        with autocast(config, device):
            logits = model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    return OptimizerStep(config, run.world, model, loss_of)


def train_epoch(run: Run, state: TrainState, step: OptimizerStep, loader: TrainLoader, request: StopRequest) -> None:
    """What remains of the epoch in progress.  Raises Stopped, the state being saved, when a signal asks for it."""
    config = run.config
    remaining = range(state.step_in_epoch, state.steps_per_epoch)
    if not remaining:  # stopped after the last step, before the evaluation
        return
    state.model.train()
    loader.set_epoch(state.epoch, state.step_in_epoch)
    batches = Pace(loader, state.step)
    for done in progress(remaining, run.world, f"epoch {state.epoch + 1}/{config.TRAIN.EPOCHS}"):
        report = step(state, islice(batches, config.TRAIN.ACCUMULATION_STEPS), stop=request.signum is not None)
        if (done + 1) % config.PRINT_FREQ == 0 or done + 1 == state.steps_per_epoch:
            run.logger.debug(step_line(config, state, report, *batches.lap(state.step), memory_mb(run.world.device)))
        if report.stop:
            save(run, state, "last.pth")
            raise Stopped(request.agreed_signal(), run.folder / "last.pth")
        if config.TRAIN.SAVE_STEPS and state.step % config.TRAIN.SAVE_STEPS == 0:
            save(run, state, "last.pth")
    tell_skipped(run, loader)


def evaluate_state(run: Run, state: TrainState, loader: Loader) -> Results:
    """The plain weights and, where there are, the EMA's."""
    results = evaluate(run, state.model, loader)
    if state.ema:
        results |= {f"ema_{name}": value for name, value in evaluate(run, state.ema.module, loader).items()}
    return results


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, loader: Loader) -> Results:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent (of fewer classes than 5: all), over all processes."""
    device = run.world.device
    share_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    for images, targets in progress(loader, run.world, "evaluating"):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast(run.config, device):
            logits = model(images).float()  # (B, classes)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets))])
    tell_skipped(run, loader)
    loss, top1, top5, images = sum_over_processes(sums).tolist()
    if not images:
        raise UserError(
            f"none of the validation images could be read; check DATA.DATA_PATH '{run.config.DATA.DATA_PATH}'"
        )
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}


def tell_skipped(run: Run, loader: Loader) -> None:
    if loader.skipped:
        run.logger.warning(f"rank {run.world.rank}: {loader.skipped} unreadable images were skipped in this pass")


def finish_epoch(run: Run, state: TrainState, records: Records, results: Results, seconds: float) -> None:
    """Record the epoch just evaluated, count it, and save."""
    config = run.config
    entry = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": state.optimizer.param_groups[0]["lr"],
        "train_loss": state.mean_loss,
        **results,
        "bad_steps": state.bad_steps,
        "seconds": round(seconds, 2),
    }
    improved = max(results["acc1"], results.get("ema_acc1", 0)) > state.best
    state.max_accuracy = max(state.max_accuracy, results["acc1"])
    state.max_accuracy_ema = max(state.max_accuracy_ema, results.get("ema_acc1", -1.0))
    state.epoch += 1
    state.epoch_loss, state.epoch_loss_steps = 0.0, 0
    on_main(lambda: records.write(entry))
    if improved:
        save(run, state, "best.pth")
    save_last(run, state, state.epoch)
    run.logger.info(
        f"epoch {state.epoch}/{config.TRAIN.EPOCHS} in {seconds:.1f}s: training loss {entry['train_loss']:.4f}; "
        f"{summary(results)}; best top-1 {state.best:.2f}%"
    )


def save(run: Run, state: TrainState, name: str) -> None:
    state.gather_random_states()
    on_main(lambda: save_checkpoint(state, run.folder / name))


def save_last(run: Run, state: TrainState, epoch: int) -> None:
    if epoch % run.config.SAVE_FREQ == 0 or epoch == run.config.TRAIN.EPOCHS:
        save(run, state, "last.pth")


def evaluate_file(run: Run, model: nn.Module) -> Results:
    """The weights, plain and EMA, in MODEL.RESUME or MODEL.PRETRAINED, else in the newest checkpoint of the folder.

    Weights to start from with a new head (DROP_HEAD) are not a model that could be evaluated.
    """
    settings = run.config.MODEL
    path = settings.RESUME or (settings.PRETRAINED if not settings.DROP_HEAD else "") or newest(run)
    if not path:
        raise UserError(f"nothing to evaluate: '{run.folder}' holds no checkpoint; name one with --resume")
    loader = build_eval_loader(run.config, rank=run.world.rank, world_size=run.world.size)
    chosen = settings.WEIGHTS
    wanted = read_weights(path) if chosen == "auto" else {chosen: load_checkpoint(path, chosen)}
    results = {}
    for kind, checkpoint in wanted.items():
        load_pretrained(model, checkpoint)
        prefix = "ema_" if kind == "ema" and len(wanted) > 1 else ""
        results |= {f"{prefix}{name}": value for name, value in evaluate(run, model, loader).items()}
    run.logger.info(f"{path}: {summary(results)}")
    return results


@torch.no_grad()
def throughput(run: Run, model: nn.Module) -> Results:
    """Images a second of all processes together and peak memory, in batches of DATA.BATCH_SIZE, after a warm-up."""
    config, device = run.config, run.world.device
    on_gpu = device.type == "cuda"
    warm_up, steps = (50, 30) if on_gpu else (2, 5)
    images = torch.randn(config.DATA.BATCH_SIZE, config.MODEL.IN_CHANS, *image_size(config), device=device)
    model = parallelise(model.eval(), config, World(0, 1, 0, device))
    with autocast(config, device):
        for _ in progress(range(warm_up), run.world, "warming up"):
            model(images)
        seconds = elapsed(lambda: [model(images) for _ in range(steps)], device) / steps
    rate = sum_over_processes(torch.tensor(len(images) / seconds, device=device)).item()
    run.logger.info(
        f"throughput {rate:.1f} images/s, batch {len(images)} a process, peak memory {memory_mb(device):.0f} MB"
    )
    return {"images_per_second": rate, "peak_memory_mb": memory_mb(device)}


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, by the device's own clock on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
