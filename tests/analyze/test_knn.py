"""k-NN of features against scikit-learn's classifier with DINO's weights, and over a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

import vmamba
from vmamba.analysis import knn as module
from vmamba.analysis.knn import knn, vote
from vmamba.classification.data import build_eval_loader
from vmamba.config import get_config
from vmamba.errors import UserError


@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_votes_are_those_of_scikit_learn(temperature, monkeypatch):
    monkeypatch.setattr(module, "_SIMILARITIES", 700)  # seven at a time
    random = torch.Generator().manual_seed(0)
    known, asked = (F.normalize(torch.randn(size, 5, generator=random), dim=1) for size in (100, 40))
    labels = torch.randint(0, 6, (100,), generator=random)
    for k, scores in zip((1, 20), vote(known, labels, asked, 7, (1, 20), temperature), strict=True):
        peer = KNeighborsClassifier(
            k, weights=lambda d: np.exp(-(d - d.min(1, keepdims=True)) / temperature), metric="cosine"
        )
        chances = peer.fit(known.double().numpy(), labels.numpy()).predict_proba(asked.double().numpy())
        assert scores.shape == (40, 7) and not scores[:, 6].any()
        found = (scores / scores.sum(1, keepdim=True))[:, :6]
        torch.testing.assert_close(found, torch.from_numpy(chances).float(), rtol=1e-3, atol=1e-4)


def test_a_run_by_hand(digits_run, tmp_path):
    """All training images as evaluation sees them, the pooled features of the checkpoint's model without its head."""
    rows = knn(str(digits_run), k=(5, 20), temperature=0.1, output=str(tmp_path))
    config = get_config(digits_run / "config.yaml")
    model, found = vmamba.load_model(digits_run), {}
    for split in ("train", "val"):
        loader = build_eval_loader(config, rank=0, world_size=1, split=split)
        images, labels = zip(*[loader.finish(batch) for batch in loader], strict=True)
        with torch.no_grad():
            kept = model.forward_features(torch.cat(images))
            found[split] = model.classifier.norm(kept).mean((1, 2)).numpy(), torch.cat(labels).numpy()
    assert [len(found[split][1]) for split in found] == [1437, 360]
    for row in rows:
        peer = KNeighborsClassifier(row["k"], weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine")
        chances = peer.fit(*found["train"]).predict_proba(found["val"][0])
        right = np.argsort(-chances, 1, kind="stable")[:, :5] == found["val"][1][:, None]
        assert row["top-1 (%)"] == pytest.approx(100 * right[:, 0].mean(), abs=0.3)  # an image where rounding decides
        assert row["top-5 (%)"] == pytest.approx(100 * right.any(1).mean(), abs=0.3)
    assert json.loads((tmp_path / "knn.json").read_text())["results"] == rows
    assert rows[0]["top-1 (%)"] > 50


def test_a_model_of_a_config_and_other_data(tmp_path, capsys):
    """timm's too, from random weights that are the seed's."""
    opts = ["MODEL.NAME", "timm/test_vit", "DATA.IMG_SIZE", "160", "DATA.BATCH_SIZE", "100"]
    opts += ["DATA.VAL_FRACTION", "0.5", "DATA.DATASET", "imagenet", "DATA.DATA_PATH", str(tmp_path / "images")]
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 20 * number).save(path)
    opts += ["MODEL.NUM_CLASSES", "2"]
    rows = [knn(cfg="configs/vmamba_digits.yaml", opts=opts, k=(3,), output=str(tmp_path / "out")) for _ in range(2)]
    assert rows[0] == rows[1] and rows[0][0]["top-5 (%)"] == 100
    assert "timm/test_vit, random weights: 6 training images, 6 held out" in capsys.readouterr().out
    with pytest.raises(UserError, match="k is 7, and there are 6 training images; choose less"):
        knn(cfg="configs/vmamba_digits.yaml", opts=opts, k=(3, 7), output=str(tmp_path / "out"))


@pytest.mark.parametrize(("given", "words"), [
    (dict(), "there is no model to look at; name a run, or a config with --cfg"),
    (dict(cfg="configs/scenes_detection.yaml"), "this is of detection, and the labels of images are needed"),
    (dict(cfg="configs/vmamba_digits.yaml", opts=["MODEL.NAM", "x"]), "unknown config key 'MODEL.NAM'"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(given, words, tmp_path):
    with pytest.raises(UserError, match=words):
        knn(**given, output=str(tmp_path))
