"""The variants' numbers, any size and number of channels, the classifier, stochastic depth, checkpointing, errors."""

import pytest
import timm
import torch
from torch.nn import functional as F

import vmamba
from vmamba.models import layers
from vmamba.models.layers import LayerNorm, downsample
from vmamba.models.variants import VARIANTS
from vmamba.models.vssm import resize_pos_embed
from vmamba_kernels import add_layer_norm

TINY = dict(depths=(1, 2), dims=16, d_state=2, num_classes=7)


def build(**options):
    torch.manual_seed(0)
    return vmamba.VSSM(**TINY | options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.parameters])
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = vmamba.create_model(name)
        assert count(model) == VARIANTS[name].parameters
        model.reset_classifier(0)
        assert count(model) == VARIANTS[name].parameters - 1000 * (model.num_features + 1)


def test_the_smallest_variants_run_as_published():
    for name in ("vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_m2"):
        model = vmamba.create_model(name, num_classes=3).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 32, 64)).shape == (1, 3)


@pytest.mark.parametrize("scan", ["selective", "ssd"])
@pytest.mark.parametrize("stem, downsample", [("v1", "v1"), ("v1", "v2"), ("v2", "v3")])
@pytest.mark.parametrize("size", [(8, 8), (29, 13), (40, 16)])
def test_any_size_and_number_of_channels(scan, stem, downsample, size):
    model = build(in_chans=5, patch_embed=stem, downsample=downsample, scan=scan).eval()
    images = torch.randn(2, 5, *size)
    features = model.forward_features(images)
    assert features.shape[0] == 2 and features.shape[3] == 32
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_tiny_images_where_padding_allows_them(size):
    assert build(patch_embed="v2", downsample="v3").eval()(torch.randn(1, 3, *size)).shape == (1, 7)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_downsampling_of_small_images_is_the_convolution(version):
    """Millions of weights and few pixels go by another way on a CPU; output and every gradient are the same."""
    torch.manual_seed(0)
    _, convolution, *_ = downsample(version, 512, 2048 if version == "v2" else 1024, LayerNorm)
    x = torch.randn(2, 512, 5, 6, requires_grad=True)
    options = dict(stride=convolution.stride, padding=convolution.padding)
    want = F.conv2d(x, convolution.weight, convolution.bias, **options)
    got = convolution(x)
    assert type(got.grad_fn) is not type(want.grad_fn)  # it did go the other way
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grad, leaves = torch.randn_like(want), (x, *convolution.parameters())
    grads = [torch.autograd.grad(y, leaves, grad) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chans, side, stride, padding", [(3, 3, 2, 1), (4, 4, 4, 0), (1, 2, 2, 0)])
def test_a_product_with_patches_is_the_convolution(chans, side, stride, padding):
    """What a GPU runs for the images of a stem; its rows are padded to a multiple of 8."""
    x = torch.randn(2, chans, 11, 14)
    weight, bias = torch.randn(6, chans, side, side, requires_grad=True), torch.randn(6, requires_grad=True)
    want = F.conv2d(x, weight, bias, stride, padding)
    got = layers._product_with_patches(x, weight, bias, stride, padding)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.permute(0, 2, 3, 1).is_contiguous()
    grad = torch.randn_like(want)
    grads = [torch.autograd.grad(y, (weight, bias), grad) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_stem_on_a_gpu_is_the_convolution(version, monkeypatch):
    """Under autocast its product rounds as the convolution does; a gradient of the images is the convolution's."""
    torch.manual_seed(0)
    stem = layers.patch_embed(version, 3, 96, 4, LayerNorm).cuda()
    images = torch.randn(4, 3, 65, 64, device="cuda").contiguous(memory_format=torch.channels_last)

    def run(images):
        with torch.autocast("cuda", torch.bfloat16):
            out = stem(images)
        return out, *torch.autograd.grad(out.square().sum(), [*stem.parameters()])

    ours, of_images = run(images), run(images.clone().requires_grad_())
    assert layers._is_better_as_product(images.bfloat16(), stem[0].weight)
    monkeypatch.setattr(layers, "_is_better_as_product", lambda x, weight: False)
    for a, b, c in zip(ours, run(images), of_images, strict=True):
        assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()
        assert torch.equal(b, c)


def test_images_too_small_are_refused_with_their_size():
    with pytest.raises(vmamba.UserError, match="images are 3 x 9 pixels.*at least 4 x 4"):
        build(patch_embed="v1")(torch.randn(1, 3, 3, 9))
    with pytest.raises(vmamba.UserError, match="features are 1 x 2, too small"):
        build(patch_embed="v1", downsample="v2")(torch.randn(1, 3, 4, 8))
    with pytest.raises(vmamba.UserError, match=r"shape \(1, 1, 8, 8\); this model takes \(batch, 3, height, width\)"):
        build()(torch.randn(1, 1, 8, 8))


def test_classifier_can_be_reset_and_left_out():
    model = build().eval()
    images = torch.randn(2, 3, 16, 16)
    model.reset_classifier(4)
    assert model.num_classes == 4 and model(images).shape == (2, 4) and model.get_classifier().out_features == 4
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 2, 2, 32)


def test_a_head_can_be_assigned():
    model = build().eval()
    model.head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(32, 4))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 4) and model.num_classes == 4
    assert model.head is model.get_classifier() and "classifier.head.1.weight" in model.state_dict()
    model.head = torch.nn.Identity()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32) and model.num_classes == 0
    for name in ("fc", "_fc", "heads", "last_linear"):
        with pytest.raises(vmamba.UserError, match=f"a VSSM has no '{name}'; its last layer is 'head'"):
            setattr(model, name, torch.nn.Linear(32, 4))
    for other in (torch.nn.Linear(32, 4), torch.nn.Identity(), 3):
        with pytest.raises(vmamba.UserError, match="; a VSSM's is norm, pooling and 'head': set 'head' for a last"):
            model.classifier = other
    for other in (None, 5, "linear"):
        with pytest.raises(vmamba.UserError, match="; give a module, or leave it out with reset_classifier"):
            model.head = other
    model.classifier = torch.compile(model.classifier, backend="eager")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((-1,), "num_classes is -1; it must be between 0 and 1000000"),
        ((2.5,), "num_classes is 2.5 .float.; expected an integer"),
        ((5, "max"), "unknown global_pool 'max'"),
        ((None,), "num_classes is None"),
    ],
)
def test_what_a_classifier_cannot_be_reset_to_leaves_it_as_it_was(given, words):
    model = build()
    head = model.head
    with pytest.raises(vmamba.UserError, match=words):
        model.reset_classifier(*given)
    assert (model.num_classes, model.global_pool) == (7, "avg") and model.head is head


