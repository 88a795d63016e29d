"""What saving costs training: how much longer its steps take, blocking and in the background."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vmamba.analysis.on_noise import Training
from vmamba.analysis.tables import check_json, markdown, write_json
from vmamba.analysis.zoo import choose_device
from vmamba.files import make_folder
from vmamba.runtime.checkpoint import LAST, save_checkpoint
from vmamba.runtime.distributed import World
from vmamba.runtime.saving import Saver


@dataclass(frozen=True)
class Stalls:
    """In seconds; a stall is by how much a save lengthens the steps around it."""

    megabytes: float  # of the file
    step: float  # without a save
    blocking: float
    first: float  # in the background, with the memory for the copy to be had
    background: float

    @property
    def share(self) -> float:
        return self.background / self.blocking


def saving_speed(
    *,
    model: str = "vmamba_base",
    size: int = 224,
    batch: int = 64,
    repeats: int = 3,
    folder: str = "",
    device: str = "auto",
    output: str = "output/saving",
) -> Stalls:
    """Save the state of a model in training with optimiser and EMA, and print and write what that costs.

    Args:
        model: of `vmamba.list_models()`.
        folder: where is saved to; "": one for temporary files.
        output: the folder that gets saving.json.

    Raises UserError for what does not fit together.
    """
    check_json(Path(output, "saving.json"), "model", "batch", "blocking")
    settings = ["MODEL.NAME", model, "DATA.IMG_SIZE", size, "DATA.BATCH_SIZE", batch, "TRAIN.EMA.ENABLE", True]
    world = World(0, 1, 0, choose_device(device))
    if folder:
        make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder or None) as place:
        stalls = _measure(Training(settings, world), Path(place), repeats)
    told = {"blocking": stalls.blocking, "background, the first": stalls.first, "background": stalls.background}
    rows = [
        {"save": kind, "stall, s": f"{seconds:.3f}", "of blocking": f"{seconds / stalls.blocking:.1%}"}
        for kind, seconds in told.items()
    ]
    print(f"{model}, batch {batch}, {stalls.megabytes:.0f} MB a save, {stalls.step:.3f} s a step")
    print(markdown(rows))
    write_json(Path(output, "saving.json"), {"model": model, "batch": batch, **asdict(stalls)})
    return stalls


def _measure(training: Training, folder: Path, repeats: int) -> Stalls:
    path, saver = folder / LAST, Saver(folder)
    for _ in range(3):
        training.step()

    def took(save: Callable[[], object], going_on: Callable[[int], bool]) -> tuple[float, int]:
        training.wait()
        start, steps = time.perf_counter(), 0
        save()
        while steps == 0 or going_on(steps):
            training.step()
            training.wait()
            steps += 1
        return time.perf_counter() - start, steps

    seconds = took(lambda: None, lambda steps: steps < 10)[0] / 10

    def stall(save: Callable[[], object], going_on: Callable[[int], bool]) -> float:
        whole, steps = took(save, going_on)
        return whole - steps * seconds

    def blocking() -> float:
        return stall(lambda: save_checkpoint(training.state.state_dict(), path), lambda steps: False)

    def background() -> float:
        found = stall(lambda: saver.start(training.state, [LAST]), lambda steps: saver.busy)
        saver.wait()
        return found

    first = background()
    pairs = [(blocking(), background()) for _ in range(repeats)]  # in turns
    told = [statistics.median(values) for values in zip(*pairs, strict=True)]
    return Stalls(path.stat().st_size / 1e6, seconds, told[0], first, told[1])
