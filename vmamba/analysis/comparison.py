"""Runs side by side: what their configs differ in, and what came out, over seeds with mean and deviation."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from vmamba.analysis.tables import markdown as markdown_table
from vmamba.analysis.tables import write_json
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.files import check_writable, write_text
from vmamba.runtime.records import read_metrics
from vmamba.runtime.task import open_task
from vmamba.text import printable

ALIKE = ("SEED", "NAME", "TAG", "OUTPUT")  # runs that differ in nothing else are repetitions of one


@dataclass(frozen=True)
class Run:
    name: str
    headline: str  # the result that decides
    settings: dict[str, Any]  # of the config, by key
    metrics: list[dict[str, Any]]  # of each round


def compare(runs: Sequence[str], *, output: str = "output/compare") -> list[dict[str, Any]]:
    """Write a table with a line for each setting, compare.{md,json}, into `output`.

    Runs that differ in their seed alone are one line.

    Args:
        runs: folders of runs.

    Returns the lines: the settings that differ; of the task's result the best round and the last one, mean and standard
    deviation over the runs; images a second, memory and hours, means.  Raises UserError for a folder without a run,
    and for runs of several tasks, whose results are not alike.
    """
    check_writable(Path(output, "compare.json"))
    found = [read_run(Path(run)) for run in runs]
    kinds = sorted({run.headline for run in found})
    if len(kinds) > 1:
        raise UserError(f"the runs have results of several kinds ({', '.join(kinds)}); give those of one task")
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(repr(_told_apart(run.settings)), []).append(run)
    first = [group[0].settings for group in groups.values()]
    keys = [key for key in _told_apart({key: None for each in first for key in each}) if _differ(first, key)]
    rows = [_row(group, keys) for group in groups.values()]
    table = markdown_table(rows)
    write_text(Path(output, "compare.md"), table)
    write_json(Path(output, "compare.json"), rows)
    print(table)
    return rows


def read_run(folder: Path) -> Run:
    """Raises UserError where it holds no run, or one without a round."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"'{printable(folder)}' holds no config.yaml; name the folder of a run")
    config = get_config(folder / "config.yaml")
    metrics = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    if not metrics:
        raise UserError(f"'{printable(folder)}' holds no round of training yet; leave it out")
    return Run(f"{folder.parent.name}/{folder.name}", open_task(config).headline, dict(flat(config)), metrics)


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


def _row(group: Sequence[Run], keys: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"run": group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"}
    row |= {key: str(group[0].settings.get(key, "–")) for key in keys}
    row["seeds"] = len(group)
    for kind in ("", "ema_"):
        name = kind + group[0].headline
        results = [[entry[name] for entry in run.metrics if entry.get(name) is not None] for run in group]
        if all(results):
            row[f"best {name}"] = spread([max(each) for each in results])
            row[f"last {name}"] = spread([each[-1] for each in results])
    rates = [[entry["images_per_second"] for entry in run.metrics if "images_per_second" in entry] for run in group]
    row["images/s"] = statistics.mean(map(statistics.median, rates)) if all(rates) else None
    memory = [entry["memory_mb"] for run in group for entry in run.metrics if entry.get("memory_mb") is not None]
    row["memory (MB)"] = max(memory) if memory else None
    row["hours"] = statistics.mean(sum(entry.get("seconds", 0) for entry in run.metrics) for run in group) / 3600
    return row


def spread(values: Sequence[float]) -> str:
    """Mean, and the deviation of a sample, of several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
