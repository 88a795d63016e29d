"""How fast detectors and segmenters are, ours and torchvision's, beside each other; and what images of many sizes do.

The models take turns, and the median of a model's steps counts, as in `speed`.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from vmamba.analysis.speed import DTYPES, IN_A_ROW, check_compile, describe, peak_memory_mb, take_turns
from vmamba.analysis.tables import check_json, check_page, write_json
from vmamba.analysis.tables import markdown as markdown_table
from vmamba.analysis.zoo import choose_device
from vmamba.detection.models import create_detector
from vmamba.errors import unknown
from vmamba.files import write_text
from vmamba.models.compilation import compile_options
from vmamba.segmentation.models import create_segmenter
from vmamba.text import counted
from vmamba.timing import elapsed

BACKBONES = ("vmamba_tiny_s1l8", "vmamba_tiny", "timm/swin_tiny_patch4_window7_224", "timm/resnet50")
TORCHVISION = "torchvision"  # its own Mask R-CNN, on ResNet-50
TASKS = ("detection", "segmentation")
MODES = ("forward", "train")
_OBJECTS = 8  # of an image to train on


@dataclass(frozen=True)
class Case:
    task: str
    mode: str
    dtype: str
    batch: int
    size: tuple[int, int]  # (height, width)
    compile: str | None = None  # of COMPILE_MODES


def tasks_speed(
    *,
    task: str = "detection",
    backbones: Sequence[str] = BACKBONES,
    size: tuple[int, int] = (800, 1280),
    batch: int = 2,
    dtype: str = "bfloat16",
    modes: Sequence[str] = MODES,
    warm_up: int = 5,
    repeats: int = 20,
    random_sizes: int = 0,
    compile: str | None = None,
    deterministic: bool = False,
    device: str = "auto",
    output: str = "output/tasks_speed",
    markdown: str | None = None,
) -> list[dict[str, Any]]:
    """Time Mask R-CNN or UperNet on every backbone, and write {task}.{md,json} into `output`.

    Args:
        task: of `TASKS`.
        backbones: of our models or timm's; for detection "torchvision" is its own Mask R-CNN on ResNet-50.
        size: of the images, (height, width).
        modes: "forward" is whole inference, suppression and masks included; "train" forward, backward and AdamW.
        random_sizes: steps of training on images of sizes drawn anew, after which time and memory are told; 0: none.
        compile: of `COMPILE_MODES`; None: not compiled.  Of detectors that is the backbone alone, torchvision's aside.
        deterministic: with `torch.use_deterministic_algorithms`, which on a GPU needs CUBLAS_WORKSPACE_CONFIG=:4096:8.
        markdown: one more file for the table; none but an earlier one of it is replaced.

    Returns the rows.  Raises UserError for an unknown task or backbone, and for cudagraphs without a GPU.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    check_json(Path(output, f"{task}.json"), "device", "torch", "rows")
    for path in filter(None, (Path(output, f"{task}.md"), markdown)):
        check_page(path, r"# (Detection|Segmentation): speed\n(?!.*\n#)")  # chapters are of a reader's hand
    place = choose_device(device)
    check_compile(compile, place)
    rows = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for mode in modes:
            rows += compare([*backbones], Case(task, mode, dtype, batch, size, compile), place, warm_up, repeats)
        for name in backbones if random_sizes else ():
            if name != TORCHVISION:
                case = Case(task, "train", dtype, batch, size, compile)
                rows.append(over_sizes(name, case, place, random_sizes))
    finally:
        torch.use_deterministic_algorithms(False)
    optimizer = "fused AdamW" if place.type == "cuda" else "AdamW"
    way = (f", compiled ({compile})" if compile else "") + (", deterministic algorithms" if deterministic else "")
    page = (
        f"# {task.capitalize()}: speed\n\n{describe(place)}, PyTorch {torch.__version__}, {date.today()}; written by "
        f"`analyze/tasks_speed.py`.\n\nThe models take turns of {IN_A_ROW} steps; a row is the median of "
        f"{counted(repeats, 'step')} after {warm_up} of warm-up, {dtype}, {optimizer}{way}, batch {batch}, images of "
        f"{size[0]} x {size[1]}; peak memory is the model's own. Weights are random.\n\n"
    )
    kinds = dict.fromkeys(tuple(row) for row in rows)
    page += "\n".join(markdown_table([row for row in rows if tuple(row) == kind]) for kind in kinds)
    for path in filter(None, (Path(output, f"{task}.md"), markdown)):
        write_text(Path(path), page)
    write_json(Path(output, f"{task}.json"), {"device": describe(place), "torch": torch.__version__, "rows": rows})
    print(page)
    return rows


