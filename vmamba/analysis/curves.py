"""Training curves of runs, overlaid: of ours from their folders, of the released ones from their text logs."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.lines import Line2D

from vmamba.analysis import zoo
from vmamba.analysis.plotting import COLOURS, STYLE, line_style, new_figure, save_figure
from vmamba.analysis.tables import parameters, read_json, write_json
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import cannot_read, check_replaces, check_writable
from vmamba.runtime.records import read_metrics
from vmamba.text import printable

Series = list[tuple[float, float, float]]  # (epochs, hours since the start, value)
PANELS = {  # panel -> its series, each a key, a kind of line and what that line is
    "loss": {
        "train_loss": ("-", "training"),
        "val_loss": ("--", "held out"),
        "ema_val_loss": (":", "held out, EMA"),
    },
    "top-1 (%)": {"acc1": ("--", "held out"), "ema_acc1": (":", "held out, EMA")},
    "learning rate": {"lr": ("-", "training")},
    "gradient norm": {"grad_norm": ("-", "training")},
}
UNITS = (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400))

# What a step's line says, in our log.txt and in the logs of Swin and of the released VMamba.
_MOMENT = re.compile(r"^\[?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
_STEP = re.compile(r"\b(train|Train:) \[(\d+)/\d+\]\[(\d+)/(\d+)\]")
_VALUE = {key: re.compile(rf"\b{key} (\d\S*)(?: \((\S+)\))?") for key in ("lr", "loss", "grad_norm")}
_PARAMETERS = re.compile(r"number of params: (\d+)")
_ACCURACY = re.compile(r"\* Acc@1 (\d+\.?\d*)")


def curves(
    runs: Sequence[str], *, by: str = "epoch", smooth: int = 10, output: str = "output/curves"
) -> dict[str, dict[str, Series]]:
    """Draw the runs' loss, accuracy, learning rate and gradient norm over each other.

    Args:
        runs: folders of our runs, their metrics.jsonl, or text logs of Swin's kind.
        by: what the curves run along, "epoch" or "time".
        smooth: gradient norms are medians of so many logged steps.
        output: folder for curves.{pdf,png} and the numbers, curves.json.

    Returns the series of each run.  Raises UserError for a run that is not there or has nothing to draw.
    """
    numbers = Path(output, "curves.json")
    check_writable(numbers)
    known = {key for series in PANELS.values() for key in series}
    check_replaces(
        numbers, lambda path: all(known >= each.keys() for each in read_json(path).values()), "file of curves"
    )
    found = {_name(run, runs): read_run(Path(run)) for run in runs}
    labels = {name: f"{name}: {describe(Path(run))}" for name, run in zip(found, runs, strict=True)}
    plot(found, labels, by, smooth, Path(output) / "curves")
    write_json(numbers, found)
    print(f"written to {output}")
    return found


def describe(path: Path) -> str:
    """What was trained, and on what, as far as the run says it.  Raises UserError for a config that is not ours."""
    config = _folder(path) / "config.yaml"
    if not path.is_file() or path.name == "metrics.jsonl":
        if not config.is_file():
            return "model and data unknown, there is no config.yaml"
        with torch.device("meta"):
            subject = zoo.of_config(get_config(config))
        return f"{subject.title}, {subject.facts}"
    size = _PARAMETERS.search(_text(path))
    return f"{parameters(int(size[1]))}, data unknown" if size else "model and data unknown"


def read_run(path: Path) -> dict[str, Series]:
    """The series of a run, by the keys in `PANELS`.  Raises UserError where there are none."""
    folder = _folder(path)
    if (folder / "metrics.jsonl").is_file():
        series = _ours(folder)
    elif path.is_file():
        series = read_log(_text(path).splitlines(), path)
    else:
        raise UserError(f"there is no run '{path}'; name a folder with metrics.jsonl, or a text log")
    if not any(series.values()):
        raise UserError(f"'{path}' has no epoch to draw yet; name a run with metrics, or a log with lines of training")
    return series


def read_log(lines: Iterable[str], source: str | Path = "the log") -> dict[str, Series]:
    """The series of a text log of Swin's kind, or of the steps in one of ours.

    Steps give learning rate, gradient norm and, at an epoch's last step, its mean loss; of several accuracies between
    two epochs the first is the plain weights', the second the EMA's.
    Raises UserError, naming `source`, for a line whose date or number is none.
    """
    series: dict[str, Series] = {key: [] for keys in PANELS.values() for key in keys}
    losses: dict[int, tuple[float, float, float]] = {}  # by epoch
    start, hours, epochs, accuracies = None, 0.0, 0.0, 0

    def read(kind: Callable[[str], Any], text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            place = f"the line '{printable(line.strip()):.60}...' of {source}"
            raise UserError(f"'{printable(text)}' is no date or number in {place}; mend or remove it") from error

    for line in lines:
        if moment := _MOMENT.match(line):
            now = read(datetime.fromisoformat, moment[1])
            start = start or now
            hours = (now - start).total_seconds() / 3600
        if step := _STEP.search(line):
            epoch, number, steps = (int(text) for text in step.groups()[1:])
            epoch -= step[1] == "train"  # ours count from one
            epochs, accuracies = epoch + number / steps, 0
            values = {key: found for key, pattern in _VALUE.items() if (found := pattern.search(line))}
            for key in ("lr", "grad_norm"):
                if key in values:
                    series[key].append((epochs, hours, read(float, values[key][1])))
            if "loss" in values and values["loss"][2]:  # the epoch's mean so far: its last line counts
                losses[epoch] = (epochs, hours, read(float, values["loss"][2]))
        elif (accuracy := _ACCURACY.search(line)) and accuracies < 2:
            series[("acc1", "ema_acc1")[accuracies]].append((float(round(epochs)), hours, float(accuracy[1])))
            accuracies += 1
    series["train_loss"] = list(losses.values())
    return series


def _ours(folder: Path) -> dict[str, Series]:
    """Of metrics.jsonl, and of log.txt what only that has: the gradient norm."""
    series: dict[str, Series] = {key: [] for keys in PANELS.values() for key in keys}
    seconds = 0.0
    for entry in read_metrics(folder / "metrics.jsonl"):
        entry = {key: value for key, value in entry.items() if value is not None}
        for key in ("seconds", *(series.keys() & entry.keys())):
            if not isinstance(entry.get(key), (int, float)):
                raise UserError(
                    f"'{folder / 'metrics.jsonl'}' has {entry.get(key)!r:.60} for {key} in the round of epoch "
                    f"{entry.get('epoch')!r:.60}, which is no number; mend or remove that line"
                )
        seconds += entry["seconds"]
        for key in series.keys() & entry.keys():
            series[key].append((entry["epoch"], seconds / 3600, entry[key]))
    log = folder / "log.txt"
    if log.is_file():
        lines = (line for line in _text(log).splitlines() if _STEP.search(line))
        norms = read_log(lines, log)["grad_norm"]
        latest = {epochs: point for epochs, *point in norms}  # where a run was resumed, steps stand there twice
        series["grad_norm"] = [(epochs, *latest[epochs]) for epochs in sorted(latest)]
    return series


def plot(runs: dict[str, dict[str, Series]], labels: dict[str, str], by: str, smooth: int, path: Path) -> None:
    """A panel for each of `PANELS`, a colour a run, which the legend calls by its label; of more runs than colours, a
    colour and a marker."""
    unit, seconds = "epoch", 1
    if by == "time":
        latest = 3600 * max(hours for series in runs.values() for points in series.values() for _, hours, _ in points)
        unit, seconds = max((unit for unit in UNITS if latest >= 2 * unit[1]), key=itemgetter(1), default=UNITS[0])
    styles = [line_style(number) for number in range(len(runs))]
    if len(runs) <= len(COLOURS):  # colours alone tell them apart
        styles = [{"color": style["color"]} for style in styles]
    drawn = {}  # kinds of lines: what they are
    with rc_context(STYLE):
        figure = new_figure(11, 3.4 + 0.17 * len(runs))
        for axes, (title, lines) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            for number, series in enumerate(runs.values()):
                for key, (line, what) in lines.items():
                    points = list(_medians(series[key], smooth)) if key == "grad_norm" else series[key]
                    if points:
                        epochs, hours, values = zip(*points, strict=True)
                        along = epochs if by == "epoch" else [3600 * moment / seconds for moment in hours]
                        marker = styles[number].get("marker") or ("." if len(points) < 3 else None)
                        every = max(1, len(points) // 8)
                        axes.plot(along, values, line, color=styles[number]["color"], marker=marker, markevery=every)
                        drawn[line] = what
            axes.set(title=title, xlabel=unit)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
            axes.grid(alpha=0.3)
            if not axes.lines:
                axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")
        colours = [Line2D([], [], **style, label=label) for style, label in zip(styles, labels.values(), strict=True)]
        figure.legend(handles=colours, loc="outside lower left", fontsize=8)
        kinds = [Line2D([], [], color="black", linestyle=line, label=what) for line, what in drawn.items()]
        figure.legend(handles=kinds, loc="outside upper right", ncols=len(kinds), fontsize=8)
        save_figure(figure, path)


def _medians(series: Series, several: int) -> Iterator[tuple[float, float, float]]:
    for start in range(0, len(series), several):
        part = series[start : start + several]
        yield (*part[len(part) // 2][:2], sorted(value for _, _, value in part)[len(part) // 2])


def _text(log: Path) -> str:
    """Of a log, in which a killed process or another encoding may have left bytes that are no text."""
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise cannot_read(log, error) from error


def _folder(path: Path) -> Path:
    return path.parent if path.name == "metrics.jsonl" else path


def _name(run: str, runs: Sequence[str]) -> str:
    """The shortest end of a run's path that no other has."""
    parts, *others = (Path(path).resolve().parts for path in (run, *runs))
    for count in range(1, len(parts) + 1):
        if sum(other[-count:] == parts[-count:] for other in others) == 1:
            return "/".join(parts[-count:])
    raise UserError(f"'{run}' is named twice; name each run once")
