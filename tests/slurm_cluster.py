"""Jobs on a real SLURM of two nodes, started here on this host: sudo python tests/slurm_cluster.py [--only NAME ...]

Needs root and Debian's packages: apt-get install slurmctld slurmd slurm-client munge.  Each job trains a small model
on two nodes with loading workers, something happens to it, and it must end with the weights of an undisturbed one.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.classification.tiny import differences, log, metrics, saved, tiny_config, tiny_file  # noqa: E402
from vmamba.config import output_folder  # noqa: E402

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
JobRequeue=1
KillWait=30
SlurmdTimeout=15
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=1 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""
SLOW = """
import time
from vmamba.runtime.step import OptimizerStep
step = OptimizerStep.__call__
def slow(self, *args, **options):
    time.sleep(PAUSE)
    return step(self, *args, **options)
OptimizerStep.__call__ = slow
"""


class Cluster:
    """Its daemons, which end with it."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        (folder / "state").mkdir()
        self.config = folder / "slurm.conf"
        self.config.write_text(CONFIG.format(folder=folder))
        os.environ |= {"SLURM_CONF": str(self.config), "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'kernels'}"}
        os.environ |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __enter__(self) -> "Cluster":
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
        self.start("ctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start(node, "slurmd", "-D", "-N", node)
        self.until(lambda: ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60, "both nodes idle")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--me", "--signal=KILL"], capture_output=True)
        subprocess.run(["scancel", "--me"], capture_output=True)
        time.sleep(2)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(30)

    def start(self, name: str, *command: str) -> None:
        self.daemons[name] = subprocess.Popen(
            [shutil.which(command[0]) or f"/usr/sbin/{command[0]}", *command[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def until(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise SystemExit(
                    f"waited {seconds:g} s in vain for: {what}\n{ask('squeue', '-l')}\n{ask('sinfo', '-l')}"
                )
            time.sleep(0.3)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


class Case:
    """A job, and what happens to it."""

    def __init__(self, cluster: Cluster, name: str, *flags: str):
        self.cluster, self.name = cluster, name
        opts = ("TRAIN.EPOCHS", 12, "DATA.BATCH_SIZE", 4, "AUG.MIXUP", 0, "TRAIN.SAVE_STEPS", 2, "DATA.NUM_WORKERS", 1)
        self.config = tiny_config(cluster.folder, *opts, "TAG", name)
        module = "slower" if "--time" in flags else "slow"
        run_of = ["--cfg", str(tiny_file(cluster.folder)), "--output", str(cluster.folder), "--tag", name]
        run_of += ["--import", module, "--opts", *map(str, opts), "GRACE", "30"]
        submit = [sys.executable, str(ROOT / "classification/submit.py"), "--nodes", "2", "--gpus-per-node", "0"]
        command = [*submit, "--cpus-per-gpu", "1", *flags, *run_of]
        if "train.slurm" in flags:
            job = ["sbatch", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={ROOT}"]
            job += [f"--output={cluster.folder}/%j.txt", str(ROOT / "classification/train.slurm")]
            command = [*job, *run_of]
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"job (\d+)", done.stdout)
        if not found:
            raise SystemExit(f"{name}: {done.stdout}{done.stderr}")
        self.job = found[1]

    def trained(self, steps: int) -> None:
        """Wait for so many."""
        self.cluster.until(lambda: self.steps() >= steps, 240, f"{self.name}: {steps} steps")

    def steps(self) -> int:
        path = output_folder(self.config) / "log.txt"
        return log(self.config).count("train [") if path.exists() else 0

    def state(self) -> str:
        return re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", self.job) or "JobState=GONE")[1]

    def restarts(self) -> int:
        return int(re.search(r"Restarts=(\d+)", ask("scontrol", "show", "job", self.job))[1])

    def ends(self, state: str = "COMPLETED") -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.until(lambda: self.state() in over, 600, f"{self.name} to end")
        if self.state() != state:
            logs = "".join(path.read_text()[-1500:] for path in (output_folder(self.config) / "jobs").glob("*.err"))
            raise SystemExit(f"{self.name} is {self.state()}, not {state}\n{logs}")

    def again(self) -> None:
        """The same command once more, as a user gives it."""
        other = Case.__new__(Case)
        Case.__init__(other, self.cluster, self.name)
        self.job = other.job


def undisturbed(case: Case) -> None:
    pass


def term_to_the_step(case: Case) -> None:
    case.trained(8)
    subprocess.run(["scancel", "--signal=TERM", f"{case.job}.0"], check=True)
    case.cluster.until(lambda: case.restarts() == 1, 90, "a requeue")


def requeued_by_hand(case: Case) -> None:
    case.trained(8)
    subprocess.run(["scontrol", "requeue", case.job], check=True)
    case.cluster.until(lambda: case.restarts() == 1, 90, "a requeue")


def warned_of_the_limit(case: Case) -> None:
    case.trained(4)
    case.cluster.until(lambda: case.restarts() >= 1, 200, "a requeue")


def warned_by_hand(case: Case) -> None:
    """What --signal does at the time limit; of train.slurm the script requeues, not submitit."""
    case.trained(8)
    subprocess.run(["scancel", "--signal=USR2", f"{case.job}.0"], check=True)
    case.cluster.until(lambda: case.restarts() == 1, 90, "a requeue")


def a_node_dies(case: Case) -> None:
    case.trained(8)
    case.cluster.daemons["n2"].kill()
    case.cluster.daemons["n2"].wait()
    for line in ask("ps", "-eo", "pid,args").splitlines():  # what ran on it dies with it
        pid, _, args = line.strip().partition(" ")
        if f"slurmstepd: [{case.job}." in args and "/n2" in (ask("readlink", f"/proc/{pid}/cwd") + args):
            os.kill(int(pid), signal.SIGKILL)
    kill_rank(case, 1)
    case.cluster.until(
        lambda: case.restarts() == 1 or case.state() == "FAILED", 120, "the end of the job on a dead node"
    )
    case.cluster.start("n2", "slurmd", "-D", "-N", "n2")
    if case.state() == "FAILED":
        case.again()


def a_rank_is_killed(case: Case) -> None:
    case.trained(8)
    kill_rank(case, 1)
    case.ends("FAILED")
    if "the run ends: process 1 on" not in log(case.config):
        raise SystemExit("its log does not say which process was lost")
    case.again()


def kill_rank(case: Case, rank: int) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            env = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
            parent = Path("/proc", re.search(r"PPid:\s*(\d+)", (process / "status").read_text())[1], "cmdline")
            first = b"submitit" in command and b"submitit" not in parent.read_bytes()
        except (OSError, TypeError):
            continue
        if first and f"SLURM_JOB_ID={case.job}".encode() in env and f"SLURM_PROCID={rank}".encode() in env:
            os.kill(int(process.name), signal.SIGKILL)


CASES = {
    "undisturbed": (undisturbed,),
    "SIGTERM to the whole step": (term_to_the_step,),
    "scontrol requeue": (requeued_by_hand,),
    "a rank killed": (a_rank_is_killed,),
    "a node dies": (a_node_dies,),
    "train.slurm, warned": (warned_by_hand, "train.slurm"),
    "the time limit's warning": (warned_of_the_limit, "--time", "2"),  # SLURM's may come a minute early
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    only = parser.parse_args().only
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the daemons end with this script
    with tempfile.TemporaryDirectory(prefix="slurm") as place, Cluster(Path(place)) as cluster:
        for module, pause in (("slow", "0.3"), ("slower", "2.5")):
            (cluster.folder / f"{module}.py").write_text(SLOW.replace("PAUSE", pause))
        whole = None
        for name in dict.fromkeys(["undisturbed", *only]):
            happens, *flags = CASES[name]
            start, case = time.monotonic(), Case(cluster, re.sub(r"\W+", "_", name), *flags)
            happens(case)
            case.ends()
            whole = whole or case
            one, other = saved(case.config), saved(whole.config)
            places = differences({**one, "config": None}, {**other, "config": None})
            if places or metrics(case.config) != metrics(whole.config):
                raise SystemExit(f"{name}: other numbers at {places[:3]}")
            print(f"{name}: the weights of an undisturbed run, in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
