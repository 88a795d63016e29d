"""The recurrences written as loops over positions and pixels, term by term as the papers have them."""

import torch
import torch.nn.functional as F


def selective_scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """Shapes as in `vmamba_kernels.selective_scan`; computes in the dtype given."""
    batch, channels, length = u.shape
    groups = B.shape[1]
    B = B.repeat_interleave(channels // groups, dim=1)  # (batch, channels, states, length)
    C = C.repeat_interleave(channels // groups, dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(batch, channels, A.shape[1])
    y = []
    for t in range(length):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + delta[:, :, t, None] * B[..., t] * u[:, :, t, None]
        y.append((C[..., t] * h).sum(-1))
    y = torch.stack(y, dim=-1)
    return y if D is None else y + D[:, None] * u


def pixels(height, width, route):
    """The (row, column) of each position of a route."""
    order = [(i, j) for i in range(height) for j in range(width)]
    if route.startswith("col"):
        order = [(i, j) for j in range(width) for i in range(height)]
    return order[::-1] if route.endswith("rev") else order


def cross_selective_scan(x, x_proj_weight, dt_weight, dt_bias, A, D, routes):
    """Shapes as in `vmamba_kernels.cross_selective_scan`; computes in the dtype given."""
    batch, height, width, dim = x.shape
    rank, states = dt_weight.shape[2], A.shape[2]
    out = torch.zeros_like(x)
    for k, route in enumerate(routes):
        order = pixels(height, width, route)
        u = torch.stack([x[:, i, j] for i, j in order], dim=-1)  # (batch, dim, length)
        dt, B, C = (x_proj_weight[k] @ u).split((rank, states, states), dim=1)
        y = selective_scan(
            u,
            dt_weight[k] @ dt,
            A[k],
            B[:, None],
            C[:, None],
            None if D is None else D[k],
            None if dt_bias is None else dt_bias[k],
        )
        along = torch.zeros_like(x)
        for t, (i, j) in enumerate(order):
            along[:, i, j] = y[:, :, t]
        out = out + along
    return out


def cross_ssd(x, x_proj_weight, dt_bias, A, D, routes):
    """The selective scan with each head's step size and A copied to the head's channels."""
    dim, heads = x.shape[3], A.shape[1]
    copies = dim // heads
    to_channels = torch.eye(heads, dtype=x.dtype).repeat_interleave(copies, dim=0)  # (dim, heads)
    states = (x_proj_weight.shape[1] - heads) // 2
    return cross_selective_scan(
        x,
        x_proj_weight,
        to_channels.expand(len(routes), dim, heads),
        None if dt_bias is None else dt_bias.repeat_interleave(copies, dim=1),
        A.repeat_interleave(copies, dim=1)[..., None].expand(-1, -1, states),
        None if D is None else D.flatten(1),
        routes,
    )
