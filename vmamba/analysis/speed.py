"""How fast models are: images a second, latency, peak memory, against each other in one run.

Clocks, temperature and neighbours change a machine from minute to minute, so the models that are compared take turns
of a few steps, and the median of a model's steps counts.
"""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.analysis import zoo
from vmamba.analysis.plotting import STYLE, line_style, new_figure, save_figure
from vmamba.analysis.tables import check_json, check_page, parameters, write_json
from vmamba.analysis.tables import markdown as markdown_table
from vmamba.errors import UserError, unknown
from vmamba.files import write_text
from vmamba.models.compilation import compile_options
from vmamba.models.flops import complexity
from vmamba.text import counted
from vmamba.timing import elapsed

MODELS = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "train")
CPU_BATCH = 8  # "auto" without a GPU's memory to fill
LARGEST_BATCH = 1024
IN_A_ROW = 5  # steps of a turn


def check_compile(mode: str | None, device: torch.device) -> None:
    """Raises UserError for a mode of `COMPILE_MODES` that the device does not have."""
    if mode == "cudagraphs" and device.type != "cuda":
        raise UserError(f"--compile cudagraphs needs a GPU, and this runs on {device.type}; leave it out")


@dataclass(frozen=True)
class Case:
    """What the models do while they take turns.  A batch of None is the largest power of two that fits."""

    size: int  # pixels a side
    dtype: str  # of autocast; float32: none
    mode: str  # forward: without gradients; train: forward, cross-entropy, backward, AdamW
    batch: int | None
    channels_last: bool = False  # the images


@dataclass(frozen=True)
class Timing:
    """One model in one case.  What did not fit into memory has no time."""

    model: str
    size: int
    dtype: str
    mode: str
    batch: int
    images_per_second: float | None
    milliseconds: float | None  # a step; for batch 1 the latency
    peak_memory_mb: float | None  # weights, activations, gradients, optimiser; None on a CPU
    ratio: float | None  # images a second in units of the model compared with
    parameters: int
    gmacs: float  # multiply-adds of an image's forward pass / 1e9


def throughput(
    *,
    models: Sequence[str] = MODELS,
    sizes: Sequence[int] = (224,),
    batch_sizes: Sequence[int | None] = (None,),
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = ("forward",),
    relative_to: str | None = None,
    compile: str | None = None,
    channels_last: bool = False,
    backend: str = "auto",
    warm_up: int = 3,
    repeats: int = 10,
    device: str = "auto",
    output: str = "output/throughput",
    markdown: str | None = None,
) -> list[Timing]:
    """Time every model in every case, write throughput.{md,json,pdf,png} into `output`, and print the table.

    Args:
        batch_sizes: None is the largest that fits; the forward mode is also timed at batch 1, which is the latency.
        dtypes: of `DTYPES`.
        modes: of `MODES`.
        relative_to: the model that ratios are given to; None: the first.
        compile: of `COMPILE_MODES`; None: not compiled.
        channels_last: give the models channels-last images and weights.
        backend: of our models' scans.
        warm_up, repeats: steps before the timed ones, and these.
        markdown: one more file for the table; none but an earlier one of it is replaced.

    Raises UserError for a model that is unknown or does not take a size or a batch.
    """
    reference = relative_to or models[0]
    if reference not in models:
        raise unknown("model in --relative-to", reference, models)
    check_json(Path(output, "throughput.json"), "settings", "timings")
    for path in filter(None, (Path(output, "throughput.md"), markdown)):
        check_page(path, r"# Throughput\n(?!.*\n#)")  # chapters are of a reader's hand
    place = zoo.choose_device(device)
    check_compile(compile, place)
    timings = time_all(
        models, sizes, batch_sizes, dtypes, modes,
        reference=reference, compile=compile, channels_last=channels_last, backend=backend,
        warm_up=warm_up, repeats=repeats, place=place,
    )  # fmt: skip
    settings = {
        "device": describe(place),
        "torch": torch.__version__,
        "date": str(date.today()),
        "optimizer": "fused AdamW" if place.type == "cuda" else "AdamW",
        "warm_up": warm_up,
        "repeats": repeats,
        "compile": compile,
        "channels_last": channels_last,
        "backend": backend,
        "relative_to": reference,
    }
    folder = Path(output)
    write_json(folder / "throughput.json", {"settings": settings, "timings": [asdict(timing) for timing in timings]})
    page = _page(timings, settings)
    for path in filter(None, (folder / "throughput.md", markdown)):
        write_text(Path(path), page)
    plot(timings, settings["device"], folder / "throughput")
    print(f"written to {folder}")
    return timings


