"""What a run leaves beside its checkpoints: one JSON line a round, tensorboardX events, a picture of the curves."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from yacs.config import CfgNode

from vmamba.errors import UserError
from vmamba.files import write_atomically
from vmamba.text import printable

logger = logging.getLogger("vmamba")
# What a round's line has beside the results of its evaluation.
_OF_TRAINING = {"epoch", "step", "lr", "train_loss", "grad_norm", "bad_steps", "images_per_second", "memory_mb"}
_OF_TRAINING |= {"seconds", "unimproved"}
_OLDER = {"loss": "val_loss", "ema_loss": "ema_val_loss"}  # names of the first version
NOT_COUNTED = "does not count: a loss or a result was not finite"  # of an evaluation
SECONDS_BETWEEN_PICTURES = 60  # one takes half a second


class Records:
    """metrics.jsonl, tensorboardX events and curves.png in `folder`, continued by a run that resumes there.

    The events go to Weights & Biases too, where `config` names a project there (WANDB).
    A record that cannot be written is a warning and no end of the run; the lines of metrics.jsonl are tried again with
    the next one.
    """

    def __init__(self, folder: Path, panels: Mapping[str, str], config: CfgNode | None = None):
        self.folder, self.panels, self.config = folder, panels, config
        self.events: SummaryWriter | None = None
        self.online: Any = None  # a run of wandb
        self.drawn = -SECONDS_BETWEEN_PICTURES
        self.unwritten: list[dict[str, Any]] = []

    def start_over(self) -> None:
        """Put the rounds of an earlier run, whose checkpoints are gone, into a file beside."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            number = next(number for number in count(1) if not path.with_name(f"metrics.{number}.jsonl").exists())
            kept = path.with_name(f"metrics.{number}.jsonl")
            self._try(kept.name, lambda: self._keep(path, kept))

    def write(self, entry: dict[str, Any], events: Mapping[str, float | None]) -> None:
        """Record one round: its line, and `events` at its step."""
        self.unwritten.append(entry)
        self._try("metrics.jsonl", self._write_lines)
        self.write_events(events, entry["step"])
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES:
            self.draw()

    def write_events(self, events: Mapping[str, float | None], step: int) -> None:
        self._try("TensorBoard's events", lambda: self._write_events(events, step))
        if self.config and self.config.WANDB:
            self._try("Weights & Biases' events", lambda: self._send_events(events, step))

    def draw(self) -> None:
        """Draw what is recorded so far; at the end of the run it is for the caller to ask."""
        self.drawn = time.monotonic()
        self._try("curves.png", self._draw)

    def close(self) -> None:
        if self.events is not None:
            self._try("TensorBoard's events", self.events.close)
            self.events = None
        if self.online is not None:
            self._try("Weights & Biases' events", self.online.finish)
            self.online = None

    def _keep(self, path: Path, kept: Path) -> None:
        path.rename(kept)
        logger.warning(f"'{path}' is of an earlier run and this one starts anew; it is {kept.name} now")

    def _draw(self) -> None:
        metrics = read_metrics(self.folder / "metrics.jsonl")
        if metrics:
            draw_curves(metrics, self.folder / "curves.png", self.panels)

    def _write_lines(self) -> None:
        write_metrics(self.folder / "metrics.jsonl", *self.unwritten)
        self.unwritten = []

    def _write_events(self, events: Mapping[str, float | None], step: int) -> None:
        if self.events is None:  # what a killed run wrote of this step and later ones is superseded
            self.events = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in _finite(events).items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def _send_events(self, events: Mapping[str, float | None], step: int) -> None:
        if self.online is None:
            import wandb

            self.online = wandb.init(
                project=self.config.WANDB,
                name=f"{self.config.NAME}/{self.config.TAG}",
                id=hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16],  # a resumed run is the same
                resume="allow",
                dir=str(self.folder),
                config=yaml.safe_load(self.config.dump()),
            )
        self.online.log(_finite(events), step=step)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logger.warning(f"cannot record {what} in '{self.folder}': {error}; the run goes on")


def check_online(config: CfgNode) -> None:
    """Raises UserError where WANDB names a project and the package is not there."""
    if config.WANDB and find_spec("wandb") is None:
        raise UserError(
            f"WANDB is '{printable(config.WANDB)}', and the package wandb is not installed; pip install wandb, or "
            "leave it empty"
        )


def _finite(events: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in events.items() if value is not None and math.isfinite(value)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rounds in a metrics.jsonl, in order, under today's names; other lines are left out, such as one cut short by
    the end of a process."""
    return sorted(_rounds(path)[0], key=_place)


def _rounds(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rounds in a metrics.jsonl, and its lines that are none."""
    rounds, others = [], []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            others.append(line)
            continue
        places = (entry.get("epoch"), entry.get("step", 0)) if isinstance(entry, dict) else (None,)
        if all(isinstance(place, (int, float)) for place in places):
            rounds.append({_OLDER.get(name, name): value for name, value in entry.items()})
        else:
            others.append(line)
    return rounds, others


def results_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """What the evaluation of a round found; nothing where there was none, or it does not count: a loss or a result was
    not finite, which stands as null in metrics.jsonl."""
    found = {name: value for name, value in entry.items() if name not in _OF_TRAINING}
    return found if all(is_number(value) for value in found.values()) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def write_metrics(path: Path, *entries: dict[str, Any]) -> None:
    """Put the lines of rounds into a metrics.jsonl, in the place of earlier lines of those rounds.  What else stands in
    it stays, in front."""
    old, others = _rounds(path)
    metrics = {_place(entry): entry for entry in old}
    for entry in entries:
        metrics[_place(entry)] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
    lines = [*others, *(json.dumps(metrics[place]) for place in sorted(metrics))]
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def _place(entry: Mapping[str, Any]) -> float:
    return entry.get("step", entry["epoch"])


def draw_curves(metrics: list[dict[str, Any]], path: Path, panels: Mapping[str, str]) -> None:
    """Draw the losses, the results of `panels` (title -> name) and the learning rate over the epochs in `metrics` (see
    `read_metrics`) into a PNG file."""
    curves = {"loss": {"train_loss": "training", "val_loss": "held out", "ema_val_loss": "held out, EMA"}}
    curves |= {title: {name: "plain", f"ema_{name}": "EMA"} for title, name in panels.items()}
    curves |= {"learning rate": {"lr": None}}
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for name, label in names.items():
            points = [(entry["epoch"], entry[name]) for entry in metrics if entry.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 3 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
