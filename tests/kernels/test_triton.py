"""The Triton backend: its numbers in processes of their own, and what it says when it cannot serve."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vmamba_kernels as vk
import vmamba_kernels.triton as backend
from vmamba_kernels.triton import common, scan, scan_kernels, ssd

OLD = triton.__version__.startswith("3.2.")  # PyTorch 2.6's, which knows no GPU after Hopper
CASES = Path(__file__).with_name("triton_cases.py")
ROOT = CASES.parents[2]


HALVES = ("images or sequences or extreme", "not (images or sequences or extreme)")  # of about the same time


def run_cases(**environment):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(CASES), "-k"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    halves = [subprocess.Popen([*command, half], env=environment, cwd=ROOT, **pipes) for half in HALVES]
    outputs = [half.communicate()[0] for half in halves]
    for half, output in zip(halves, outputs, strict=True):
        assert half.returncode == 0, output[-6000:]


@pytest.mark.skipif(OLD, reason="Triton 3.2's interpreter adds 32-bit integers up in 64 bits")
def test_kernels_agree_with_the_reference_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_agree_with_the_reference_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def source(kernel, dtype, constants, ones=("u_d", "B_n")):
    """A kernel with the types of its arguments; pointers are float32 but those of images and projections."""
    varying = {"u", "x", "dt", "B", "C", "P", "w", "y", "dy", "du", "ddt", "dP", "values"}
    floats = {"bias", "A2", "skip", "states", "sums", "adjoints", "scratch", "dB", "dC", "dA", "dbias", "dskip"}
    signature, known = {}, {}
    for name in kernel.arg_names:
        if name in constants or name in ones:
            signature[name], known[name] = "constexpr", constants.get(name, 1)
        else:
            signature[name] = f"*{dtype}" if name in varying else "*fp32" if name in floats else "i32"
    return ASTSource(kernel, signature, known)


def compile_for(architecture, kernel, constants):
    """The compiled kernel, made where no GPU is."""
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source(kernel, "bf16", constants), target, options={"num_warps": 2})


class Ttir(Exception):
    """Carries a kernel's Triton IR out of its compilation, of which the rest takes seconds."""


@pytest.fixture
def ttir(monkeypatch, tmp_path):
    """A function of what `source` takes: the kernel's Triton IR, every number an argument."""

    def leave(module, *_):
        raise Ttir(str(module))

    monkeypatch.setattr(backends["nvidia"].compiler, "make_ttgir", staticmethod(leave))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def translate(kernel, constants, dtype="bf16"):
        given = {name: value for name, value in constants.items() if name in kernel.arg_names}
        with pytest.raises(Ttir) as left:
            triton.compile(source(kernel, dtype, given, ones=()), GPUTarget("cuda", 90, 32))
        return str(left.value)

    return translate


INDICES = {"routes", "codes", "segments", "chunk", "chunks", "length", "height", "width"}  # of 32 bits, as a pixel is
INDEX_AGAIN = {"arith.divsi", "arith.remsi", "arith.cmpi", "arith.cmpf", "tt.load"}
VALUE = r"%[\w$.-]+"


def narrow_products(ttir: str, by: set[str] = frozenset()) -> list[str]:
    """The 32-bit products by a stride or a number of channels that addresses are made of, by line of the kernels.

    What a quotient, a remainder or a comparison by such a number gives is an index again, and so is what a pixel's
    number is made of (INDICES): only a product by the others can be as large as a tensor.  by: only by these.
    """
    numbers = set(re.findall(r"%(\w+): i\d+", re.search(r"tt\.func public .*", ttir)[0]))
    sizes = {f"%{name}" for name in by or numbers - INDICES}
    made, addresses, carried = {}, [], []  # value -> (operation, operands, type, place)
    for line in ttir.splitlines():
        text, _, place = line.strip().partition(" loc(")
        value = re.match(rf"({VALUE})(?::\d+)? = \"?([\w.]+)\"?(.*)", text)
        if value:
            name, operation, rest = value.groups()
            made[name] = (operation, re.findall(VALUE, rest), rest.rpartition(":")[2], place)
            if operation == "tt.addptr":
                addresses.append(made[name][1][1])
            for own, first in re.findall(rf"({VALUE}) = ({VALUE})", rest.partition("iter_args")[2]):
                made[own] = ("carried by a loop", [first], "", "")
                carried.append(own)
        elif text.startswith("scf.yield"):  # to be safe, by any loop
            for own in carried:
                made[own][1].extend(re.findall(VALUE, text))

    def parts(value: str, ends: set[str], seen: set[str]) -> set[str]:
        """What `value` is made of, not looking through operations of `ends`."""
        if value not in seen:
            seen.add(value)
            operation, operands, *_ = made.get(value, ("", []))
            for operand in [] if operation in ends else operands:
                parts(operand, ends, seen)
        return seen

    def line_of(place: str) -> str:
        places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
        while not (line := re.search(r"(\w+\.py)\":(\d+)", place)):
            place = places[re.search(r"#loc\d*", place)[0]]
        return f"{line[1]}:{line[2]}"

    found = set()
    for value in set().union(*(parts(address, {"tt.load"}, set()) for address in addresses)) & made.keys():
        operation, operands, kind, place = made[value]
        narrow = operation == "arith.muli" and kind.strip(" >").endswith("i32")
        if narrow and any(parts(operand, INDEX_AGAIN, set()) & sizes for operand in operands):
            found.add(line_of(place))
    return sorted(found)


