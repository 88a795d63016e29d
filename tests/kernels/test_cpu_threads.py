"""The cpu backend's threads, and its compiled loops in several processes: the same bits in all of them."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import vmamba_kernels as vk
from vmamba_kernels import folders
from vmamba_kernels.cpu import loops, threads
from vmamba_kernels.cpu.loops import BLOCK, STATES

from .test_cpu import image, run, sequence


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["PyTorch's threads", "a pool of ours"])
def helpers(request, monkeypatch):
    if request.param == "a pool of ours":
        monkeypatch.setattr(threads, "_team", lambda: None)
    elif threads._team() is None:
        pytest.skip("this PyTorch has no GNU OpenMP of its own")


LARGE = dict(batch=3, height=37, width=33, dim=2 * BLOCK + 3, states=3, rank=5)


def test_the_same_bits_on_every_run_and_for_any_number_of_threads(set_threads, helpers):
    image_of_one = LARGE | dict(batch=1, states=STATES + 1)
    found = []
    for number in (1, 1, 2, 3, 8, 40):  # with few threads the routes of an image are one task, with many several
        set_threads(number)
        results = (
            run(vk.cross_selective_scan, image(**LARGE), "cpu"),
            run(vk.cross_selective_scan, image(**image_of_one), "cpu"),
            run(vk.selective_scan, sequence(batch=3, groups=4, dim=70, length=50), "cpu"),
        )
        found.append([t for result in results for t in result.values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_work_is_shared_among_as_many_threads_as_pytorch_has(set_threads, helpers, number):
    set_threads(number)
    done, workers = [], set()

    def work(start, stop):
        time.sleep(0.001)
        workers.add(threading.get_ident())
        done.extend(range(start, stop))

    threads.share(100, work)
    assert sorted(done) == list(range(100))
    assert len(workers) <= number and (number == 1) == (workers == {threading.get_ident()})


def test_an_error_in_a_helper_is_raised(set_threads, helpers):
    set_threads(2)
    caller = threading.get_ident()

    def work(start, stop):
        time.sleep(0.001)
        if threading.get_ident() != caller:
            raise ValueError("in a helper")

    with pytest.raises(ValueError, match="in a helper"):
        threads.share(100, work)


def test_several_threads_of_python_at_once(set_threads, helpers):
    cases = [image(**{**LARGE, "dim": dim}) for dim in (5, 64, 65, 100)] * 2
    want = [run(vk.cross_selective_scan, case, "cpu") for case in cases]

    def run_with_two(case):
        torch.set_num_threads(2)
        return run(vk.cross_selective_scan, case, "cpu")

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run_with_two, cases))
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def _in_a_child(number, queue):
    torch.get_num_threads = lambda: number  # of our threads; PyTorch's own do not survive a fork
    done = []
    threads.share(10, lambda start, stop: done.extend(range(start, stop)))
    out = run(vk.cross_selective_scan, image(**LARGE), "cpu")
    queue.put((sorted(done), {name: t.numpy() for name, t in out.items()}))


def _that_forks(queue):
    torch.set_num_threads(2)
    threads.share(10, lambda start, stop: time.sleep(0.001))  # so that there are threads to lose
    torch.set_num_threads(1)
    want = run(vk.cross_selective_scan, image(**LARGE), "cpu")
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=_in_a_child, args=(2, found))
    child.start()
    done, out = found.get(timeout=60)
    child.join()
    queue.put((done, all((out[name] == t.numpy()).all() for name, t in want.items())))


def test_after_a_fork():
    """In a process of its own: where torch.export has run, PyTorch refuses gradients behind a fork."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    parent = context.Process(target=_that_forks, args=(queue,))
    parent.start()
    assert queue.get(timeout=120) == (list(range(10)), True)
    parent.join()


class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return vk.cross_selective_scan(**image(**LARGE))


