"""analyze/average.py: means of weights by hand, and a file that the rest takes."""

from pathlib import Path

import pytest
import torch
import yaml

import vmamba
from vmamba.analysis.averaging import average
from vmamba.config import get_config
from vmamba.errors import UserError
from vmamba.runtime.task import open_task


@pytest.fixture(params=["configs/vmamba_digits.yaml", "configs/scenes_segmentation.yaml"])
def files(tmp_path, request):
    config = get_config(request.param, ["MODEL.OPTIONS.dims", 8])
    for number in range(3):
        torch.manual_seed(number)
        model = open_task(config).build_model()
        for name, buffer in model.named_buffers():
            if "num_batches" in name:
                buffer.fill_(number)
        content = {"model": model.state_dict(), "config": yaml.safe_load(config.dump())}
        torch.save(content, tmp_path / f"{number}.pth")
    return [str(tmp_path / f"{number}.pth") for number in range(3)]


def test_the_mean_is_a_checkpoint(files, tmp_path):
    mean = average(files, output=str(tmp_path / "mean.pth"))
    states = [torch.load(file, weights_only=True)["model"] for file in files]
    for name, weight in mean.items():
        if weight.is_floating_point():
            torch.testing.assert_close(weight, sum(state[name].double() for state in states).div(3).float())
        else:
            assert weight == 2
    model = vmamba.load_model(tmp_path / "mean.pth")
    assert all(torch.equal(weight, mean[name]) for name, weight in model.state_dict().items())


def test_nothing_but_an_average_is_written_over(files, tmp_path):
    for name, content in (("last.pth", torch.load(files[0]) | {"step": 1}), ("none.pth", 3)):
        torch.save(content, tmp_path / name)
    (tmp_path / "config.yaml").write_text("TASK: classification")
    for name in ("last.pth", "none.pth", "config.yaml"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"{name}' is there already and is no average of checkpoints; remove it"):
            average(files, output=str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "mean.pth").touch()
    for _ in range(2):
        average(files, output=str(tmp_path / "mean.pth"))


def test_what_cannot_be_averaged_is_a_sentence(files, tmp_path):
    with pytest.raises(UserError, match="an average needs two checkpoints at least; name more"):
        average(files[:1], output=str(tmp_path / "mean.pth"))
    same = Path(files[0]).parent / "." / ".." / Path(files[0]).parent.name / Path(files[0]).name
    with pytest.raises(UserError, match="is given twice, and would count twice; name each checkpoint once"):
        average([*files, str(same)], output=str(tmp_path / "mean.pth"))
    with pytest.raises(UserError, match="1.pth"):
        average(files, output=files[1])
    content = torch.load(files[1], weights_only=True)
    name = next(iter(content["model"]))
    shape = tuple(content["model"].pop(name).shape)
    torch.save(content, files[1])
    with pytest.raises(UserError) as error:
        average(files, output=str(tmp_path / "mean.pth"))
    assert f"{name} is nothing there and {shape} here; average checkpoints of one model" in str(error.value)
    assert not (tmp_path / "mean.pth").exists()
