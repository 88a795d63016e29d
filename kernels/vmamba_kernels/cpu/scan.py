"""`cross_selective_scan` and `selective_scan` on the loops of loops.py, as operators of PyTorch."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch, reference
from ..registry import wants_gradient
from . import loops
from .loops import BLOCK, STATES, TILE
from .threads import share

KINDS = {"row": 0, "col": 1, "row_rev": 2, "col_rev": 3}
LOG2E, LN2 = math.log2(math.e), math.log(2)
TASKS_WANTED = 4  # a thread


class Operator(dispatch.Operator):
    key = "CPU"
    backend = "cpu"


def cross_selective_scan(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    routes: tuple[str, ...], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`vmamba_kernels.cross_selective_scan`, already checked."""
    inputs = x, x_proj_weight, dt_weight, dt_bias, A, D
    return IMAGE(*inputs, " ".join(routes), out_dtype, wants_gradient(*inputs))[0]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`vmamba_kernels.selective_scan`, already checked."""
    inputs = u, delta, A, B, C, D, delta_bias
    return SEQUENCE(*inputs, delta_softplus, out_dtype, wants_gradient(*inputs))[0]


def step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """`reference.step_sizes` of float32, the same bits for any number of threads."""
    return STEPS(delta, bias, softplus)


class Scan:
    """A call as its loops take it: everything float32 and channels last, the weights in blocks of channels.

    Args:
        x: (images, pixels, channels).
        delta: the same; None where the steps are projected.
        rows: (images, pixels, routes, ranks + 2 states), the ranks padded to a multiple of 4.
        dt_weight: (routes, dim, rank).
        bias: (routes, dim), or None.
        A: (routes, dim, states).
        D: (routes, dim), or None: where routes share channels, of the first route, for all.
        kinds: of the routes.
        shared: whether the routes share channels, so that their outputs add up.
    """

    def __init__(self, x, delta, rows, dt_weight, bias, A, D, kinds, height, width, softplus, shared):
        self.x, self.delta, self.rows, self.kinds, self.shared = x, delta, rows, kinds, shared
        (self.routes, self.dim, self.states), self.rank = A.shape, dt_weight.shape[2]
        self.images, self.blocks = x.shape[0], -(-self.dim // BLOCK)
        ranks = rows.shape[3] - 2 * self.states
        self.weight = self._in_blocks(dt_weight, ranks, LOG2E)
        self.bias = self._in_blocks(None if bias is None else bias.unsqueeze(2), 1, LOG2E)[:, :, 0]
        self.A = self._in_blocks(A, self.states)
        self.skip = self._in_blocks(None if D is None else D.unsqueeze(2), 1)[:, :, 0]
        self.skips = D is not None
        self._sizes = self.dim, height, width, softplus

    def _in_blocks(self, t: Tensor | None, columns: int, scale: float = 1.0) -> np.ndarray:
        """t (routes or fewer, dim, up to `columns`), times scale; None counts as zeros."""
        if t is None:
            return np.zeros((self.routes, self.blocks, columns, BLOCK), np.float32)
        return loops.in_blocks(_array(t.contiguous()), self.routes, columns, scale)

    def _out_of_blocks(self, t: Tensor) -> Tensor:
        """(images, routes, blocks, columns, BLOCK) -> (routes, dim, columns), the sum of the images."""
        return t.sum(0).transpose(2, 3).flatten(1, 2)[:, : self.dim].contiguous()

    def _arguments(self, parts: int) -> tuple:
        """The first ones of both kernels."""
        table = []
        for route, kind in enumerate(self.kinds):
            channel, slot = (0, route if parts > 1 else 0) if self.shared else (route * self.dim, 0)
            first = route == 0 or not self.shared
            table.append((kind, channel, slot, first or parts > 1, first and self.skips))
        delta = self.x.new_empty(0, 0, 0) if self.delta is None else self.delta
        weights = self.weight, self.bias, self.A, self.skip
        return *map(_array, (self.x, delta, self.rows)), *weights, np.array(table), *self._sizes

    def _parts(self, tasks: int) -> int:
        """How many parts the routes are done in, where there are `tasks` with all of them in one.

        The bits are the same: a part writes what would be added.  With more passes than one a route that would be so.
        """
        threads = torch.get_num_threads()
        busy = tasks % threads == 0 or tasks >= TASKS_WANTED * threads  # as many for each, or enough to even out
        return 1 if busy and self.states <= STATES else self.routes

    def _slots(self, parts: int) -> Tensor:
        """What parts write their outputs to."""
        return self.x.new_empty(parts if self.shared else 1, *self.x.shape)

    def borders(self, save: bool) -> Tensor:
        tiles = -(-self.x.shape[1] // TILE)
        return self.x.new_empty(border_shape(self.images if save else 0, self.routes, tiles, self.states, self.dim))

    def forward(self, save: bool) -> tuple[Tensor, Tensor]:
        """The output (images, pixels, channels), and the states at the tiles' borders."""
        parts = self._parts(self.images * self.blocks)
        out, borders = self._slots(parts), self.borders(save)
        arguments = *self._arguments(parts), _array(out), _array(borders), parts
        share(self.images * parts * self.blocks, lambda start, stop: loops.scan_fwd(*arguments, start, stop))
        return _added(out), borders

    def backward(self, borders: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """The gradients of x (but not through rows), delta, rows, dt_weight, bias, A, and of D's rows."""
        parts = self._parts(self.images)
        dx, d_rows = self._slots(parts), torch.zeros_like(self.rows)
        d_delta = torch.empty_like(self.x) if self.delta is not None else self.x.new_empty(0, 0, 0)
        d_weights = [self.x.new_zeros(self.images, *t.shape) for t in (self.weight, self.bias, self.A, self.skip)]
        tensors = borders, dy, dx, d_delta, d_rows, *d_weights
        arguments = *self._arguments(parts), *map(_array, tensors), parts
        share(self.images * parts, lambda start, stop: loops.scan_bwd(*arguments, start, stop))
        d_weight, d_bias, d_A, d_skip = d_weights
        return {
            "x": _added(dx), "delta": d_delta, "rows": d_rows,
            "dt_weight": self._out_of_blocks(d_weight[..., : self.rank, :]),
            "bias": self._out_of_blocks(d_bias.unsqueeze(3)).squeeze(2),
            "A": self._out_of_blocks(d_A),
            "D": self._out_of_blocks(d_skip.unsqueeze(3)).squeeze(2),
        }  # fmt: skip


def border_shape(images: int, routes: int, tiles: int, states: int, dim: int) -> tuple[int, ...]:
    return images, routes, tiles, states, -(-dim // BLOCK), BLOCK


def _array(t: Tensor):
    return t.detach().numpy()


def _added(slots: Tensor) -> Tensor:
    """The slots' sum, in their order: the bits that adding to one slot gives."""
    total = slots[0]
    for slot in slots[1:]:
        total += slot
    return total


def _contracted(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, 512 rows at a time: with more, what MKL adds up first depends on the number of threads."""
    missing = -len(a) % 512  # a part of fewer rows may depend on it too
    if missing:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, 0, 0, missing))
    return torch.bmm(a.unflatten(0, (-1, 512)).mT, b.unflatten(0, (-1, 512))).sum(0)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


# What both operators' gradients share.


def _keep(ctx, tensors, output) -> None:
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the borders


def _present(gradients, inputs):
    """None for the gradients of what is not there."""
    return (None if t is None else g for g, t in zip(gradients, inputs, strict=True))


def _is_differentiated() -> bool:
    """Whether the gradient now computed will be differentiated: then it comes from the reference."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _through(output: Tensor, inputs: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    wanted = [t is not None and t.requires_grad for t in inputs]
    chosen = [t for t, w in zip(inputs, wanted, strict=True) if w]
    gradients = iter(torch.autograd.grad(output, chosen, dy, create_graph=True))
    return [next(gradients) if w else None for w in wanted]


# The image operator.


def _image(x, x_proj_weight, dt_weight, dt_bias, A, D, routes: str) -> tuple[Scan, Tensor]:
    """The scan, and the weight of the projection (rows of all routes, dim)."""
    batch, height, width, dim = x.shape
    rank = dt_weight.shape[2]
    pixels, weight = _float(x).view(batch, height * width, dim), x_proj_weight.float()
    if rank % 4:
        steps, others = weight.split((rank, weight.shape[1] - rank), dim=1)
        weight = torch.cat((steps, steps.new_zeros(len(steps), -rank % 4, dim), others), dim=1)
    weight = weight.flatten(0, 1)
    rows = (pixels.view(-1, dim) @ weight.t()).view(batch, height * width, len(A), -1)
    kinds = [KINDS[route] for route in routes.split()]
    skip = None if D is None else D.sum(0, keepdim=True)
    scan = Scan(
        pixels, None, rows, dt_weight.float(), dt_bias, A, skip, kinds, height, width, softplus=True, shared=True
    )
    return scan, weight


def _image_forward(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor, D: Tensor | None,
    routes: str, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the states at the tiles' borders."""
    if x.numel() == 0:
        return _like_image_forward(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, out_dtype, save)
    with reference.no_autocast("cpu"):
        out, borders = _image(x, x_proj_weight, dt_weight, dt_bias, A, D, routes)[0].forward(save)
        return out.view(x.shape).to(out_dtype), borders


def _like_image_forward(x, x_proj_weight, dt_weight, dt_bias, A, D, routes, out_dtype, save):
    count, dim, states = A.shape
    tiles = (x.shape[1] * x.shape[2] + TILE - 1) // TILE
    shape = border_shape(x.shape[0] if save else 0, count, tiles, states, dim)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(shape, dtype=torch.float32)


def _image_backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor | None, A: Tensor,
    D: Tensor | None, borders: Tensor, routes: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        fakes = _like_image_backward(dy, x, x_proj_weight, dt_weight, dt_bias, A, D, borders, routes)
        return tuple(t.zero_() for t in fakes)
    with reference.no_autocast("cpu"):
        scan, weight = _image(x, x_proj_weight, dt_weight, dt_bias, A, D, routes)
        g = scan.backward(borders, _float(dy).view_as(scan.x))
        d_rows = g["rows"].flatten(0, 1).flatten(1)  # (pixels of all images, rows of all routes)
        dx = g["x"].view(-1, scan.dim).addmm_(d_rows, weight)
        d_weight = _contracted(d_rows, scan.x.view(-1, scan.dim)).unflatten(0, (scan.routes, -1))
        if scan.rank % 4:
            d_weight = torch.cat((d_weight[:, : scan.rank], d_weight[:, -2 * scan.states :]), dim=1)
        return (
            dx.view(x.shape).to(x.dtype), d_weight.to(x_proj_weight.dtype), g["dt_weight"].to(dt_weight.dtype),
            g["bias"], g["A"], g["D"][:1].repeat(scan.routes, 1),
        )  # fmt: skip


def _like_image_backward(dy, x, x_proj_weight, dt_weight, dt_bias, A, D, borders, routes):
    vector = A.new_empty(A.shape[:2])
    return tuple(t.new_empty(t.shape) for t in (x, x_proj_weight, dt_weight, vector, A, vector))


def _setup_image(ctx, inputs, output):
    *tensors, ctx.routes, ctx.out_dtype, _ = inputs
    _keep(ctx, tensors, output)


def _image_autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    *inputs, borders = ctx.saved_tensors
    if _is_differentiated():
        routes = tuple(ctx.routes.split())
        gradients = _through(reference.cross_selective_scan(*inputs, routes, ctx.out_dtype), inputs, dy)
    else:
        gradients = _present(IMAGE_BACKWARD(dy, *inputs, borders, ctx.routes), inputs)
    return *gradients, None, None, None


IMAGE = Operator("cross_selective_scan_cpu", _image_forward, _like_image_forward, _setup_image, _image_autograd)
IMAGE_BACKWARD = Operator("cross_selective_scan_bwd_cpu", _image_backward, _like_image_backward)


# The sequence operator: a group is a route of its own channels, in row order.


def _sequence(u, delta, A, B, C, D, delta_bias, softplus: bool) -> Scan:
    batch, channels, length = u.shape
    groups = B.shape[1]
    rows = torch.cat((B.float(), C.float()), dim=2).permute(0, 3, 1, 2).contiguous()  # (batch, length, groups, 2N)
    A, D, bias = (None if t is None else t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    return Scan(
        _float(u.transpose(1, 2)), _float(delta.transpose(1, 2)), rows, A[:, :, :0], bias, A, D, [0] * groups, 1,
        length, softplus, shared=False,
    )  # fmt: skip


def _sequence_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    softplus: bool, out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and for the backward pass the states at the tiles' borders."""
    if u.numel() == 0:
        return _like_sequence_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save)
    out, borders = _sequence(u, delta, A, B, C, D, delta_bias, softplus).forward(save)
    return _positions_last(out, out_dtype), borders


def _like_sequence_forward(u, delta, A, B, C, D, delta_bias, softplus, out_dtype, save):
    (channels, states), groups = A.shape, B.shape[1]
    shape = border_shape(u.shape[0] if save else 0, groups, (u.shape[2] + TILE - 1) // TILE, states, channels // groups)
    return u.new_empty(u.shape, dtype=out_dtype), u.new_empty(shape, dtype=torch.float32)


def _sequence_backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, borders: Tensor, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if u.numel() == 0:
        fakes = _like_sequence_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus)
        return tuple(t.zero_() for t in fakes)
    g = _sequence(u, delta, A, B, C, D, delta_bias, softplus).backward(borders, _float(dy.transpose(1, 2)))
    dB, dC = g["rows"].permute(0, 2, 3, 1).chunk(2, dim=2)
    return (
        _positions_last(g["x"], u.dtype), _positions_last(g["delta"], delta.dtype), g["A"].view(A.shape),
        dB.to(B.dtype).contiguous(), dC.to(C.dtype).contiguous(), g["D"].reshape(-1), g["bias"].reshape(-1),
    )  # fmt: skip


def _positions_last(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, length, channels) -> (batch, channels, length)."""
    return t.transpose(1, 2).to(dtype).contiguous()


def _like_sequence_backward(dy, u, delta, A, B, C, D, delta_bias, borders, softplus):
    grads = [t.new_empty(t.shape) for t in (u, delta, A, B, C)]
    return *grads, A.new_empty(A.shape[0]), A.new_empty(A.shape[0])


def _setup_sequence(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.out_dtype, _ = inputs
    _keep(ctx, tensors, output)


def _sequence_autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 10
    *inputs, borders = ctx.saved_tensors
    if _is_differentiated():
        gradients = _through(reference.selective_scan(*inputs, ctx.softplus, ctx.out_dtype), inputs, dy)
    else:
        gradients = _present(SEQUENCE_BACKWARD(dy, *inputs, borders, ctx.softplus), inputs)
    return *gradients, None, None, None


SEQUENCE = Operator(
    "selective_scan_cpu", _sequence_forward, _like_sequence_forward, _setup_sequence, _sequence_autograd
)
SEQUENCE_BACKWARD = Operator("selective_scan_bwd_cpu", _sequence_backward, _like_sequence_backward)


# The steps of a scan with states, which it is given as they are.


def _steps_inputs(delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return delta.contiguous(), delta.new_zeros(delta.shape[1]) if bias is None else bias.contiguous()


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta, bias = _steps_inputs(delta, bias)
    out = torch.empty_like(delta)
    arguments = _array(delta), _array(bias), softplus, _array(out)
    share(delta.shape[1], lambda start, stop: loops.steps_fwd(*arguments, start, stop))
    return out


def _like_steps(delta, bias, softplus):
    return delta.new_empty(delta.shape)


def _steps_backward(dy: Tensor, delta: Tensor, bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    delta, bias = _steps_inputs(delta, bias)
    d_delta, d_bias = torch.empty_like(delta), torch.zeros_like(bias)
    arguments = _array(delta), _array(bias), softplus, _array(dy.contiguous()), _array(d_delta), _array(d_bias)
    share(delta.shape[1], lambda start, stop: loops.steps_bwd(*arguments, start, stop))
    return d_delta, d_bias


def _like_steps_backward(dy, delta, bias, softplus):
    return delta.new_empty(delta.shape), delta.new_empty(delta.shape[1])


def _setup_steps(ctx, inputs, output):
    delta, bias, ctx.softplus = inputs
    ctx.save_for_backward(delta, bias)


def _steps_autograd(ctx, dy):
    inputs = ctx.saved_tensors
    if _is_differentiated():
        gradients = _through(reference.step_sizes(*inputs, ctx.softplus), inputs, dy)
    else:
        gradients = _present(STEPS_BACKWARD(dy, *inputs, ctx.softplus), inputs)
    return *gradients, None


STEPS = Operator("step_sizes_cpu", _steps, _like_steps, _setup_steps, _steps_autograd)
STEPS_BACKWARD = Operator("step_sizes_bwd_cpu", _steps_backward, _like_steps_backward)
