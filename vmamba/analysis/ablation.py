"""Configs over seeds: trained, evaluated, and written into one table with mean and deviation."""

import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

import vmamba_kernels
from vmamba.analysis import speed
from vmamba.analysis.comparison import flat, read_run, spread
from vmamba.analysis.tables import around_table, check_json, check_page, markdown, read_json, replace_table, write_json
from vmamba.analysis.zoo import choose_device
from vmamba.config import get_config, image_size, output_folder
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.runtime.checkpoint import LAST
from vmamba.runtime.records import NOT_COUNTED, is_number
from vmamba.runtime.stop import StopRequest
from vmamba.runtime.task import open_task
from vmamba.text import counted, printable, some

GIVEN_OTHERWISE = {"SEED": "seeds are given by --seeds", "TAG": "a run's is its seed's", "OUTPUT": "--output gives it"}
NOT_A_TRAINING = ("DRY_RUN", "EVAL_MODE", "THROUGHPUT_MODE")
# What may differ between a run that is there and the one that is wanted, since it changes no result.
MAY_DIFFER = (
    "OUTPUT",
    "PRINT_FREQ",
    "SAVE_FREQ",
    "DATA.DATA_PATH",
    "DATA.NUM_WORKERS",
    "DATA.PREFETCH_FACTOR",
    "DATA.PERSISTENT_WORKERS",
    "DATA.PIN_MEMORY",
)
PROGRAM = (sys.executable, "-m", "vmamba.runtime")  # main.py, from wherever the package lies
_PACKAGES = [str(Path(package.__file__).parents[1]) for package in (sys.modules["vmamba"], vmamba_kernels)]


def _is_by(value: Any) -> bool:
    """Whether it tells by what a run was made, as far as the table says it."""
    if not isinstance(value, dict) or not isinstance(value.get("versions"), dict):
        return False
    devices, started = value.get("devices"), value.get("started")
    return isinstance(devices, list) and bool(devices) and isinstance(started, str) and "torch" in value["versions"]


def _may_be(value: Any) -> bool:
    """Whether it is a number, or null for one that was not finite."""
    return value is None or is_number(value)


_OF_A_RESULT = {
    "results": lambda value: isinstance(value, dict) and bool(value) and all(map(_may_be, value.values())),
    "details": lambda value: isinstance(value, dict),
    "images_per_second": _may_be,
    "memory_mb": _may_be,
    "by": _is_by,
}  # in result.json


def _counts(told: Mapping[str, Any]) -> bool:
    return all(map(is_number, told["results"].values()))


