"""Mamba's layer for sequences (arXiv 2312.00752, section 3.4), one way or both as Vim has it (arXiv 2401.09417).

The names of parameters are those of `mamba_ssm.modules.mamba_simple.Mamba`, and of Vim's copy of it, so that their
weights load.
"""

import logging
import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.models.layers import Unscripted, go_together
from vmamba.models.ss2d import step_biases
from vmamba.text import printable
from vmamba.values import Takes
from vmamba_kernels import backends, why_absent, wider
from vmamba_kernels.mamba import overlaps, selective_scan_fn, selective_state_update

logger = logging.getLogger("vmamba")
_COUNT = Takes((int,), at_least=1, at_most=2**16)
_SWITCH = Takes((bool,))
TAKES = {
    **dict.fromkeys(("d_model", "d_state", "d_conv"), _COUNT),
    "expand": Takes((float,), above=0, at_most=64),
    "dt_rank": Takes((int, str), at_least=1, at_most=2**16, choices=("auto",)),
    **dict.fromkeys(("conv_bias", "bias", "bidirectional", "divide"), _SWITCH),
    "scan_backend": Takes((str,), choices=lambda: ("auto", *backends())),
    "conv_backend": Takes((str,), choices=("auto", "torch", "causal_conv1d")),
}


@cache
def why_no_causal_conv1d() -> str | None:
    """What keeps that package from being used, or None; in the log where it is there and cannot be imported."""
    if find_spec("causal_conv1d") is None:
        return "is not installed (pip install causal-conv1d)"
    try:
        _ = import_module("causal_conv1d").causal_conv1d_fn
    except Exception as error:  # of a build for another PyTorch or CUDA, in many ways
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        missing = f"is installed but cannot be imported ({reason})"
        logger.warning(f"causal_conv1d {missing}: the convolutions are PyTorch's; install it anew, or remove it")
        return missing
    return None


class MambaState(NamedTuple):
    """What a layer keeps between positions; `Mamba1D.step` changes it in place."""

    inputs: Tensor  # (batch, d_inner, d_conv), of the convolution, the last position last
    scan: Tensor  # (batch, d_inner, d_state)


