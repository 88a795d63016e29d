"""How good a model's features are without a head: DINO's weighted k-NN (arXiv 2104.14294, section 4.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from vmamba.analysis.prediction import config_of, file_of
from vmamba.analysis.tables import check_json, check_page, markdown, write_json
from vmamba.analysis.zoo import choose_device
from vmamba.classification.data import build_eval_loader
from vmamba.config import changed, get_config
from vmamba.data.loaders import Loader
from vmamba.errors import UserError
from vmamba.files import write_text
from vmamba.models.pretrained import load_pretrained, open_checkpoint, told_by_timm
from vmamba.models.variants import build_model
from vmamba.runtime.feed import Feed
from vmamba.runtime.precision import autocast, set_up_precision
from vmamba.text import counted

_SIMILARITIES = 2**26  # held at a time, of some held-out images with all training images


NEIGHBOURS = (10, 20, 100, 200)  # DINO's


def knn(
    run: str | None = None,
    *,
    cfg: str | None = None,
    opts: Sequence[str] = (),
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = 0.07,
    weights: str = "auto",
    device: str = "auto",
    output: str = "output/knn",
) -> list[dict[str, Any]]:
    """Classify the held-out images by the nearest training images, and write a table, knn.{md,json}, into `output`.

    Both are seen as evaluation sees images.

    Args:
        run: a checkpoint or a run's folder, of classification; a released file or its address.  Its head is left out.
        cfg: a config that says model and data in the place of the run's own; without a run its MODEL.PRETRAINED is
            loaded, or nothing.
        opts: KEY VALUE ... on top of the config, such as DATA.DATA_PATH.
        k: numbers of neighbours; of those that nobody chose the ones that there are training images for.
        temperature: of the neighbours' weights.
        weights: as of `vmamba.load_checkpoint`.

    Returns a line for each k: top-1 and top-5 in percent.  Raises UserError without a model or data.
    """
    check_json(Path(output, "knn.json"), "model", "weights", "results")
    check_page(Path(output, "knn.md"), r"[^\n]* held out, temperature ")
    if run is None and cfg is None:
        raise UserError("there is no model to look at; name a run, or a config with --cfg")
    found = open_checkpoint(file_of(run), weights) if run else None
    config = changed(get_config(cfg) if cfg else config_of(found, None), opts)
    if config.TASK != "classification":
        raise UserError(f"this is of {config.TASK}, and the labels of images are needed; give one of classification")
    place = choose_device(device)
    set_up_precision(config, place)
    torch.manual_seed(config.SEED)  # of random weights
    model = build_model(config)
    start = found or (config.MODEL.PRETRAINED and open_checkpoint(config.MODEL.PRETRAINED, weights))
    if start:
        load_pretrained(model, start, drop_head=True)
    train, held_out = (build_eval_loader(config, rank=0, world_size=1, split=split) for split in ("train", "val"))
    if tuple(k) == NEIGHBOURS:
        k = [count for count in k if count <= train.images] or [train.images]
    if max(k) > train.images:
        raise UserError(f"k is {max(k)}, and there are {counted(train.images, 'training image')}; choose less with --k")
    model.to(place).eval()
    known, labels = features(config, model, train, place)
    asked, truth = features(config, model, held_out, place)
    scores = vote(known, labels, asked, config.MODEL.NUM_CLASSES, k, temperature)
    rows = []
    for number, score in zip(k, scores, strict=True):
        hits = score.argsort(dim=1, descending=True, stable=True)[:, :5] == truth[:, None]
        top1, top5 = (100 * hits[:, :most].any(1).double().mean().item() for most in (1, 5))
        rows.append({"k": number, "top-1 (%)": round(top1, 2), "top-5 (%)": round(top5, 2)})
    source = start.path if start else "random weights"
    head = (
        f"{config.MODEL.NAME}, {source}: {counted(len(known), 'training image')}, {len(asked):,} held out, "
        f"temperature {temperature:g}\n"
    )
    table = f"{head}\n{markdown(rows)}"
    write_text(Path(output, "knn.md"), table)
    write_json(Path(output, "knn.json"), {"model": config.MODEL.NAME, "weights": str(source), "results": rows})
    print(table, end="")
    return rows


def before_head(model: nn.Module, images: Tensor) -> Tensor:
    """(N, dim), of a model that does not do it as timm's what its head takes.  Raises UserError where there is none."""
    if hasattr(model, "forward_head") and hasattr(model, "forward_features"):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    heads = told_by_timm(model, "classifier")
    if not heads:
        raise UserError(
            f"this {type(model).__name__} has neither forward_features and forward_head, as timm's models have, nor a "
            f"linear layer, so nothing tells its features; give it the former"
        )
    taken: list[Tensor] = []
    handle = model.get_submodule(heads[0]).register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model(images)
    handle.remove()
    return taken[0].flatten(1)


@torch.no_grad()
def features(config: CfgNode, model: nn.Module, loader: Loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the head would get of each image, (N, dim) float32 of length 1, and the labels (N,).

    Raises UserError where none of the images can be read.
    """
    found, labels = [], []
    for images, targets in Feed(loader, device, loader.finish, loader.ahead):
        with autocast(config, device):
            pooled = before_head(model, images)
        found.append(F.normalize(pooled.float(), dim=1))
        labels.append(targets)
    if not found:
        raise UserError(f"none of the images could be read; check DATA.DATA_PATH '{config.DATA.DATA_PATH}'")
    return torch.cat(found), torch.cat(labels)


def vote(
    known: Tensor, labels: Tensor, asked: Tensor, classes: int, k: Sequence[int], temperature: float
) -> list[Tensor]:
    """For each of `k` the scores (M, classes) of `asked` (M, dim): each of the k most similar of `known` (N, dim), with
    `labels` (N,), votes with exp(similarity / temperature).  A row's scores are told up to a factor.

    Vectors have length 1.
    """
    scores = [[] for _ in k]
    for part in asked.split(max(1, _SIMILARITIES // len(known))):
        similarity, nearest = (part @ known.T).topk(max(k), dim=1)
        votes = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1, so that none overflows
        for number, all_of_k in zip(k, scores, strict=True):
            score = votes.new_zeros(len(part), classes)
            all_of_k.append(score.scatter_add_(1, labels[nearest[:, :number]], votes[:, :number]))
    return [torch.cat(each) for each in scores]
