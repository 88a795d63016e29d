"""CUDA C++ to kernels at run time: NVRTC through cuda.core, with a cache of cubins on disk (`cubins.py`)."""

import hashlib
import re
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

import torch

from ..private import raw_stream
from ..registry import BackendError
from . import cubins

SOURCES = Path(__file__).parent
OPTIONS = ("c++17",)  # of NVRTC, beside the architecture and the macros
INSTALL = "the cuda backend needs NVRTC through cuda.core: pip install cuda-core nvidia-cuda-nvrtc"


_IMPORT = threading.Lock()  # a second thread would see cuda.core half imported


@cache
def cuda_core():
    """The module cuda.core, under either of its names (older releases have it under experimental)."""
    with _IMPORT:
        try:
            import cuda.core as core

            if not hasattr(core, "Program"):
                import cuda.core.experimental as core
        except ImportError as error:
            raise BackendError(f"{INSTALL} ({error})") from error
    return core


@cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that compiles; BackendError when it is not there."""
    cuda_core()
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda.bindings raises its own classes for a missing library
        raise BackendError(f"{INSTALL} ({error})") from error
    assert int(status) == 0, status
    return major, minor


@cache
def source(name: str) -> str:
    """A kernel file with what it includes put in, so that NVRTC needs no search path."""
    text = (SOURCES / name).read_text()
    return re.sub(r'#include "(.+)"', lambda include: source(include[1]), text)


def compile_cubin(name: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The cubin of kernel file `name` for an architecture such as "sm_90", from the cache or from NVRTC.

    Raises BackendError when NVRTC is missing or does not know the architecture.
    """
    defines = sorted((key, str(value)) for key, value in macros.items())
    everything = repr((source(name), defines, arch, OPTIONS, nvrtc_version()))  # that the cubin's bytes depend on
    entry = f"{Path(name).stem}-{arch}-{hashlib.sha256(everything.encode()).hexdigest()[:32]}.cubin"
    cubin = cubins.read(entry)
    if cubin is None:
        cubin = _nvrtc(name, defines, arch)
        cubins.write(entry, cubin)
    return cubin


def _nvrtc(name: str, defines: list[tuple[str, str]], arch: str) -> bytes:
    core = cuda_core()
    try:
        options = core.ProgramOptions(std=OPTIONS[0], arch=arch, define_macro=defines or None)
        return bytes(core.Program(source(name), "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core raises its own classes
        version = ".".join(map(str, nvrtc_version()))
        known = [f"sm_{number}" for number in _architectures()]
        if arch not in known:
            raise BackendError(
                f"NVRTC {version} does not know {arch}, only {', '.join(known)}; a newer one may: "
                "pip install --upgrade nvidia-cuda-nvrtc"
            ) from error
        raise BackendError(f"NVRTC {version} could not compile {name} for {arch}: {_text(error)}") from error


def _architectures() -> list[int]:
    from cuda.bindings import nvrtc

    status, known = nvrtc.nvrtcGetSupportedArchs()
    assert int(status) == 0, status
    return known


def _text(error: Exception) -> str:
    return str(error).strip("\0\n ")


@lru_cache(4096)
def _launch_config(blocks: int, threads: int, shared_bytes: int):
    return cuda_core().LaunchConfig(grid=blocks, block=threads, shmem_size=shared_bytes)


_thread = threading.local()  # .device: the one whose context the thread was given last


def make_current(index: int) -> None:
    """Give the calling thread the context of a device: one of PyTorch's backward pass has none before it computes."""
    if getattr(_thread, "device", None) != index:
        cuda_core().Device(index).set_current()
        _thread.device = index


@contextmanager
def _loading():
    """What goes wrong inside is the driver's refusal, a BackendError."""
    try:
        yield
    except Exception as error:  # cuda.core raises its own classes
        version = ".".join(map(str, nvrtc_version()))
        raise BackendError(
            f"the driver does not load what NVRTC {version} compiles ({_text(error)}); take a newer driver, or an "
            "nvidia-cuda-nvrtc no newer than the driver's CUDA"
        ) from error


class Kernel:
    """One kernel on one device; calling it with (blocks, threads, shared bytes, *arguments) launches it on PyTorch's
    current stream; the device's context is the thread's (`make_current`).

    Arguments are tensors (passed by address), None (a null pointer) or integers (64 bits).  Raises BackendError when
    the driver does not take the code.
    """

    def __init__(self, code, name: str, device: torch.device):
        core = cuda_core()
        self._launch, self._stream = core.launch, cache(core.Stream.from_handle)
        self._device, self._shared = device, 48 * 1024
        with _loading():
            self._code, self._kernel = code, code.get_kernel(name)
            self._load()

    def __call__(self, blocks: int, threads: int, shared_bytes: int, *arguments: torch.Tensor | int | None) -> None:
        if shared_bytes > self._shared:
            self._allow(shared_bytes)
        # What torch.cuda.current_stream answers, in a tenth of its time; PyTorch's own compiler asks it so.
        stream = self._stream(raw_stream(self._device.index))
        config = _launch_config(blocks, threads, shared_bytes)
        values = [v if type(v) is int else 0 if v is None else v.data_ptr() for v in arguments]
        self._launch(stream, config, self._kernel, *values)

    @cache  # noqa: B019 - kernels are few and live as long as the process
    def blocks_at_once(self, threads: int) -> int:
        """How many blocks of so many threads the device holds at a time: more would begin when others end."""
        from cuda.bindings import driver

        status, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, 0)
        assert int(status) == 0, status
        return blocks * torch.cuda.get_device_properties(self._device).multi_processor_count

    def _load(self) -> None:
        """Now and not when first launched, which the driver would otherwise wait for."""
        from cuda.bindings import driver

        kernel = self._kernel
        self._handle = driver.CUkernel(int(kernel.handle if hasattr(kernel, "handle") else kernel._handle))
        status, self._function = driver.cuKernelGetFunction(self._handle)
        if int(status):
            raise RuntimeError(status.name)

    def _allow(self, shared_bytes: int) -> None:
        """More dynamic shared memory than every launch may have must be asked for."""
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(self._device.index)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, self._handle, device)
        assert int(status) == 0, f"{shared_bytes} bytes of shared memory: {status}"
        self._shared = shared_bytes


@cache
def why_not_on(device: torch.device) -> str | None:
    """One sentence why kernels cannot be compiled for this GPU or loaded on it, or None: an empty one is tried."""
    try:
        with torch.cuda.device(device):
            make_current(device.index)
            _ = load("probe.cu", (), device).probe_kernel
    except BackendError as error:
        return str(error)
    except Exception as error:  # cuda.core's own, of a driver that it cannot work with
        return f"cuda.core cannot use this GPU ({_text(error)})"
    return None


@cache
def load(name: str, macros: tuple[tuple[str, object], ...], device: torch.device) -> "Module":
    """Kernel file `name` with these macros, on this device."""
    return Module(name, macros, device)


class Module:
    """The kernels of one compiled file, as attributes."""

    def __init__(self, name: str, macros: tuple[tuple[str, object], ...], device: torch.device):
        major, minor = torch.cuda.get_device_capability(device)
        cubin = compile_cubin(name, dict(macros), f"sm_{major}{minor}")
        with _loading():
            self._code, self._device = cuda_core().ObjectCode.from_cubin(cubin), device

    def __getattr__(self, kernel: str) -> Kernel:
        value = Kernel(self._code, kernel, self._device)
        setattr(self, kernel, value)
        return value
