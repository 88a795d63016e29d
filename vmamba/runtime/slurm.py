"""Runs as jobs of SLURM, or of this machine, through submitit: submitted, stopped in time, requeued and resumed."""

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from vmamba.errors import UserError
from vmamba.runtime.stop import Stopped
from vmamba.text import printable
from vmamba_kernels.private import batch_file

try:
    import submitit
except ImportError:  # optional: needed by those who submit, not by those who train
    submitit = None


@dataclass
class Resources:
    """What to ask the scheduler for; one process runs on each GPU."""

    minutes: int
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    comment: str | None = None
    exclude: str | None = None
    additional: dict[str, str | bool] = field(default_factory=dict)  # any other option of sbatch: its value, or True
    grace: int = 120  # seconds between the scheduler's warning and the end of the job


class Job:
    """A run that submitit can carry: `function(config)`, both importable, in every process of the job."""

    def __init__(self, function: Callable[[CfgNode], Any], config: CfgNode):
        self.function, self.config = function, config

    def __call__(self) -> Any:
        job = submitit.JobEnvironment()
        if job.cluster == "local":  # under SLURM the processes find each other by srun's variables
            os.environ.update(
                RANK=str(job.global_rank),
                WORLD_SIZE=str(job.num_tasks),
                LOCAL_RANK=str(job.local_rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(20000 + int(job.job_id) % 20000),
            )
        try:
            return self.function(self.config)
        except Stopped as stop:
            if stop.checkpoint:
                self._go_on_from_the_folder()
            warning = getattr(signal, f"SIG{job.USR_SIG}")
            if stop.signum == warning or _is_preempted(job):
                signal.raise_signal(warning)  # submitit's own handler: rank 0 requeues the job and ends, others return
                sys.exit(0)
            sys.exit(128 + stop.signum)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What submitit calls to requeue the job: the state is saved, so the same job resumes."""
        return submitit.helpers.DelayedSubmission(self)

    def _go_on_from_the_folder(self) -> None:
        """From now on the run's own checkpoint counts, not the one it was started from."""
        self.config = self.config.clone()
        self.config.defrost()
        self.config.MODEL.RESUME = ""
        self.config.TRAIN.AUTO_RESUME = True
        self.config.freeze()


def _is_preempted(job: "submitit.JobEnvironment") -> bool:
    """Whether a job ended by another signal than the warning is to go on: a cancelled one is no longer running."""
    if job.cluster != "slurm":
        return False
    ask = ["squeue", "--noheader", "--format=%T", f"--jobs={job.raw_job_id}"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "RUNNING"


def submit(jobs: Sequence[Job], resources: Resources, folder: Path, local: bool = False) -> "list[submitit.Job]":
    """Hand `jobs` to SLURM, several as an array, or start them here in the background; pickles and logs go into
    `folder`.

    Raises UserError where there is no submitit or no SLURM, and where SLURM refuses.
    """
    executor = _executor(resources, folder, local)
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0])]
        with executor.batch():
            return [executor.submit(job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        said = str(error).strip().splitlines()
        raise UserError(f"SLURM refuses the job: {said[-1] if said else 'without a word'}") from error


def sbatch_file(resources: Resources, folder: Path) -> str:
    """The batch file that `submit` would give to SLURM, without needing one."""
    executor = _executor(resources, folder, local=False, anywhere=True)
    return batch_file(executor)


_OURS = {  # options of sbatch that a job has anyway, and what says them
    **{name: f"--{name}" for name in ("time", "nodes", "gpus-per-node", "partition", "account", "qos", "constraint")},
    **{name: f"--{name}" for name in ("comment", "exclude")},
    **{"ntasks": "--gpus-per-node", "ntasks-per-node": "--gpus-per-node", "cpus-per-task": "--cpus-per-gpu"},
    **{"array": "--seeds", "signal": "the key GRACE", "output": "--output", "error": "--output"},
    **dict.fromkeys(("open-mode", "requeue", "no-requeue"), "no flag: a job is requeued, and its logs go on"),
}


def one_line(text: str) -> str:
    """What an option of sbatch takes: a line break would end the options of a batch file."""
    if not text.isprintable() or not text.strip():
        raise argparse.ArgumentTypeError(
            f"'{printable(text)}' is no value of an option of sbatch; write a line of text"
        )
    return text


def pair(text: str) -> tuple[str, str | bool]:
    """What --slurm-additional takes: an option of sbatch, without its dashes, and its value where it has one."""
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", name):
        raise argparse.ArgumentTypeError(
            f"'{printable(text)}' is no option of sbatch and its value; write one as gres=gpu:8, or as exclusive alone"
        )
    if name in _OURS:
        raise argparse.ArgumentTypeError(f"'{name}' is said by {_OURS[name]}")
    return name, one_line(value) if equals else True


def each_once(values: Sequence[Any], flag: str) -> Sequence[Any]:
    """`values`.  Raises UserError where one comes twice."""
    twice = [value for place, value in enumerate(values) if value in values[:place]]
    if twice:
        raise UserError(f"{flag} has {twice[0]} twice; give each once")
    return values


def seeded(config: CfgNode, seed: int) -> CfgNode:
    """`config` with that seed, in a folder of its own beside: TAG-seed."""
    config = config.clone()
    config.defrost()
    config.SEED, config.TAG = seed, f"{config.TAG}-{seed}"
    config.freeze()
    return config


def check_local(resources: Resources) -> None:
    """Raises UserError for a job of several machines."""
    if resources.nodes > 1:
        raise UserError(f"--local runs on this machine alone, and --nodes is {resources.nodes}; drop one of them")


def gpus_of_a_node(asked: int | None, local: bool) -> int:
    """--gpus-per-node, where it is not given 8, and on this machine alone as many as there are.

    Raises UserError for more GPUs than this machine has.
    """
    here = torch.cuda.device_count()
    if local and asked is not None and asked > here:
        raise UserError(
            f"--gpus-per-node is {asked} and PyTorch sees {here} on this machine; with --gpus-per-node 0 one process "
            f"runs on the CPU"
        )
    if asked is None:
        return here if local else 8
    return asked


def minutes(time: str) -> int:
    """A time limit in SLURM's notations, in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; seconds round up."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise UserError(f"--time {time} is not a time limit; write minutes, H:M:S or D-H:M:S")
    days, dash, clock = time.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if not dash and len(fields) < 3:
        fields.insert(0, 0)  # no hours
    hours, mins, seconds = (*fields, 0, 0)[:3]
    found = 1440 * int(days or 0) + 60 * hours + mins + math.ceil(seconds / 60)
    if not found:
        raise UserError(f"--time {time} is no time at all; write minutes, H:M:S or D-H:M:S")
    return found


def _executor(resources: Resources, folder: Path, local: bool, anywhere: bool = False) -> "submitit.Executor":
    if submitit is None:
        raise UserError("submitting needs the package submitit; install it with: pip install 'vmamba[slurm]'")
    processes = max(1, resources.gpus_per_node)
    parameters = {"nodes": resources.nodes, "signal_delay_s": resources.grace}
    if resources.gpus_per_node:
        parameters["gpus_per_node"] = resources.gpus_per_node
    if local:
        executor = submitit.LocalExecutor(folder)
        parameters |= {"timeout_min": resources.minutes, "tasks_per_node": processes}
    else:
        if not anywhere and shutil.which("srun") is None:
            raise UserError(
                "there is no srun on this machine; submit from a SLURM cluster, or use --local or --dry-run"
            )
        executor = (_AnywhereExecutor if anywhere else submitit.SlurmExecutor)(folder, max_num_timeout=1000)
        options = ("partition", "account", "qos", "constraint", "comment", "exclude")
        asked = {name: getattr(resources, name) for name in options}
        parameters |= {name: value for name, value in asked.items() if value is not None}
        parameters |= {
            "time": resources.minutes,
            "ntasks_per_node": processes,
            "cpus_per_task": resources.cpus_per_gpu,
            "job_name": "vmamba",
            "srun_args": ["--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True}
            | {name.replace("-", "_"): value for name, value in resources.additional.items()},
        }
    executor.update_parameters(**parameters)
    return executor


if submitit is not None:

    class _AnywhereExecutor(submitit.SlurmExecutor):
        """Writes batch files on a machine without SLURM too."""

        @classmethod
        def affinity(cls) -> int:
            return 1
