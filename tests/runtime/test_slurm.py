"""Jobs: what goes out to SLURM, and what happens at its warning."""

import argparse
import os
import pickle
import shlex
import signal
import stat

import pytest

from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime import slurm
from vmamba.runtime.slurm import (
    Job,
    Resources,
    check_local,
    each_once,
    minutes,
    one_line,
    pair,
    sbatch_file,
    seeded,
    submit,
)
from vmamba.runtime.stop import Stopped

MORE = dict(comment="table-2", exclude="gpu[3-4]", additional={"gres": "lustre:1", "licenses": "x@y"})
TWO_NODES = Resources(minutes=90, nodes=2, gpus_per_node=8, partition="gpu", account="vision", grace=200, **MORE)


def stopped_by(signum):
    def function(config):
        raise Stopped(signum, "last.pth")

    return function


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name=script, ...) puts shell scripts where commands are looked for."""

    def write(**scripts):
        for name, script in scripts.items():
            program = tmp_path / name
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


@pytest.fixture
def inside_a_job(monkeypatch):
    """The environment of one task of a local job."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    for name, value in {
        "JOB_ID": 77,
        "NTASKS": 2,
        "JOB_NUM_NODES": 1,
        "NODEID": 0,
        "GLOBALID": 1,
        "LOCALID": 1,
    }.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("2:30:00", 150), ("1-0", 1440), ("1-2:30", 1590), ("1-2:30:01", 1591), ("0:0:5", 1)],
)
def test_time_limits_are_slurms(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5"])
def test_a_time_limit_in_another_notation_is_a_sentence(text):
    with pytest.raises(UserError, match="is not a time limit"):
        minutes(text)


def test_the_batch_file_says_what_was_asked(tmp_path):
    text = sbatch_file(TWO_NODES, tmp_path)
    for line in ("nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "time=90", "partition=gpu", "account=vision"):
        assert f"#SBATCH --{line}\n" in text
    for line in ("comment=table-2", "exclude=gpu[3-4]", "gres=lustre:1", "licenses=x@y"):
        assert f"--{line}" in shlex.split(text)  # some versions of submitit quote what a shell would read
    assert "signal=USR2@200" in text
    assert "srun" in text
    assert str(tmp_path) in text
    assert "qos" not in text


def test_a_job_reaches_sbatch(tmp_path, monkeypatch, programs):
    programs(srun="", sbatch='cp "$1" sent.sh; echo Submitted batch job 4711')
    monkeypatch.chdir(tmp_path)
    (job,) = submit([Job(len, get_config())], TWO_NODES, tmp_path / "jobs")
    assert job.job_id == "4711"
    assert "#SBATCH --nodes=2" in (tmp_path / "sent.sh").read_text()
    sent = job.submission()
    assert sent.function.function is len
    assert sent.function.config == get_config()


def test_an_array_has_a_job_a_seed(tmp_path, monkeypatch, programs):
    programs(srun="", sbatch='cp "$1" sent.sh; echo Submitted batch job 4711')
    monkeypatch.chdir(tmp_path)
    configs = [seeded(get_config(), seed) for seed in (3, 5)]
    jobs = submit([Job(len, config) for config in configs], TWO_NODES, tmp_path / "jobs")
    assert [job.job_id for job in jobs] == ["4711_0", "4711_1"]
    assert "#SBATCH --array=0-1" in (tmp_path / "sent.sh").read_text()
    sent = [job.submission().function.config for job in jobs]
    assert [(config.SEED, config.TAG) for config in sent] == [(3, "default-3"), (5, "default-5")]


def test_a_job_that_slurm_refuses_is_a_sentence(tmp_path, monkeypatch, programs):
    refusal = "sbatch: error: invalid partition specified: gpu"
    programs(srun="", sbatch=f"echo '{refusal}' >&2; exit 1")
    with pytest.raises(UserError, match=f"SLURM refuses the job: .*{refusal}"):
        submit([Job(len, get_config())], TWO_NODES, tmp_path / "jobs")


@pytest.mark.parametrize("text", ["=1", "--gres=1", "GRES=1", "a b=1", ""])
def test_another_option_of_sbatch(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no option of sbatch and its value; write one as"):
        pair(text)
    assert pair("gres=gpu:8,x=2") == ("gres", "gpu:8,x=2")


@pytest.mark.parametrize(
    ("name", "where"),
    [("time", "--time"), ("ntasks-per-node", "--gpus-per-node"), ("signal", "GRACE"), ("array", "--seeds")],
)
def test_what_a_job_says_anyway_is_no_other_option(name, where):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{name}' is said by .*{where}"):
        pair(f"{name}=1")


@pytest.mark.parametrize("text", ["", " ", "two\nlines", "a\r"])
def test_a_line_break_does_not_end_the_options_of_a_batch_file(text):
    for refuse in (one_line, lambda value: pair(f"gres={value}")):
        with pytest.raises(
            argparse.ArgumentTypeError, match="is no value of an option of sbatch; write a line of text"
        ):
            refuse(text)


def test_no_time_is_no_time_limit():
    with pytest.raises(UserError, match="no time at all"):
        minutes("0:0:0")


def test_what_would_be_said_or_run_twice_is_refused():
    with pytest.raises(UserError, match="--seeds has 3 twice; give each once"):
        each_once([3, 4, 3], "--seeds")
    assert each_once([3, 4], "--seeds") == [3, 4]


def test_other_options_stand_in_the_batch_file_once_and_the_job_may_be_requeued(tmp_path):
    """Also where the cluster's JobRequeue is 0; and SLURM takes the last of two."""
    additional = dict(map(pair, ("job-name=mine", "exclusive", "mail-type=END")))
    lines = sbatch_file(Resources(90, additional=additional), tmp_path).splitlines()
    for line in ("--job-name=mine", "--exclusive", "--mail-type=END", "--requeue"):
        assert f"#SBATCH {line}" in lines
    names = [line.partition("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert len(names) == len({*names})


def test_without_slurm_or_submitit_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no srun.*--local"):
        submit([Job(len, get_config())], TWO_NODES, tmp_path)
    with pytest.raises(UserError, match="--nodes is 2"):
        check_local(TWO_NODES)
    monkeypatch.setattr(slurm, "submitit", None)
    with pytest.raises(UserError, match="pip install"):
        submit([Job(len, get_config())], TWO_NODES, tmp_path)


def test_the_processes_of_a_local_job_find_each_other(inside_a_job):
    Job(lambda config: None, get_config())()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
    assert os.environ["MASTER_PORT"] == "20077"


def test_at_the_warning_a_stopped_job_is_requeued_to_resume_its_own_folder(inside_a_job):
    job = Job(stopped_by(signal.SIGUSR2), get_config(None, ["MODEL.RESUME", "elsewhere.pth"]))
    requeued = []
    previous = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(job.checkpoint()))
    with pytest.raises(SystemExit) as end:
        job()
    signal.signal(signal.SIGUSR2, previous)
    assert end.value.code == 0
    again = pickle.loads(pickle.dumps(requeued[0].function.config))
    assert again.MODEL.RESUME == ""
    assert again.TRAIN.AUTO_RESUME


@pytest.mark.parametrize(("state", "code", "times"), [("RUNNING", 0, 1), ("CANCELLED", 143, 0)])
def test_under_slurm_a_preempted_job_is_requeued_and_a_cancelled_one_is_not(monkeypatch, programs, state, code, times):
    programs(squeue=f'[ "$3" = --jobs=4711 ] && echo {state}')
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    requeued = []
    previous = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(1))
    with pytest.raises(SystemExit) as end:
        Job(stopped_by(signal.SIGTERM), get_config())()
    signal.signal(signal.SIGUSR2, previous)
    assert end.value.code == code
    assert len(requeued) == times


def test_a_local_job_that_is_ended_is_not_requeued(inside_a_job):
    requeued = []
    previous = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(1))
    with pytest.raises(SystemExit) as end:
        Job(stopped_by(signal.SIGTERM), get_config())()
    signal.signal(signal.SIGUSR2, previous)
    assert end.value.code == 143
    assert not requeued
