"""Faults, counted: python tests/faults.py --tries 100 [--only NAME ...] > faults.md

Runs of a second each are killed, signalled, and robbed of their files at random moments, and started again until they
are done; then they must have left, bit for bit, what a run that nothing happened to leaves.  A try is lost where they
have not, where a fault ends in a traceback instead of a sentence, and where something waits for ever.  The processes
are forked from this one, which has imported everything: what is tried is the run, not the import.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from tests.classification.tiny import differences, metrics, saved, tiny_config  # noqa: E402
from vmamba.classification.task import Accuracy  # noqa: E402
from vmamba.config import output_folder  # noqa: E402
from vmamba.runtime import saving  # noqa: E402
from vmamba.runtime.cli import exit_code  # noqa: E402
from vmamba.runtime.trainer import run  # noqa: E402

EPOCHS = 6
LIMIT = 60  # seconds after which a process hangs
TWO = ("DATA.BATCH_SIZE", 4, "AUG.MIXUP", 0)  # of each of two processes
SLOW = 0.05
CHANCE = random.Random()  # of its own: a run's random numbers are the run's


class Lost(Exception):
    """What a try found that must not be."""


class Bench:
    """A folder of runs, each beside the one that nothing happened to."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.number = folder, 30000 + os.getpid() % 10000, 0
        self.whole: dict[tuple, object] = {}

    def config(self, tag: str, *opts: object):
        every = ("TRAIN.EPOCHS", EPOCHS, "TRAIN.SAVE_STEPS", 2, "TAG", tag)
        return tiny_config(self.folder, *every, *opts)

    def fresh(self, *opts: object):
        self.number += 1
        return self.config(f"try{self.number}", *opts)

    def start(self, config, ranks: int = 1, prepare: Callable[[], object] = lambda: None) -> list[int]:
        """Fork the processes of a run; `prepare` is called in each."""
        self.port += 1
        children = []
        for rank in range(ranks):
            child = os.fork()
            if not child:
                self._be(config, rank, ranks, prepare)
            children.append(child)
        return children

    def _be(self, config, rank: int, ranks: int, prepare: Callable[[], object]) -> None:
        code = 70
        try:
            os.setsid()
            said = os.open(self.said(config), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(said, 1), os.dup2(said, 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
            prepare()
            code = exit_code(lambda: run(config))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def said(self, config) -> Path:
        return self.folder / f"{config.TAG}.txt"

    def finish(self, config, *opts: object, ranks: int = 1) -> None:
        """Start the run again until it is done, and compare what it left with the run that nothing happened to."""
        codes = wait(self.start(config, ranks))
        if any(codes):
            raise Lost(f"the run that goes on ended with {codes}")
        key = (ranks, *opts)
        if key not in self.whole:
            whole = self.config(f"whole{len(self.whole)}", *opts)
            if any(wait(self.start(whole, ranks))):
                raise Lost("the run that nothing happens to did not end well")
            self.whole[key] = whole
        self.compare(config, self.whole[key])

    def compare(self, config, whole) -> None:
        one, other = saved(config), saved(whole)
        places = differences({**one, "config": None}, {**other, "config": None})
        if places or metrics(config) != metrics(whole):
            raise Lost(f"other numbers at {places[:3]}")
        if saved(config, "best.pth")["step"] != saved(whole, "best.pth")["step"]:
            raise Lost("another best")
        if "Traceback" in self.said(config).read_text():
            raise Lost(f"a traceback: {self.said(config).read_text()[-1500:]}")
        for each in (output_folder(config), self.said(config)):
            shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink()


def wait(children: list[int], limit: float = LIMIT) -> list[int]:
    """The exit codes; negative: the signal."""
    end, codes = time.monotonic() + limit, {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise Lost(f"a process hung for {limit:g} s")
        time.sleep(0.002)
    return [codes[child] for child in children]


def once_done(path: Path, children: list[int]) -> bool:
    """Until `path` is there; False where the processes ended before."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        if time.monotonic() > end or any(state(child) == "Z" for child in children):
            return False
        time.sleep(0.001)
    return True


def state(child: int) -> str:
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def kill_at_random(bench: Bench, tries: int, *opts: object, ranks: int = 1, whom: str = "all") -> None:
    """SIGKILL at moments from before the first step to after the last one, over as many runs as it takes."""
    left = tries
    while left:
        config = bench.fresh(*opts)
        for _ in range(min(left, 5)):
            children = bench.start(config, ranks)
            time.sleep(CHANCE.uniform(0.05, 1.2) * (1.5 if ranks > 1 else 1))
            victims = children if whom == "all" else [CHANCE.choice(children)]
            for child in victims:
                try:
                    os.killpg(child, signal.SIGKILL)
                except ProcessLookupError:  # it has not called setsid yet, or is gone
                    os.kill(child, signal.SIGKILL)
            wait(children)
            left -= 1
        bench.finish(config, *opts, ranks=ranks)


def marking(owner: object, name: str, marker: Path) -> Callable[[], None]:
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


def kill_during(bench: Bench, tries: int, owner: object, name: str, ranks: int = 1) -> None:
    left = tries
    opts = TWO if ranks > 1 else ()
    while left:
        config = bench.fresh(*opts)
        for _ in range(min(left, 4)):
            marker = bench.folder / "marker"
            marker.unlink(missing_ok=True)
            children = bench.start(config, ranks, marking(owner, name, marker))
            for _ in range(CHANCE.randrange(4)):  # not always the first time
                once_done(marker, children)
                marker.unlink(missing_ok=True)
            once_done(marker, children)
            time.sleep(CHANCE.uniform(0, 2 * SLOW))
            for child in children:
                os.kill(child, signal.SIGKILL)
            wait(children)
            left -= 1
        bench.finish(config, *opts, ranks=ranks)


def signals(bench: Bench, tries: int, *opts: object, ranks: int = 1, group: bool = False) -> None:
    """TERM, USR1, USR2 and HUP at random moments; the run says how it ended and goes on."""
    left, known = tries, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    while left:
        config = bench.fresh(*opts)
        for _ in range(min(left, 5)):
            children = bench.start(config, ranks)
            wait_for_session(children)
            time.sleep(CHANCE.uniform(0.02, 1.2))
            signum = CHANCE.choice(known)
            for child in children:
                if state(child) != "Z":
                    os.killpg(child, signum) if group else os.kill(child, signum)
            codes = wait(children)
            if not set(codes) <= {0, 128 + signum, -signum}:  # the last: before the run takes signals
                raise Lost(f"{signum.name} ended it with {codes}")
            left -= 1
        bench.finish(config, *opts, ranks=ranks)


def wait_for_session(children: list[int]) -> None:
    for child in children:
        while state(child) != "Z" and os.getpgid(child) != child:
            time.sleep(0.001)


def damage(bench: Bench, tries: int, how: Callable[[Path], object]) -> None:
    """Of a run that was stopped the last file is damaged; it goes on from the one before."""
    for _ in range(tries):
        config = bench.fresh()
        (child,) = bench.start(config)
        last = output_folder(config) / "last.2.pth"
        once_done(last, [child])
        time.sleep(CHANCE.uniform(0, 0.5))
        if state(child) != "Z":
            os.kill(child, signal.SIGTERM)
        wait([child])
        how(output_folder(config) / "last.pth")
        bench.finish(config)


def truncate(path: Path) -> None:
    os.truncate(path, CHANCE.randrange(1, path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[CHANCE.randrange(len(content))] ^= 1 << CHANCE.randrange(8)
    path.write_bytes(content)


def touch(path: Path) -> None:
    """The clock set back, and files touched and copied, as far as files tell of it."""
    for each in path.parent.glob("*.pth"):
        when = CHANCE.randrange(10**9)
        os.utime(each, (when, when))
    shutil.copy(path, path.with_name("copy_of_last.pth"))


def folder_in_its_place(bench: Bench, tries: int) -> None:
    for _ in range(tries):
        config = bench.fresh()
        (child,) = bench.start(config)
        once_done(output_folder(config) / "last.2.pth", [child])
        os.kill(child, signal.SIGKILL)
        wait([child])
        last = output_folder(config) / "last.pth"
        last.unlink()
        (last / "inside").mkdir(parents=True)
        code = wait(bench.start(config))
        told = bench.said(config).read_text()
        if code != [1] or "Traceback" in told or "last.pth" not in told:
            raise Lost(f"a folder called last.pth ended it with {code}")
        shutil.rmtree(last)
        bench.finish(config)


def full_disk(bench: Bench, tries: int) -> None:
    """Files cannot grow as long as a checkpoint is, from a random save on."""

    def prepare() -> None:
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

    told_of(bench, tries, prepare, "cannot write")


def read_only(bench: Bench, tries: int) -> None:
    """The system refuses to write, from a random save on."""

    def prepare() -> None:
        after, write, count = CHANCE.randrange(6), saving.save_checkpoint, [0]

        def refused(content, path, *rest):
            count[0] += 1
            if count[0] > after:
                path = Path("/proc/1/last.pth") if os.access("/proc/1", os.R_OK) else Path("/proc/last.pth")
            write(content, path, *rest)

        saving.save_checkpoint = refused

    told_of(bench, tries, prepare, "cannot write")


def told_of(bench: Bench, tries: int, prepare: Callable[[], object], sentence: str) -> None:
    for _ in range(tries):
        config = bench.fresh()
        seed = CHANCE.random()
        code = wait(bench.start(config, 1, lambda seed=seed: (CHANCE.seed(seed), prepare())))
        if code != [1] or sentence not in bench.said(config).read_text():
            raise Lost(f"ended with {code}: {bench.said(config).read_text()[-200:]}")
        bench.finish(config)


def folder_removed(bench: Bench, tries: int) -> None:
    for _ in range(tries):
        config = bench.fresh()
        (child,) = bench.start(config)
        once_done(output_folder(config) / "last.pth", [child])
        time.sleep(CHANCE.uniform(0, 0.3))
        shutil.rmtree(output_folder(config), ignore_errors=True)
        code, told = wait([child]), bench.said(config).read_text()
        if code not in ([0], [1]) or "Traceback" in told or (code == [1] and "error: cannot" not in told):
            raise Lost(f"ended with {code}: {told[-300:]}")
        shutil.rmtree(output_folder(config), ignore_errors=True)
        bench.finish(config)


def second_run(bench: Bench, tries: int) -> None:
    """A second run is refused while the first lives; once that was killed it takes over."""
    for _ in range(tries):
        config = bench.fresh()
        (first,) = bench.start(config)
        once_done(output_folder(config) / "last.pth", [first])
        code = wait(bench.start(config))
        if state(first) != "Z" and code != [1]:
            raise Lost(f"the second ended with {code}")
        if state(first) != "Z":
            os.kill(first, signal.SIGKILL)
        wait([first])
        bench.finish(config)


def worker_killed(bench: Bench, tries: int) -> None:
    opts = ("DATA.NUM_WORKERS", 2)
    for _ in range(tries):
        config = bench.fresh(*opts)
        (child,) = bench.start(config)
        once_done(output_folder(config) / "last.pth", [child])
        time.sleep(CHANCE.uniform(0, 0.3))
        workers = Path(f"/proc/{child}/task/{child}/children").read_text().split() if state(child) != "Z" else []
        if workers:
            os.kill(int(CHANCE.choice(workers)), signal.SIGKILL)
        code, told = wait([child]), bench.said(config).read_text()
        if "Traceback" in told or (code != [0] and "a loading process was killed at " not in told):
            raise Lost(f"ended with {code}: {told[-300:]}")
        bench.finish(config, *opts)


FAULTS: dict[str, Callable[[Bench, int], None]] = {
    "SIGKILL, one process": kill_at_random,
    "SIGKILL, one process with two loading ones": lambda b, n: kill_at_random(b, n, "DATA.NUM_WORKERS", 2),
    "SIGKILL, two processes at once": lambda b, n: kill_at_random(b, n, *TWO, ranks=2),
    "SIGKILL, one of two processes": lambda b, n: kill_at_random(b, n, *TWO, ranks=2, whom="one"),
    "SIGKILL while saving": lambda b, n: kill_during(b, n, saving, "save_checkpoint"),
    "SIGKILL while saving, two processes": lambda b, n: kill_during(b, n, saving, "save_checkpoint", 2),
    "SIGKILL while evaluating": lambda b, n: kill_during(b, n, Accuracy, "add"),
    "a stop signal, one process": signals,
    "a stop signal, to the group with loading processes": lambda b, n: signals(b, n, "DATA.NUM_WORKERS", 2, group=True),
    "a stop signal, two processes": lambda b, n: signals(b, n, *TWO, ranks=2),
    "the last checkpoint truncated": lambda b, n: damage(b, n, truncate),
    "the last checkpoint with a flipped bit": lambda b, n: damage(b, n, flip),
    "the last checkpoint emptied": lambda b, n: damage(b, n, empty),
    "a folder in the checkpoint's place": folder_in_its_place,
    "files touched and copied": lambda b, n: damage(b, n, touch),
    "disk full while saving": full_disk,
    "disk read-only while saving": read_only,
    "the run's folder removed": folder_removed,
    "a second run in the folder, and a lock whose holder was killed": second_run,
    "a loading process killed": worker_killed,
}
SLOWER = dict.fromkeys(list(FAULTS)[10:], 0.2)  # share of the tries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lost_any = False
    print("| fault | tries | lost | seconds |\n|---|--:|--:|--:|", flush=True)
    for name in args.only:
        CHANCE.seed(f"{args.seed} {name}")
        tries, lost, start = max(1, round(args.tries * SLOWER.get(name, 1))), [], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            done = 0
            while done < tries:
                part = min(5, tries - done)
                try:
                    FAULTS[name](bench, part)
                except Lost as error:
                    lost.append(str(error))
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                done += part
        print(f"| {name} | {tries} | {len(lost)} | {time.monotonic() - start:.0f} |", flush=True)
        lost_any |= bool(lost)
    return lost_any


if __name__ == "__main__":
    sys.exit(main())
