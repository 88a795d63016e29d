"""Timing models side by side: who takes turns, what counts, what is written.  No time itself is tested."""

import json

import pytest
import torch
from torch import nn

from vmamba.analysis import speed
from vmamba.errors import UserError

SETTINGS = dict(
    models=["vmamba_digits", "resnet18"],
    sizes=[32, 64],
    batch_sizes=[2],
    dtypes=["float32"],
    modes=["forward", "train"],
    relative_to="resnet18",
    compile=None,
    channels_last=False,
    backend="reference",
    warm_up=1,
    repeats=2,
    device="cpu",
    markdown=None,
)


def test_every_model_is_timed_in_every_case(tmp_path):
    page = tmp_path / "page.md"
    timings = speed.throughput(**SETTINGS | dict(output=str(tmp_path), markdown=str(page)))
    cases = [(timing.model, timing.size, timing.mode, timing.batch) for timing in timings]
    assert cases == [
        (model, size, mode, batch)
        for size in (32, 64)
        for mode, batch in (("forward", 1), ("forward", 2), ("train", 2))
        for model in ("vmamba_digits", "resnet18")
    ]
    for ours, other in zip(timings[::2], timings[1::2], strict=True):
        assert other.ratio == 1
        assert ours.ratio == pytest.approx(ours.images_per_second / other.images_per_second)
        assert ours.images_per_second == pytest.approx(1000 * ours.batch / ours.milliseconds)
    assert timings[1].parameters == 11_689_512
    assert timings[0].gmacs == timings[4].gmacs < timings[6].gmacs
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert len(written["timings"]) == len(timings)
    assert written["settings"]["relative_to"] == "resnet18"
    assert page.read_text() == (tmp_path / "throughput.md").read_text()
    assert page.read_text().count("| resnet18 |") == 6
    assert written["settings"]["optimizer"] == "AdamW"
    assert written["settings"]["date"] in page.read_text()
    for kind in ("pdf", "png"):
        assert (tmp_path / f"throughput.{kind}").stat().st_size > 1000
    with pytest.raises(UserError, match="absent"):  # which is looked for: its own files may be replaced
        speed.throughput(**SETTINGS | dict(models=["absent"], relative_to=None, output=str(tmp_path), markdown=page))


def test_the_models_take_turns_and_the_median_counts(monkeypatch):
    turns = []
    models = {name: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)) for name in ("first", "second")}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: turns.append(name))
    monkeypatch.setattr(speed, "IN_A_ROW", 2)
    times = iter([1.0, 9.0, 2.0, 2.0, 3.0, 8.0])  # of first, first, second, second, first, second

    def elapsed(step, device):
        step()
        return next(times)

    monkeypatch.setattr(speed, "elapsed", elapsed)
    case = speed.Case(2, "float32", "forward", 4)
    first, second = speed.compare(
        models,
        case,
        torch.device("cpu"),
        warm_up=2,
        repeats=3,
        compile=None,
        reference="first",
        gmacs={"first": 1, "second": 2},
    )
    assert turns == ["first"] * 2 + ["second"] * 2 + ["first", "first", "second", "second", "first", "second"]
    assert (first.milliseconds, second.milliseconds) == (3000, 2000)
    assert (first.ratio, second.ratio) == (1, 1.5)
    assert (first.gmacs, second.gmacs) == (1, 2)


def test_every_case_is_compiled_for_its_own_batch(monkeypatch):
    class Model(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1))

    variables = []

    def backend(graph, inputs):
        variables.append([value for value in inputs if isinstance(value, torch.SymInt)])
        return graph.forward

    monkeypatch.setattr(speed, "compile_options", lambda model, mode: {"backend": backend})
    models = {"only": Model(12, 2)}
    for batch in (2, 3):
        speed.compare(
            models,
            speed.Case(2, "float32", "train", batch),
            torch.device("cpu"),
            warm_up=1,
            repeats=1,
            compile="default",
            reference="only",
            gmacs={"only": 1},
        )
    assert variables == [[], []]


