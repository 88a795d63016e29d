"""The figure of the published tables: every row is there, speeds are those of the pages, labels can be read."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from vmamba.analysis import speed, tasks_speed
from vmamba.analysis.tables import read_table
from vmamba.analysis.tradeoff import FAMILIES, PANELS, point, read_speeds, tradeoff
from vmamba.errors import UserError
from vmamba.models.published import PUBLISHED

DOCS = Path(__file__).parents[2] / "docs"
SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder for pages, and what writes them with given images/s, as the commands do."""
    folder = tmp_path / "docs"
    folder.mkdir()

    def write(task, rates, device="GPU, of a kind"):
        def timed(names, case, *_, **__):
            factor = 1 if case.mode == "forward" else 0.5
            if task != "classification":
                return [
                    {"model": name, "mode": case.mode, "images/s": factor * rates[name], "ratio": 1} for name in names
                ]
            rate = {name: factor * rates[name] / (1 if case.batch == 4 else 100) for name in names}
            return [
                speed.Timing(name, case.size, case.dtype, case.mode, case.batch, rate[name], 1.0, None, 1.0, 1000, 1.0)
                for name in names
            ]

        for module in (speed, tasks_speed):
            monkeypatch.setattr(module, "compare", timed)
            monkeypatch.setattr(module, "describe", lambda _: device)
        options = dict(device="cpu", output=str(tmp_path / "out"), markdown=str(folder / PANELS[task].page))
        if task == "classification":
            monkeypatch.setattr(speed.zoo, "create", lambda *_, **__: speed.zoo.Subject("", None, ""))
            monkeypatch.setattr(speed, "complexity", lambda *_: type("Cost", (), {"macs": 1})())
            modes = {"modes": ["forward", "train"], "dtypes": ["bfloat16"], "batch_sizes": [4]}
            speed.throughput(models=list(rates), **modes, **options)
        else:
            tasks_speed.tasks_speed(task=task, backbones=list(rates), size=(64, 32), **options)
        return folder

    return write


def test_every_published_row_is_a_point():
    points = {row.config: point(row, None) for row in PUBLISHED if PANELS[row.table].number in row.numbers}
    assert len(points) == len(PUBLISHED) - 3  # the three that were never trained
    assert {each.family for each in points.values()} == FAMILIES.keys()
    found = {name: (each.family, each.kind, each.label, each.setting) for name, each in points.items()}
    assert found["vmamba_tiny"] == ("VMamba", "", "T", "")
    assert found["vmamba_small_s1l20"] == ("VMamba[s1l]", "s1l20", "S", "")
    assert found["deit_base_384"] == ("DeiT", "", "B 384", "384")
    assert found["detection/mask_rcnn_vmamba_base_s2l15_1x"] == ("VMamba[s2l]", "s2l15", "B", "1x")
    assert found["detection/mask_rcnn_swin_small_3x"] == ("Swin", "", "S", "3x")
    assert found["segmentation/upernet_vmamba_small_640"] == ("VMamba", "", "S 640", "640")
    three = (
        points["vmamba_tiny"],
        points["detection/mask_rcnn_vmamba_tiny_3x"],
        points["segmentation/upernet_swin_base"],
    )
    assert [(each.accuracy, each.gflops) for each in three] == [(82.2, 5.627), (48.5, 286), (48.1, 1188)]


def test_speeds_of_the_page_of_classifiers():
    """Of its first table, which others follow."""
    found = read_speeds(DOCS / "throughput-gpu.md", "forward")
    assert found.where == "NVIDIA H200, bfloat16\nbatch 128, 224 x 224"
    first = {row["model"]: float(row["images/s"]) for row in read_table((DOCS / "throughput-gpu.md").read_text())
             if row["mode"] == "forward" and row["batch"] == "128"}  # fmt: skip
    assert found.of["swin_tiny", ""] == first[SWIN] and found.of["vmamba_tiny", ""] == first["vmamba_tiny"]
    assert len(found.of) == len(first)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("task", PANELS)