class Mamba1D(Unscripted, nn.Module):
    """A projection to twice `expand` channels, a causal depthwise convolution, SiLU, the scan, a gate, a projection.

    Args:
        d_model: channels in and out.
        d_state: of the scan.
        d_conv: positions that the convolution sees, this one and those before it.
        expand: channels inside, in those outside.
        dt_rank: of the step projection; "auto": d_model / 16, rounded up.
        conv_bias, bias: of the convolution, and of the projections in and out.
        bidirectional: also walk from the end, with a convolution, a projection and a scan of its own, and take the mean
            of both (Vim's "v2"; `divide` False: the sum).
        scan_backend: of `vmamba_kernels.backends()`, such as "mamba_ssm"; "auto" takes the fastest that can serve.
        conv_backend: "torch"; "causal_conv1d", that package's kernel for a GPU; "auto": that where it is installed and
            the input is on a GPU.  Where it is installed but cannot be imported, the log says so.

    Raises UserError for a value that cannot be, and for an unknown, absent or broken backend.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        bidirectional: bool = False,
        divide: bool = True,
        scan_backend: str = "auto",
        conv_backend: str = "auto",
    ):
        super().__init__()
        given = dict(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        given |= dict(conv_bias=conv_bias, bias=bias, bidirectional=bidirectional, divide=divide)
        given |= dict(scan_backend=scan_backend, conv_backend=conv_backend)
        for name, value in given.items():
            TAKES[name].check(name, value)
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        if self.d_inner < 1:
            raise UserError(f"expand is {expand}, which of {d_model} channels leaves none; choose a larger one")
        missing = None if conv_backend == "torch" else why_no_causal_conv1d()
        if conv_backend == "causal_conv1d" and missing:
            raise UserError(f"conv_backend is causal_conv1d, which {missing}; choose torch")
        _check_there("scan_backend", scan_backend)
        self.bidirectional, self.divide = bidirectional, divide
        self.scan_backend = scan_backend
        self.conv_backend = "torch" if missing else conv_backend
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        for end in ("", "_b") if bidirectional else ("",):
            self._make_direction(end, conv_bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def _make_direction(self, end: str, conv_bias: bool) -> None:
        """What a direction has of its own; `end` is "_b" in the names of the one from the end."""
        inner, rank, states = self.d_inner, self.dt_rank, self.d_state
        conv = nn.Conv1d(inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1, bias=conv_bias)
        projection, steps = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        nn.init.uniform_(steps.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            steps.bias.copy_(step_biases(inner))
        A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        setattr(self, f"conv1d{end}", conv)
        setattr(self, f"x_proj{end}", projection)
        setattr(self, f"dt_proj{end}", steps)
        setattr(self, "A_b_log" if end else "A_log", A_log)
        setattr(self, f"D{end}", nn.Parameter(torch.ones(inner)))

    def set_backend(self, backend: str) -> None:
        """Of the scan.  Raises UserError for no backend, and one that is absent or broken."""
        backend = TAKES["scan_backend"].check("backend", backend)
        _check_there("backend", backend)
        self.scan_backend = backend

    def extra_repr(self) -> str:
        return f"bidirectional={self.bidirectional}, divide={self.divide}"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) -> (batch, length, d_model).  Raises UserError for another shape or kind of numbers,
        and for a sequence of no positions."""
        x = _checked("sequence", x, getattr(self.in_proj, "weight", None), ("batch", "length", self.d_model))
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (batch, d_inner, length)
        y = self._scan(x, z, "")
        if self.bidirectional:
            y = y + self._scan(x.flip(2), z.flip(2), "_b").flip(2)
            y = y / 2 if self.divide else y
        return self.out_proj(y.transpose(1, 2))

    def _scan(self, x: Tensor, z: Tensor, end: str) -> Tensor:
        """One direction, (batch, d_inner, length), gated."""
        x = self._convolve(x, getattr(self, f"conv1d{end}"))
        dt, B, C = self._project(x.transpose(1, 2), end)
        dt = F.linear(dt, getattr(self, f"dt_proj{end}").weight).transpose(1, 2)
        return selective_scan_fn(
            x, dt, self._A(end), B.transpose(1, 2), C.transpose(1, 2), getattr(self, f"D{end}"), z,
            delta_bias=getattr(self, f"dt_proj{end}").bias, delta_softplus=True, backend=self.scan_backend,
        )  # fmt: skip

    def _project(self, x: Tensor, end: str) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., d_inner) -> the numbers of the steps (..., dt_rank), B and C (..., d_state)."""
        return getattr(self, f"x_proj{end}")(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)

    def _A(self, end: str) -> Tensor:
        return _decay(self.A_b_log if end else self.A_log)

    def _convolve(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """SiLU of the convolution of what came before and is, (batch, d_inner, length)."""
        seen = isinstance(x, torch.fx.Proxy)  # which is on no device yet
        if self.conv_backend == "causal_conv1d" or (self.conv_backend == "auto" and not seen and x.is_cuda):
            return _causal_conv1d(x, conv.weight, conv.bias)
        return F.silu(conv(x)[..., : x.shape[2]])

    def make_state(self, batch: int) -> MambaState:
        """The state before the first position, zeros, for `step`.  Raises UserError for a batch that is no number."""
        batch = Takes((int,), at_least=0).check("batch", batch)
        weight = self.conv1d.weight
        scan = weight.new_zeros(batch, self.d_inner, self.d_state, dtype=self._A("").dtype)
        return MambaState(weight.new_zeros(batch, self.d_inner, self.d_conv), scan)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """The next position alone, (batch, d_model) -> (batch, d_model): what `forward` gives there, with no gradient.

        Raises UserError for a layer that also walks from the end, for another shape or kind of numbers of x or of the
        state, and for a state with several numbers in one place of memory.
        """
        if self.bidirectional:
            raise UserError("a bidirectional layer needs the whole sequence; there is no step of it")
        x = _checked("position", x, getattr(self.in_proj, "weight", None), ("batch", self.d_model))
        if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, Tensor) for part in state)):
            raise UserError(
                f"the state is a {type(state).__name__} and no MambaState; take it from make_state({len(x)})"
            )
        inputs, scan = (tuple(part.shape) for part in state)
        if inputs != (len(x), self.d_inner, self.d_conv) or scan != (len(x), self.d_inner, self.d_state):
            raise UserError(
                f"the state has shapes {inputs} and {scan}, which are not of this layer and {len(x)} sequences; take "
                f"it from make_state({len(x)})"
            )
        state = MambaState(*state)
        for part in state:
            if not part.is_floating_point() or part.device != x.device or overlaps(part):
                raise UserError(
                    f"the state has a part of {part.dtype} on {part.device}, strides {part.stride()}; it must be of "
                    f"floats on {x.device}, each in a place of its own: take it from make_state({len(x)})"
                )
        x, z = self.in_proj(x).chunk(2, dim=1)
        state.inputs.copy_(torch.cat((state.inputs[..., 1:], x[..., None].to(state.inputs.dtype)), -1))
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = (state.inputs * weight).sum(-1).to(x.dtype)
        x = F.silu(x if bias is None else x + bias)
        dt, B, C = self._project(x, "")
        dt = F.linear(dt, self.dt_proj.weight)
        y = selective_state_update(
            state.scan, x, dt, self._A(""), B, C, self.D, z, dt_bias=self.dt_proj.bias, dt_softplus=True
        )
        return self.out_proj(y)


def _check_there(name: str, backend: str) -> None:
    missing = None if backend == "auto" else why_absent(backend)
    if missing:
        raise UserError(f"{name} is {backend}, which cannot be used: {missing}; choose auto")


# torch.fx takes what is wrapped so whole: what it does depends on shapes and dtypes.
@torch.fx.wrap
def _checked(what: str, x: Tensor, weight: object, shape: tuple[str | int, ...]) -> Tensor:
    """`x`.  Raises UserError unless it is a tensor of that shape, with one position or more, and of the numbers that
    the `weight` it meets has, or that autocast makes so; what is quantised takes what it takes."""
    words = f"({', '.join(map(str, shape))})"
    if not isinstance(x, Tensor):
        raise UserError(f"the {what} is a {type(x).__name__}; it must be a tensor {words}")
    if x.dim() != len(shape) or x.shape[-1] != shape[-1]:
        raise UserError(f"the {what} has shape {tuple(x.shape)}; it must be {words}")
    if not x.shape[1]:
        raise UserError(f"the {what} has shape {tuple(x.shape)}, which has no position; give one or more")
    if not go_together(x, weight):
        raise UserError(f"the {what} is of {x.dtype}, and the layer's weights of {weight.dtype}; give it in theirs")
    return x


@torch.fx.wrap
def _decay(A_log: Tensor) -> Tensor:
    return -A_log.to(wider(A_log.dtype, torch.float32)).exp()


@torch.fx.wrap
def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """That package's convolution with SiLU, x (batch, channels, length), weight (channels, 1, width)."""
    convolve = import_module("causal_conv1d").causal_conv1d_fn
    bias = None if bias is None else bias.to(x.dtype)
    return convolve(x, weight.squeeze(1).to(x.dtype), bias, activation="silu")


torch.fx.wrap("selective_scan_fn")