def test_intermediates_are_the_stages_before_their_downsampling():
    model = build().eval()
    images = torch.randn(2, 3, 32, 16)
    last, (first, second) = model.forward_intermediates(images)
    assert first.shape == (2, 16, 8, 4) and second.shape == (2, 32, 4, 2)
    torch.testing.assert_close(last, model.forward_features(images))
    torch.testing.assert_close(second.permute(0, 2, 3, 1), last)
    assert len(model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)) == 1


def test_stochastic_depth_grows_along_the_model_and_is_off_in_eval():
    model = build(drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == [0.0, 0.25, 0.5]
    images = torch.randn(4, 3, 16, 16)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_gradient_checkpointing_changes_no_gradient():
    model = build(drop_path_rate=0.5)
    images = torch.randn(4, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for without, with_checkpointing in zip(*gradients, strict=True):
        torch.testing.assert_close(with_checkpointing, without, rtol=0, atol=0)


def test_position_map_is_resized_to_the_image():
    model = build(pos_embed=True, img_size=(16, 32)).eval()
    assert model.pos_embed.shape == (1, 16, 4, 8)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 7)
    assert resize_pos_embed(model.pos_embed, (4, 8)) is model.pos_embed
    flat = torch.full_like(model.pos_embed, 2.0)
    torch.testing.assert_close(resize_pos_embed(flat, (5, 3)), torch.full((1, 16, 5, 3), 2.0))


@pytest.mark.parametrize("scan", ["selective", "ssd"])
def test_initialisations(scan):
    mamba = build(scan=scan, d_state=4, ssm_init="v0").layers[0].blocks[0].op
    step = torch.nn.functional.softplus(mamba.dt_projs_bias)
    assert step.min() >= 0.001 * 0.999 and step.max() <= 0.1 * 1.001 and torch.all(mamba.Ds == 1)
    if scan == "selective":
        torch.testing.assert_close(-mamba.A_logs.exp()[5], -torch.arange(1.0, 5))
        assert mamba.dt_projs_weight.abs().max() <= mamba.dt_rank**-0.5
    normal = build(scan=scan, d_state=4, ssm_init="v1").layers[0].blocks[0].op
    assert normal.A_logs.std() > 0.1 and normal.dt_projs_bias.min() < 0
    zero = build(scan=scan, d_state=4, ssm_init="v2").layers[0].blocks[0].op
    assert torch.all(zero.A_logs == 0) and zero.dt_projs_bias.min() >= 0 and zero.dt_projs_bias.max() <= 0.1
    assert abs(zero.in_proj.weight.std() - 0.02) < 0.005


def test_what_is_not_decayed_beside_norms_and_biases():
    assert build(pos_embed=True, depths=(1,)).no_weight_decay() == {"layers.0.blocks.0.op.Ds", "pos_embed"}
    assert build(scan="ssd", depths=(1,)).no_weight_decay() == set()


@pytest.mark.parametrize("scan_float32", [False, True])
def test_dtypes(scan_float32):
    model = build(scan_float32=scan_float32).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model.double()(images.double())
    torch.testing.assert_close(model.float()(images).double(), expected, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images) - expected).norm() / expected.norm() < 0.05
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert model.half()(images.half()).isfinite().all()