def test_speeds_are_read_as_they_are_written(task, mode, pages):
    prefix = "" if task == "classification" else "timm/"
    rates = {f"{prefix}{SWIN}": 1500.0, "vmamba_tiny": 80.0, "vmamba_tiny_s1l8": 7.25}
    found = read_speeds(pages(task, rates) / PANELS[task].page, mode)
    case = "bfloat16\nbatch 4, 224 x 224" if task == "classification" else "bfloat16\nbatch 2, 64 x 32"
    assert found.where == f"GPU, of a kind, {case}"
    factor = 1 if mode == "forward" else 0.5
    expected = {("swin_tiny", ""): 1500.0, ("vmamba_tiny", ""): 80.0, ("vmamba_tiny_s1l8", ""): 7.25}
    assert found.of == pytest.approx({name: factor * rate for name, rate in expected.items()}, rel=1e-2)


def test_what_is_not_measured_is_not_drawn_and_counted(pages, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: written.append(figure))
    docs = pages("detection", {"vmamba_tiny": 20.0, "timm/resnet50": 30.0, "torchvision": 40.0})
    points = tradeoff(docs=str(docs), output=str(tmp_path))
    measured = {each.name: each.speed for each in points if each.speed is not None}
    assert measured == {"Mask R-CNN 1x, VMamba-T": 20.0, "Mask R-CNN 3x, VMamba-T": 20.0}
    above, below = written[0].axes[:3], written[0].axes[3:]
    assert [axes.get_title() for axes in below] == [
        f"{count} rows measured" for count in ("0 of 15", "2 of 15", "0 of 11")
    ]
    assert [sum(len(line.get_xdata()) for line in axes.lines) for axes in (*above, *below)] == [15, 15, 11, 0, 2, 0]
    said = [axes.get_xlabel().split("\n", 1)[1] for axes in below]
    assert said == [
        "no page of measurements yet",
        "GPU, of a kind, bfloat16\nbatch 2, 64 x 32",
        "no page of measurements yet",
    ]
    assert all("published" in axes.get_ylabel() for axes in (*above, *below))
    assert all("published" in axes.get_xlabel() for axes in above)
    assert all("measured here" in axes.get_xlabel() for axes in below)
    told = json.loads((tmp_path / "tradeoff.json").read_text())
    assert [each["speed"] for each in told["rows"]] == [each.speed for each in points]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_labels_cover_neither_points_nor_each_other(seed, pages, tmp_path, monkeypatch):
    """With the speeds in docs, and with any of all models."""
    written, docs = [], DOCS
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: written.append(figure))
    if seed is not None:
        draw = random.Random(seed)
        for task in PANELS:
            rows = [row for row in PUBLISHED if row.table == task and PANELS[task].number in row.numbers]
            names = {re.sub(r"^\w+/(mask_rcnn|upernet)_|_(1x|3x|384|640)$", "", row.config): row.gflops for row in rows}
            docs = pages(task, {name: 1e4 / gflops * draw.uniform(0.7, 1.3) for name, gflops in names.items()})
    tradeoff(docs=str(docs), output=str(tmp_path))
    figure = written[-1]  # the page of classifiers has one too
    for axes in figure.axes:
        labels = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        points = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
        assert len(labels) == len(points)
        assert not [pair for pair in itertools.combinations(labels, 2) if pair[0].overlaps(pair[1])]
        assert not [place for label in labels for place in points if label.padded(1).contains(*place)]
        assert all(axes.bbox.contains(*label.min) and axes.bbox.contains(*label.max) for label in labels)


def test_what_cannot_be_drawn_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="'.*nowhere' has none of throughput-gpu.md, detection-speed.md, segm.*--docs"):
        tradeoff(docs=str(tmp_path / "nowhere"), output=str(tmp_path))
    with pytest.raises(UserError, match="unknown mode 'forwards'; did you mean 'forward'"):
        tradeoff(mode="forwards", output=str(tmp_path))
    page = tmp_path / "detection-speed.md"
    table = "| model | mode | images/s |\n| :-- | :-- | --: |\n| a | forward | 3 |\n"
    for text, sentence in [
        ("", "has no table of forward speeds with the card above it"),
        (f"GPU, PyTorch 2.\n\n{table.replace('forward', 'train')}", "has no table of forward speeds"),
        (f"GPU, PyTorch 2.\n\n{table.replace('3', 'out of memory')}", "has no table of forward speeds"),
        (table, "has no table of forward speeds with the card above it"),
        (f"GPU, PyTorch 2.\n\n{table}", "does not say type, batch and size; measure again with --markdown"),
    ]:
        page.write_text(text)
        with pytest.raises(UserError, match=f"'.*detection-speed.md' {sentence}"):
            tradeoff(docs=str(tmp_path), output=str(tmp_path))
