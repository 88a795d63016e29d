"""On a GPU neither a step of training nor a batch of an evaluation waits for the GPU."""

import logging
from itertools import islice

import pytest
import torch

from vmamba.config import get_config
from vmamba.runtime.distributed import World
from vmamba.runtime.evaluation import evaluate
from vmamba.runtime.feed import Feed
from vmamba.runtime.plan import build_plan
from vmamba.runtime.run import Run
from vmamba.runtime.start import build_state
from vmamba.runtime.step import OptimizerStep, parallelise
from vmamba.runtime.task import open_task

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_waiting():
    def forbid(forbidden):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")

    yield forbid
    forbid(False)


@pytest.mark.parametrize("options", [
    (),
    ("TRAIN.COMPILE", "cudagraphs"),
    ("AMP.DTYPE", "float16"),
    ("TRAIN.LOSS", "bce", "TRAIN.CLASS_WEIGHTS", "balanced"),
])  # fmt: skip
def test_no_step_and_no_batch_waits_for_the_gpu(no_waiting, tmp_path, monkeypatch, options):
    mixed = ("AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.5", "TRAIN.EMA.ENABLE", "true")
    base = ("DEVICE", "cuda", "AMP.ENABLE", "true", "OUTPUT", str(tmp_path), *mixed)
    config = get_config("configs/vmamba_digits.yaml", [*base, *options])
    world = World(0, 1, 0, torch.device("cuda", 0))
    run = Run(config, open_task(config), world, logging.getLogger("vmamba"))
    loader, held_out = run.task.train_loader(world), run.task.eval_loader(world)
    model = run.task.build_model().to(world.device)
    state = build_state(run, model, build_plan(config, loader.steps_per_epoch))
    step = OptimizerStep(config, world, parallelise(model, config, world), run.task.loss)
    ready = Feed(loader, world.device, loader.finish)
    reports = [report for batch in islice(ready, 5) for report in step(state, [batch])]
    no_waiting(True)
    reports += [report for batch in islice(ready, 5) for report in step(state, [batch])]
    assert len(reports) == 9
    no_waiting(False)
    step.settle(state)
    (meter,) = evaluate(run, [model], held_out)
    add, seen = type(meter).add, []

    def watched(self, *args):
        no_waiting(True)
        add(self, *args)
        torch.cuda.set_sync_debug_mode("default")
        seen.append(args)

    monkeypatch.setattr(type(meter), "add", watched)
    evaluate(run, [model], held_out)
    assert len(seen) == len(held_out)