@pytest.mark.parametrize("name", ["vmamba_digits", "vim_tiny_patch16_224"])
def test_images_of_other_numbers_than_the_weights_are_a_sentence(name):
    own = dict(depths=(1,), dims=8) if name == "vmamba_digits" else dict(depth=1, embed_dim=16, img_size=32)
    model, images = timm.create_model(name, **own).eval(), torch.randn(1, 3, 32, 32)
    for weights, given in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        words = f"images are of {given}, and the weights of {weights}; give them in that type"
        with pytest.raises(vmamba.UserError, match=words):
            model.to(weights)(images.to(given))
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images.bfloat16()).isfinite().all()
        with pytest.raises(vmamba.UserError, match="images are of torch.float64, and the weights of torch.float32"):
            model(images.double())


AUTOCAST = [("v1", torch.bfloat16), ("v2", torch.float32), ("v3", torch.float32)]


@pytest.mark.parametrize("version, behind", AUTOCAST)
def test_the_dtype_of_the_sums_under_autocast(version, behind):
    """As in the original: stem and convolutions between stages end in a norm, PatchMerging in a linear layer."""
    model, dtypes = build(downsample=version, depths=(1, 1, 1)).train(), []
    for stage in model.layers:
        stage.blocks[0].register_forward_hook(lambda block, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 3, 16, 16)).dtype == torch.bfloat16
    assert dtypes == [torch.float32, behind, behind]


@pytest.mark.gpu
@pytest.mark.parametrize("version, behind", AUTOCAST)
def test_the_dtype_of_the_originals_sums(version, behind):
    """PyTorch's own layers in the original's order, on the device whose autocast it used."""
    x = torch.randn(2, 4, 4, 16, device="cuda")
    norm, linear = torch.nn.LayerNorm(16).cuda(), torch.nn.Linear(16, 16).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        between = norm(linear(x)) if version != "v1" else linear(norm(x))
        assert between.dtype == (between + linear(norm(between))).dtype == behind


def test_backend_reaches_every_scan():
    model = build().eval()
    model.set_backend("cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve cross_selective_scan here"):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(d_sate=3), "unknown model option 'd_sate'; did you mean 'd_state'?"),
        (dict(scan="selectiv"), "unknown scan 'selectiv'; did you mean 'selective'?"),
        (dict(out_norm="softmx"), "unknown out_norm 'softmx'; did you mean 'softmax'?"),
        (dict(routes=("row", "cols")), "unknown routes 'cols'; did you mean 'col'?"),
        (dict(ssm_act="gleu"), "unknown ssm_act 'gleu'; did you mean 'gelu'?"),
        (dict(ssm_init="v9"), "unknown ssm_init 'v9'"),
        (dict(downsample="v4"), "unknown downsample 'v4'"),
        (dict(patch_embed="v0"), "unknown patch_embed 'v0'"),
        (dict(norm_layer="batch"), "unknown norm_layer 'batch'"),
        (dict(dims=(16, 32)), "dims has 2 stages and depths 4"),
        (dict(ssm_conv=4), "ssm_conv is 4"),
        (dict(scan="ssd", dt_rank=5), "do not divide among 5 heads"),
    ],
)
def test_errors_name_the_option_and_the_nearest_right_one(options, words):
    with pytest.raises(vmamba.UserError) as error:
        vmamba.create_model("vmamba_tiny", **options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "images, words", [(None, "images are a NoneType"), (torch.zeros(1, 3, 32, 32).byte(), "torch.uint8")]
)
def test_images_that_are_no_numbers_of_images_are_a_sentence(images, words):
    model = vmamba.create_model("vmamba_digits", in_chans=3)
    with pytest.raises(vmamba.UserError, match=f"{words}; this model takes a tensor of floating-point numbers"):
        model(images)


