"""selective_scan (1-D, Mamba's layout) on the GPU, as operators of PyTorch: the kernels of the 2-D operator over
an image of one row, whose routes are the groups."""

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..reference import wider
from ..registry import wants_gradient
from .compiler import Module, load
from .layout import layout
from .operator import Operator
from .scan import Geometry, Scan, aligned, empty_borders


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dtype = u.dtype
    for other in (delta, B, C):
        dtype = wider(dtype, other.dtype)
    inputs = u.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), D, delta_bias
    return FORWARD(*inputs, delta_softplus, out_dtype, wants_gradient(*inputs))[0]


class SequenceScan(Scan):
    """A scan between the operator's tensors, positions last, and its own, channels last."""

    def __init__(self, layout, geometry, device):
        super().__init__(layout, geometry, device)
        channels, length = geometry.pixel_stride, geometry.width
        tiles = -(-channels // (16 * layout.thread_channels)) * -(-length // 64)
        self._turn, self._turn_sizes = (geometry.batch * tiles, 256, 0), (channels, length)
        columns = geometry.sequences * layout.row_width // 8 * length  # eight of them a thread
        self._row_launch, self._row_sizes = (-(-columns // 256), 256, 0), (columns, geometry.routes, length)
        self._shape = geometry.batch, channels, length
        self._state_shape = geometry.batch, geometry.routes, layout.states, length  # of B and C

    @cached_property
    def _kernels(self) -> Module:
        return load("sequences.cu", self.layout.pixel_macros, self._device)

    def channels_last(self, t: Tensor) -> Tensor:
        """(batch, channels, length) -> (batch, length, channels), of the inputs' or the output's type."""
        if t.mT.is_contiguous():
            return aligned(t.mT)
        kernels = self._kernels
        kernel = kernels.inputs_kernel if t.dtype == self.layout.x else kernels.gradient_kernel
        turned = torch.empty_like(t.mT, memory_format=torch.contiguous_format)
        kernel(*self._turn, aligned(t), turned, *self._turn_sizes)
        return turned

    def rows(self, B: Tensor, C: Tensor) -> Tensor:
        """(batch, length, groups, row width)."""
        geometry, layout = self.geometry, self.layout
        rows = B.new_empty(geometry.batch, geometry.length, geometry.routes, layout.row_width, dtype=layout.row_dtype)
        self._kernels.rows_kernel(*self._row_launch, B.contiguous(), C.contiguous(), rows, *self._row_sizes)
        return rows

    def rows_backward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of B and C from the rows'."""
        dB, dC = (rows.new_empty(self._state_shape, dtype=self.layout.x) for _ in range(2))
        self._kernels.d_rows_kernel(*self._row_launch, rows, dB, dC, *self._row_sizes)
        return dB, dC

    def output(self, y: Tensor, pixels: Tensor, D: Tensor | None) -> Tensor:
        """ln 2 times y, plus D times u's pixels, (batch, channels, length)."""
        out = y.new_empty(self._shape, dtype=self.layout.out)
        self._kernels.output_kernel(*self._turn, y, pixels, D, out, *self._turn_sizes)
        return out

    def du(self, dx: Tensor, d_pixels: Tensor, D: Tensor | None) -> Tensor:
        """ln 2 times dx, plus D times the output's gradient, (batch, channels, length)."""
        du = dx.new_empty(self._shape, dtype=self.layout.x)
        self._kernels.du_kernel(*self._turn, dx, d_pixels, D, du, *self._turn_sizes)
        return du

    def d_delta(self, steps: Tensor) -> Tensor:
        """The gradient of delta, (batch, channels, length), from the steps'."""
        d_delta = steps.new_empty(self._shape, dtype=self.layout.x)
        self._kernels.d_delta_kernel(*self._turn, steps, d_delta, *self._turn_sizes)
        return d_delta


@lru_cache(4096)
def _scan(
    u_shape: torch.Size, groups: int, states: int, u: torch.dtype, out: torch.dtype, softplus: bool,
    device: torch.device,
) -> SequenceScan:  # fmt: skip
    batch, channels, length = u_shape
    dim = channels // groups
    geometry = Geometry(batch, 1, length, groups, 0, channels, dim)
    return SequenceScan(layout(states, 0, dim, u, out, softplus), geometry, device)


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the states at chunk borders."""
    if u.numel() == 0:
        return _like_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save)
    scan = _scan(u.shape, B.shape[1], A.shape[1], u.dtype, out_dtype, softplus, u.device)
    bias = None if delta_bias is None else delta_bias.contiguous()
    pixels, steps = scan.channels_last(u), scan.channels_last(delta)
    y, borders = scan.forward(pixels, steps, scan.rows(B, C), None, bias, A.contiguous(), save)
    return scan.output(y, pixels, None if D is None else D.contiguous()), borders


def _like_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save):
    (channels, states), groups = A.shape, B.shape[1]
    plan = layout(int(states), 0, int(channels // groups), u.dtype, out_dtype, softplus)
    return u.new_empty(u.shape, dtype=out_dtype), empty_borders(u, plan, u.shape[0], groups, u.shape[2], save)


def _backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, borders: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if u.numel() == 0:
        return tuple(t.zero_() for t in _like_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus))
    channels, states = A.shape
    scan = _scan(u.shape, B.shape[1], states, u.dtype, dy.dtype, softplus, u.device)
    bias = None if delta_bias is None else delta_bias.contiguous()
    pixels, steps, d_pixels = (scan.channels_last(t) for t in (u, delta, dy))
    g = scan.backward(pixels, steps, scan.rows(B, C), None, bias, A.contiguous(), d_pixels, borders)
    du = scan.du(g.x, d_pixels, None if D is None else D.contiguous())
    d_delta, (dB, dC) = scan.d_delta(g.steps), scan.rows_backward(g.rows)
    return du, d_delta, g.A.view(channels, states), dB, dC, g.D.reshape(-1), g.dt_bias.reshape(-1)


def _like_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus):
    grads = [t.new_empty(t.shape) for t in (u, delta, A, B, C)]
    return *grads, A.new_empty(A.shape[0]), A.new_empty(A.shape[0])  # PyTorch 2.6 wants a GPU for A[:, 0]


def _setup_context(ctx, inputs, output):
    *tensors, softplus, _, save = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.softplus = softplus
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the borders


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 10
    *tensors, borders = ctx.saved_tensors
    du, d_delta, dA, dB, dC, dD, d_bias = BACKWARD(dy, *tensors, borders, ctx.softplus)
    *_, D, bias = tensors
    return du, d_delta, dA, dB, dC, None if D is None else dD, None if bias is None else d_bias, None, None, None


FORWARD = Operator("selective_scan_cuda", _forward, _like_forward, _setup_context, _autograd)
BACKWARD = Operator("selective_scan_bwd_cuda", _backward, _like_backward)
