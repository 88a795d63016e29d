"""Faults, counted: python tests/faults.py --tries 100 [--only NAME ...] [--keep FOLDER] > faults.md

Runs of a second each are killed, signalled, and robbed of their files at random moments, and started again until they
are done; then they must have left, bit for bit, what a run that nothing happened to leaves.  A run that is killed and
started again five times is five tries; a kill that found the run done is none.  A try is lost where numbers differ,
where a fault ends in a traceback instead of a sentence, and where something waits for ever; what is lost is kept: the
run's folder, what its processes said (of one that hangs, where it stood), and what was done to it when.  The processes
are forked from this one, which has imported everything: what is tried is the run, not the import.
"""

import argparse
import faulthandler
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from tests.classification.tiny import differences, metrics, saved, tiny_config  # noqa: E402
from vmamba.classification.task import Accuracy  # noqa: E402
from vmamba.config import output_folder  # noqa: E402
from vmamba.runtime import records, saving  # noqa: E402
from vmamba.runtime.cli import exit_code  # noqa: E402
from vmamba.runtime.shares import read_folder  # noqa: E402
from vmamba.runtime.trainer import run  # noqa: E402

EPOCHS = 6
EVERY = ("TRAIN.EPOCHS", EPOCHS, "TRAIN.SAVE_STEPS", 2, "MODEL.BACKEND", "reference", "TIMEOUT", 10)
TWO = ("DATA.BATCH_SIZE", 4, "AUG.MIXUP", 0)  # of each of two processes
IN_SHARES = (*TWO, "TRAIN.PARALLEL", "fsdp")
LOADING = ("DATA.NUM_WORKERS", 2)
LIMIT = 60  # seconds after which a process hangs; one whose peer was killed before they met waits 40
SLOW = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
CHANCE = random.Random()  # of its own: a run's random numbers are the run's

Prepare = Callable[[], object]


class Lost(Exception):
    """What a try found that must not be."""


