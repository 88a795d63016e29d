"""What an image's size costs and brings: multiply-adds, parameters, activations, accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from yacs.config import CfgNode

from vmamba.analysis import zoo
from vmamba.analysis.plotting import STYLE, line_style, new_figure, save_figure
from vmamba.analysis.tables import check_json, check_page, markdown, parameters, write_json
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.models.flops import complexity
from vmamba.runtime.evaluation import evaluate_alone

MODELS = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224")
COSTS = ("multiply-adds (G)", "activations (M)", "parameters")
ACCURACY = "top-1 (%)"


def scale(
    *,
    models: Sequence[str] = MODELS,
    sizes: Sequence[int] = (224, 448, 672, 896),
    weights: Sequence[str] = (),
    cfg: str | None = None,
    data_path: str | None = None,
    device: str = "auto",
    output: str = "output/scale",
) -> list[dict[str, Any]]:
    """Count each model at each size and, where `cfg` names a data set and `weights` the models', evaluate it there.

    Writes scale.{md,json,pdf,png} into `output`, prints the table and returns its rows.
    Raises UserError for unknown models, weights that do not fit model or config, or a data set that cannot be read.
    """
    if bool(weights) != bool(cfg):
        raise UserError("accuracy needs both --weights, one a model, and --cfg, whose data set is evaluated")
    check_json(Path(output, "scale.json"), "model", "size", *COSTS)
    check_page(Path(output, "scale.md"), r"\| model \| size \|")
    place = zoo.choose_device(device)
    rows = []
    for name, path in zip(models, zoo.pair_weights(models, weights), strict=True):
        for size in sizes:
            subject = zoo.create(name, size, path)
            cost = complexity(subject.model, size)
            row = {"model": subject.title, "size": size}
            row |= zip(COSTS, (cost.macs / 1e9, cost.activations / 1e6, cost.parameters), strict=True)
            if cfg:
                changes = ["DATA.IMG_SIZE", str(size), *(["DATA.DATA_PATH", data_path] if data_path else [])]
                config = get_config(cfg, changes)
                _check_trained_so(subject, path, config, cfg)
                row |= {"weights": subject.weights, "file": path, "data": zoo.data_of(config), ACCURACY: None}
                if path:
                    row[ACCURACY] = evaluate_alone(config, subject.model, place)["acc1"]
            rows.append(row)
    folder = Path(output)
    write_json(folder / "scale.json", rows)
    write_text(folder / "scale.md", markdown(rows))
    plot(rows, folder / "scale")
    print(markdown(rows))
    print(f"written to {folder}")
    return rows


def _check_trained_so(subject: zoo.Subject, path: str | None, config: CfgNode, cfg: str) -> None:
    """Raises UserError for weights of other classes or channels than `config`, of the file `cfg`, has."""
    for key, own in (("NUM_CLASSES", subject.model.num_classes), ("IN_CHANS", subject.in_chans)):
        if path and own != config.MODEL[key]:
            raise UserError(
                f"'{path}' has MODEL.{key} {own}, but '{cfg}' has {config.MODEL[key]}; name the config that these "
                f"weights were trained with (of a run its config.yaml), or weights of that config"
            )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a quantity, a line a model and its weights."""
    panels = [name for name in (*COSTS[:2], ACCURACY) if name in rows[0]]
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row.get("weights"), row.get("file")), []).append(row)
    with rc_context(STYLE):
        figure = new_figure(3.8 * len(panels), 3.2 + 0.17 * len(lines))
        grid = figure.subplots(1, len(panels))
        for axes, panel in zip(grid, panels, strict=True):
            for number, ((model, weights, _), own) in enumerate(lines.items()):
                points = [(row["size"], row[panel]) for row in own if row[panel] is not None]
                label = ", ".join(filter(None, [model, parameters(*(row["parameters"] for row in own)), weights]))
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, **line_style(number))
            axes.set(xlabel="image side (pixels)", ylabel=panel, ylim=(0, None))
            axes.set_xticks(sorted({row["size"] for row in rows}))
            axes.grid(alpha=0.3)
            if panel == ACCURACY:
                axes.set_title(f"held-out images of {rows[0]['data']}")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
        save_figure(figure, path)
