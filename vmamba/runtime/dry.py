"""A training tried out (DRY_RUN): a few steps, a few batches of evaluation and a save, of which nothing is left."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from yacs.config import CfgNode

from vmamba.config import changed, output_folder
from vmamba.errors import UserError
from vmamba.files import cannot_write, make_folder
from vmamba.runtime.distributed import World, on_main
from vmamba.runtime.lock import is_left
from vmamba.runtime.plan import Plan
from vmamba.runtime.records import check_online
from vmamba.runtime.stop import Stopped

STEPS = 2
_NAME = ".dry-run-"  # of its folder, which a random part follows
_NOTHING_KEPT = "nothing of a dry run is kept, and the same command begins anew"


@contextmanager
def tried(config: CfgNode, world: World) -> Iterator[CfgNode]:
    """`config` as it is; of a DRY_RUN with a folder of its own beside the run's, which is removed at the end with what
    was made for it, and without the project of Weights & Biases.  All processes call it."""
    if not config.DRY_RUN:
        yield config
        return
    if config.EVAL_MODE or config.THROUGHPUT_MODE:
        raise UserError("--dry-run tries a training, and --eval and --throughput are none; leave one out")
    check_online(config)
    beside = output_folder(config).parent
    new = [place for place in (beside, *beside.parents) if not place.exists()]
    folder = on_main(lambda: _make_folder(beside))
    try:
        yield changed(config, ["TAG", folder.name, "WANDB", ""])
    except Stopped as stop:
        raise Stopped(stop.signum, without=_NOTHING_KEPT) from None  # what it saved goes too
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_NOTHING_KEPT) from None
    finally:
        if world.main:
            shutil.rmtree(folder, ignore_errors=True)
            for place in new:
                with suppress(OSError):  # something else has come into it
                    place.rmdir()


def _make_folder(beside: Path) -> Path:
    """A new one; those that killed dry runs left are removed."""
    make_folder(beside)
    for folder in beside.glob(f"{_NAME}*"):
        if is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
    try:
        return Path(tempfile.mkdtemp(prefix=_NAME, dir=beside))
    except OSError as error:
        raise cannot_write(beside, error) from error


def shortened(plan: Plan, step: int) -> Plan:
    """`plan` with the run's end a few steps behind `step` completed ones; the rates are those of the whole run."""
    return replace(plan, steps=min(plan.steps, step + STEPS))


def describe(folder: Path, trained: bool) -> str:
    """What a dry run has done, while its folder is there."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not trained:
        return (
            "the dry run had nothing to train and went through evaluation alone: a step and a save are not tried; its "
            f"{size / 1e6:.1f} MB are removed"
        )
    return f"the dry run went through, evaluation and saving too; its {size / 1e6:.1f} MB are removed"