class Bench:
    """A folder of runs, each beside the one that nothing happened to."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.tries = folder, 0, 0
        self.undisturbed: dict[tuple, Life] = {}

    def life(self, *opts: object, ranks: int = 1, prepare: Prepare = lambda: None) -> "Life":
        """A new run; `prepare` is called in each of its processes."""
        key = ranks, *opts
        if key not in self.undisturbed:
            life = Life(self, f"whole{len(self.undisturbed)}", opts, ranks)
            start = time.monotonic()
            if any(life.wait(life.start())):
                raise Lost(f"the run that nothing happens to did not end well: {life.told()[-1000:]}")
            life.seconds = time.monotonic() - start
            self.undisturbed[key] = life
        self.number += 1
        life = Life(self, f"try{self.number}", opts, ranks, prepare)
        life.whole = self.undisturbed[key]
        self.now = life
        return life


class Life:
    """A run, from its first start to its end, and what was done to it."""

    def __init__(self, bench: Bench, tag: str, opts: Sequence[object], ranks: int, prepare: Prepare = lambda: None):
        self.bench, self.ranks, self.prepare = bench, ranks, prepare
        self.config = tiny_config(bench.folder, *EVERY, "TAG", tag, *opts)
        self.folder, self.said = output_folder(self.config), bench.folder / f"{tag}.txt"
        self.begin, self.seconds, self.done = time.monotonic(), 0.0, []
        self.whole: Life

    def did(self, what: str) -> None:
        self.done.append(f"{time.monotonic() - self.begin:8.3f} s  {what}")

    def tried(self, what: str) -> None:
        self.did(what)
        self.bench.tries += 1

    def start(self) -> list[int]:
        """Fork its processes."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        children = []
        for rank in range(self.ranks):
            seed = CHANCE.random()
            child = os.fork()
            if not child:
                CHANCE.seed(seed)
                self._be(rank, port)
            children.append(child)
        self.did(f"started as {children}")
        return children

    def _be(self, rank: int, port: int) -> None:
        code = 70
        try:
            os.setsid()
            said = os.open(self.said, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(said, 1), os.dup2(said, 2)
            faulthandler.enable()
            records.draw_curves = lambda *_: None  # a third of such a run's time, and nothing that goes on from it
            if self.ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.prepare()
            code = exit_code(lambda: run(self.config))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, children: list[int]) -> list[int]:
        """Their exit codes; negative: the signal.  Raises Lost where one hangs, which then says where it stands."""
        end, codes = time.monotonic() + LIMIT, {}
        while len(codes) < len(children):
            for child in set(children) - codes.keys():
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                hanging = sorted(set(children) - codes.keys())
                for signum in (signal.SIGABRT, signal.SIGKILL):
                    for child in hanging:
                        send(child, signum, group=True)
                    time.sleep(1)
                for child in hanging:
                    os.waitpid(child, 0)
                raise Lost(f"{hanging} hung for {LIMIT:g} s")
            time.sleep(0.002)
        found = [codes[child] for child in children]
        self.did(f"ended with {found}")
        return found

    def stops(self, children: list[int]) -> None:
        """Wait for the end of a run that goes on from what was damaged, and was asked to stop or not."""
        codes = self.wait(children)
        if not set(codes) <= {0, 128 + signal.SIGTERM, -signal.SIGTERM}:
            raise Lost(f"it ended with {codes}")

    def trains(self) -> bool:
        """Whether something is left to do, as far as its records tell: a finished run is no place for faults."""
        lines = self.folder / "metrics.jsonl"
        return not lines.exists() or lines.read_bytes().count(b"\n") < EPOCHS

    def told(self) -> str:
        return self.said.read_text()

    def finish(self) -> None:
        """Start it again until it is done, and compare."""
        codes = self.wait(self.start())
        if any(codes):
            raise Lost(f"the run that goes on ended with {codes}")
        self.compare()

    def compare(self) -> None:
        """What it left with what the run left that nothing happened to."""
        places = differences(self._state("last"), self.whole._state("last"))
        if places or metrics(self.config) != metrics(self.whole.config):
            raise Lost(f"other numbers at {places[:3]}")
        if self._state("best")["step"] != self.whole._state("best")["step"]:
            raise Lost("another best")
        if "Traceback" in self.told():
            raise Lost("a traceback")
        shutil.rmtree(self.folder)
        self.said.unlink()

    def _state(self, name: str) -> dict[str, Any]:
        shares = self.folder / f"{name}.sharded"
        state = read_folder(shares) if shares.exists() else saved(self.config, f"{name}.pth")
        return {**state, "config": None}

    def keep(self, folder: Path, error: Lost) -> None:
        """What is needed to find out why it was lost."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, symlinks=True)
        if self.said.exists():
            shutil.copy(self.said, folder / "said.txt")
        what = [str(error), f"{self.ranks} process(es) of the config beside this; done to them:", *self.done]
        (folder / "lost.txt").write_text("\n".join(what) + "\n")


def send(child: int, signum: int, group: bool = False) -> None:
    with suppress(ProcessLookupError):
        try:
            os.killpg(child, signum) if group else os.kill(child, signum)
        except ProcessLookupError:  # it has not called setsid yet
            os.kill(child, signum)


def alive(child: int) -> bool:
    """A child that was not waited for."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition: Callable[[], object], children: list[int]) -> bool:
    """Wait for `condition`; False where one of the processes ended before."""
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end or not all(map(alive, children)):
            return False
        time.sleep(0.001)
    return True


def until_saved(life: Life, children: list[int], name: str = "last.pth") -> bool:
    """Wait until this start has saved, not for the first time, and a random while more; False where it has ended."""
    last = life.folder / name
    before = stamp(last)
    saw = until(lambda: stamp(last) != before and last.with_stem("last.2").exists(), children)
    time.sleep(CHANCE.uniform(0, 0.3))
    return saw and all(map(alive, children))


def stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


# ---- each function is one life of a run, with as many tries as it takes the run to end ----