def time_all(
    models: Sequence[str],
    sizes: Sequence[int],
    batch_sizes: Sequence[int | None],
    dtypes: Sequence[str],
    modes: Sequence[str],
    *,
    reference: str,
    compile: str | None,
    place: torch.device,
    warm_up: int,
    repeats: int,
    channels_last: bool = False,
    backend: str = "auto",
) -> list[Timing]:
    """Every model in every case, as of `throughput`, each case's table printed as soon as it is there."""
    timings = []
    for size in sizes:
        subjects = {}
        for name in models:
            model = zoo.create(name, size, backend=backend).model
            subjects[name] = model.to(memory_format=torch.channels_last) if channels_last else model
        gmacs = {name: complexity(model, size).macs / 1e9 for name, model in subjects.items()}
        for case in _cases(size, dtypes, modes, batch_sizes, channels_last):
            new = compare(
                subjects,
                case,
                place,
                warm_up=warm_up,
                repeats=repeats,
                compile=compile,
                reference=reference,
                gmacs=gmacs,
            )
            print(markdown_table([_row(timing) for timing in new]), flush=True)
            timings += new
    return timings


def compare(
    models: dict[str, nn.Module],
    case: Case,
    device: torch.device,
    *,
    warm_up: int,
    repeats: int,
    compile: str | None,
    reference: str,
    gmacs: Mapping[str, float],
) -> list[Timing]:
    """Let the models take turns in one case.

    `reference` is the name of the one that the others are measured in, `gmacs` holds each one's multiply-adds.
    """
    batches, peaks, steps = {}, {}, {}
    # What was compiled for another case would be looked through in every call, and the batch be a variable in this one.
    torch.compiler.reset()
    for name, model in models.items():
        model.to(device).train(case.mode == "train")
        batches[name] = case.batch or largest_batch(model, case, device)
        called = torch.compile(model, **compile_options(model, compile)) if compile else model
        torch.manual_seed(0)
        step = build_step(called, case, batches[name], device)
        try:
            peaks[name] = peak_memory_mb(lambda step=step: [step() for _ in range(warm_up)], model, device)
            if compile and case.mode == "forward":
                torch.manual_seed(0)
                check_agreement(name, compile, step(), build_step(model, case, batches[name], device)(), case)
            steps[name] = step
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        except ValueError as error:  # of a batch norm that is given one value a channel
            raise UserError(
                f"{name} cannot {case.mode} with batches of {counted(batches[name], 'image')} of {case.size} pixels "
                f"({error}); give other --batch-sizes, --sizes or --modes"
            ) from error
    seconds = take_turns(steps, repeats, device, queued=waits_at_the_end(device, max(batches.values())))
    for model in models.values():
        model.zero_grad()
        model.to("cpu")
    rates = {name: batches[name] / seconds[name] for name in steps}
    return [
        Timing(
            model=name,
            size=case.size,
            dtype=case.dtype,
            mode=case.mode,
            batch=batches[name],
            images_per_second=rates.get(name),
            milliseconds=1000 * seconds[name] if name in steps else None,
            peak_memory_mb=peaks.get(name),
            ratio=rates[name] / rates[reference] if name in rates and reference in rates else None,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            gmacs=gmacs[name],
        )
        for name, model in models.items()
    ]


def check_agreement(name: str, compile: str, found: Tensor, expected: Tensor, case: Case) -> None:
    """Raises UserError where a compiled model's logits are, but for rounding, not those of the model as it is."""
    difference = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    bound = 1e-3 if case.dtype == "float32" else 5e-2
    if not difference < bound:
        raise UserError(
            f"{name} compiled ({compile}) is {difference:.1e} away from what it gives as it is, in {case.dtype}, more "
            f"than {bound:g}: it is not timed; choose another --compile, or another version of PyTorch"
        )


def waits_at_the_end(device: torch.device, batch: int) -> bool:
    """Whether a turn's steps are waited for at its end, `take_turns`' queued: not where a step is the latency."""
    return device.type == "cuda" and batch > 1


def take_turns(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, queued: bool = False
) -> dict[str, float]:
    """The median seconds of `repeats` steps of each model, the models taking turns of a few steps.

    A step that follows another model's finds the host's caches full of that one's work, which a training never does:
    where the host limits, that is half as long again (docs/log.md).

    Args:
        queued: the steps of a turn are waited for at its end, as a training does not wait for each, and count as
            their mean; otherwise each step is waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(0, repeats, IN_A_ROW):
        count = min(IN_A_ROW, repeats - done)
        for name, step in steps.items():
            if queued:
                times[name].append(elapsed(lambda: [step() for _ in range(count)], device) / count)  # noqa: B023
            else:
                times[name] += [elapsed(step, device) for _ in range(count)]
    return {name: statistics.median(several) for name, several in times.items()}


def build_step(model: nn.Module, case: Case, batch: int, device: torch.device) -> Callable[[], object]:
    """One step of `case` on random images, as a function to be called again and again."""
    images = torch.randn(batch, _in_chans(model), case.size, case.size, device=device)
    if case.channels_last:
        images = images.to(memory_format=torch.channels_last)
    targets = torch.zeros(batch, dtype=torch.long, device=device)
    autocast = torch.autocast(device.type, DTYPES[case.dtype], enabled=case.dtype != "float32")
    training = case.mode == "train"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda") if training else None

    @torch.no_grad()
    def forward() -> Tensor:
        with autocast:
            return model(images)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return train if training else forward


def largest_batch(model: nn.Module, case: Case, device: torch.device) -> int:
    """The largest power of two, up to `LARGEST_BATCH`, that fits into the GPU's memory; `CPU_BATCH` on a CPU."""
    if device.type != "cuda":
        return CPU_BATCH
    batch = 1
    while 2 * batch <= LARGEST_BATCH:
        try:
            build_step(model, case, 2 * batch, device)()
        except torch.OutOfMemoryError:
            break
        batch *= 2
    model.zero_grad()
    torch.cuda.empty_cache()
    return batch