CONSTANTS = dict(
    N=16, NP=16, STEPS=2, BLOCK=64, HAS_BIAS=True, HAS_SKIP=True, SOFTPLUS=True, MODE="save", SPLIT=False, WIDE=False,
    HEAD=16, HP=16, Q=16, ADJOINT=True, PRECISION="tf32", REVERSE=False,
)  # fmt: skip
IMAGE = dict(RANK=12, C_AT=16, DT_AT=32)
SEQUENCE = dict(RANK=0, C_AT=0, DT_AT=0)
KERNELS = [
    *((scan_kernels.scan_fwd_kernel, {**of, "MODE": mode}) for of in (IMAGE, SEQUENCE) for mode in ("save", "local")),
    (scan_kernels.scan_fwd_kernel, {**SEQUENCE, "MODE": "chunk"}),
    *((scan_kernels.scan_adjoint_kernel, of) for of in (IMAGE, SEQUENCE)),
    *((scan_kernels.scan_bwd_kernel, {**of, "SPLIT": split}) for of in (IMAGE, SEQUENCE) for split in (True, False)),
    (ssd.ssd_state_kernel, {}),
    (ssd.ssd_fwd_kernel, {}),
    (ssd.ssd_bwd_kernel, {}),
    (common.chunk_pass_kernel, {}),
]


@pytest.mark.skipif(OLD, reason="Triton 3.2 leaves out the names of a kernel's arguments")
def test_products_of_32_bits_do_not_make_addresses_that_may_be_larger(ttir):
    """Inside an image none does if WIDE; between images, routes and blocks none ever does."""
    seen = {}
    for kernel, constants in KERNELS:
        assert not narrow_products(ttir(kernel, {**CONSTANTS, **constants, "WIDE": True})), kernel.__name__
        narrow = ttir(kernel, {**CONSTANTS, **constants})
        outer = {name for name in kernel.arg_names if re.search("_b$|_k$|_block$|^row$", name)}
        assert not narrow_products(narrow, outer), kernel.__name__
        seen[kernel.__name__] = len(narrow_products(narrow))
    assert seen["scan_bwd_kernel"] >= 4 and seen["ssd_fwd_kernel"] >= 4  # the search sees those inside an image


@pytest.mark.parametrize("dtype, states", [("fp32", 1), ("fp32", 16), ("bf16", 1), ("bf16", 16)])
def test_scan_kernels_have_no_tf32(ttir, dtype, states):
    """Triton turns some sums of products into TF32 matrix products by itself; then float32 loses digits."""
    sizes = dict(N=states, NP=states, RANK=12, C_AT=states, DT_AT=2 * states, STEPS=16 if states == 1 else 2)
    for kernel in (scan_kernels.scan_fwd_kernel, scan_kernels.scan_adjoint_kernel, scan_kernels.scan_bwd_kernel):
        assert "tt.dot" not in ttir(kernel, {**CONSTANTS, **sizes}, dtype)


def test_kernels_compile():
    """Those of SSD into plain matrix instructions: of Hopper's own (wgmma) some are wrong at a model's 64 states and 16
    channels."""
    constants = {**CONSTANTS, "N": 64, "NP": 64, "Q": ssd.MAX_CHUNK}
    assert ssd.WARPS == 2
    for kernel in (ssd.ssd_state_kernel, ssd.ssd_fwd_kernel, ssd.ssd_bwd_kernel):
        compiled = compile_for(90, kernel, {n: v for n, v in constants.items() if n in kernel.arg_names})
        assert "mma.sync" in compiled.asm["ptx"] and "wgmma" not in compiled.asm["ptx"]
        assert compiled.asm["cubin"]
    constants = {**CONSTANTS, **IMAGE}
    kernel = scan_kernels.scan_bwd_kernel
    newest = 90 if OLD else 120
    assert compile_for(newest, kernel, {n: v for n, v in constants.items() if n in kernel.arg_names}).asm["cubin"]
    assert compile_for(80, common.probe_kernel, {}).asm["cubin"]