def kill_at_random(bench: Bench, *opts: object, ranks: int = 1, whom: str = "all") -> None:
    """SIGKILL at moments from before the first step to after the last one."""
    life = bench.life(*opts, ranks=ranks)
    while life.trains():
        children = life.start()
        time.sleep(CHANCE.uniform(0.01, 1.2 * life.whole.seconds))
        victims = children if whom == "all" else [CHANCE.choice(children)]
        living = all(map(alive, children))
        for child in victims:
            send(child, signal.SIGKILL, group=True)
        if living:
            life.tried(f"SIGKILL to {victims}")
        codes = life.wait(children)
        if not set(codes) <= {0, 1, -signal.SIGKILL}:
            raise Lost(f"they ended with {codes}")
    life.finish()


def marking(owner: object, name: str, marker: Path) -> Prepare:
    """Lets a function tell that it has begun, by a file, and take a while."""

    def prepare() -> None:
        whole = getattr(owner, name)

        def marked(*args, **options):
            marker.touch()
            time.sleep(CHANCE.uniform(0, SLOW))
            found = whole(*args, **options)
            time.sleep(CHANCE.uniform(0, SLOW))
            return found

        setattr(owner, name, marked)

    return prepare


def kill_during(bench: Bench, owner: object, name: str, *opts: object, ranks: int = 1) -> None:
    marker = bench.folder / "marker"
    life = bench.life(*opts, ranks=ranks, prepare=marking(owner, name, marker))
    while life.trains():
        marker.unlink(missing_ok=True)
        children = life.start()
        for _ in range(CHANCE.randrange(12)):  # an evaluation has four of them, and not always the first shall it be
            until(marker.exists, children)
            marker.unlink(missing_ok=True)
        until(marker.exists, children)
        time.sleep(CHANCE.uniform(0, 2 * SLOW))
        living = all(map(alive, children))
        for child in children:
            send(child, signal.SIGKILL)
        if living:
            life.tried(f"SIGKILL in {name}")
        life.wait(children)
    life.finish()


def signals(bench: Bench, *opts: object, ranks: int = 1, group: bool = False) -> None:
    """TERM, USR1, USR2 and HUP at random moments; the run says how it ended and goes on."""
    life = bench.life(*opts, ranks=ranks)
    while life.trains():
        children = life.start()
        until(lambda those=children: all(os.getpgid(child) == child for child in those), children)
        time.sleep(CHANCE.uniform(0.01, 1.2 * life.whole.seconds))
        signum, living = CHANCE.choice(SIGNALS), all(map(alive, children))
        for child in children:
            send(child, signum, group)
        if living:
            life.tried(signum.name)
        codes = life.wait(children)
        if not set(codes) <= {0, 128 + signum, -signum}:  # the last: before the run takes signals
            raise Lost(f"{signum.name} ended it with {codes}")
    life.finish()


def damage(bench: Bench, how: Callable[[Path], object]) -> None:
    """Of a run that was stopped the last file is damaged; it goes on from the one before."""
    life = bench.life()
    while life.trains():
        (child,) = children = life.start()
        saved_anew = until_saved(life, children)
        if saved_anew:
            send(child, signal.SIGTERM)
        life.stops(children)
        if saved_anew:
            how(life.folder / "last.pth")
            life.tried(f"{how.__name__} of last.pth")
    life.finish()