def peak_memory_mb(work: Callable[[], object], model: nn.Module, device: torch.device) -> float | None:
    """MB of GPU memory that `model`'s tensors and what `work` allocates take at most together; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    before = torch.cuda.memory_allocated(device)  # the weights of all models, among them this one's
    torch.cuda.reset_peak_memory_stats(device)
    work()
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return (torch.cuda.max_memory_allocated(device) - before + own) / 2**20


def plot(timings: Sequence[Timing], device: str, path: Path) -> None:
    """Against the size: images a second at the best batch, a panel a mode and dtype; then multiply-adds."""
    panels = list(dict.fromkeys((timing.mode, timing.dtype) for timing in timings))
    models = dict.fromkeys(timing.model for timing in timings)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(3.6 * (len(panels) + 1), 3.4 + 0.17 * len(models))
        figure.suptitle(f"on {device}, random weights, which do not change the speed", fontsize=9)
        *grid, last = figure.subplots(1, len(panels) + 1)
        for number, name in enumerate(models):
            own = [timing for timing in timings if timing.model == name]
            counts = parameters(*(timing.parameters for timing in own))
            line = line_style(number) | dict(label=f"{name}, {counts}")
            for axes, panel in zip(grid, panels, strict=True):
                best: dict[int, float] = {}  # by size
                for timing in own:
                    if (timing.mode, timing.dtype) == panel and timing.images_per_second:
                        best[timing.size] = max(best.get(timing.size, 0), timing.images_per_second)
                if best:
                    axes.plot(list(best), list(best.values()), **line)
            gmacs = {timing.size: timing.gmacs for timing in own}
            last.plot(list(gmacs), list(gmacs.values()), **line)
        for axes, (mode, dtype) in zip(grid, panels, strict=True):
            axes.set(title=f"{mode}, {dtype}", ylabel="images / s", ylim=(0, None))
        last.set(title="forward pass of an image", ylabel="multiply-adds (G)", ylim=(0, None))
        for axes in (*grid, last):
            axes.set_xlabel("image side (pixels)")
            axes.set_xticks(sorted({timing.size for timing in timings}))
            axes.grid(alpha=0.3)
        figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
        save_figure(figure, path)


def _cases(
    size: int, dtypes: Sequence[str], modes: Sequence[str], batches: Sequence[int | None], channels_last: bool
) -> list[Case]:
    return [
        Case(size, dtype, mode, batch, channels_last)
        for mode in modes
        for dtype in dtypes
        for batch in dict.fromkeys([1, *batches] if mode == "forward" else batches)
    ]


def _in_chans(model: nn.Module) -> int:
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def _row(timing: Timing) -> dict[str, Any]:
    return {
        "model": timing.model,
        "parameters (M)": timing.parameters / 1e6,
        "multiply-adds (G)": timing.gmacs,
        "size": timing.size,
        "dtype": timing.dtype,
        "mode": timing.mode,
        "batch": timing.batch,
        "images/s": timing.images_per_second or "out of memory",
        "ms a step": timing.milliseconds,
        "peak memory (MB)": timing.peak_memory_mb,
        "ratio": timing.ratio,
    }


def _page(timings: Sequence[Timing], settings: dict[str, Any]) -> str:
    compiled = f"torch.compile ({settings['compile']}), " if settings["compile"] else ""
    layout = "channels-last images and weights" if settings["channels_last"] else "PyTorch's default layout"
    return (
        f"# Throughput\n\n"
        f"{settings['device']}, PyTorch {settings['torch']}, {compiled}{layout}, backend {settings['backend']}, "
        f"{settings['date']}; written by `analyze/throughput.py`.\n\n"
        f"The models take turns of {IN_A_ROW} steps; a row is the median of {counted(settings['repeats'], 'step')} "
        f"after {settings['warm_up']} of warm-up. "
        f"bfloat16 and float16 are autocast. Training is forward, cross-entropy, backward and "
        f"{settings['optimizer']}. At batch 1 the "
        f"time of a step is the latency; of larger ones a GPU's turn is waited for at its end, as in training. Peak "
        f"memory is the model's own: weights, activations, gradients, optimiser. "
        f"Ratio is images a second over {settings['relative_to']}'s. Weights are random; they do not change the "
        f"speed.\n\n{markdown_table([_row(timing) for timing in timings])}"
    )


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{counted(torch.get_num_threads(), 'thread')} of a CPU ({platform.machine()})"
