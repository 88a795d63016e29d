"""The baselines of the tables in our loop: MODEL.NAME timm/..."""

import pytest
import timm
import torch
import yaml

from vmamba.config import get_config, output_folder
from vmamba.errors import UserError
from vmamba.runtime.trainer import run

from .tiny import CLASSES, TINY, log, saved, tiny_file


@pytest.fixture
def config_of(tmp_path):
    tiny_file(tmp_path)  # makes the images
    model = {"NAME": "timm/test_convnext", "NUM_CLASSES": CLASSES, "DROP_PATH_RATE": 0.1}
    tree = TINY | {"MODEL": model, "DATA": TINY["DATA"] | {"DATA_PATH": str(tmp_path / "images"), "IMG_SIZE": 32}}
    (tmp_path / "timm.yaml").write_text(yaml.safe_dump(tree))
    return lambda *opts: get_config(tmp_path / "timm.yaml", ["OUTPUT", str(tmp_path), *map(str, opts)])


def test_it_trains_evaluates_and_starts_from_its_weights(config_of):
    config = config_of()
    results = run(config)
    assert "timm/test_convnext: " in log(config)
    model = timm.create_model("test_convnext", num_classes=CLASSES)
    model.load_state_dict(saved(config)["model"])
    assert run(config_of("EVAL_MODE", True)) == results
    last = str(output_folder(config) / "last.pth")
    torch.save(timm.create_model("test_convnext").state_dict(), last.replace("last", "published"))
    with pytest.raises(UserError, match=r"head.fc.bias.*for a new head of 6 classes, use --drop-head"):
        run(config_of("TAG", "b", "MODEL.PRETRAINED", last.replace("last", "published")))
    run(config_of("TAG", "c", "MODEL.PRETRAINED", last.replace("last", "published"), "MODEL.DROP_HEAD", True))


def test_stochastic_depth_is_the_configs(config_of):
    from vmamba.models.variants import build_model

    drops = [module.drop_prob for module in build_model(config_of()).modules() if hasattr(module, "drop_prob")]
    assert max(drops) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("opts", "sentence"),
    [
        (("MODEL.NAME", "timm/swin_tyny"), "unknown model 'swin_tyny'; did you mean"),
        (("MODEL.NAME", "timm/test_convnext.nope"), r"unknown model 'test_convnext.nope'; did you mean 'test_convnext"),
        (("MODEL.OPTIONS.d_state", 4), "MODEL.OPTIONS are of our models, and MODEL.NAME is timm/test_convnext"),
        (("MODEL.NAME", "timm/test_vit", "DATA.IMG_SIZE", 37), "test_vit does not take images of 37 x 37 pixels"),
    ],
)
def test_what_cannot_be_is_a_sentence(config_of, opts, sentence):
    with pytest.raises(UserError, match=sentence):
        run(config_of(*opts))
