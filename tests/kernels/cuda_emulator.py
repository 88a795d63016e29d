"""Runs the CUDA kernels on a CPU: the same sources, through the host's C++ compiler and cuda_emulator.h.

It shows that their arithmetic and their synchronisation by warp and block are right, on small cases; it says nothing
about speed, and nothing about races that a fixed order of the threads hides.
"""

import ctypes
import hashlib
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch

from vmamba_kernels.cuda import compiler, scan

# The package's attributes of these names are functions.
operators, sequences, norms, convolutions, mlps, sums = (
    sys.modules[f"vmamba_kernels.cuda.{name}"]
    for name in ("cross_selective_scan", "selective_scan", "layer_norm", "depthwise_conv", "mlp", "sum_rows")
)

HEADER = Path(__file__).with_name("cuda_emulator.h")
INSTRUCTIONS = {  # the start of an assembly text -> C++
    "cvt.f32.f16": "r = from_fp16_bits(v.bits);",
    "cvt.rn.bf16.f32": "r.bits = to_bf16_bits(v);",
    "cvt.rn.f16.f32": "r.bits = to_fp16_bits(v);",
    "cvt.rn.bf16x2": "both = to_bf16_bits(lower) | (unsigned)to_bf16_bits(upper) << 16;",
    "cvt.rn.f16x2": "both = to_fp16_bits(from[0]) | (unsigned)to_fp16_bits(from[1]) << 16;",
    "ex2.approx": "r = exp2_flushed(v);",
    "cp.async.cg": "memset(shared, 0, BYTES); memcpy(shared, global, count);",
    "cp.async.ca": "memset(shared, 0, BYTES); memcpy(shared, global, count);",
    "cp.async.": ";",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16": "multiply_bf16(d, a0, a1, b);",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32": "multiply_tf32(d, {a0, a1, a2, a3, b0, b1});",
    "movmatrix": "r = transposed_lanes(two);",
    "ldmatrix": "v = transposed(row_of_lane);",
}


def _host_source(name: str) -> str:
    def instruction(match: re.Match) -> str:
        return next(code for start, code in INSTRUCTIONS.items() if match[1].startswith(start))

    text = re.sub(r'asm(?: volatile)?\(\s*"(.*?)\);', instruction, compiler.source(name), flags=re.DOTALL)
    text = re.sub(r"unsigned (v, )?address = static_cast<unsigned>\(.*\);", r"unsigned \1unused = 0;", text)
    text = re.sub(r"extern __shared__ .*? shared\[\];", "float *shared = dynamic_shared;", text)
    return f'#include "{HEADER}"\n{text}'


class Emulator:
    """Stands in for compiler.load, keeping in a folder what it builds, and taking what it finds there."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cache  # noqa: B019
    def __call__(self, name, macros, device):
        source = _host_source(name)
        key = hashlib.sha256(repr((source, macros)).encode()).hexdigest()[:16]
        path, library = self.folder / f"{key}.cpp", self.folder / f"{key}.so"
        if not library.exists():
            path.write_text(source)
            defines = [f"-D{key}={value}" for key, value in macros]
            options = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fno-gnu-unique", "-shared", "-fPIC"]
            command = ["g++", *options, *defines, path, "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return _Module(ctypes.CDLL(str(library)))


class _Module:
    def __init__(self, library):
        self._library = library

    def __getattr__(self, kernel):
        function = ctypes.cast(getattr(self._library, kernel), ctypes.c_void_p)

        def launch(blocks, threads, shared_bytes, *arguments):
            values = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in arguments]
            array = (ctypes.c_longlong * len(values))(*values)
            self._library.emulate(function, len(values), array, ctypes.c_longlong(blocks), threads)

        launch.blocks_at_once = lambda threads: 3
        return launch


def install(monkeypatch, folder: Path, processors: int = 1) -> None:
    """From here on the cuda backend's functions take CPU tensors.  More `processors` cut routes into segments."""
    emulator = Emulator(folder)
    for module in (scan, sequences, norms, convolutions, mlps, sums):
        monkeypatch.setattr(module, "load", emulator)
    monkeypatch.setattr(operators, "TYPED_PRODUCT", False)  # not on a CPU
    monkeypatch.setattr(scan, "_limits", lambda device: (processors, 227 * 1024))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
