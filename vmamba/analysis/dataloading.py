"""What feeds training: reading, decoding, augmentation, collation, transfer and the step timed apart; images a second
by the number of loading processes; and which of them a run waits for."""

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torch import nn
from torch.utils.data import Dataset
from yacs.config import CfgNode

from vmamba.analysis.speed import describe
from vmamba.analysis.tables import check_json, check_page, write_json
from vmamba.analysis.tables import markdown as markdown_table
from vmamba.analysis.zoo import choose_device
from vmamba.classification.source import Source
from vmamba.classification.transforms import let_posterize_take_zero_bits
from vmamba.config import get_config, image_size
from vmamba.data.draws import IMAGE, permutation, preserved_generators, seed_generators
from vmamba.data.images import UnreadableImage, reading
from vmamba.data.loaders import Examples, Key, Loader
from vmamba.errors import UserError
from vmamba.files import make_folder, write_atomically, write_text
from vmamba.models import freezing
from vmamba.runtime.distributed import World
from vmamba.runtime.feed import Feed, to_device
from vmamba.runtime.plan import build_plan
from vmamba.runtime.precision import autocast, set_up_precision
from vmamba.runtime.run import Run
from vmamba.runtime.start import build_state
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.task import open_task
from vmamba.text import counted
from vmamba.timing import elapsed

CONFIG = "configs/vmamba_tiny_s1l8.yaml"
MODES = ("training", "evaluation")
_CLASSES = 10  # of generated images
_SIZES = ((500, 375), (500, 375), (500, 375), (500, 333), (375, 500), (333, 500), (500, 500), (640, 480))  # ImageNet's
_TIMED = 256  # images, of which the parts on one core are timed


def dataloading(
    *,
    cfg: str = CONFIG,
    data_path: str = "",
    images: int = 2000,
    workers: Sequence[int] = (1, 2, 4, 8),
    modes: Sequence[str] = MODES,
    seconds: float = 10,
    opts: Sequence[str] = (),
    device: str = "auto",
    output: str = "output/dataloading",
) -> dict[str, Any]:
    """Time what feeds a classification, and write dataloading.{md,json} into `output`.

    Args:
        cfg: config file of the run; `opts` are keys and values over it.
        data_path: of its data set; empty, and where `opts` name none: JPEGs of ImageNet's sizes, made in
            `output`/jpegs and kept there.
        images: so many of those to train on, and a fifth of it to evaluate on.
        workers: numbers of loading processes.
        modes: of `MODES`.
        seconds: that each rate is measured for.

    Returns what is in the JSON file.  Raises UserError for another task, where the data is not there, and for an image
    that cannot be read, unless DATA.SKIP_BAD_IMAGES says to leave it out.
    """
    check_json(Path(output, "dataloading.json"), "machine", "torch", "batch", "config")
    check_page(Path(output, "dataloading.md"), r"# What feeds training\n")
    place = choose_device(device)
    if (task := get_config(cfg, opts).TASK) != "classification":
        raise UserError(f"{cfg} is of {task}; this times the images of a classification")
    given = ["DATA.DATA_PATH", data_path] if data_path else []
    jpegs = Path(output, "jpegs") if not (data_path or {"DATA.DATASET", "DATA.DATA_PATH"} & {*opts[::2]}) else None
    if jpegs:
        given = ["DATA.DATASET", "imagenet", "DATA.DATA_PATH", str(jpegs), "MODEL.NUM_CLASSES", str(_CLASSES)]
    config = get_config(cfg, [*given, "DEVICE", place.type, "DATA.NUM_WORKERS", "0", *opts])
    if jpegs:
        make_jpegs(jpegs, max(images, 2 * config.DATA.BATCH_SIZE))
    set_up_precision(config, place)
    found = {mode: measure(config, mode == "training", place, workers, seconds) for mode in modes}
    machine = f"{describe(place)}, {cores()} cores"
    told = {"machine": machine, "torch": torch.__version__, "batch": config.DATA.BATCH_SIZE, "config": cfg, **found}
    where = config.DATA.DATA_PATH or config.DATA.DATASET
    page = (
        f"# What feeds training\n\n{machine}, PyTorch {torch.__version__}, {date.today()}; written by "
        f"`analyze/dataloading.py`.\n\n{cfg}{' with ' + ' '.join(opts) if opts else ''}, batch "
        f"{config.DATA.BATCH_SIZE}, images of {where}. Each part by itself: reading by the clock, up to collation on "
        f"one core, then on the device.\n\n" + "\n".join(_page(mode, found[mode]) for mode in modes)
    )
    write_text(Path(output, "dataloading.md"), page)
    write_json(Path(output, "dataloading.json"), told)
    print(page)
    return told


