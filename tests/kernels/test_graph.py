"""The operators whose recurrences other programs run, against the reference."""

import pytest
import torch

import vmamba_kernels as vk
from vmamba_kernels.graph import softplus

SEQUENCES = [(("row", "col", "row_rev", "col_rev"), 1), (("col_rev", "row"), 3), (("row_rev",), 16)]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(("routes", "states"), SEQUENCES)
@pytest.mark.parametrize("bare", [False, True])
def test_cross_selective_scan(routes, states, bare):
    k, dim, rank = len(routes), 6, 2
    weights = [numbers(k, rank + 2 * states, dim), numbers(k, dim, rank), numbers(k, dim, seed=1)]
    A, D = -numbers(k, dim, states).exp(), numbers(k, dim)
    weights, D = ((*weights[:2], None), None) if bare else (weights, D)
    found, expected = (
        vk.cross_selective_scan(numbers(2, 5, 7, dim), *weights, A, D, routes=routes, backend=backend)
        for backend in ("graph", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (9, 11)])  # of one chunk and of several
def test_cross_ssd(size):
    k, dim, heads, states = 4, 6, 2, 3
    arguments = numbers(k, heads + 2 * states, dim), numbers(k, heads), -numbers(k, heads).exp(), numbers(k, heads, 3)
    found, expected = (
        vk.cross_ssd(numbers(2, *size, dim), *arguments, chunk_size=40, backend=backend)
        for backend in ("graph", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("bare", [False, True])
def test_selective_scan(states, bare):
    groups, channels, length = 2, 6, 9
    u, A, D, bias = numbers(2, channels, length), -numbers(channels, states).exp(), numbers(channels), numbers(channels)
    B, C = numbers(2, groups, states, length), numbers(2, groups, states, length, seed=1)
    delta = numbers(2, channels, length, seed=1)
    rest, softplus = ((None, None), False) if bare else ((D, bias), True)
    delta = delta.abs() if bare else delta
    found, expected = (
        vk.selective_scan(u, delta, A, B, C, *rest, delta_softplus=softplus, backend=backend)
        for backend in ("graph", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_softplus_to_its_last_digits():
    x = torch.linspace(-15.9, 90, 20001)
    torch.testing.assert_close(softplus(x).double(), torch.nn.functional.softplus(x.double()), rtol=4e-7, atol=0)
    low = torch.tensor([-1e30, -100.0, -16.0, -torch.inf])
    assert (softplus(low) - torch.nn.functional.softplus(low)).abs().max() < 1.3e-7
    assert softplus(torch.tensor(torch.inf)) == torch.inf and softplus(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("states", [1, 3])
def test_gradients_are_refused_and_autocast_changes_the_projection_alone(states):
    k, dim, rank = 4, 6, 2
    weights = numbers(k, rank + 2 * states, dim), numbers(k, dim, rank), numbers(k, dim, seed=1)
    rest = -numbers(k, dim, states).exp(), numbers(k, dim)
    with pytest.raises(vk.BackendError, match="backend 'graph' has no gradients; call it inside torch.no_grad"):
        vk.cross_selective_scan(numbers(2, 5, 7, dim).requires_grad_(), *weights, *rest, backend="graph")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (
            vk.cross_selective_scan(numbers(2, 5, 7, dim), *weights, *rest, out_dtype=torch.float32, backend=backend)
            for backend in ("graph", "reference")
        )
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
