"""Models beside their peers: the best of the ways is taken, by name, and what a compiled model gives is checked."""

import json

import pytest
import torch
from torch import nn

from vmamba.analysis import speed
from vmamba.analysis.peers import best_of, peers
from vmamba.errors import UserError

PAGE = "# Speed\n\n<!-- table -->\nold\n<!-- end -->\nafter\n"


def timing(model, mode, batch, rate):
    return speed.Timing(model, 224, "bfloat16", mode, batch, rate, None, None, None, 1, 1.0)


def test_the_best_of_the_ways_beside_the_best_of_the_peers():
    ours, peer, other = "vmamba_tiny", "resnet18", "resnet34"
    timings = {
        "eager": [
            timing(ours, "forward", 1, 100.0),
            timing(ours, "forward", 128, 900.0),
            timing(ours, "train", 128, 300.0),
        ],
        "cudagraphs": [
            *(timing(ours, "forward", 1, 400.0), timing(ours, "train", 128, 290.0), timing(ours, "forward", 128, None)),
            *(timing(peer, "train", 128, 600.0), timing(other, "train", 128, 500.0), timing(peer, "forward", 1, 200.0)),
        ],
    }
    assert best_of(timings, [ours, peer]) == [
        {
            "model": ours,
            "forward (images/s)": "900 eager",
            "training (images/s)": "300 eager (0.50)",
            "one image (ms)": "2.50 cudagraphs (2.00)",
        },
        {
            "model": peer,
            "forward (images/s)": None,
            "training (images/s)": "600 cudagraphs",
            "one image (ms)": "5.00 cudagraphs",
        },
    ]


def test_it_runs_and_puts_its_table_into_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    small = dict(size=32, batch=2, dtype="float32", warm_up=1, repeats=1, device="cpu", output=str(tmp_path / "out"))
    rows = peers(models=["vmamba_digits", "resnet18"], ways=["eager"], page=str(page), **small)
    assert [row["model"] for row in rows] == ["vmamba_digits", "resnet18"]
    assert all("eager" in row[column] for row in rows for column in row if column != "model")
    text = page.read_text()
    assert text.startswith("# Speed\n\n<!-- table -->\n") and text.endswith("\n<!-- end -->\nafter\n")
    assert "| vmamba_digits | " in text and "old" not in text
    assert len(json.loads((tmp_path / "out" / "peers.json").read_text())["eager"]) == 6
    page.write_text("nothing")
    with pytest.raises(UserError, match="has no lines <!-- table --> and <!-- end -->"):
        peers(page=str(page), **small)
    with pytest.raises(UserError, match="cudagraphs needs a GPU"):
        peers(**small)


def test_a_compiled_model_that_gives_something_else_is_not_timed(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    monkeypatch.setattr(torch, "compile", lambda model, **options: other)
    more = dict(warm_up=1, repeats=1, compile="default", reference="a model", gmacs={"a model": 1})
    with pytest.raises(UserError, match=r"a model compiled \(default\) is .* away from what it gives as it is"):
        speed.compare({"a model": model}, speed.Case(2, "float32", "forward", 4), torch.device("cpu"), **more)
