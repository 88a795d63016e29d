"""Parameters, multiply-adds and activations of models at any size, ours and timm's by one counter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vmamba.analysis.tables import check_json, check_page, markdown, write_json
from vmamba.analysis.zoo import create
from vmamba.files import write_text
from vmamba.models.flops import complexity
from vmamba.models.variants import VARIANTS

PEERS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
)
MODELS = (*(name for name in VARIANTS if name != "vmamba_digits"), *PEERS)


def flops(
    *, models: Sequence[str] = MODELS, sizes: Sequence[int] = (224,), output: str | Path = "output/flops"
) -> list[dict]:
    """Print `table` and write it to `output`/flops.md and flops.json.  Raises UserError as that does."""
    check_json(Path(output, "flops.json"), "model", "GFLOPs (multiply-adds)")
    check_page(Path(output, "flops.md"), r"\| model \|[^\n]* GFLOPs \(multiply-adds\) \|")
    rows = table(models, sizes)
    text = markdown([row | {"GFLOPs (multiply-adds)": f"{row['GFLOPs (multiply-adds)']:.3f}"} for row in rows])
    write_text(Path(output, "flops.md"), text)
    write_json(Path(output, "flops.json"), rows)
    print(text)
    print(f"written to {output}; {complexity.__module__} states the convention")
    return rows


def table(models: Sequence[str], sizes: Sequence[int]) -> list[dict]:
    """One row a model and size.  Raises UserError for an unknown name, or a size that a model does not take."""
    rows = []
    for name in tqdm(models, disable=None, desc="counting", leave=False):
        for size in sizes:
            with torch.device("meta"):
                model = create(name, size).model
            counted = complexity(model, size)
            rows.append(
                {
                    "model": name,
                    "size": size,
                    "parameters": counted.parameters,
                    "parameters without head": counted.parameters_without_head,
                    "GFLOPs (multiply-adds)": counted.macs / 1e9,
                    "activations (M)": counted.activations / 1e6,
                }
            )
    return rows
