"""Our models behave as timm's own: what timm's model tests check, for every variant, small; and what users build on."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from yacs.config import CfgNode

import vmamba
from vmamba.models.released import to_released
from vmamba.models.timm_models import checkpoint_filter_fn
from vmamba.models.variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)
kinds = pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_m2"])


def stages(name):
    return len(VARIANTS[name].options["depths"])


def small(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, depths=(1,) * stages(name), dims=16, **options)


def images(*size, batch=2, chans=3):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(1))


def assert_same_weights(state, other):
    assert state.keys() == other.keys()
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=0, atol=0, msg=name)


# ------------------------------------------------------------------------------------------------ registry and options


def test_the_registry_lists_every_variant():
    assert set(timm.list_models("vmamba*")) == set(vmamba.list_models())
    released = {name for name, variant in VARIANTS.items() if variant.weights}
    assert set(timm.list_models("vmamba*", pretrained=True)) == {f"{name}.in1k" for name in released}
    assert timm.is_model_pretrained("vmamba_tiny") and not timm.is_model_pretrained("vmamba_tiny_m2")
    assert timm.get_pretrained_cfg("vmamba_base").url.endswith("/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth")


@every_variant
def test_timm_builds_the_same_model_as_we_do(name):
    with torch.device("meta"):
        ours, theirs = vmamba.create_model(name), timm.create_model(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.num_classes == 1000 and theirs.pretrained_cfg["architecture"] == name
    for key in (theirs.default_cfg["first_conv"], theirs.default_cfg["classifier"]):
        assert f"{key}.weight" in shapes[0]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(feature_only=True), "unknown model option 'feature_only'; did you mean 'features_only'?"),
        (dict(drop_path=0.1), "unknown model option 'drop_path'; did you mean 'drop_path_rate'?"),
        (dict(feature_cfg={}), "unknown model option 'feature_cfg'"),
        (dict(out_indices=(1,)), "unknown model option 'out_indices'"),
        (dict(global_pool="max"), "unknown global_pool 'max'"),
    ],
)
def test_an_unknown_option_is_named(options, words):
    with pytest.raises(vmamba.UserError) as error:
        timm.create_model("vmamba_digits", **options)
    assert words in str(error.value)


def test_options_of_timm_scripts_are_taken():
    model = small("vmamba_tiny", drop_rate=0.1, drop_path_rate=0.2, global_pool="avg", scriptable=False, in_chans=1)
    assert model.classifier.drop.p == 0.1 and model.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model(images(32, 32, chans=1)).shape == (2, 1000)


# ------------------------------------------------------------------------------------------------- forward, backward


@every_variant
def test_forward_and_default_cfg(name):
    model = small(name).eval()
    cfg, x = model.default_cfg, images(64, 64)
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000 and cfg["crop_pct"] == 0.875
    side = cfg["pool_size"][0] * 64 // 224
    with torch.no_grad():
        assert model(images(37, 45, batch=1)).isfinite().all()
        logits = model(x)
        features = model.forward_features(x)
        assert model.output_fmt == "NHWC" and features.shape == (2, side, side, model.num_features)
        torch.testing.assert_close(model.forward_head(features), logits, rtol=0, atol=0)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled, rtol=0, atol=0)
        model.reset_classifier(0, "")
        assert model(x).shape == features.shape and model.global_pool == ""
        headless = small(name, num_classes=0, global_pool="").eval()
        headless.load_state_dict(model.state_dict())
        torch.testing.assert_close(headless(x), model(x), rtol=0, atol=0)


@every_variant
def test_backward_reaches_every_parameter_with_and_without_checkpointing(name):
    model = small(name, num_classes=42, drop_path_rate=0.0).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output = model(images(32, 32))
        output.square().mean().backward()
        results.append((output.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}))
    assert results[0][0].shape == (2, 42)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in results[0][1].values())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ features


def reference_features(model, x):
    """The stages one by one, by hand."""
    x = model.patch_embed(x.contiguous(memory_format=torch.channels_last))
    features = []
    for stage in model.layers:
        x = stage.blocks(x)
        features.append(x.permute(0, 3, 1, 2))
        x = x if stage.downsample is None else stage.downsample(x)
    return features


@every_variant
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_features_only(name):
    model = small(name, features_only=True).eval()
    x = images(64, 96)
    expected = reference_features(small(name).eval(), x)
    features = model(x)
    assert len(features) == stages(name) and model.output_fmt == "NCHW"
    assert model.feature_info.channels() == [feature.shape[1] for feature in features]
    assert model.feature_info.reduction() == [64 // feature.shape[2] for feature in features]
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    sum(feature.sum() for feature in features).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # no part is left that no one uses
    for feature_cls in ("hook", "fx"):
        other = small(name, features_only=True, feature_cls=feature_cls).eval()
        torch.testing.assert_close([f.permute(0, 3, 1, 2) for f in other(x)], expected, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("out_indices, chosen", [((1, 2, 3), [1, 2, 3]), ((0, 2), [0, 2]), ([-2], [2]), (1, [3])])
def test_features_of_chosen_stages(name, out_indices, chosen):
    model = small(name, num_classes=10, features_only=True, out_indices=out_indices).eval()
    expected = reference_features(small(name, num_classes=10).eval(), images(64, 64))
    torch.testing.assert_close(model(images(64, 64)), [expected[i] for i in chosen], rtol=0, atol=0)
    assert model.feature_info.channels() == [16 * 2**i for i in chosen]


@every_variant
def test_forward_intermediates_and_pruning(name):
    model, x, last = small(name).eval(), images(32, 64), stages(name) - 1
    expected = reference_features(model, x)
    output, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(output, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(intermediates, expected, rtol=0, atol=0)
    only = partial(model.forward_intermediates, x, intermediates_only=True)
    torch.testing.assert_close(only(1), expected[-1:], rtol=0, atol=0)
    torch.testing.assert_close(only([0, -1]), [expected[0], expected[-1]], rtol=0, atol=0)
    torch.testing.assert_close(
        only([0], stop_early=True, output_fmt="NHWC"), [expected[0].permute(0, 2, 3, 1)], rtol=0, atol=0
    )
    normed = only([last], norm=True)[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(normed.mean((1, 2)), model.forward_head(output, pre_logits=True))
    with pytest.raises(vmamba.UserError, match="output_fmt"):
        only(output_fmt="NLC")
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    pruned = model.forward_intermediates(x, [0], intermediates_only=True)
    torch.testing.assert_close(pruned, expected[:1], rtol=0, atol=0)
    assert {key.split(".")[0] for key in model.state_dict()} == {"patch_embed", "layers"} and len(model.layers) == 1


# ---------------------------------------------------------------------------------------------------- parameter groups


@every_variant
@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_follow_the_forward_pass(name, coarse):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [key for group in groups.values() for key in group]
    assert sorted(names) == sorted(key for key, _ in model.named_parameters())
    depths = VARIANTS[name].options["depths"]
    assert len(groups) == 2 + (len(depths) if coarse else sum(depths))  # the stem, blocks or stages, the head
    group_of = {key: group for group, keys in groups.items() for key in keys}
    order = [group_of[key] for key, _ in model.named_parameters()]  # registered as they run
    assert order == sorted(order)
    assert group_of["classifier.head.weight"] == len(groups) - 1


@kinds
def test_layer_decay_and_no_weight_decay(name):
    model = small(name)
    not_decayed = model.no_weight_decay()
    assert not_decayed == {key for key, _ in model.named_parameters() if key.endswith(".Ds") and "m2" not in name}
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=not_decayed, layer_decay=0.5)
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert settings.keys() == {id(parameter) for parameter in model.parameters()}
    assert settings[id(model.get_classifier().weight)] == (1.0, 0.05)
    assert settings[id(model.get_classifier().bias)] == (1.0, 0.0)
    assert settings[id(model.patch_embed[0].weight)] == (0.5**5, 0.05)  # behind it four blocks and the head
    assert settings[id(model.layers[0].blocks[0].op.Ds)] == (0.5**4, 0.05 if "m2" in name else 0.0)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(settings)


@every_variant
def test_data_config_and_transform(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    config = resolve_data_config({}, model=model)
    assert config["interpolation"] == "bicubic" and config["crop_pct"] == 0.875
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    assert create_transform(**config)(picture).shape == (3, 224, 224)
    assert create_transform(**config, is_training=True)(picture).shape == (3, 224, 224)


# --------------------------------------------------------------------------------------------------------- checkpoints


@every_variant
def test_state_dict_reloads_after_another_head(name):
    model = small(name)
    model.reset_classifier(5)
    assert model.get_classifier().out_features == model.num_classes == 5
    other = small(name, num_classes=5)
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(images(32, 32)), model.eval()(images(32, 32)), rtol=0, atol=0)


def pretrained(name, weights, **options):
    return small(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), **options)


@kinds
def test_released_weights_load_and_adapt(name):
    source = small(name)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = to_released(source, january=name == "vmamba_tiny")
    assert_same_weights(pretrained(name, {"model": {}, "model_ema": weights}).state_dict(), source.state_dict())
    adapted = pretrained(name, weights, num_classes=7, in_chans=1).state_dict()
    assert adapted.pop("classifier.head.weight").shape == (7, 128) and adapted.pop("classifier.head.bias").shape == (7,)
    expected = source.state_dict()
    expected["patch_embed.0.weight"] = expected["patch_embed.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(adapted["patch_embed.0.weight"], expected["patch_embed.0.weight"])
    assert_same_weights(
        adapted, {key: adapted[key] if "patch_embed.0.weight" in key else expected[key] for key in adapted}
    )
    features = pretrained(name, weights, features_only=True, out_indices=(0, 1)).eval()
    torch.testing.assert_close(
        features(images(32, 32)), reference_features(source.eval(), images(32, 32))[:2], rtol=0, atol=0
    )


@pytest.mark.parametrize("options", [{}, dict(num_classes=7), dict(features_only=True)])
def test_weights_of_another_model_do_not_load(options):
    weights = small("vmamba_tiny_s2l5").state_dict()
    with pytest.raises(vmamba.UserError, match=r"another architecture: \d+ missing: .*mlp"):
        pretrained("vmamba_tiny_s2l5", {k: v for k, v in weights.items() if ".mlp." not in k}, **options)
    with pytest.raises(vmamba.UserError, match="another architecture.*of another shape"):
        pretrained("vmamba_tiny_s1l8", weights, **options)


def test_position_map_is_resized_on_loading():
    source, target = (small("vmamba_tiny", pos_embed=True, img_size=size) for size in (32, 48))
    torch.nn.init.constant_(source.pos_embed, 3.0)
    filtered = checkpoint_filter_fn(source.state_dict(), target)
    torch.testing.assert_close(filtered["pos_embed"], torch.full_like(target.pos_embed, 3.0))


def test_a_released_file_is_fetched_from_its_address(tmp_path, monkeypatch):
    source = small("vmamba_tiny")
    plain = {key: torch.zeros_like(value) for key, value in to_released(source, january=True).items()}
    served = tmp_path / "served"
    served.mkdir()
    torch.save(
        dict(model=plain, model_ema=to_released(source, january=True), epoch=3, config=CfgNode({"A": {"B": 1}})),
        served / "released.pth",
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/released.pth"
        model = small("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=dict(url=url))
    finally:
        server.shutdown()
        server.server_close()
    assert_same_weights(model.state_dict(), source.state_dict())
    assert (tmp_path / "home/hub/checkpoints/released.pth").exists()
    again = small("vmamba_tiny", pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(url=url))  # no server now
    torch.testing.assert_close(again.layers[0].blocks[0].op.A_logs, source.layers[0].blocks[0].op.A_logs)


def test_no_weights_no_pretrained_model():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_tiny_m2"):
        small("vmamba_tiny_m2", pretrained=True)


def test_timm_checkpoint_path(tmp_path):
    source = small("vmamba_tiny", num_classes=4)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "checkpoint.pth")
    torch.manual_seed(7)
    loaded = timm.create_model(
        "vmamba_tiny", depths=(1,) * 4, dims=16, num_classes=4, checkpoint_path=str(tmp_path / "checkpoint.pth")
    )
    assert_same_weights(loaded.state_dict(), source.state_dict())


# -------------------------------------------------------------------------------------------------------- hugging face


@kinds
@pytest.mark.parametrize("safe", [True, False])
def test_saved_for_hugging_face_and_back_from_the_folder(name, safe, tmp_path):
    pytest.importorskip("huggingface_hub")
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm does not load from local folders")
    model = small(name, num_classes=5, in_chans=1).eval()
    model.reset_classifier(6)
    options = dict(depths=(1,) * 4, dims=16)
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=safe)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name and config["num_classes"] == 6 and config["num_features"] == 128
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=6).eval()
    assert_same_weights(back.state_dict(), model.state_dict())
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, features_only=True).eval()
    x = images(32, 32, chans=1)
    torch.testing.assert_close(features(x), reference_features(model, x), rtol=0, atol=0)


def test_pushing_to_hugging_face_uploads_model_and_config(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = timm.models._hub
    uploaded = {}

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def file_exists(self, **options):
            return False

        def upload_folder(self, repo_id, folder_path, **options):
            uploaded.update({path.name: path.stat().st_size for path in Path(folder_path).iterdir()}, repo=repo_id)

    if not hasattr(hub, "HfApi"):
        pytest.skip("this timm uploads by other calls")
    monkeypatch.setattr(hub, "HfApi", Api)
    hub.push_to_hf_hub(small("vmamba_tiny_s1l8"), "someone/vmamba", model_args=dict(depths=(1,) * 4, dims=16))
    assert uploaded["repo"] == "someone/vmamba" and uploaded.keys() >= {"config.json", "model.safetensors", "README.md"}


# ------------------------------------------------------------------------------------------ segmentation_models_pytorch


@kinds
def test_encoder_of_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet(f"tu-{name}", encoder_weights=None, in_channels=4, classes=3, decoder_channels=(32, 16, 16, 8, 8))
    x = images(64, 96, batch=1, chans=4)
    masks = model(x)
    assert masks.shape == (1, 3, 64, 96)
    masks.mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert model.encoder.out_channels == [4, 0, 96, 192, 384, 768]


@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus", "PAN"])
def test_decoders_that_ask_for_dilated_stages(decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    options = dict(encoder_name="tu-vmamba_tiny_s1l8", encoder_weights=None)
    with pytest.raises(
        vmamba.UserError, match="output_stride is (8|16); .* has no dilated stages, so its stride is 32"
    ):
        getattr(smp, decoder)(**options)
    if decoder == "PAN":
        assert smp.PAN(**options, encoder_output_stride=32).eval()(images(256, 256)).shape == (2, 1, 256, 256)


def test_the_stride_that_a_model_has_may_be_asked_for():
    assert small("vmamba_tiny", output_stride=32).num_features == 128
    assert small("vmamba_digits", output_stride=8).num_features == 32
    with pytest.raises(vmamba.UserError, match="output_stride is 16; vmamba_tiny has no dilated stages, so"):
        small("vmamba_tiny", output_stride=16)
