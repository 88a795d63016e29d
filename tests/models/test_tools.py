"""What looks into a model, as users do with timm's: exports, traces, torch.fx, torch.func, converters of norms."""

import copy
import io

import pytest
import timm
import torch
from timm.layers import LayerNorm2d, convert_splitbn_model, freeze_batch_norm_2d
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vmamba
import vmamba_kernels
from vmamba.errors import UserError
from vmamba.models import Mamba1D
from vmamba.models.layers import convolve_and_activate, on_channels_last
from vmamba_kernels import operators, registry

kinds = pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_m2"])
more = pytest.mark.parametrize(  # what the kinds leave out: other norms, a weight of megabytes, a position map
    "options",
    [
        dict(norm_layer="bn", gated_mlp=True, pos_embed=True, img_size=32, out_norm="ln_dwconv3"),
        dict(dims=(512, 1024), ssm_ratio=0.1, mlp_ratio=0, scan_float32=True, out_norm="softmax"),
    ],
    ids=["bn", "large"],
)


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    return vmamba.create_model(name, **dict(depths=(1, 1), dims=16, num_classes=5) | options).eval()


def images(batch=2, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "depths", "side", "strict"),
    [
        ("vmamba_tiny", (1,), 224, False),  # the scan of 16 states goes in pieces
        ("vmamba_tiny_s1l8", (1,), 32, True),
        ("vmamba_tiny_m2", (1, 1), 32, False),
    ],
)
def test_export_with_any_batch(name, depths, side, strict):
    model = small(name, depths=depths)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (images(2, side),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    called = {node.target.namespace for node in exported.graph.nodes if hasattr(node.target, "namespace")}
    assert called == {"aten"}  # nothing that a reader of the program lacks
    with torch.no_grad():
        close(exported.module()(images(3, side)), model(images(3, side)))


@kinds
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trace_with_and_without_gradients(name):
    model = small(name)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            traced = torch.jit.trace(model, images())
        close(traced(images(3)), model(images(3)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_traces_of_what_stands_on_a_backbone():
    options = dict(depths=(1, 1, 1, 1), dims=8)
    segmenter = vmamba.create_segmenter("upernet", "vmamba_nano", 3, backbone_options=options, channels=8).eval()
    x = images(1, 64)
    for model in (segmenter.backbone, segmenter):
        for one, other in zip(torch.jit.trace(model, x)(x), model(x), strict=True):
            close(one, other)
    detector = vmamba.create_detector("mask_rcnn", "vmamba_nano", 3, backbone_options=options, channels=8).eval()
    for record in (torch.jit.trace, torch.export.export):
        with pytest.raises(UserError, match="a detector gives as many boxes as it finds, .*; record its maps"):
            record(detector, (x,))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: small("vmamba_tiny", depths=(0,), norm_layer="bn"), "VSSM"),
        (lambda: vmamba.Backbone(small("vmamba_tiny_m2", depths=(1,)), (0,)), "VSSM"),
        (lambda: vmamba.SS2D(8), "SS2D"),
        (lambda: nn.Sequential(Mamba1D(8)), "Mamba1D"),
    ],
)
def test_what_torchscript_does_not_compile_is_one_sentence(make, kind):
    with pytest.raises(
        UserError,
        match=f"torch.jit.script cannot compile a {kind}; use torch.jit.trace or torch.export, or vmamba.export for a",
    ):
        torch.jit.script(make())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_trace_asks_the_kernels_for_what_gradients_need():
    """Whatever the mode it is made in: PyTorch checks a trace by another one without gradients."""
    asked = []

    class Asks(nn.Linear):
        def forward(self, x):
            if torch.jit.is_tracing():  # it also runs the module itself, to compare
                asked.append(registry.wants_gradient(x, self.weight))
            return super().forward(x)

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.jit.trace(Asks(1, 1), torch.ones(1))
    assert len(asked) >= 3 and all(asked)
    with torch.no_grad():
        assert not registry.wants_gradient(torch.ones(1, requires_grad=True))


def symbolic(model):
    traced = torch.fx.symbolic_trace(model.eval())
    close(traced(images(3, 45)), model(images(3, 45)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(images()), model(images()))
    traced = torch.fx.symbolic_trace(model.train())
    traced(images()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


@kinds
def test_torch_fx_without_its_users_help(name):
    symbolic(small(name, drop_path_rate=0.0))


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(conv_backend="auto", dt_rank=2)])
def test_torch_fx_of_mambas_layer(options, monkeypatch):
    monkeypatch.setattr("vmamba.models.mamba1d.why_no_causal_conv1d", lambda: None)  # as where it is installed
    layer = Mamba1D(8, **options)
    traced = torch.fx.symbolic_trace(layer)
    for length in (3, 20):
        x = torch.randn(2, length, 8)
        assert torch.equal(traced(x), layer(x))
    with pytest.raises(UserError, match="the sequence has shape"):
        traced(torch.randn(2, 8))


