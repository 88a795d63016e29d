"""The scan as attention: its rows applied to the scan's input are the scan."""

import pytest
import torch

from vmamba import create_model
from vmamba.analysis.attention import activation_map, find_block, maps, mean_matrix, routes, scan_input
from vmamba.errors import UserError
from vmamba.models.ss2d import SS2D, SSD2D
from vmamba_kernels import ROUTES, cross_merge, cross_selective_scan, cross_ssd

MIXERS = {
    "selective": lambda: SS2D(16, d_state=3),
    "one state, routes in another order": lambda: SS2D(16, d_state=1, routes=("col_rev", "row", "row"), gate=False),
    "ssd": lambda: SSD2D(16, d_state=4, dt_rank=2, ssm_init="v2"),
}


def scan_of_one_route(mixer, x, k):
    """The scan along the mixer's route number k alone, without the skip."""
    A = -mixer.A_logs.exp()
    weights = mixer.x_proj_weight[k : k + 1]
    route = mixer.routes[k : k + 1]
    if isinstance(mixer, SSD2D):
        return cross_ssd(x, weights, mixer.dt_projs_bias[k : k + 1], A[k : k + 1], None, routes=route)
    A = A.unflatten(0, (len(mixer.routes), -1))[k : k + 1]
    dt_weight, dt_bias = mixer.dt_projs_weight[k : k + 1], mixer.dt_projs_bias[k : k + 1]
    return cross_selective_scan(x, weights, dt_weight, dt_bias, A, None, routes=route)


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    mixer = MIXERS[request.param]().double().requires_grad_(False)
    for parameter in (mixer.x_proj_weight, mixer.dt_projs_bias):
        parameter.mul_(3)  # so that the memory matters
    return mixer


def test_the_rows_of_every_route_applied_to_x_are_its_scan(mixer):
    x = torch.randn(1, 4, 5, mixer.d_inner, dtype=torch.float64)
    for k, route in enumerate(routes(mixer, x)):
        rows = torch.stack([route.row(query) for query in range(20)])  # (query, position, dim)
        assert not rows.triu(0).movedim(-1, 0).triu(1).any()  # nothing later reaches a query
        y = torch.einsum("ijd,jd->id", rows, route.u)
        expected = scan_of_one_route(mixer, x, k)
        torch.testing.assert_close(route.on_image(y, 4, 5)[None], expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-3


def test_the_routes_together_and_the_skip_are_what_the_module_computes(mixer):
    x = torch.randn(1, 4, 5, mixer.d_inner, dtype=torch.float64)
    ys = []
    for route in routes(mixer, x):
        ys.append(torch.stack([(route.row(query) * route.u).sum(0) for query in range(20)]))
    merged = cross_merge(torch.stack(ys)[None], 4, 5, mixer.routes)
    skip = mixer.Ds.reshape(len(mixer.routes), -1).sum(0) * x
    torch.testing.assert_close(merged + skip, mixer.scan(x), rtol=1e-9, atol=1e-12)


def test_the_hook_sees_what_the_scan_is_given():
    torch.manual_seed(0)
    model = create_model("vmamba_digits", num_classes=10, in_chans=1).eval().requires_grad_(False)
    mixer = find_block(model, "1.0").op
    given = []
    scan = mixer.scan
    mixer.scan = lambda x: given.append(x) or scan(x)
    x = scan_input(model, mixer, torch.randn(1, 1, 32, 32))
    assert torch.equal(x, given[0])
    assert not mixer.act._forward_hooks


def test_maps_place_the_rows_over_the_image(mixer):
    x = torch.randn(1, 4, 5, mixer.d_inner, dtype=torch.float64)
    found = maps(mixer, x, (0.5, 0.3), [2, 0])
    assert found.query == (1, 2)
    assert found.weights.shape == (len(mixer.routes), 4, 5, 2)
    reached = {  # of row 1, column 2: what each route passes before or at it
        "row": lambda row, column: (row, column) <= (1, 2),
        "col": lambda row, column: (column, row) <= (2, 1),
        "row_rev": lambda row, column: (row, column) >= (1, 2),
        "col_rev": lambda row, column: (column, row) >= (2, 1),
    }
    for k, name in enumerate(found.names):
        for row in range(4):
            for column in range(5):
                passed = reached[name](row, column)
                assert found.weights[k, row, column].any() == passed
                assert bool(found.similarity[k, row, column]) == passed
    # At the query itself nothing decays: w is C . B times the step.
    for k, route in enumerate(routes(mixer, x)):
        step = route.delta[route.position(7), [2, 0]]
        torch.testing.assert_close(found.weights[k, 1, 2], found.similarity[k, 1, 2] * step)


def test_the_matrix_holds_the_rows(mixer):
    route = routes(mixer, torch.randn(1, 3, 2, mixer.d_inner, dtype=torch.float64))[0]
    matrix = mean_matrix(route, [1, 3])
    assert matrix.shape == (6, 6)
    torch.testing.assert_close(matrix[4], route.row(4)[:, [1, 3]].abs().mean(1))


def test_the_door_writes_figure_and_numbers(digits_run, tmp_path):
    weights = str(digits_run / "best.pth")
    where = dict(layer="0.1", at=(0.5, 0.5), channels=[1, 4])
    found = activation_map(
        model="vmamba_digits", weights=weights, size=32, matrix=True, device="cpu", output=str(tmp_path), **where
    )
    assert found.weights.shape == (4, 8, 8, 2)
    assert tuple(found.names) == ROUTES
    assert torch.load(tmp_path / "matrix.pt").shape == (4, 64, 64)
    assert torch.equal(torch.load(tmp_path / "activation_map.pt")["weights"], found.weights)
    for kind in ("pdf", "png"):
        assert (tmp_path / f"activation_map.{kind}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"layer": "2.0"}, "no layer '2.0'; this model has 0.0 to 0.1, 1.0 to 1.1"),
        ({"layer": "x"}, "no layer 'x'"),
        ({"at": (1.5, 0.0)}, "from 0 to 1"),
        ({"channels": [99]}, "no channel 99"),
        ({"channels": [None, 1]}, "names mean and others"),
        ({"model": "resnet18"}, "ResNet is none of our models, whose blocks are drawn; name one"),
        ({"image": "absent.jpg"}, "cannot read 'absent.jpg'"),
    ],
)
def test_what_the_user_can_mend(changed, sentence, tmp_path):
    settings = dict(model="vmamba_digits", size=32, layer="0.0", device="cpu", output=str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        activation_map(**settings | changed)