def test_unknown_model():
    with pytest.raises(vmamba.UserError, match="unknown model 'vmamba_tinny'; did you mean 'vmamba_tiny'?"):
        vmamba.create_model("vmamba_tinny")
    assert set(vmamba.list_models()) == set(VARIANTS)


# Sums and norms as one operator, where nobody looks between blocks.


def block_by_block(model, x):
    """The classifier's scores, each block called by itself."""
    x = model._stem(x)
    for stage in model.layers:
        for block in stage.blocks:
            x = block(x)
        x = model._downsample(stage, x)
    return model.forward_head(x)


@pytest.fixture
def sums(monkeypatch):
    """Which norms were taken together with the sum before them."""
    seen = []

    def watched(x, branch, weight, bias, **options):
        seen.append(weight)
        return add_layer_norm(x, branch, weight, bias, **options)

    monkeypatch.setattr("vmamba.models.layers.add_layer_norm", watched)
    return seen


@pytest.mark.parametrize("options", [{}, dict(mlp_ratio=0.0), dict(norm_layer="bn"), dict(scan="ssd", depths=(3, 0))])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_in_a_stage_are_the_blocks_one_by_one(sums, options, training):
    model = build(drop_path_rate=0.5, **options).train(training)
    x, results = torch.randn(3, 3, 32, 32), []
    for function in (model, lambda x: block_by_block(model, x)):
        torch.manual_seed(1)
        model.zero_grad()
        out = function(x)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    if not options:  # of the three blocks each one's second norm, and once the next one's first; then block by block
        blocks = [block for stage in model.layers for block in stage.blocks]
        first = [blocks[0].norm2, blocks[1].norm2, blocks[2].norm, blocks[2].norm2]
        expected = [norm.weight for norm in (*first, *(block.norm2 for block in blocks))]
        assert len(sums) == len(expected) and all(a is b for a, b in zip(sums, expected, strict=True))
    if options.get("norm_layer") == "bn":
        assert not sums


@pytest.mark.parametrize("name", ["", ".norm", ".norm2", ".drop_path", ".op", ".mlp"])
def test_hooks_between_blocks_see_what_they_always_saw(name):
    model, seen = build().eval(), []
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    watched = [model.get_submodule(f"layers.1.blocks.{i}{name}") for i in range(2)]
    for module in watched:
        module.register_forward_hook(lambda module, given, out: seen.append((module, given[0], out)))
    assert torch.equal(model(x), expected)
    assert [module for module, *_ in seen] == ([watched[0]] * 2 + [watched[1]] * 2 if "drop" in name else watched)
    if not name:
        assert torch.equal(seen[0][2], seen[1][1])  # what a block gives is what the next one is given
    assert all(torch.equal(module.forward(given), out) for module, given, out in seen)


def test_modules_in_the_place_of_ours_are_called(sums):
    model = build().eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    sums.clear()
    for block in (block for stage in model.layers for block in stage.blocks):
        other = torch.nn.LayerNorm(block.norm2.normalized_shape)
        other.load_state_dict(block.norm2.state_dict())
        block.norm2 = other
    model.layers[1].blocks[1].norm.forward = lambda y: y * 0
    assert not torch.allclose(model(x), expected) and not sums
    del model.layers[1].blocks[1].norm.forward
    torch.testing.assert_close(model(x), expected)
    assert [weight.shape for weight in sums] == [(32,)]


def test_a_branch_of_one_number_a_channel_is_added_everywhere():
    model = build().eval()
    model.layers[1].blocks[0].op.forward = lambda x: x.mean((1, 2), keepdim=True)
    assert torch.equal(model(torch.ones(2, 3, 32, 32)), block_by_block(model, torch.ones(2, 3, 32, 32)))
