"""Which process this is, by each launcher's environment; and the device."""

import pytest
import torch

from vmamba.errors import UserError
from vmamba.runtime import distributed
from vmamba.runtime.lifeline import Lifeline, Loss, PeerLost

LAUNCHERS = {
    "none": ({}, (0, 1, 0)),
    "torchrun": (
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        (3, 4, 1),
    ),
    "srun": (
        {
            "SLURM_STEP_NUM_TASKS": "16",
            "SLURM_PROCID": "9",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NODELIST": "localhost,n2",
            "SLURM_JOB_ID": "41007",
        },
        (9, 16, 1),
    ),
    "a batch script without srun": ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    names = {name for environment, _ in LAUNCHERS.values() for name in environment}
    for name in {*names, "MASTER_ADDR", "MASTER_PORT"}:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("environment", "expected"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launcher_is_understood(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._launched_as() == expected


def test_a_process_that_is_killed_before_the_run_begins_is_a_sentence_on_the_others(monkeypatch):
    def connect(line, share):
        line.loss = Loss(1, "n2")
        line._news.set(), line._written.set()

    def gather(value):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:8871.")

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(Lifeline, "connect", connect)
    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(PeerLost, match="process 1 on n2 has ended without a word"), distributed.processes("cpu"):
        pass


def test_a_processs_place_on_its_machine():
    hosts = ["a", "a", "b", "a", "b"]  # SLURM may deal them out in turn
    places = [distributed._place_on_machine(rank, hosts) for rank in range(5)]
    assert places == [(0, 3), (1, 3), (0, 2), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "lacks MASTER_ADDR; start the run with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "lacks MASTER_PORT"),
        ({"RANK": "0"}, "lacks WORLD_SIZE"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "lacks SLURM_STEP_NODELIST"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "[1-2]"}, "expected names of nodes"),
    ],
)
def test_an_environment_that_does_not_say_all_is_a_sentence(environment, sentence, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence), distributed.processes("cpu"):
        pass


def test_others_that_cannot_be_reached_are_a_sentence(monkeypatch):
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    given = {}

    def refuse(*args, **options):
        given.update(options)
        raise RuntimeError("the client socket has failed to connect")

    monkeypatch.setattr(distributed.dist, "init_process_group", refuse)
    with pytest.raises(UserError, match="process 1 of 2 cannot join the others at no.such.host.invalid:29500: the cl"):
        distributed.processes("cpu", 77).__enter__()
    assert given["timeout"].total_seconds() == 77


def test_under_srun_all_meet_at_the_first_node(monkeypatch):
    for name, value in LAUNCHERS["srun"][0].items():
        monkeypatch.setenv(name, value)
    distributed._launched_as()
    assert distributed.os.environ["MASTER_ADDR"] == "localhost"
    assert distributed.os.environ["MASTER_PORT"] == "21007"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[07-09,12],big1", "gpu07"), ("a,b", "a"), ("r1-[3,5]-ib", "r1-3-ib")],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert distributed.first_host(nodes) == first


def test_a_world_of_one_needs_no_launcher():
    with distributed.processes("cpu") as world:
        assert (world.rank, world.size, world.main, world.device.type) == (0, 1, True, "cpu")
        assert distributed.sum_over_processes(torch.ones(2)).tolist() == [1, 1]
        assert distributed.gather("mine") == ["mine"]
        assert distributed.on_main(lambda: 5) == 5


def test_a_gpu_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees no GPU"), distributed.processes("cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, PyTorch sees 2"):
        distributed._choose_device("auto", 2)
    assert distributed._choose_device("auto", 1) == torch.device("cuda", 1)


def test_a_slurm_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert distributed._choose_device("auto", 3) == torch.device("cuda", 0)
