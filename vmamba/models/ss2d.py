"""The blocks' core: an image is projected, convolved, scanned along routes, normed, gated and projected back.

`SS2D` scans with the selective scan (VMamba, arXiv 2401.10166, section 4), `SSD2D` with Mamba-2's (arXiv 2405.21060).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.models import layers
from vmamba.models.layers import activation, convolve_and_activate, depthwise_conv, on_channels_last
from vmamba.models.layers import out_norm as out_norm_layer
from vmamba.models.options import ScanOptions, signed_by
from vmamba.values import Takes
from vmamba_kernels import ROUTES, autocast_dtype, cross_selective_scan, cross_ssd, no_autocast


def step_biases(*shape: int) -> Tensor:
    """Biases of which softplus makes steps between 0.001 and 0.1, log-uniform (arXiv 2312.00752, section 3.6)."""
    step = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


class Mixer2D(layers.Unscripted, nn.Module):
    """What both scans share.  A subclass adds the scan's parameters and `scan`.

    Args:
        dim: channels in and out.
        options: what can be chosen, or `changes` of it by name: see `options.ScanOptions`.

    Raises:
        UserError: an option is unknown, or its value impossible.
    """

    conv_key = ""  # "1" where the released files call the convolution conv2d.1
    projections = ()  # names of the scan's weights that autocast casts

    @signed_by(ScanOptions)
    def __init__(self, dim: int, options: ScanOptions | None = None, **changes: Any):
        super().__init__()
        o = (options or ScanOptions()).changed(**changes)
        self.dim = dim = Takes((int,), at_least=1, at_most=2**14).check("dim", dim)
        self.d_inner = int(o.ssm_ratio * dim)
        self.d_state = o.d_state
        self.dt_rank = math.ceil(dim / 16) if o.dt_rank == "auto" else o.dt_rank
        self.routes = (o.routes,) if isinstance(o.routes, str) else o.routes
        self.pool = o.pool
        self.scan_float32 = o.scan_float32
        self.weights_of_autocast = () if o.scan_float32 else self.projections
        self.backend = o.backend
        self.gate = o.gate
        if self.d_inner < 1:
            raise UserError(f"ssm_ratio is {o.ssm_ratio}, which of {dim} channels leaves none; choose a larger one")
        if not self.routes:
            raise UserError(f"routes is empty; give at least one of {', '.join(ROUTES)}")
        if o.pool == "turns":
            raise UserError("pool is turns, which the blocks of a model take; here choose columns, rows or none")
        if o.ssm_conv > 1 and o.ssm_conv % 2 == 0:
            raise UserError(f"ssm_conv is {o.ssm_conv}; the convolution keeps the image's size, so choose an odd side")
        self.in_proj = nn.Linear(dim, self.d_inner * (2 if o.gate else 1), bias=False)
        self.conv2d = depthwise_conv(self.d_inner, o.ssm_conv, o.ssm_conv_bias) if o.ssm_conv > 1 else nn.Identity()
        if o.ssm_conv > 1 and self.conv_key:
            self.conv2d = nn.Sequential(nn.Identity(), self.conv2d)
        self.act = activation(o.ssm_act)()
        self.gate_act = activation(o.ssm_act)() if o.gate_act else nn.Identity()
        self._make_scan_parameters(o.ssm_init)
        self.out_norm = out_norm_layer(o.out_norm, self.d_inner)
        self.out_act = nn.GELU() if o.out_act else nn.Identity()
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False)
        self.dropout = nn.Dropout(o.ssm_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim).  Raises UserError for features of another shape."""
        layers.check_channels_last(x, self.dim, type(self).__name__)
        x = self.in_proj(x)  # (B, H, W, d_inner), twice that with a gate
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = convolve_and_activate(x, self.conv2d, self.act)
        x = self.out_act(on_channels_last(self.out_norm, self.scan(x)))
        if self.gate:
            x = x * self.gate_act(z)
        return self.dropout(self.out_proj(x))

    def scan(self, x: Tensor) -> Tensor:
        """The scan alone, (B, H, W, d_inner) -> (B, H, W, d_inner).

        Of means of columns or rows (`pool`) each pixel gets what its own has, and its own skip.
        """
        D = self._skips()
        if self.pool == "none":
            return self._along_routes(x, D)
        means = x.mean(1 if self.pool == "columns" else 2, keepdim=True)
        y = self._along_routes(means, None)
        return (y + x * D.flatten(1).sum(0)).to(y.dtype)

    def _skips(self) -> Tensor:
        """D, a number for each channel of each route."""
        raise NotImplementedError

    def _along_routes(self, x: Tensor, D: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _make_scan_parameters(self, init: str) -> None:
        raise NotImplementedError

    def _dt_init(self, init: str, *shape: int) -> Tensor:
        """Step biases: "v0" puts softplus of them between 0.001 and 0.1, log-uniform."""
        if init == "v1":
            return 0.1 * torch.randn(shape)
        if init == "v2":
            return 0.1 * torch.rand(shape)
        return step_biases(*shape)

    def _projection_init(self, numbers: int) -> Tensor:
        """(routes, numbers, d_inner), as PyTorch starts a linear layer."""
        bound = self.d_inner**-0.5
        return torch.empty(len(self.routes), numbers, self.d_inner).uniform_(-bound, bound)


class SS2D(Mixer2D):
    """The selective scan along routes: each channel has its own step size, A of `d_state` numbers, and D."""

    projections = ("x_proj_weight", "dt_projs_weight")

    def _make_scan_parameters(self, init: str) -> None:
        routes, dim, rank, states = len(self.routes), self.d_inner, self.dt_rank, self.d_state
        self.x_proj_weight = nn.Parameter(self._projection_init(rank + 2 * states))
        self.dt_projs_weight = nn.Parameter(self._dt_weight_init(init, routes, dim, rank))
        self.dt_projs_bias = nn.Parameter(self._dt_init(init, routes, dim))
        self.A_logs = nn.Parameter(self._A_log_init(init, routes * dim, states))
        self.Ds = nn.Parameter(torch.ones(routes * dim))

    def _skips(self) -> Tensor:
        return self.Ds.unflatten(0, (len(self.routes), -1))

    def _along_routes(self, x: Tensor, D: Tensor | None) -> Tensor:
        weights = (self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias)
        A_logs = self.A_logs.unflatten(0, (len(self.routes), -1))
        return _selective_scan(x, *weights, A_logs, D, self.routes, self.backend, self.scan_float32)

    def _dt_weight_init(self, init: str, *shape: int) -> Tensor:
        if init == "v0":
            bound = self.dt_rank**-0.5
            return torch.empty(shape).uniform_(-bound, bound)
        return 0.1 * (torch.randn(shape) if init == "v1" else torch.rand(shape))

    def _A_log_init(self, init: str, channels: int, states: int) -> Tensor:
        if init == "v0":
            return torch.arange(1.0, states + 1).log().repeat(channels, 1)
        return torch.randn(channels, states) if init == "v1" else torch.zeros(channels, states)


class SSD2D(Mixer2D):
    """Mamba-2's scan along routes: `dt_rank` heads, each with one step size and one A; B and C shared by the heads."""

    conv_key = "1"
    projections = ("x_proj_weight",)

    def _make_scan_parameters(self, init: str) -> None:
        routes, heads = len(self.routes), self.dt_rank
        if self.d_inner % heads:
            raise UserError(
                f"{self.d_inner} channels of the scan do not divide among {heads} heads; choose another dt_rank"
            )
        self.x_proj_weight = nn.Parameter(self._projection_init(heads + 2 * self.d_state))
        self.dt_projs_bias = nn.Parameter(self._dt_init(init, routes, heads))
        self.A_logs = nn.Parameter(self._A_log_init(init, routes, heads))
        self.Ds = nn.Parameter(torch.ones(routes, heads, self.d_inner // heads))

    def _skips(self) -> Tensor:
        return self.Ds

    def _along_routes(self, x: Tensor, D: Tensor | None) -> Tensor:
        weights = (self.x_proj_weight, self.dt_projs_bias, self.A_logs)
        return _ssd(x, *weights, D, self.routes, self.backend, self.scan_float32)

    def _A_log_init(self, init: str, *shape: int) -> Tensor:
        if init == "v0":  # Mamba-2's: A uniform in [1, 16]
            return torch.empty(shape).uniform_(1, 16).log()
        return torch.randn(shape) if init == "v1" else torch.zeros(shape)


# torch.fx takes what is wrapped so whole: what it does depends on dtypes and on autocast.
@torch.fx.wrap
def _selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_logs: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    backend: str,
    in_float32: bool,
) -> Tensor:
    def scan(x: Tensor) -> Tensor:
        A = -A_logs.to(_at_least_float32(x)).exp()
        return cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, routes=routes, backend=backend)

    return _in_its_dtype(scan, x, in_float32)


@torch.fx.wrap
def _ssd(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_bias: Tensor,
    A_logs: Tensor,
    D: Tensor | None,
    routes: tuple[str, ...],
    backend: str,
    in_float32: bool,
) -> Tensor:
    def scan(x: Tensor) -> Tensor:
        A = -A_logs.to(_at_least_float32(x)).exp()
        return cross_ssd(x, x_proj_weight, dt_bias, A, D, routes=routes, backend=backend)

    return _in_its_dtype(scan, x, in_float32)


def _in_its_dtype(scan: Callable[[Tensor], Tensor], x: Tensor, in_float32: bool) -> Tensor:
    """`scan` on x: in float32 if so asked, also under autocast; without autocast the result has the dtype of x."""
    if autocast_dtype(x.device.type) is not None:
        if not in_float32:
            return scan(x)
        with no_autocast(x.device.type):
            return scan(x.float())
    return scan(x.float() if in_float32 and x.dtype != torch.float64 else x).to(x.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
