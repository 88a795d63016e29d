"""Exported models beside PyTorch's: whether onnxruntime gives the same, how long it takes, what smaller numbers do.

The models take turns as in `vmamba.analysis.speed`; one image, weights at random.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmamba.analysis import zoo
from vmamba.analysis.speed import describe, take_turns
from vmamba.analysis.tables import check_json, check_page, write_json
from vmamba.analysis.tables import markdown as markdown_table
from vmamba.errors import unknown
from vmamba.exporting import export, graphs
from vmamba.files import write_text
from vmamba.models.vssm import VSSM

MODELS = ("swin_tiny_patch4_window7_224", "vmamba_tiny_s1l8", "vmamba_tiny", "vmamba_tiny_m2")
NUMBERS = ("float32", "float16", "int8")


def exports(
    *,
    models: Sequence[str] = MODELS,
    sizes: Sequence[int] = (224,),
    numbers: Sequence[str] = ("float32",),
    relative_to: str | None = None,
    pytorch: bool = True,
    warm_up: int = 1,
    repeats: int = 7,
    output: str = "output/exports",
    markdown: str | None = None,
) -> list[dict[str, Any]]:
    """Export every model at every size, compare, time, and write exports.{md,json} into `output`.

    Args:
        numbers: of `NUMBERS`: the weights and, of float16, the arithmetic of the ONNX file, converted by onnxruntime's
            tools; int8 is its dynamic quantisation.
        relative_to: the model, in float32, that ratios of time are given to; None: the first.
        pytorch: also time the models in PyTorch.
        warm_up, repeats: steps before the timed ones, and these; 0 repeats compare numbers alone.
        markdown: one more file for the table; none but an earlier one of it is replaced.

    Returns the rows: `difference` is the largest one between onnxruntime's and PyTorch's results of two images, in
    units of the largest result, and `same class` whether the same class comes first.  Raises UserError for an unknown
    model and where a package is missing.
    """
    reference = relative_to or models[0]
    if reference not in models:
        raise unknown("model in --relative-to", reference, models)
    check_json(Path(output, "exports.json"), "settings", "rows")
    for file in filter(None, [Path(output, "exports.md"), markdown]):
        check_page(file, r"[^\n]*; written by `analyze/exports.py`")
    graphs.check_installed("the comparison", "onnx", "onnxscript", "onnxruntime")
    rows = []
    for size in sizes:
        with TemporaryDirectory() as folder:
            rows += _rows(models, size, numbers, reference, pytorch, warm_up, repeats, Path(folder))
    page = _page(rows, reference, repeats)
    settings = {"date": str(date.today()), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(Path(output, "exports.json"), {"settings": settings, "rows": rows})
    for file in filter(None, [Path(output, "exports.md"), markdown]):
        write_text(file, page)
    print(page)
    return rows


@torch.no_grad()
def _rows(
    models: Sequence[str],
    size: int,
    numbers: Sequence[str],
    reference: str,
    pytorch: bool,
    warm_up: int,
    repeats: int,
    folder: Path,
) -> list[dict[str, Any]]:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    rows, steps = [], {}
    for name in models:
        model = zoo.create(name, size).model
        path = folder / f"{name}.onnx"
        start = time.perf_counter()
        _export(model, path, images)
        seconds = time.perf_counter() - start
        expected = model(images)
        if pytorch and repeats:
            steps[name, "pytorch"] = partial(model, images[:1])
        for kind in numbers:
            row = {"model": name, "size": size, "numbers": kind, "export (s)": seconds, "file (MB)": None}
            row |= {"difference": None, "same class": None, "pytorch (ms)": None, "onnxruntime (ms)": None}
            rows.append(row | {"ratio": None})
            try:
                file = _converted(path, kind)
                run = _session(file)
                found = np.concatenate([run(image[None].numpy()) for image in images])
            except Exception as error:  # what the tools of other people say of a graph
                rows[-1]["same class"] = f"fails: {str(error).splitlines()[0]:.90}"
                continue
            difference = np.abs(found - expected.numpy()).max() / expected.abs().max().item()
            same = bool((found.argmax(1) == expected.argmax(1).numpy()).all())
            rows[-1] |= {
                "file (MB)": file.stat().st_size / 1e6,
                "difference": f"{difference:.1e}",
                "same class": "yes" if same else "no",
            }
            if repeats:
                steps[name, kind] = partial(run, images[:1].numpy())
            print(rows[-1], flush=True)
    if repeats:
        _time(rows, steps, reference, warm_up, repeats)
    return rows


def _time(
    rows: Sequence[dict[str, Any]],
    steps: Mapping[tuple[str, str], Callable[[], object]],
    reference: str,
    warm_up: int,
    repeats: int,
) -> None:
    take_turns(steps, warm_up, torch.device("cpu"))
    seconds = take_turns(steps, repeats, torch.device("cpu"))
    compared = seconds.get((reference, "float32"))
    for row in rows:
        own, pytorch = seconds.get((row["model"], row["numbers"])), seconds.get((row["model"], "pytorch"))
        row["pytorch (ms)"] = None if pytorch is None else 1e3 * pytorch
        row["onnxruntime (ms)"] = None if own is None else 1e3 * own
        row["ratio"] = None if own is None or compared is None else own / compared


def _export(model: nn.Module, path: Path, images: Tensor) -> None:
    if isinstance(model, VSSM):
        export(model, path, size=images.shape[2:])
    else:  # as timm's own users do
        options = dict(input_names=["images"], output_names=["logits"], opset_version=18, external_data=False)
        torch.onnx.export(model, (images[:1],), str(path), dynamo=True, verbose=False, **options)


def _converted(path: Path, numbers: str) -> Path:
    """The file with other numbers, beside the one at `path`."""
    import onnx

    file = path.with_suffix(f".{numbers}.onnx")
    if numbers == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(path, file)
    elif numbers == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), file)
    return path if numbers == "float32" else file


def _session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _page(rows: Sequence[Mapping[str, Any]], reference: str, repeats: int) -> str:
    import onnxruntime

    cpu = torch.device("cpu")
    return (
        f"{describe(cpu)}, PyTorch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {date.today()}; written "
        f"by `analyze/exports.py`. One image; the models take turns, a row is the median of {repeats} steps. Ratio is "
        f"onnxruntime's time over that of {reference}. Weights are random.\n\n{markdown_table(rows)}"
    )