@pytest.mark.parametrize("operator, shape, states, rank, wide", [
    ("image", (1, 1 << 12, 1 << 12, 127), 1, 1, False),  # pixels x channels: 2.1e9
    ("image", (1, 1 << 12, 1 << 12, 129), 1, 1, True),
    ("image", (3, 2896, 2896, 8), 31, 2, False),  # pixels x the four routes' B and C: 8.4 million x 4 x 62 or 64
    ("image", (1, 2900, 2900, 8), 32, 2, True),
    ("image", (1, 2900, 2900, 8), 1, 126, True),  # pixels x the four routes' rows
    ("image", (1, 2, 2, 1 << 25), 64, 1, True),  # states x channels
    ("image", (1, 2, 2, 1 << 23), 1, 257, True),  # rank x channels
    ("sequence", (2, 1 << 10, (1 << 21) - 1), 1, 0, False),  # channels x positions
    ("sequence", (1, 1 << 10, (1 << 21) + 1), 1, 0, True),
    ("sequence", (1, 8, 1 << 26), 31, 0, True),  # positions x states, twice in the gradient
    ("sequence", (1, 8, 1 << 24), 31, 0, False),
    ("ssd", (1, 1 << 12, 1 << 12, 126), 1, 2, False),
    ("ssd", (1, 1 << 12, 1 << 12, 130), 1, 2, True),
    ("ssd", (1, 2900, 2900, 8), 31, 2, True),  # pixels x the four routes' rows
    ("ssd", (1, 2, 2, 1 << 25), 64, 2, True),  # states x channels
])  # fmt: skip
def test_offsets_are_of_64_bits_when_they_must_be(operator, shape, states, rank, wide):
    dim, empty = shape[-1], torch.empty
    with FakeTensorMode():
        if operator == "image":
            weights = empty(4, rank + 2 * states, dim), empty(4, dim, rank), None, empty(4, dim, states)
            launched = scan._image(empty(shape), *weights, None, 0b11100100)[0].constants(64)
        elif operator == "sequence":
            A, B = empty(shape[1], states), empty(shape[0], 1, states, shape[2])
            launched = scan._sequence(empty(shape), empty(shape), A, B, B, None, None, True)[0].constants(64)
        else:
            weights = empty(4, rank + 2 * states, dim), None, empty(4, rank), None
            launched = ssd._Launch(empty(shape), *weights, 0b11100100, 32).constants
    assert launched["WIDE"] is wide


def test_routes_too_long_to_count_are_refused():
    u = torch.empty(1, 1, 1 << 30, dtype=torch.bfloat16, device="meta")
    A, B = torch.empty(1, 1, device="meta"), u[:, None]
    with pytest.raises(vk.BackendError, match=r"1,073,740,800 positions .* not 1 x 1,073,741,824; cut them, or take"):
        scan._sequence(u, u, A, B, B, None, None, True)
    x = torch.empty(1, 1 << 23, 1, 1, dtype=torch.bfloat16, device="meta")
    with pytest.raises(vk.BackendError, match=r"columns of up to 4,194,304, not 8,388,608 x 1"):
        ssd._Launch(x, torch.empty(1, 3, 1, device="meta"), None, A, None, 1, 32)


def test_says_why_it_cannot_serve():
    def reason(device="cpu", dtype=torch.float32, **sizes):
        call = vk.Call("cross_selective_scan", torch.device(device), dtype, dtype, **sizes)
        return vk.explain(call)["triton"]

    assert "needs a GPU" in reason()
    assert "device type 'cuda'" in reason(device="meta")
    with pytest.raises(vk.BackendError, match=r"backend 'triton' cannot serve cross_ssd here: Triton needs a GPU"):
        vk.cross_ssd(torch.ones(1, 2, 2, 4), torch.ones(4, 4, 4), None, -torch.ones(4, 2), None, backend="triton")


def test_a_gpu_that_triton_cannot_compile_for_is_a_reason(monkeypatch):
    """As where no C compiler is found, with which Triton makes what launches its kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    call = vk.Call("cross_ssd", torch.device("cuda:0"), torch.float32, torch.float32, states=4, rank=1)
    for error in (RuntimeError("Failed to find C compiler"), None):
        kernel = Mock(warmup=Mock(side_effect=error))
        monkeypatch.setattr(common, "probe_kernel", kernel)
        common.why_not_on.cache_clear()
        chosen = vk.choice(call)
        if error is None:
            assert chosen == vk.Choice("triton", {})
        else:
            assert chosen.backend == "reference"
            assert re.search(r"Triton 3\.\d.* compile or load .*C compiler", chosen.declined["triton"])
    common.why_not_on.cache_clear()


def test_says_which_size_is_beyond_it(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)  # as if on a device that it serves

    def reason(dtype=torch.float32, **sizes):
        return backend.why_not(vk.Call("cross_selective_scan", torch.device("cpu"), dtype, dtype, **sizes))

    assert reason(states=64, rank=48, routes=("row",) * 31) is None
    assert "float64" in reason(dtype=torch.float64)
    assert "64 states, and there are 65" in reason(states=65)
    assert "this one is 257" in reason(rank=257)
    assert "there are 32" in reason(routes=("row",) * 32)
