"""What an image's size costs and brings: multiply-adds, parameters, activations, accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from vmamba.analysis import zoo
from vmamba.analysis.plotting import MARKERS, STYLE, new_figure, save_figure
from vmamba.analysis.tables import markdown, write_json
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.models.flops import complexity
from vmamba.runtime.evaluation import evaluate_alone

COSTS = ("multiply-adds (G)", "activations (M)", "parameters (M)")


def scale(
    models: Sequence[str],
    sizes: Sequence[int],
    weights: Sequence[str],
    cfg: str | None,
    data_path: str | None,
    device: str,
    output: str,
) -> list[dict[str, Any]]:
    """Count each model at each size and, where `cfg` names a data set and `weights` the models', evaluate it there.

    Writes scale.{md,json,pdf,png} into `output`, prints the table and returns its rows.
    Raises UserError for unknown models, weights that do not fit, or a data set that cannot be read.
    """
    if bool(weights) != bool(cfg):
        raise UserError("accuracy needs both --weights, one a model, and --cfg, whose data set is evaluated")
    place = zoo.choose_device(device)
    rows = []
    for name, path in zip(models, zoo.pair_weights(models, weights), strict=True):
        for size in sizes:
            subject = zoo.create(name, size, path)
            cost = complexity(subject.model, size)
            row = {"model": name, "size": size}
            row |= zip(COSTS, (cost.macs / 1e9, cost.activations / 1e6, cost.parameters / 1e6), strict=True)
            if cfg:
                changes = ["DATA.IMG_SIZE", str(size), *(["DATA.DATA_PATH", data_path] if data_path else [])]
                row |= {"weights": subject.weights, "top-1 (%)": None}
                if path:
                    row["top-1 (%)"] = evaluate_alone(get_config(cfg, changes), subject.model, place)["acc1"]
            rows.append(row)
    folder = Path(output)
    write_json(folder / "scale.json", rows)
    write_text(folder / "scale.md", markdown(rows))
    plot(rows, folder / "scale")
    print(markdown(rows))
    print(f"written to {folder}")
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel a quantity, a line a model."""
    panels = [name for name in (*COSTS[:2], "top-1 (%)") if name in rows[0]]
    with rc_context(STYLE):
        figure = new_figure(3.8 * len(panels), 3.2)
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for name, marker in zip(dict.fromkeys(row["model"] for row in rows), MARKERS * len(rows), strict=False):
                points = [(row["size"], row[panel]) for row in rows if row["model"] == name and row[panel] is not None]
                label = name
                if panel == "top-1 (%)":
                    label += "\n" + next(row["weights"] for row in rows if row["model"] == name)
                if points:
                    axes.plot(*zip(*points, strict=True), marker=marker, label=label)
            axes.set(xlabel="image side (pixels)", ylabel=panel, ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        figure.supxlabel("costs are those of the architecture, whatever its weights", fontsize=7)
        save_figure(figure, path)
