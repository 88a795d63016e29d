"""Runs side by side: what their configs differ in, and what came out, over seeds with mean and deviation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from yacs.config import CfgNode

from vmamba.analysis.tables import check_json, check_page, write_json
from vmamba.analysis.tables import markdown as markdown_table
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.runtime.records import is_number, read_metrics, results_of
from vmamba.runtime.task import open_task
from vmamba.text import counted, printable

ALIKE = ("SEED", "NAME", "TAG", "OUTPUT")  # runs that differ in nothing else are repetitions of one


@dataclass(frozen=True)
class Run:
    name: str
    headline: str  # the result that decides
    settings: dict[str, Any]  # of the config, by key
    metrics: list[dict[str, Any]]  # of each round
    unfinished: str | None  # how far it came, "44 of 200 epochs"; None where that is to its end


def compare(runs: Sequence[str], *, output: str = "output/compare") -> list[dict[str, Any]]:
    """Write a table with a line for each setting, compare.{md,json}, into `output`.

    Runs that differ in their seed alone are one line; a folder that is given twice, by whatever path, is one run.  One
    that holds no round of training, as a start that was refused leaves it, is left out, and named.  One that was
    stopped, or goes on, is a line of its own that says how far it came, and is named too.

    Args:
        runs: folders of runs.

    Returns the lines: the settings that differ; how many runs, of how many seeds; of the task's result the best round
    and the last one, mean and standard deviation over the runs, "(2 of 3)" where not all have one; images a second,
    memory and hours, means.  An evaluation that found what is not finite does not count.  Raises UserError for a folder
    that is none of a run, where none is left, and for runs of several tasks, whose results are not alike.
    """
    check_json(Path(output, "compare.json"), "run", "runs", "seeds")
    check_page(Path(output, "compare.md"), r"\| run \|")
    places = [Path(run).resolve() for run in runs]
    folders = [Path(run) for number, run in enumerate(runs) if places[number] not in places[:number]]
    empty = {folder: why for folder in folders if (why := _why_empty(folder))}
    if len(empty) == len(folders):
        raise UserError(f"{'; '.join(empty.values())}; name runs that have one")
    found = [read_run(folder) for folder in folders if folder not in empty]
    kinds = sorted({run.headline for run in found})
    if len(kinds) > 1:
        raise UserError(f"the runs have results of several kinds ({', '.join(kinds)}); give those of one task")
    unfinished = [run for run in found if run.unfinished]
    groups: dict[str, list[Run]] = {}
    for number, run in enumerate(found):
        alone = number if run.unfinished else None  # fewer steps are no repetition
        groups.setdefault(repr((_told_apart(run.settings), alone)), []).append(run)
    first = [group[0].settings for group in groups.values()]
    keys = [key for key in _told_apart({key: None for each in first for key in each}) if _differ(first, key)]
    averaged = any(_best(run, f"ema_{run.headline}") is not None for run in found)
    rows = [_row(group, keys, averaged, bool(unfinished)) for group in groups.values()]
    notes = [f"Not finished, so in no mean over seeds: '{run.name}', {run.unfinished}.\n" for run in unfinished]
    notes += [f"Left out: {why}.\n" for why in empty.values()]
    table = "\n".join([markdown_table(rows), *notes])
    write_text(Path(output, "compare.md"), table)
    write_json(Path(output, "compare.json"), rows)
    print(table)
    return rows


def _why_empty(folder: Path) -> str:
    """Why the folder of a run has nothing to compare; "" where it has.  Raises UserError where it is of none."""
    if not (folder / "config.yaml").is_file():
        if not any((folder / name).is_file() for name in ("run.json", "log.txt")):
            raise UserError(f"'{printable(folder)}' holds no config.yaml; name the folder of a run")
        return f"'{printable(folder)}' holds a start that trained nothing (its log.txt says why)"
    return "" if read_metrics(folder / "metrics.jsonl") else f"'{printable(folder)}' holds no round of training yet"


def read_run(folder: Path) -> Run:
    """Raises UserError where it holds no run, or one without a round."""
    why = _why_empty(folder)
    if why:
        raise UserError(f"{why}; leave it out")
    config = get_config(folder / "config.yaml")
    metrics = read_metrics(folder / "metrics.jsonl")
    name = f"{folder.parent.name}/{folder.name}"
    return Run(name, open_task(config).headline, dict(flat(config)), metrics, _unfinished(config, metrics[-1]))


def _unfinished(config: CfgNode, last: Mapping[str, Any]) -> str | None:
    """How far a run came whose last round is `last`; None where its config asks for no more."""
    train = config.TRAIN
    if 0 < train.PATIENCE <= last.get("unimproved", 0):
        return None
    unit, planned = ("step", train.STEPS) if train.STEPS else ("epoch", train.EPOCHS)
    done = last.get(unit, 0)
    shown = f"{done:,}" if isinstance(done, int) else f"{done:,.2f}"
    return f"{shown} of {counted(planned, unit)}" if done < planned else None


def flat(node: CfgNode, path: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a config, MODEL.NAME and so on, with their values."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _told_apart(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ALIKE}


def _differ(settings: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(each.get(key) != settings[0].get(key) for each in settings)


def _row(group: Sequence[Run], keys: Sequence[str], averaged: bool, unfinished: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"run": group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"}
    row |= {key: str(group[0].settings.get(key, "–")) for key in keys}
    if unfinished:
        row["unfinished"] = group[0].unfinished
    row |= {"runs": len(group), "seeds": len({run.settings["SEED"] for run in group})}
    for kind in ("", "ema_") if averaged else ("",):
        name = kind + group[0].headline
        row[f"best {name}"] = spread([_best(run, name) for run in group])
        row[f"last {name}"] = spread([_last(run, name) for run in group])
    rates = [median(rate) for run in group if (rate := _numbers(run, "images_per_second"))]
    memory = [number for run in group for number in _numbers(run, "memory_mb")]
    row["images/s"] = mean(rates) if rates else None
    row["memory (MB)"] = max(memory, default=None)
    row["hours"] = mean(sum(_numbers(run, "seconds")) for run in group) / 3600
    return row


def _numbers(run: Run, name: str) -> list[float]:
    """Of the rounds that have one: a round that only evaluated anew has no rate."""
    return [entry[name] for entry in run.metrics if is_number(entry.get(name))]


def _best(run: Run, name: str) -> float | None:
    """Of the rounds whose evaluation counts."""
    return max((found[name] for entry in run.metrics if name in (found := results_of(entry))), default=None)


def _last(run: Run, name: str) -> float | None:
    """Of the last round that was evaluated, where that counts."""
    evaluated = [entry for entry in run.metrics if name in entry]
    return results_of(evaluated[-1]).get(name) if evaluated else None


def spread(values: Sequence[float | None]) -> str | None:
    """Mean, and the deviation of a sample, of those of several that are there; how many these are, where not all."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    told = f"{mean(found):.2f}" if len(found) == 1 else f"{mean(found):.2f} ± {stdev(found):.2f}"
    return told if len(found) == len(values) else f"{told} ({len(found)} of {len(values)})"
