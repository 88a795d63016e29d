"""Options for ablations: blocks that take parts of the routes in turn, scans of the means of rows and columns."""

from pathlib import Path

import pytest
import torch

import vmamba
from vmamba.analysis import attention
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.models.ss2d import SS2D, SSD2D
from vmamba.models.variants import build_model
from vmamba_kernels import cross_selective_scan

ROOT = Path(__file__).parents[2]
SMALL = dict(depths=(1, 2), dims=16, d_state=2, num_classes=3)


def test_blocks_take_parts_of_the_routes_in_turn():
    """Through the stages, and the model is the one whose blocks have those routes."""
    model = vmamba.create_model("vmamba_tiny", route_turns=2, **SMALL)
    blocks = [block.op for stage in model.layers for block in stage.blocks]
    assert [block.routes for block in blocks] == [("row", "col"), ("row_rev", "col_rev"), ("row", "col")]
    assert blocks[1].x_proj_weight.shape[0] == 2
    whole = vmamba.create_model("vmamba_tiny", routes=("row", "col"), **SMALL)
    whole.load_state_dict(model.state_dict())
    whole.layers[1].blocks[0].op.routes = ("row_rev", "col_rev")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), whole.eval()(images))
    single = vmamba.create_model("vmamba_tiny", route_turns=4, **SMALL)
    assert [block.op.routes for stage in single.layers for block in stage.blocks] == [("row",), ("col",), ("row_rev",)]
    eight = vmamba.create_model("vmamba_tiny", routes=("row", "col", "row_rev", "col_rev") * 2, **SMALL)
    assert eight(images).shape == (2, 3)


@pytest.mark.parametrize(("kind", "options"), [(SS2D, {}), (SSD2D, {"dt_rank": 4})])
@pytest.mark.parametrize(("pool", "axis"), [("columns", 1), ("rows", 2)])
def test_a_scan_of_means_by_hand(kind, options, pool, axis):
    """What the means get along the routes, without the skip, which is each pixel's own."""
    torch.manual_seed(0)
    pooled, plain = kind(8, d_state=2, pool=pool, **options), kind(8, d_state=2, **options)
    torch.nn.init.normal_(pooled.Ds)
    plain.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 3, 5, pooled.d_inner)
    means, skip = x.mean(axis, keepdim=True), pooled.Ds.view(4, -1).sum(0)
    expected = (plain.scan(means) - means * skip).expand_as(x) + x * skip
    torch.testing.assert_close(pooled.scan(x), expected, rtol=1e-4, atol=1e-5)


def test_a_scan_of_means_against_the_recurrence():
    """One route, one state, one channel at a time."""
    torch.manual_seed(1)
    mixer = SS2D(4, d_state=1, ssm_ratio=1.0, dt_rank=1, routes="row", pool="columns").double()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    y, state = torch.zeros_like(x), torch.zeros(4, dtype=torch.float64)
    for column in range(5):
        u = x[0, :, column].mean(0)
        step, B, C = mixer.x_proj_weight[0] @ u
        delta = torch.nn.functional.softplus(mixer.dt_projs_weight[0, :, 0] * step + mixer.dt_projs_bias[0])
        state = torch.exp(-mixer.A_logs.exp()[:, 0] * delta) * state + delta * B * u
        y[0, :, column] = C * state + mixer.Ds * x[0, :, column]
    torch.testing.assert_close(mixer.scan(x), y)


def test_blocks_pool_columns_and_rows_in_turn_and_their_gradients_are_whole():
    model = vmamba.create_model("vmamba_tiny", pool="turns", **SMALL)
    assert [block.op.pool for stage in model.layers for block in stage.blocks] == ["columns", "rows", "columns"]
    model(torch.randn(1, 3, 40, 32)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert vmamba.flops(model, 64) < vmamba.flops(vmamba.create_model("vmamba_tiny", **SMALL), 64)


def test_without_a_skip_the_operator_is_the_same():
    x, numbers = torch.randn(1, 2, 3, 4), dict(routes=("row",))
    weights = torch.randn(1, 3, 4), torch.randn(1, 4, 1), torch.randn(1, 4), -torch.rand(1, 4, 1)
    with_skip = cross_selective_scan(x, *weights, torch.ones(1, 4), **numbers)
    torch.testing.assert_close(cross_selective_scan(x, *weights, None, **numbers) + x, with_skip)


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(UserError, match="route_turns is 3, which does not divide 4 routes; choose a divisor"):
        vmamba.create_model("vmamba_tiny", route_turns=3)
    with pytest.raises(UserError, match="pool is turns, which the blocks of a model take; here choose columns"):
        SS2D(8, pool="turns")
    mixer = SS2D(8, pool="rows")
    with pytest.raises(UserError, match="scans the means of rows, and the picture is of pixels; choose pool none"):
        attention.routes(mixer, torch.randn(1, 2, 2, 16))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_changes_one_option_of_the_model(path):
    config = get_config(path)
    assert len(config.MODEL.OPTIONS) == 1 and config.MODEL.NAME == "vmamba_tiny_s1l8" and path.stem == config.NAME
    assert config.TRAIN.EPOCHS == 300
    with torch.device("meta"):
        build_model(config)