def truncate(path: Path) -> None:
    os.truncate(path, CHANCE.randrange(1, path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[CHANCE.randrange(len(content))] ^= 1 << CHANCE.randrange(8)
    path.write_bytes(content)


def touch(path: Path) -> None:
    """Files with random times, and a copy of one."""
    for each in path.parent.glob("*.pth"):
        when = CHANCE.randrange(10**9)
        os.utime(each, (when, when))
    shutil.copy(path, path.with_name("copy_of_last.pth"))


def damage_shares(bench: Bench, how: Callable[[Path], object]) -> None:
    """The same of a state in shares: one of its files."""
    life = bench.life(*IN_SHARES, ranks=2)
    while life.trains():
        children = life.start()
        saved_anew = until_saved(life, children, "last.sharded")
        if saved_anew:
            for child in children:
                send(child, signal.SIGTERM)
        life.stops(children)
        if saved_anew:
            victim = CHANCE.choice(sorted((life.folder / "last.sharded").iterdir()))
            how(victim)
            life.tried(f"{how.__name__} of {victim.name}")
    life.finish()


def wrong_clock(bench: Bench) -> None:
    """Each start is at another time, up to a year before or after."""

    def prepare() -> None:
        now, off = time.time, CHANCE.uniform(-3e7, 3e7)
        time.time = lambda: now() + off

    life = bench.life(prepare=prepare)
    while life.trains():
        (child,) = children = life.start()
        time.sleep(CHANCE.uniform(0.01, 1.2 * life.whole.seconds))
        if alive(child):
            life.tried("SIGTERM or SIGKILL, and another time")
        send(child, CHANCE.choice((signal.SIGTERM, signal.SIGKILL)))
        life.wait(children)
    life.finish()


def folder_in_its_place(bench: Bench) -> None:
    life = bench.life()
    (child,) = children = life.start()
    until_saved(life, children)
    send(child, signal.SIGKILL)
    life.wait(children)
    last = life.folder / "last.pth"
    last.unlink()
    (last / "inside").mkdir(parents=True)
    life.tried("a folder in the place of last.pth")
    code = life.wait(life.start())
    if code != [1] or "last.pth" not in life.told():
        raise Lost(f"a folder called last.pth ended it with {code}")
    shutil.rmtree(last)
    life.finish()


def full_disk(bench: Bench) -> None:
    """Its folder is a disk of its own, too small for all that the run leaves (or, where this script may not mount one,
    files cannot grow as long as a checkpoint is, from a random save on)."""
    mounts = os.geteuid() == 0
    life = bench.life(prepare=lambda: None if mounts else no_growth())
    if mounts:
        size = CHANCE.randrange(20, 400)  # KiB; a run leaves some 500
        life.folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(life.folder)]
        mounts = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        life.tried(f"a disk of {size} KiB" if mounts else "files that cannot grow")
        told_of(life, "cannot write")
        if mounts:
            subprocess.run(["mount", "-o", "remount,size=64m", str(life.folder)], check=True)
            kept = life.bench.folder / "kept"
            shutil.copytree(life.folder, kept)
    finally:
        if mounts:
            subprocess.run(["umount", str(life.folder)], check=True)
    if mounts:
        life.folder.rmdir()
        kept.rename(life.folder)
    life.prepare = lambda: None
    life.finish()


def no_growth() -> None:
    import resource

    after, write, count = CHANCE.randrange(6), saving.save_checkpoint, [0]

    def limited(*args):
        count[0] += 1
        if count[0] > after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (CHANCE.randrange(2**10, 2**16), resource.RLIM_INFINITY))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    saving.save_checkpoint = limited


def read_only(bench: Bench) -> None:
    """The system refuses to write, from a random save on."""

    def prepare() -> None:
        after, write, count = CHANCE.randrange(6), saving.save_checkpoint, [0]

        def refused(content, path, *rest):
            count[0] += 1
            if count[0] > after:
                path = Path("/proc/1/last.pth") if os.access("/proc/1", os.R_OK) else Path("/proc/last.pth")
            write(content, path, *rest)

        saving.save_checkpoint = refused

    life = bench.life(prepare=prepare)
    life.tried("a disk that takes nothing")
    told_of(life, "cannot write")
    life.prepare = lambda: None
    life.finish()


def told_of(life: Life, sentence: str) -> None:
    code = life.wait(life.start())
    if code != [1] or sentence not in life.told():
        raise Lost(f"ended with {code}")


def folder_removed(bench: Bench) -> None:
    life = bench.life()
    children = life.start()
    if until_saved(life, children):
        life.tried("its folder removed")
    shutil.rmtree(life.folder, ignore_errors=True)
    code, told = life.wait(children), life.told()
    if code not in ([0], [1]) or (code == [1] and "error: cannot" not in told):
        raise Lost(f"ended with {code}")
    shutil.rmtree(life.folder, ignore_errors=True)
    life.finish()