def test_torch_fx_of_vim():
    vim = timm.create_model("vim_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_classes=3)
    symbolic_of = torch.fx.symbolic_trace(vim.eval())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(symbolic_of(x), vim(x))


def test_torch_fx_of_what_stands_on_a_backbone_is_one_sentence():
    options = dict(depths=(1, 0, 0, 0), dims=8)
    segmenter = vmamba.create_segmenter("upernet", "vmamba_nano", 3, backbone_options=options, channels=8).eval()
    detector = vmamba.create_detector("mask_rcnn", "vmamba_nano", 3, backbone_options=options, channels=8, hidden=8)
    for model, kind in ((segmenter, "segmenter"), (detector.eval(), "detector")):
        with pytest.raises(UserError, match=f"torch.fx cannot follow a whole {kind}, .*; trace its backbone"):
            torch.fx.symbolic_trace(model)
        x = images(1, 64)
        for one, other in zip(torch.fx.symbolic_trace(model.backbone)(x), model.backbone(x), strict=True):
            assert torch.equal(one, other)


@more
def test_torch_fx_of_other_options(options):
    symbolic(small("vmamba_tiny_s1l8", drop_path_rate=0.0, **options))


@kinds
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_torchvisions_feature_extractor(name):
    model = small(name)
    nodes = get_graph_node_names(model)[1]
    assert "layers.0.blocks.0.op.out_proj" in nodes
    block = [node for node in nodes if node.startswith("layers.0.blocks.0.add")][-1]
    extractor = create_feature_extractor(model, return_nodes={block: "first", "classifier.head": "y"})
    found = extractor(images())
    close(found["first"].permute(0, 3, 1, 2), model.forward_intermediates(images(), intermediates_only=True)[0])
    assert torch.equal(found["y"], model(images()))


@kinds
def test_gradients_of_each_image(name):
    model = small(name)
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights, image, label):
        return cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    labels = torch.tensor([1, 4])
    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images(), labels)
    for i in range(2):
        expected = grad(loss)(weights, images()[i], labels[i])
        close({key: value[i] for key, value in found.items()}, expected)


def forward_mode(model):
    """The derivative of the output along a direction of the images, by torch.func and by dual numbers."""
    x, direction = images(), torch.ones_like(images())
    _, backward = torch.autograd.functional.jvp(model, x, direction, strict=False)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            close(jvp(model, (x,), (direction,))[1], backward)
            with forward_ad.dual_level():
                close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent, backward)


@kinds
def test_forward_mode_with_and_without_gradients(name):
    forward_mode(small(name))


@more
def test_forward_mode_of_other_options(options):
    forward_mode(small("vmamba_tiny_s1l8", **options))


@kinds
def test_ensembles(name):
    models = [small(name, seed) for seed in range(2)]
    weights, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(weights, buffers, x):
        return functional_call(base, (weights, buffers), (x,))

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = vmap(call, in_dims=(0, 0, None))(weights, buffers, images())
            close(found, torch.stack([model(images()) for model in models]))


def test_what_looks_into_a_call_gets_the_reference(monkeypatch):
    """On a GPU "auto" would take a kernel, of which torch.func knows nothing."""
    asked = []
    choose = operators.registry.implementation
    monkeypatch.setattr(
        operators.registry, "implementation", lambda backend, **call: asked.append(backend) or choose(backend, **call)
    )
    model = small("vmamba_tiny")
    vmap(lambda image: model(image[None]))(images())
    assert set(asked) == {"reference"}
    asked.clear()
    model(images())
    assert "reference" not in asked
    model.set_backend("triton")
    with pytest.raises(vmamba_kernels.BackendError, match="'triton' cannot serve"):  # what is asked for is kept
        vmap(lambda image: model(image[None]))(images())


@kinds
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_by_tracing(name):
    onnx = pytest.importorskip("onnx")
    onnx_reference = pytest.importorskip("onnx.reference")
    model, file = small(name), io.BytesIO()
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    options = dict(input_names=["x"], output_names=["y"], dynamic_axes=axes, opset_version=17)
    torch.onnx.export(model, (images(),), file, dynamo=False, **options)
    graph = onnx.load_from_string(file.getvalue())
    (logits,) = onnx_reference.ReferenceEvaluator(graph).run(None, {"x": images(3).numpy()})
    close(torch.tensor(logits), model(images(3)).detach())


