"""The commands of analyze/: nothing is written over a file that none of them has written."""

from pathlib import Path

import pytest

from vmamba.analysis.ablation import ablate
from vmamba.analysis.comparison import compare
from vmamba.analysis.complexity import flops
from vmamba.analysis.curves import curves
from vmamba.analysis.dataloading import dataloading
from vmamba.analysis.knn import knn
from vmamba.analysis.parallel_speed import parallel_speed
from vmamba.analysis.peers import peers
from vmamba.analysis.receptive_field import erf
from vmamba.analysis.saving_speed import saving_speed
from vmamba.analysis.scaling import scale
from vmamba.analysis.scene_pictures import scene_pictures
from vmamba.analysis.speed import throughput
from vmamba.analysis.tasks_speed import tasks_speed
from vmamba.analysis.tradeoff import tradeoff
from vmamba.analysis.waiting import waiting
from vmamba.errors import UserError
from vmamba.exporting.comparison import exports

ABSENT = dict(models=["absent"])  # they end there, were they to go on
COMMANDS = [
    (ablate, dict(configs=["absent.yaml"]), "ablation.json", "ablation.md"),
    (compare, dict(runs=["absent"]), "compare.json", "compare.md"),
    (curves, dict(runs=["absent"]), "curves.json"),
    (dataloading, dict(cfg="absent.yaml"), "dataloading.json", "dataloading.md"),
    (erf, ABSENT, "erf.json", "erf.md"),
    (exports, ABSENT, "exports.json", "exports.md"),
    (flops, ABSENT, "flops.json", "flops.md"),
    (knn, dict(run="absent"), "knn.json", "knn.md"),
    (parallel_speed, ABSENT, "gpus.json", "gpus.md"),
    (peers, ABSENT, "peers.json", "peers.md"),
    (saving_speed, dict(model="absent"), "saving.json"),
    (scale, ABSENT, "scale.json", "scale.md"),
    (scene_pictures, dict(detector="absent", segmenter="absent"), "scenes.json"),
    (tasks_speed, dict(task="detection", backbones=["absent"]), "detection.json", "detection.md"),
    (throughput, ABSENT, "throughput.json", "throughput.md"),
    (tradeoff, dict(docs="absent"), "tradeoff.json"),
    (waiting, dict(workers=[1], steps=2), "waiting.json"),
]
FOREIGN = ('{"mine": 1}', '[{"mine": 1}]', "[]", "# Mine\n", "| mine |\n| --: |\n| 1 |\n")


@pytest.mark.parametrize(
    ("command", "options", "names"), [(each, options, names) for each, options, *names in COMMANDS]
)
def test_a_foreign_file_stays(tmp_path, command, options, names):
    for name in names:
        path = tmp_path / name
        for text in FOREIGN:
            path.write_text(text)
            with pytest.raises(UserError, match=f"{name}' is there already and is no file of .*; remove it, or choose"):
                command(**options, output=str(tmp_path))
            assert path.read_text() == text
        path.unlink()


@pytest.mark.parametrize(
    ("command", "options", "page"),
    [
        (throughput, ABSENT, "throughput-gpu.md"),
        (tasks_speed, dict(task="detection", backbones=["absent"]), "detection-speed.md"),
        (exports, ABSENT, "export.md"),
    ],
)
def test_so_does_a_page_of_more_than_the_table(tmp_path, command, options, page):
    """Such as a page of docs/ that began as this command's, and has got chapters."""
    text = Path(__file__).parents[2].joinpath("docs", page).read_text()
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(UserError, match="page.md' is there already and is no file of this command"):
        command(**options, output=str(tmp_path / "out"), markdown=str(path))
    assert path.read_text() == text