def second_run(bench: Bench) -> None:
    """A second run is refused while the first lives; once that was killed it takes over."""
    life = bench.life()
    (first,) = children = life.start()
    if until_saved(life, children):
        code = life.wait(life.start())
        if alive(first):
            life.tried("a second run")
            if code != [1] or "is being written by" not in life.told():
                raise Lost(f"the second ended with {code}")
    send(first, signal.SIGKILL)
    life.wait(children)
    life.finish()


def worker_killed(bench: Bench) -> None:
    life = bench.life(*LOADING)
    while life.trains():
        (child,) = children = life.start()
        time.sleep(CHANCE.uniform(0.1, 0.8 * life.whole.seconds))
        workers = Path(f"/proc/{child}/task/{child}/children").read_text().split() if alive(child) else []
        if workers:
            life.tried(f"SIGKILL to {workers[0]} of {workers}")
            send(int(CHANCE.choice(workers)), signal.SIGKILL)
        code = life.wait(children)
        if code != [0] and (code != [1] or "a loading process was killed at " not in life.told()):
            raise Lost(f"ended with {code}")
    life.finish()


FAULTS: dict[str, Callable[[Bench], None]] = {
    "SIGKILL, one process": kill_at_random,
    "SIGKILL, one process with two loading ones": lambda b: kill_at_random(b, *LOADING),
    "SIGKILL, two processes at once": lambda b: kill_at_random(b, *TWO, ranks=2),
    "SIGKILL, two processes at once, states in shares": lambda b: kill_at_random(b, *IN_SHARES, ranks=2),
    "SIGKILL, one of two processes": lambda b: kill_at_random(b, *TWO, ranks=2, whom="one"),
    "SIGKILL while saving": lambda b: kill_during(b, saving, "save_checkpoint"),
    "SIGKILL while saving, two processes": lambda b: kill_during(b, saving, "save_checkpoint", *TWO, ranks=2),
    "SIGKILL while evaluating": lambda b: kill_during(b, Accuracy, "add"),
    "SIGKILL while evaluating, two processes": lambda b: kill_during(b, Accuracy, "add", *TWO, ranks=2),
    "a stop signal, one process": signals,
    "a stop signal, to the group with loading processes": lambda b: signals(b, *LOADING, group=True),
    "a stop signal, two processes": lambda b: signals(b, *TWO, ranks=2),
    "a loading process killed": worker_killed,
    "the last checkpoint truncated": lambda b: damage(b, truncate),
    "the last checkpoint with a flipped bit": lambda b: damage(b, flip),
    "the last checkpoint emptied": lambda b: damage(b, empty),
    "a file of the last shares truncated": lambda b: damage_shares(b, truncate),
    "a file of the last shares with a flipped bit": lambda b: damage_shares(b, flip),
    "a folder in the checkpoint's place": folder_in_its_place,
    "files touched and copied": lambda b: damage(b, touch),
    "the clock set back and forward": wrong_clock,
    "disk full": full_disk,
    "disk read-only while saving": read_only,
    "the run's folder removed": folder_removed,
    "a second run in the folder, and a lock whose holder was killed": second_run,
}
FEWER = dict.fromkeys(list(FAULTS)[13:], 0.2)  # share of the tries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME")
    parser.add_argument("--keep", type=Path, default=Path("output/faults"), help="for what is lost (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn here; the moments are the machine's too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # else each process copies what it collects
    lost_any = False
    print("| fault | tries | lost | seconds |\n|---|--:|--:|--:|", flush=True)
    for name in args.only:
        CHANCE.seed(f"{args.seed} {name}")
        lost, start = 0, time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            tries = max(1, round(args.tries * FEWER.get(name, 1)))
            while bench.tries < tries:
                try:
                    FAULTS[name](bench)
                except Lost as error:
                    lost += 1
                    kept = args.keep / f"{name.replace(' ', '_').replace(',', '')}-{args.seed}-{lost}"
                    bench.now.keep(kept, error)
                    print(f"{name}: {error}; see {kept}", file=sys.stderr, flush=True)
        print(f"| {name} | {bench.tries} | {lost} | {time.monotonic() - start:.0f} |", flush=True)
        lost_any |= bool(lost)
    return lost_any


if __name__ == "__main__":
    sys.exit(main())