# ------------------------------------------------------------------------------------------ layers that others know


def with_batch_norm():
    """A model whose stages have as many rows as channels, where a wrong layout fits too; its statistics are its own."""
    model = small("vmamba_tiny_s1l8", dims=(8, 16), norm_layer="bn").train()
    model(images(4))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0)
    return model.eval()


@pytest.mark.parametrize(
    "convert",
    [nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d, lambda model: convert_splitbn_model(model, 2)],
    ids=["sync", "frozen", "split"],
)
def test_batch_norms_are_converted(convert):
    model = with_batch_norm()
    converted = convert(copy.deepcopy(model))
    left = [key for key, each in converted.named_modules() if type(each) is nn.BatchNorm2d]
    assert not [key for key in left if "aux_bn" not in key]  # of the split ones
    close(converted.eval()(images()), model(images()))
    assert {key.removesuffix(".num_batches_tracked") for key in converted.state_dict()} >= {
        key for key in model.state_dict() if not key.endswith("num_batches_tracked")
    }


def test_batch_norm_norms_the_channels():
    """By hand: every norm of a block and of the stem sees channels, each with mean 0 and variance 1 in training."""
    model, seen = small("vmamba_tiny_s1l8", dims=(8, 16), norm_layer="bn").train(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: seen.append((module, out)))
    model(images(4))
    assert len(seen) == 2 + 2 * 2 + 1 + 1  # stem, blocks, downsampling, classifier
    for module, out in seen:
        assert out.shape[1] == module.num_features
        close(out.mean((0, 2, 3)), torch.zeros(module.num_features))


class LowRank(nn.Module):
    """A convolution and a trained correction of low rank, as peft puts in its place."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base = base
        options = dict(stride=base.stride, padding=base.padding, bias=False)
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, **options)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@kinds
def test_depthwise_convolutions_are_pytorchs(name):
    model = small(name)
    convolutions = {key: each for key, each in model.named_modules() if type(each) is nn.Conv2d and each.groups > 1}
    assert len(convolutions) == 2
    macs = []
    for each in convolutions.values():
        each.register_forward_hook(lambda each, args, out: macs.append(out[0].numel() * each.weight[0].numel()))
    expected = model(images())
    sizes = [(8 * 8, model.layers[0].blocks[0].op.d_inner), (4 * 4, model.layers[1].blocks[0].op.d_inner)]
    assert macs == [pixels * channels * 9 for pixels, channels in sizes]
    for key, each in convolutions.items():
        model.set_submodule(key, LowRank(each))
    model(images()).sum().backward()
    close(model(images()), expected)
    assert all(each.up.weight.grad.abs().max() > 0 for each in model.modules() if isinstance(each, LowRank))


def test_a_convolution_that_was_changed_is_called_as_it_is():
    """As packages do that trade stride for dilation; then it is no longer what one operator computes."""
    torch.manual_seed(0)
    mixer, x = small("vmamba_tiny_s1l8").layers[0].blocks[0].op, torch.randn(1, 8, 8, 16)
    convolution = mixer.conv2d
    convolution.dilation, convolution.padding = (2, 2), (2, 2)
    seen = convolve_and_activate(x[..., : convolution.in_channels], convolution, mixer.act)
    close(seen, mixer.act(convolution(x[..., : convolution.in_channels].permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "norm", [lambda dim: nn.GroupNorm(4, dim), LayerNorm2d, nn.InstanceNorm2d], ids=["group", "layer", "instance"]
)
@pytest.mark.parametrize("options", [dict(norm_layer="bn"), dict(out_norm="ln_dwconv3")], ids=["bn", "ln"])
def test_norms_of_images_in_the_place_of_ours_read_channels_first(norm, options):
    model, read = small("vmamba_tiny_s1l8", **options), []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.LayerNorm, nn.BatchNorm2d)):
                dim, other = child.weight.numel(), norm(child.weight.numel())
                other.register_forward_hook(lambda other, args, out, dim=dim: read.append(args[0].shape[1] == dim))
                setattr(parent, name, other)
    model(images(2, 36))
    assert read == [True] * 10
    x = torch.randn(2, 8, 8, 8)  # the axes could be taken for each other
    close(on_channels_last(norm(8), x).permute(0, 3, 1, 2), norm(8)(x.permute(0, 3, 1, 2)))