def measure(
    config: CfgNode, training: bool, device: torch.device, workers: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Of one mode: `parts` (seconds an image), `loading` and `from_files` (images a second by number of processes),
    `waited` (the share of the latter's time in which the device had no batch), `by_timm` (from files by timm's loader),
    `core` (seconds of a core an image), `step` (images a second that the device could take)."""
    run = Run(config, open_task(config), World(0, 1, 0, device), logging.getLogger("vmamba"))
    loader = run.task.train_loader(run.world) if training else run.task.eval_loader(run.world)
    parts = time_loading(config, loader, training)
    model = run.task.build_model().to(device)
    work, end = (trainer if training else evaluator)(run, model, loader)
    batch = next(iter(endless(config, loader, 0)))
    parts["transfer"] = time_transfer(loader, batch, device) / config.DATA.BATCH_SIZE
    ready = loader.finish(to_device(batch, device))
    repeated = rate(iter(lambda: ready, None), work, end, seconds) * config.DATA.BATCH_SIZE
    parts["step"] = 1 / repeated
    loading, from_files, waited, by_timm = {}, {}, {}, {}
    for number in workers:
        first = config.DATA.PREFETCH_FACTOR * number  # batches that lie ready when the first is asked for
        feeding = endless(config, loader, number)
        batches = iter(feeding)
        loading[number] = rate(batches, lambda batch: None, lambda: None, seconds, first) * config.DATA.BATCH_SIZE
        core = feeding.seconds_an_image
        del batches, feeding  # which ends its processes
        feeding = endless(config, loader, number)
        batches = Feed(feeding, device, feeding.finish, feeding.ahead)
        warm_up(batches, work, end, first)
        before, start = batches.waited(), time.perf_counter()
        from_files[number] = rate(batches, work, end, seconds) * config.DATA.BATCH_SIZE
        waited[number] = (batches.waited() - before) / (time.perf_counter() - start)
        del batches, feeding
        theirs = endless_timm(config, loader, training, device, number)
        by_timm[number] = rate(theirs, work, end, seconds, first) * config.DATA.BATCH_SIZE
        del theirs
    return {
        "parts": parts,
        "loading": loading,
        "from_files": from_files,
        "waited": waited,
        "by_timm": by_timm,
        "core": core,
        "step": repeated,
    }


def time_loading(config: CfgNode, loader: Loader, training: bool) -> dict[str, float]:
    """Seconds an image, of one core; of reading by the clock."""
    images, transform = loader.examples.source, loader.examples.transform
    asked = permutation(config.SEED, 0, len(images)).tolist()[:_TIMED]
    start = time.perf_counter()
    files = {number: file for number in asked if (file := _readable(config, partial(_read, images, number)))}
    read = time.perf_counter() - start

    def decoded_files() -> dict[int, Any]:
        found = {}
        for number, (file, label) in files.items():
            decode = partial(images.decode, file, images.channels, images.name(number))
            if (image := _readable(config, decode)) is not None:
                found[number] = image, label
        return found

    decoded, decoding = _on_a_core(decoded_files)
    if not decoded:
        raise UserError(f"none of {counted(len(asked), 'image')} can be read; check the data path")

    def augmented() -> list[Any]:
        samples = []
        for number, sample in decoded.items():
            seed_generators(config.SEED, IMAGE, 0, number)
            samples.append(transform(sample))
        return samples

    with preserved_generators():
        samples, augmentation = _on_a_core(augmented)
    size = config.DATA.BATCH_SIZE
    _, collation = _on_a_core(
        lambda: [loader.collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    )
    total = {"reading": read, "decoding": decoding, "augmentation": augmentation, "collation": collation}
    return {name: value / len(decoded) for name, value in total.items()}


def _read(images: Any, number: int) -> tuple[Any, int]:
    with reading(images.name(number)):
        return images.source.read(number)


def _readable(config: CfgNode, read: Callable[[], Any]) -> Any:
    """What `read` gives; None of an image that cannot be read and may be left out.  Raises UserError where not."""
    try:
        return read()
    except UnreadableImage as error:
        if config.DATA.SKIP_BAD_IMAGES:
            return None
        raise UserError(f"{error}; mend or remove it, or set DATA.SKIP_BAD_IMAGES true") from error


def _on_a_core(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.thread_time()
    return work(), time.thread_time() - start


def time_transfer(loader: Loader, batch: Any, device: torch.device, repeats: int = 10) -> float:
    """Seconds a batch, from the memory that the loader gives it in, normalised."""
    loader.finish(to_device(batch, device))
    return elapsed(lambda: [loader.finish(to_device(batch, device)) for _ in range(repeats)], device) / repeats


def trainer(run: Run, model: nn.Module, loader: Loader) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """A step of training as a function of a batch on the device; and what waits for the last one."""
    config = run.config
    state = build_state(run, model, build_plan(config, loader.steps_per_epoch))
    freezing.train(model)
    step = OptimizerStep(config, run.world, parallelise(model, config, run.world), run.task.loss)
    size = config.TRAIN.ACCUMULATION_STEPS
    waiting: list[Any] = []

    def work(batch: Any) -> None:
        waiting.append(batch)
        if len(waiting) == size:
            step(state, waiting)
            waiting.clear()

    return work, lambda: step.settle(state)


def evaluator(run: Run, model: nn.Module, loader: Loader) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """What an evaluation does with a batch, likewise."""
    model = parallelise(model.eval(), run.config, World(0, 1, 0, run.world.device))
    meter = run.task.meter(run.world)

    @torch.no_grad()
    def work(batch: Any) -> None:
        with autocast(run.config, run.world.device):
            meter.add(model, batch)

    return work, meter.results


def endless(config: CfgNode, loader: Loader, workers: int) -> Loader:
    """The images of `loader` over and over, epoch by epoch, by so many loading processes."""
    config = config.clone()
    config.defrost()
    config.DATA.NUM_WORKERS = workers
    config.freeze()
    known = loader.examples
    examples = Examples(config, known.source, known.transform, training=known.training)
    return Loader(config, examples, _Endless(config, len(known.source)), loader.collate, loader.finish)


def endless_timm(config: CfgNode, loader: Loader, training: bool, device: torch.device, workers: int) -> Iterator[Any]:
    """Batches on the device as timm's own loader makes them of the same images, with the same augmentation."""
    channels, aug, data = config.MODEL.IN_CHANS, config.AUG, config.DATA
    mean, std = (tuple(data[key]) * (channels // len(data[key])) for key in ("MEAN", "STD"))
    theirs = create_loader(
        _ForTimm(loader.examples.source.source, channels),
        input_size=(channels, *image_size(config)),
        batch_size=data.BATCH_SIZE,
        is_training=training,
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        re_count=aug.RECOUNT,
        scale=tuple(aug.SCALE),
        ratio=tuple(aug.RATIO),
        hflip=aug.HFLIP,
        vflip=aug.VFLIP,
        color_jitter=aug.COLOR_JITTER or None,
        auto_augment=aug.AUTO_AUGMENT,
        interpolation=data.INTERPOLATION,
        mean=mean,
        std=std,
        num_workers=workers,
        crop_pct=config.TEST.CROP_PCT,
        crop_mode="center" if config.TEST.CROP else "squash",
        pin_memory=device.type == "cuda",
        device=device,
        use_multi_epochs_loader=True,  # its processes go on from epoch to epoch
    )
    let_posterize_take_zero_bits(theirs.dataset.transform)
    for _ in count():
        yield from theirs


class _ForTimm(Dataset):
    """Images as Pillow decodes them; timm's loader sets `transform`."""

    def __init__(self, source: Source, channels: int):
        self.source, self.channels, self.transform = source, channels, None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, label = self.source.load(index, self.channels)
        except UnreadableImage:  # timm's data sets give the next one too
            return self[(index + 1) % len(self)]
        return self.transform(image), label


class _Endless:
    def __init__(self, config: CfgNode, images: int):
        self.seed, self.size, self.images = config.SEED, config.DATA.BATCH_SIZE, images

    def __iter__(self) -> Iterator[list[Key]]:
        keys: list[Key] = []
        for epoch in count():
            for index in permutation(self.seed, epoch, self.images).tolist():
                keys.append((epoch, index))
                if len(keys) == self.size:
                    yield keys
                    keys = []


def warm_up(batches: Iterator[Any], work: Callable[[Any], Any], end: Callable[[], Any], first: int) -> None:
    """Work on `first` batches, three at least."""
    for _ in range(max(3, first)):
        work(next(batches))
    end()


def rate(
    batches: Iterator[Any], work: Callable[[Any], Any], end: Callable[[], Any], seconds: float, first: int = 0
) -> float:
    """Batches a second that are got and worked on, after a `warm_up`; `end` waits for the work's end."""
    warm_up(batches, work, end, first)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work(next(batches))
        done += 1
    end()
    return done / (time.perf_counter() - start)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_jpegs(folder: Path, images: int) -> None:
    """`images` to train on in folder/train and a fifth as many in folder/val, a folder a class; 500 x 375 pixels take
    about 105 kB.  What lies there already is not made again.  Raises UserError where they cannot be written."""
    for split, number in (("train", images), ("val", max(_CLASSES, images // 5))):
        for index in range(number):
            path = folder / split / f"class{index % _CLASSES}" / f"{index}.jpg"
            if index < _CLASSES:
                make_folder(path.parent)
            if not path.exists():
                write_atomically(path, lambda file, key=(split == "val", index): file.write(_jpeg(*key)))


def _jpeg(*key: int) -> bytes:
    """Noise of every scale, the finer the weaker, as in photographs."""
    draw = np.random.default_rng(key)
    width, height = _SIZES[key[-1] % len(_SIZES)]
    pixels = np.zeros((height, width, 3), np.float32)
    for scale in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        noise = draw.integers(0, 256, (-(-height // scale), -(-width // scale), 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
        pixels += (np.asarray(layer, np.float32) - 128) * scale**0.1
    pixels = 128 + pixels * (45 / pixels.std())
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def _page(mode: str, found: dict[str, Any]) -> str:
    parts = [
        {"part": name, "ms an image": 1000 * value, "images/s": 1 / value if value else None}
        for name, value in found["parts"].items()
    ]
    rows = [
        {
            "loading processes": number,
            "loading alone, images/s": found["loading"][number],
            f"{mode} from files, images/s": found["from_files"][number],
            "of the device's rate": found["from_files"][number] / found["step"],
            "of the time waiting for data": found["waited"][number],
            "from files by timm's loader, images/s": found["by_timm"][number],
        }
        for number in found["loading"]
    ]
    return f"## {mode.capitalize()}\n\n{markdown_table(parts)}\n{markdown_table(rows)}\n{summary(mode, found)}\n"


def summary(mode: str, found: dict[str, Any]) -> str:
    """Which part limits, and the cores that would be enough."""
    most = max(found["loading"], key=found["loading"].get)
    rates = {
        f"loading by {most} processes": found["loading"][most],
        "the transfer": 1 / found["parts"]["transfer"],
        "the device": found["step"],
    }
    slowest = min(rates, key=rates.get)
    return (
        f"What limits {mode} is {slowest}, {rates[slowest]:,.0f} images/s. The device takes {found['step']:,.0f}, and "
        f"an image takes {1000 * found['core']:.2f} ms of a core: that needs {found['step'] * found['core']:.1f} cores "
        f"for loading.\n"
    )
