"""What a run leaves beside its checkpoints: one JSON line an epoch, tensorboardX events, a picture of the curves."""

import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from vmamba.files import cannot_write, write_atomically
from vmamba.runtime.logging import read_metrics, write_metrics

SECONDS_BETWEEN_PICTURES = 60  # one takes half a second


class Records:
    """metrics.jsonl, tensorboardX events and curves.png in `folder`, continued by a run that resumes there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events: SummaryWriter | None = None
        self.drawn = -SECONDS_BETWEEN_PICTURES

    def write(self, entry: dict[str, Any]) -> None:
        """Record one epoch.  Raises UserError when the folder cannot be written."""
        write_metrics(self.folder / "metrics.jsonl", entry)
        try:
            if self.events is None:  # what a killed run wrote of this epoch and later ones is superseded
                self.events = SummaryWriter(str(self.folder), purge_step=entry["epoch"])
            for name, value in entry.items():
                if value is not None and name != "epoch":
                    self.events.add_scalar(name, value, entry["epoch"])
            self.events.flush()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES:
            self.draw()

    def draw(self) -> None:
        """Draw what is recorded so far; after the last epoch it is for the caller to ask."""
        draw_curves(read_metrics(self.folder / "metrics.jsonl"), self.folder / "curves.png")
        self.drawn = time.monotonic()


_PANELS = {
    "loss": {"train_loss": "training", "loss": "held out", "ema_loss": "held out, EMA"},
    "top-1 (%)": {"acc1": "plain", "ema_acc1": "EMA"},
    "learning rate": {"lr": None},
}


def draw_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs in `metrics` (see `read_metrics`) into a PNG file."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for name, label in curves.items():
            points = [(entry["epoch"], entry[name]) for entry in metrics if entry.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 3 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