@dataclass(frozen=True)
class Repetition:
    """A config with a seed: one run, its folder OUTPUT/NAME/seed<n>."""

    file: str
    seed: int
    options: tuple[str, ...]  # KEY VALUE ... on top
    output: str

    @property
    def command(self) -> list[str]:
        given = ["--opts", *self.options] if self.options else []
        place = ["--output", self.output, "--tag", f"seed{self.seed}", "--seed", str(self.seed)]
        return ["--cfg", self.file, *given, *place]

    @cached_property
    def config(self) -> CfgNode:
        place = ["OUTPUT", self.output, "TAG", f"seed{self.seed}", "SEED", str(self.seed)]
        return get_config(self.file, [*self.options, *place])

    @property
    def folder(self) -> Path:
        return output_folder(self.config)

    @property
    def result(self) -> Path:
        """What the run came to; it is there once the run is trained and evaluated."""
        return self.folder / "result.json"

    @property
    def evaluation(self) -> list[str]:
        """The command that evaluates the last weights, whatever the run began with."""
        ways = ["--eval", "--resume", str(self.folder / LAST)]
        # which weights of a file to begin with says nothing of this one
        return [*self.command, *ways, *(["--opts", "MODEL.WEIGHTS", "auto"] if self.config.MODEL.PRETRAINED else [])]

    @property
    def is_done(self) -> bool:
        """Whether the result is there, and not of the weights that the run began with."""
        if not self.result.is_file():
            return False
        settings = self.config.MODEL
        began = {*filter(None, [settings.PRETRAINED, settings.RESUME])}
        return self.told.get("checkpoint") not in began

    @property
    def told(self) -> dict[str, Any]:
        """What is in its result.  Raises UserError where that is not as `Runs` writes it."""
        told = read_json(self.result)
        for name, fits in _OF_A_RESULT.items():
            if not isinstance(told, dict) or not fits(told.get(name)):
                raise UserError(
                    f"'{printable(self.result)}' does not tell '{name}' as a finished run does; remove the file, and "
                    f"the same command evaluates that run again"
                )
        return told

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that its evaluation found, by name; None for those that are not finite, and for all of an
        evaluation that does not count."""
        told = self.told
        found = {name: value for name, value in {**told["results"], **told["details"]}.items() if _may_be(value)}
        return found if _counts(told) else dict.fromkeys(found)

    @property
    def counts(self) -> bool:
        return _counts(self.told)

    def __str__(self) -> str:
        return f"{self.config.NAME}, seed {self.seed}"

    def check(self) -> None:
        """Raises UserError where the config trains nothing, or the folder holds a run of another one."""
        for key in NOT_A_TRAINING:
            if self.config[key]:
                raise UserError(
                    f"{key} is true in '{printable(self.file)}' or --opts, and a run is to train; leave it out"
                )
        if not (self.folder / "config.yaml").is_file():
            return
        wanted, there = dict(flat(self.config)), dict(flat(get_config(self.folder / "config.yaml")))
        for key in {**wanted, **there}:
            if key not in MAY_DIFFER and wanted.get(key) != there.get(key):
                raise UserError(
                    f"'{printable(self.folder)}' holds a run of {key} {there.get(key)}, and {wanted.get(key)} is asked "
                    f"for; choose another folder with --output, or remove that run"
                )


def ablate(
    configs: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    options: Sequence[str] = (),
    jobs: int = 1,
    columns: Sequence[str] = (),
    timed: bool = False,
    output: str = "output/ablation",
    page: str | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate each config with each seed, and write ablation.{md,json} into `output`: a line a config.

    Each run is a process of its own in OUTPUT/NAME/seed<n>, as main.py makes it; what is finished there is not run
    again, and what was stopped goes on.  Of several GPUs the runs use one each, in turn.

    Args:
        configs: files, each a run.
        options: KEY VALUE ... of all of them.
        jobs: runs at a time.
        columns: the numbers of `--eval` that the table shows; all where none is named.
        timed: time the models of classification too, after the runs: in turns, alone on the device.
        page: a Markdown file whose first table between "<!-- table -->" and "<!-- end -->" is replaced by this one.

    Returns the lines: of the last weights the numbers that `--eval` finds, mean and standard deviation over the seeds;
    "(1 of 2)" where not all have one; images a second and memory of the training.
    Raises UserError for configs that cannot be, before anything is run; and, once the others are done and the table is
    written, for runs that failed.
    """
    check_json(Path(output, "ablation.json"), "rows", "runs")
    check_page(Path(output, "ablation.md"), r"\|.*; written by\s`analyze/ablate.py`\.\n$")
    for key in options[::2]:
        if key in GIVEN_OTHERWISE:
            raise UserError(f"--opts sets {key}, and {GIVEN_OTHERWISE[key]}; leave it out")
    if page:
        around_table(Path(page))
    repetitions = [Repetition(file, seed, tuple(options), output) for seed in seeds for file in configs]
    names = [each.config.NAME for each in repetitions[: len(configs)]]
    if len(names) > len({*names}) or len(seeds) > len({*seeds}):
        raise UserError(f"runs of one name and seed would be one: {some(names)}, seeds {some(seeds)}")
    for each in repetitions:
        each.check()
        if timed and each.config.TASK != "classification":
            task = each.config.TASK
            raise UserError(f"--timed times models of classification, and these are of {task}; leave it out")
    check_columns(columns, [each for each in repetitions if each.is_done])
    failed = _run_all([each for each in repetitions if not each.is_done], jobs, columns)
    done = [each for each in repetitions if each.is_done]
    groups = {name: [each for each in done if name == each.config.NAME] for name in names}
    if not done:
        raise UserError(f"none of the {counted(len(repetitions), 'run')} could be made; {'; '.join(failed)}")
    shown = columns or [name for name, is_number in found_in(done).items() if is_number]
    rows = [_row(name, group, shown) for name, group in groups.items() if group]
    if timed:
        _time([group[0] for group in groups.values() if group], rows)
    text = _text(rows, done, jobs, timed)
    write_text(Path(output, "ablation.md"), text)
    runs = [{"config": each.config.NAME, "seed": each.seed, **each.told} for each in done]
    write_json(Path(output, "ablation.json"), {"rows": rows, "runs": runs})
    if page:
        replace_table(Path(page), text)
    print(text)
    if failed:
        raise UserError(f"{counted(len(failed), 'run')} failed; {'; '.join(failed)}")
    return rows