def test_a_turn_that_is_queued_is_waited_for_at_its_end(monkeypatch):
    done, waited = [], []

    def elapsed(work, device):
        work()
        waited.append(list(done))
        return float(len(waited))

    monkeypatch.setattr(speed, "elapsed", elapsed)
    monkeypatch.setattr(speed, "IN_A_ROW", 2)
    steps = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    seconds = speed.take_turns(steps, 3, torch.device("cpu"), queued=True)
    assert waited == [["a"] * 2, ["a", "a", "b", "b"], ["a", "a", "b", "b", "a"], ["a", "a", "b", "b", "a", "b"]]
    assert seconds == {"a": (1 / 2 + 3) / 2, "b": (2 / 2 + 4) / 2}
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [speed.waits_at_the_end(*case) for case in ((gpu, 128), (gpu, 1), (cpu, 128))] == [True, False, False]


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_are_the_images_and_the_weights(channels_last, monkeypatch, tmp_path):
    seen = []

    def peek(work, model, device):
        model.conv1.register_forward_hook(lambda module, images, _: seen.extend([images[0], module.weight]))
        work()

    monkeypatch.setattr(speed, "peak_memory_mb", peek)
    settings = dict(models=["resnet18"], modes=["train"], sizes=[64], relative_to=None, repeats=1)
    speed.throughput(**SETTINGS | settings | dict(channels_last=channels_last, output=str(tmp_path)))
    assert len(seen) >= 4
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) == channels_last for tensor in seen)
    layout = "channels-last images and weights" if channels_last else "PyTorch's default layout"
    assert f", {layout}, " in (tmp_path / "throughput.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_what_its_mode_says(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    before = model[1].weight.clone()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    speed.build_step(model, speed.Case(2, dtype, "forward", 4), 4, torch.device("cpu"))()
    assert not seen[0].requires_grad
    assert torch.equal(model[1].weight, before)
    speed.build_step(model, speed.Case(2, dtype, "train", 4), 4, torch.device("cpu"))()
    assert seen[0].dtype == seen[1].dtype == speed.DTYPES[dtype]
    assert not torch.equal(model[1].weight, before)


def test_what_does_not_fit_has_no_time(monkeypatch):
    def full(work, model, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(speed, "peak_memory_mb", full)
    models = {"only": nn.Sequential(nn.Flatten(), nn.Linear(12, 2))}
    case = speed.Case(2, "float32", "forward", 4)
    (timing,) = speed.compare(
        models, case, torch.device("cpu"), warm_up=1, repeats=1, compile=None, reference="only", gmacs={"only": 1}
    )
    assert timing.images_per_second is timing.milliseconds is timing.ratio is None


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"models": ["resnt18"]}, "did you mean 'resnet18'"),
        ({"relative_to": "resnet50"}, "model in --relative-to 'resnet50'"),
        ({"models": ["resnet18.nope"]}, "unknown model 'resnet18.nope'; did you mean 'resnet18"),
        ({"models": ["vmamba_tiny.pth"]}, "unknown model 'vmamba_tiny.pth'; did you mean 'vmamba_tiny"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"compile": "cudagraphs"}, "--compile cudagraphs needs a GPU, and this runs on cpu; leave it out"),
        ({"device": "meta"}, "--device meta holds no numbers to compute with; use cpu"),
        ({"device": "vulkan"}, "--device vulkan is not to be had .[^\n]{,100}; use cpu"),
        ({"device": "hpu"}, r"--device hpu is not to be had \([^\n]+\); use cpu"),
        (
            {"models": ["resnet18"], "sizes": [32], "modes": ["train"], "batch_sizes": [1]},
            r"resnet18 cannot train with batches of 1 image of 32 pixels \(Expected more than 1 value .*\); give other",
        ),
    ],
)
def test_what_the_user_can_mend(changed, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        speed.throughput(**SETTINGS | dict(output=str(tmp_path), relative_to=None) | changed)