def test_in_workers_of_a_loader():
    (out,) = torch.utils.data.DataLoader(Scans(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(out, torch.stack([Scans()[0]] * 2))


def _compile(queue):
    case = image()

    def scan_with_two(_):
        torch.set_num_threads(2)
        return vk.cross_selective_scan(**case)

    with ThreadPoolExecutor(3) as pool:
        outs = list(pool.map(scan_with_two, range(3)))
    assert all(torch.equal(out, outs[0]) for out in outs)
    queue.put((outs[0].numpy(), Path(loops.scan_fwd.stats.cache_path)))


def test_two_processes_share_a_cache_that_is_empty_at_first(tmp_path, monkeypatch):
    """Under spawn, each with three threads that scan for the first time at once."""
    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    want, queue = vk.cross_selective_scan(**image(), backend="cpu").numpy(), context.Queue()
    children = [context.Process(target=_compile, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        out, path = queue.get(timeout=60)
        assert (out == want).all() and path.parent == tmp_path / "cpu"
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert {file.suffix for file in path.iterdir()} == {".nbc", ".nbi"}  # nothing half written
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_where_the_home_cannot_be_written_a_temporary_folder_keeps_the_code(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path / "file" / "cache"))  # below a file nothing is made
    folder = folders.own_folder("cpu")
    assert folder.parent == tmp_path / "tmp" and folder.stat().st_mode & 0o777 == 0o700
    assert folders.own_folder("cpu") == folder
    folder.chmod(0o777)  # others may have put code there
    other = folders.own_folder("cpu")
    assert other != folder and other.parent == tmp_path / "tmp" and other.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("VMAMBA_KERNELS_CACHE", str(tmp_path / "cache"))
    assert folders.own_folder("cpu") == tmp_path / "cache" / "cpu"


def test_bits_of_a_part_that_is_not_whole_for_many_threads(set_threads):
    """1,517 pixels: what is left of 512 rows at a time is added up the same way, too."""
    case = image(batch=1, height=37, width=41, dim=8)
    found = []
    for number in (1, 8, 12):
        set_threads(number)
        found.append([*run(vk.cross_selective_scan, case, "cpu").values()])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_a_thread_that_outlives_the_main_one_works_alone(set_threads, monkeypatch):
    class Ended:
        def submit(self, work):
            raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(threads, "_team", lambda: None)
    monkeypatch.setattr(threads, "_pool", Ended)
    set_threads(4)
    done = []
    threads.share(10, lambda start, stop: done.extend(range(start, stop)))
    assert sorted(done) == list(range(10))


def test_help_that_came_before_the_end_is_waited_for(set_threads, monkeypatch):
    """The interpreter may end between two helpers."""
    monkeypatch.setattr(threads, "_team", lambda: None)
    with ThreadPoolExecutor(1) as pool:

        class Ending:
            helpers = 0

            def submit(self, work):
                Ending.helpers += 1
                if Ending.helpers > 1:
                    raise RuntimeError("cannot schedule new futures after shutdown")
                return pool.submit(work)

        monkeypatch.setattr(threads, "_pool", Ending)
        set_threads(4)
        done, caller = [], threading.get_ident()

        def work(start, stop):
            time.sleep(0.001 if threading.get_ident() == caller else 0.1)
            done.extend(range(start, stop))

        threads.share(100, work)
        assert sorted(done) == list(range(100))


def test_a_damaged_cache_is_told_and_passed_over():
    def damaged(*_):
        raise EOFError

    loops._tell_of_the_cache.cache_clear()
    with pytest.warns(UserWarning, match="cannot be used .EOFError., so they are compiled in every process; remove it"):
        assert loops._whatever_is_wrong(damaged)("a signature") is None
    assert loops.in_blocks._cache.load_overload.__name__ == "careful"


def test_a_new_process_compiles_a_model_in_one_graph():
    code = """
import sys, torch, vmamba, vmamba_kernels
vmamba_kernels.layer_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3))
assert "numba" not in sys.modules  # what is not asked to scan costs nothing
model = vmamba.create_model("vmamba_digits", depths=(1,), dims=8).eval()
assert torch.compile(model, fullgraph=True, backend="eager")(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
"""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})