def compare(names: Sequence[str], case: Case, device: torch.device, warm_up: int, repeats: int) -> list[dict[str, Any]]:
    torch.compiler.reset()  # of other cases
    models = {name: build(name, case).to(device).train(case.mode == "train") for name in names}
    steps = {name: build_step(model, case, device, case.size) for name, model in models.items()}
    peaks = {
        name: peak_memory_mb(lambda step=step: [step() for _ in range(warm_up)], models[name], device)
        for name, step in steps.items()
    }
    seconds = take_turns(steps, repeats, device)
    return [
        {
            "model": name,
            "parameters (M)": sum(parameter.numel() for parameter in models[name].parameters()) / 1e6,
            "mode": case.mode,
            "images/s": case.batch / seconds[name],
            "ms a step": 1000 * seconds[name],
            "peak memory (MB)": peaks[name],
            "ratio": seconds[names[0]] / seconds[name],
        }
        for name in names
    ]


def over_sizes(name: str, case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """Train on images whose sides are drawn anew in each step; of the first and the last tenth of the steps the median
    time, and memory after them."""
    torch.compiler.reset()  # of other cases
    model = build(name, case).to(device).train()
    optimizer = build_optimizer(model)
    draw, times, memory = random.Random(0), [], []
    for _ in range(steps):
        size = tuple(32 * draw.randint(max(1, side // 64), side // 32) for side in case.size)
        times.append(elapsed(build_step(model, case, device, size, optimizer), device))
        memory.append(torch.cuda.memory_reserved(device) / 2**20 if device.type == "cuda" else None)
    tenth = max(1, steps // 10)
    return {
        "model": name,
        "steps of random sizes": steps,
        "ms a step, first tenth": 1000 * statistics.median(times[:tenth]),
        "last tenth": 1000 * statistics.median(times[-tenth:]),
        "memory held then (MB)": memory[tenth - 1],
        "at the end": memory[-1],
    }


def build(name: str, case: Case) -> nn.Module:
    if case.task == "segmentation":
        model = create_segmenter("upernet", backbone=name)
    elif name == TORCHVISION:
        sides = min(case.size), max(case.size)
        return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1])
    else:
        model = create_detector("mask_rcnn", backbone=name)
    if case.compile:
        model.compile(**compile_options(model, case.compile))
    return model


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=next(model.parameters()).is_cuda)


def build_step(
    model: nn.Module,
    case: Case,
    device: torch.device,
    size: Sequence[int],
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], object]:
    """One step on random images of `size`, as a function to be called again and again."""
    images = torch.randn(case.batch, 3, *size, device=device)
    autocast = torch.autocast(device.type, DTYPES[case.dtype], enabled=case.dtype != "float32")
    arguments = _arguments(model, case, images)
    if case.mode == "forward":

        @torch.no_grad()
        def forward() -> object:
            with autocast:
                return model(*arguments[:1])

        return forward
    optimizer = optimizer or build_optimizer(model)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            losses = model(*arguments)
        sum(value for name, value in losses.items() if "loss" in name).backward()
        optimizer.step()

    return train


def _arguments(model: nn.Module, case: Case, images: Tensor) -> tuple[Any, ...]:
    """What a model is called with to train; the first of them to predict."""
    size, device = tuple(images.shape[2:]), images.device
    if case.task == "segmentation":
        return images, torch.randint(0, 150, (case.batch, *size), device=device)
    limits = torch.tensor([size[1], size[0]], device=device)
    targets = []
    for _ in range(case.batch):
        start = torch.rand(_OBJECTS, 2, device=device) * limits * 0.6
        boxes = torch.cat([start, start + (0.1 + 0.3 * torch.rand(_OBJECTS, 2, device=device)) * limits], 1)
        masks = torch.ones(_OBJECTS, *size, dtype=torch.uint8, device=device)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 80, (_OBJECTS,), device=device), "masks": masks})
    if not hasattr(model, "rpn_head"):  # torchvision's
        return list(images), targets
    return images, [size] * case.batch, targets
