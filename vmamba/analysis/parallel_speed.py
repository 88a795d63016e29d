"""What several GPUs of one machine give: images a second by number of processes, beside one."""

import gc
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from vmamba.analysis.on_noise import Training
from vmamba.analysis.speed import describe
from vmamba.analysis.tables import around_table, check_json, check_page, markdown, replace_table, write_json
from vmamba.analysis.zoo import choose_device
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.models.compilation import COMPILE_MODES, WITH_CUDA_GRAPHS
from vmamba.runtime.distributed import processes
from vmamba.text import counted

MODELS = ("vmamba_tiny_s1l8", "vmamba_base_s1l20")
# TRAIN.PARALLEL, and behind a colon TRAIN.COMPILE where there is one; under FSDP2 there are no CUDA graphs.
WAYS = tuple(
    f"{parallel}:{mode}" if mode else parallel
    for parallel in ("ddp", "fsdp")
    for mode in ("", *COMPILE_MODES)
    if parallel == "ddp" or mode not in WITH_CUDA_GRAPHS
)
_WARM_UP, _ROUNDS = 10, 3  # steps; of as many steps as are asked for, of which the median counts


@dataclass(frozen=True)
class Speed:
    """Of all processes together, a step on `batch` images each."""

    model: str
    way: str
    processes: int
    milliseconds: float
    images_per_second: float
    efficiency: float | None  # images a second over those of one process, times their number; None: one was not timed
    memory_mb: float | None  # at most, of one process; None on a CPU


def parallel_speed(
    *,
    models: Sequence[str] = MODELS,
    counts: Sequence[int] = (1, 2),
    ways: Sequence[str] = ("ddp", "ddp:cudagraphs", "fsdp"),
    size: int = 224,
    batch: int = 64,
    steps: int = 10,
    device: str = "auto",
    output: str = "output/gpus",
    page: str | None = None,
) -> list[Speed]:
    """Train every model on noise by every way with every number of processes; write gpus.{md,json} into `output`.

    Args:
        models: of `vmamba.list_models()` and timm's, as MODEL.NAME takes them.
        counts: numbers of processes, a GPU each.
        ways: of `WAYS`.
        batch: images of a process.
        steps: of a round; the median of three rounds counts.
        page: a Markdown file whose table between "<!-- table -->" and "<!-- end -->" is replaced.

    Raises UserError for what is unknown, for more processes than there are GPUs, and for a process that fails.
    """
    check_json(Path(output, "gpus.json"), "model", "way", "processes")
    check_page(Path(output, "gpus.md"), r"[^\n]* Written by `python analyze/gpus.py`")
    if page:
        around_table(Path(page))
    place = choose_device(device)
    if place.type == "cuda" and max(counts) > torch.cuda.device_count():
        there = counted(torch.cuda.device_count(), "GPU")
        raise UserError(f"--gpus {max(counts)}, and this machine has {there}; give numbers up to that")
    for way in ways:
        if place.type != "cuda" and way.endswith(":cudagraphs"):
            raise UserError(f"--ways {way} needs a GPU, and this runs on {place.type}; leave it out")
    cases = {(model, way): _settings(model, way, size, batch) for model in models for way in ways}
    for settings in cases.values():
        get_config(None, settings)
    found: list[Speed] = []
    for count in sorted(counts):
        for (model, way), (seconds, memory) in zip(cases, _times(count, [*cases.values()], steps, place), strict=True):
            alone = next((one for one in found if (one.model, one.way, one.processes) == (model, way, 1)), None)
            rate = count * batch / seconds
            efficiency = 1.0 if count == 1 else rate / (count * alone.images_per_second) if alone else None
            found.append(Speed(model, way, count, 1000 * seconds, rate, efficiency, memory))
    found.sort(key=lambda speed: [*cases].index((speed.model, speed.way)))
    text = (
        f"{describe(place)}, PyTorch {torch.__version__}, {size} x {size}, bfloat16 autocast, AdamW and an EMA, "
        f"{batch} images of noise a process, {date.today()}: medians of {_ROUNDS} rounds of {counted(steps, 'step')}. "
        f"Written by `python analyze/gpus.py`.\n\n{markdown([_row(speed) for speed in found])}"
    )
    write_text(Path(output, "gpus.md"), text)
    write_json(Path(output, "gpus.json"), [asdict(speed) for speed in found])
    if page:
        replace_table(Path(page), text)
    print(f"{text}\nwritten to {output}")
    return found


def _settings(model: str, way: str, size: int, batch: int) -> list[str]:
    parallel, _, mode = way.partition(":")
    settings = ["MODEL.NAME", model, "DATA.IMG_SIZE", size, "DATA.BATCH_SIZE", batch, "TRAIN.EMA.ENABLE", True]
    return list(map(str, [*settings, "TRAIN.PARALLEL", parallel, "TRAIN.COMPILE", mode]))


def _row(speed: Speed) -> dict[str, Any]:
    return {
        "model": speed.model,
        "way": speed.way,
        "processes": speed.processes,
        "ms a step": f"{speed.milliseconds:.1f}",
        "images/s": f"{speed.images_per_second:,.0f}",
        "efficiency": None if speed.efficiency is None else f"{speed.efficiency:.3f}",
        "memory (MB)": None if speed.memory_mb is None else f"{speed.memory_mb:,.0f}",
    }


def _times(
    count: int, cases: Sequence[Sequence[str]], steps: int, place: torch.device
) -> list[tuple[float, float | None]]:
    """(seconds a step, memory in MB) of each case with `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        try:
            multiprocessing.start_processes(_train, (count, port, cases, steps, place.type, told.name), nprocs=count)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"a process of {count} failed: {last}") from error
        return json.load(told)


def _train(rank: int, count: int, port: int, cases: Sequence[Sequence[str]], steps: int, device: str, to: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = []
    with processes(device) as world:
        for settings in cases:
            told.append(_measure(Training(settings, world), steps))
            torch.compiler.reset()  # which keeps graphs, and their memory
            gc.collect()
            if world.main:
                print(
                    f"{counted(count, 'process', 'processes')}, {' '.join(settings)}: {1000 * told[-1][0]:.1f} ms",
                    flush=True,
                )
        if world.main:
            Path(to).write_text(json.dumps(told))


def _measure(training: Training, steps: int) -> tuple[float, float | None]:
    on_gpu = training.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def round_of(number: int) -> float:
        training.wait()
        start = time.perf_counter()
        for _ in range(number):
            training.step()
        training.wait()  # for the others too: each step sums over all
        return (time.perf_counter() - start) / number

    round_of(_WARM_UP)
    seconds = statistics.median(round_of(steps) for _ in range(_ROUNDS))
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