# ------------------------------------------------------------------------------------------------ the runs


def _run_all(repetitions: Sequence[Repetition], jobs: int, columns: Sequence[str]) -> list[str]:
    """Make the runs, `jobs` at a time; a sentence for each that failed.

    Where this process is interrupted or ended, its runs are asked to stop, and save.  Raises UserError where a run that
    is finished has found none of a column; the others that go on then come to their end, and no more begin.
    """
    waiting: queue.SimpleQueue[Repetition] = queue.SimpleQueue()
    for each in repetitions:
        waiting.put(each)
    runs = Runs(columns)
    threads = [threading.Thread(target=runs.serve, args=(waiting, place)) for place in _places(jobs)]
    with runs.stopped_with_us():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if runs.unknown:
        raise runs.unknown
    return runs.failed


def _places(jobs: int) -> list[dict[str, str]]:
    """What each of the processes at a time has in its environment beside ours: of several GPUs one."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    devices = visible.split(",")[:count]
    return [{"CUDA_VISIBLE_DEVICES": devices[job % count]} if count else {} for job in range(jobs)]


class Runs:
    """The processes of the runs that go on."""

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns, self.unknown = columns, None
        self.failed: list[str] = []
        self.ended = False
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def serve(self, waiting: "queue.SimpleQueue[Repetition]", place: Mapping[str, str]) -> None:
        """Make runs until none waits."""
        while not self.ended:
            try:
                each = waiting.get_nowait()
            except queue.Empty:
                return
            print(f"{each}: training in {each.folder}", flush=True)
            said = self._call(each.command, place) or self._call(each.evaluation, place)
            try:
                told = said or self._conclude(each)
            except Exception as error:  # else the runs that wait for this thread would never be made
                said = told = f"its results cannot be read ({type(error).__name__}: {error})"
            if said is not None:
                self.failed.append(f"{each}: {said}")
            print(f"{each}: {told}", flush=True)
            if said is None:
                self._check(each)

    def _check(self, each: Repetition) -> None:
        """Begin no other run for a table that cannot be."""
        try:
            check_columns(self.columns, [each])
        except UserError as error:
            self.unknown, self.ended = error, True

    def _conclude(self, each: Repetition) -> str:
        """Write down what the run came to; its headline."""
        found, metrics = read_json(each.folder / "evaluation.json"), read_run(each.folder).metrics
        rates, memory, seconds = (
            [entry[name] for entry in metrics if is_number(entry.get(name))]
            for name in ("images_per_second", "memory_mb", "seconds")
        )
        found |= {
            "images_per_second": statistics.median(rates) if rates else None,
            "memory_mb": max(memory, default=None),
            "seconds": sum(seconds),
        }
        write_json(each.result, found)
        name = open_task(each.config).headline
        return f"{name} {each.told['results'][name]:.2f}" if each.counts else NOT_COUNTED

    def _call(self, arguments: Sequence[str], place: Mapping[str, str]) -> str | None:
        """Run the program; None, or the last line that it said where it failed."""
        paths = [*_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **place, "PYTHONPATH": os.pathsep.join(paths)}
        with self._lock:
            if self.ended:
                return "it was not begun"
            process = subprocess.Popen(
                [*PROGRAM, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self._processes.add(process)
        _, errors = process.communicate()
        self._processes.discard(process)
        lines = errors.strip().splitlines() or [f"it ended with status {process.returncode} and said nothing"]
        return None if process.returncode == 0 else lines[-1].removeprefix("error: ")

    @contextmanager
    def stopped_with_us(self) -> Iterator[None]:
        """An interruption of the block ends the runs before it goes on."""
        try:
            with StopRequest():
                yield
        except BaseException:
            with self._lock:  # none begins any more
                self.ended = True
                going_on = [*self._processes]
            print(f"stopping {counted(len(going_on), 'run')}, which save; the same command goes on", flush=True)
            for process in going_on:
                process.terminate()
            for process in going_on:
                process.wait()
            raise


# ------------------------------------------------------------------------------------------------ the table


def found_in(done: Sequence[Repetition]) -> dict[str, bool]:
    """The names of the numbers that evaluations found, and whether any is one: what is not finite is null."""
    names: dict[str, bool] = {}
    for each in done:
        for name, value in each.numbers.items():
            names[name] = names.get(name, False) or value is not None
    return names


def check_columns(columns: Sequence[str], done: Sequence[Repetition]) -> None:
    """Raises UserError for one that none of the finished runs has found, where there are any."""
    known = found_in(done)
    for name in columns:
        if done and name not in known:
            raise UserError(f"unknown column '{printable(name)}'; --eval finds {', '.join(known)}")


def _row(name: str, group: Sequence[Repetition], columns: Sequence[str]) -> dict[str, Any]:
    model = open_task(group[0].config).build_model()
    row: dict[str, Any] = {
        "config": name,
        "parameters (M)": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "seeds": len(group),
    }
    found, told = [each.numbers for each in group], [each.told for each in group]
    for key in columns:
        row[key] = spread([numbers.get(key) for numbers in found])
    for title, key in (("images/s", "images_per_second"), ("memory (MB)", "memory_mb")):
        values = [value for each in told if (value := each.get(key)) is not None]
        row[title] = statistics.mean(values) if values else None
    return row


def _time(first: Sequence[Repetition], rows: Sequence[dict[str, Any]]) -> None:
    """Put each model's speed and memory alone on the device into its row."""
    config = first[0].config
    device = choose_device(config.DEVICE)
    models: dict[str, nn.Module] = {each.config.NAME: open_task(each.config).build_model() for each in first}
    dtype = config.AMP.DTYPE if config.AMP.ENABLE else "float32"
    case = speed.Case(max(image_size(config)), dtype, "train", config.DATA.BATCH_SIZE)
    for mode in ("train", "forward"):
        timings = speed.compare(
            models,
            replace(case, mode=mode),
            device,
            warm_up=5,
            repeats=20,
            compile=None,
            reference=first[0].config.NAME,
            gmacs=dict.fromkeys(models, 0.0),
        )
        for row, timing in zip(rows, timings, strict=True):
            row["images/s" if mode == "train" else "images/s, forward"] = timing.images_per_second
            if mode == "train":
                row["memory (MB)"] = timing.peak_memory_mb


def _text(rows: Sequence[Mapping[str, Any]], done: Sequence[Repetition], jobs: int, timed: bool) -> str:
    """The table, and what stands behind its numbers."""
    config, by = done[0].config, done[0].told["by"]
    seeds = ", ".join(dict.fromkeys(str(each.seed) for each in done))
    pace = f"of training, {counted(jobs, 'run')} at a time"
    if timed:
        pace = f"of steps of {config.DATA.BATCH_SIZE} random images, the models taking turns, alone on the device"
    diverged = "; ".join(str(each) for each in done if not each.counts)
    left_out = f" Left out, since the evaluation {NOT_COUNTED}: {diverged}." if diverged else ""
    return (
        f'{markdown(rows)}\nOf the last weights; mean and standard deviation over seeds {seeds}, "(1 of 2)" where not '
        f"all have a number.{left_out} Images a second and "
        f"memory are {pace}. {by['devices'][0]}, PyTorch {by['versions']['torch']}, {by['started'][:10]}; written by "
        f"`analyze/ablate.py`.\n"
    )
