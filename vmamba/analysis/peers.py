"""Our models beside their peers, each in the fastest of its ways: the table of the README."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from vmamba.analysis import zoo
from vmamba.analysis.speed import IN_A_ROW, Timing, check_compile, describe, time_all
from vmamba.analysis.tables import around_table, check_json, check_page, markdown, replace_table, write_json
from vmamba.files import write_text
from vmamba.models.variants import list_models

MODELS = ("vmamba_tiny_s1l8", "vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")
AS_IT_IS = "eager"
WAYS = (AS_IT_IS, "cudagraphs", "reduce-overhead")  # without compilation; of `COMPILE_MODES`
_CASES = {  # column -> mode, and whether it is of one image
    "forward (images/s)": ("forward", False),
    "training (images/s)": ("train", False),
    "one image (ms)": ("forward", True),
}


def peers(
    *,
    models: Sequence[str] = MODELS,
    ways: Sequence[str] = WAYS,
    size: int = 224,
    batch: int = 128,
    dtype: str = "bfloat16",
    warm_up: int = 3,
    repeats: int = 20,
    device: str = "auto",
    output: str = "output/peers",
    page: str | None = None,
) -> list[dict[str, Any]]:
    """Time every model in every way, forward, training and one image; write peers.{md,json} into `output`: for each
    model the best of the ways, by name, and the ratio to the best of timm's models.

    Args:
        ways: of `WAYS` and `COMPILE_MODES`.
        page: a Markdown file whose table between "<!-- table -->" and "<!-- end -->" is replaced by the first.

    Raises UserError as `throughput` does, and for a page without a place for a table.
    """
    check_json(Path(output, "peers.json"), "device", "torch")
    check_page(Path(output, "peers.md"), r"[^\n]* Written by `python analyze/peers.py`")
    if page:
        around_table(Path(page))
    place = zoo.choose_device(device)
    timings: dict[str, list[Timing]] = {}
    for way in ways:
        check_compile(None if way == AS_IT_IS else way, place)
    for way in ways:
        print(f"{way}:", flush=True)
        timings[way] = time_all(
            models, [size], [batch], [dtype], ["forward", "train"],
            reference=models[0], compile=None if way == AS_IT_IS else way, place=place,
            warm_up=warm_up, repeats=repeats,
        )  # fmt: skip
    rows = best_of(timings, models)
    text = (
        f"{describe(place)}, PyTorch {torch.__version__}, {size} x {size}, {dtype}, batch {batch}, {date.today()}: "
        f"medians of {repeats} steps, turns of {IN_A_ROW}; the fastest of {', '.join(ways)}, by name, and in brackets "
        f"how it compares with the best of timm's. Written by `python analyze/peers.py`.\n\n{markdown(rows)}"
    )
    write_text(Path(output, "peers.md"), text)
    everything = {way: [asdict(timing) for timing in found] for way, found in timings.items()}
    write_json(Path(output, "peers.json"), {"device": describe(place), "torch": torch.__version__, **everything})
    if page:
        replace_table(Path(page), text)
    print(f"{text}\nwritten to {output}")
    return rows


def best_of(timings: dict[str, list[Timing]], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row a model, a column a case: the most images a second that it makes in any way."""
    best: dict[str, dict[str, tuple[float, str]]] = {}  # column -> model -> images a second, way
    for column, (mode, one) in _CASES.items():
        for way, found in timings.items():
            for timing in found:
                if timing.mode != mode or (timing.batch == 1) != one or timing.images_per_second is None:
                    continue
                rate = timing.images_per_second, way
                of_models = best.setdefault(column, {})
                of_models[timing.model] = max(of_models.get(timing.model, rate), rate)
    return [
        {"model": model, **{column: _cell(model, column, best.get(column, {})) for column in _CASES}}
        for model in models
    ]


def _cell(model: str, column: str, best: dict[str, tuple[float, str]]) -> str | None:
    if model not in best:
        return None
    rate, way = best[model]
    number = f"{1000 / rate:.2f}" if column.endswith("(ms)") else f"{rate:,.0f}"
    theirs = [other for name, (other, _) in best.items() if name not in list_models()]
    ratio = f" ({rate / max(theirs):.2f})" if theirs and model in list_models() else ""
    return f"{number} {way}{ratio}"
