"""What every part of a run needs to know, and how it saves."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from vmamba.config import output_folder
from vmamba.runtime.checkpoint import LAST, SHARDED
from vmamba.runtime.distributed import World, on_main, share_buffers
from vmamba.runtime.history import History
from vmamba.runtime.saving import Saver
from vmamba.runtime.sharding import is_sharded
from vmamba.runtime.state import TrainState
from vmamba.runtime.stop import Stopped, StopRequest
from vmamba.runtime.task import Task


@dataclass(frozen=True)
class Run:
    config: CfgNode
    task: Task
    world: World
    logger: logging.Logger
    request: StopRequest = field(default_factory=StopRequest)
    history: History = field(default_factory=lambda: History(None))

    @property
    def folder(self) -> Path:
        return output_folder(self.config)

    @cached_property
    def saver(self) -> Saver:
        return Saver(self.folder, self.config.KEEP_LAST, self.config.KEEP_BEST)

    def save(self, state: TrainState, *names: str) -> None:
        """Write `state` into the run's folder, in the background but for one in shares; all processes call it.

        Raises UserError where what was to be saved before could not be written.
        """
        state.gather_random_states()
        if not is_sharded(state.model):
            return on_main(lambda: self.saver.start(state, names))
        from vmamba.runtime.shares import save_folder

        share_buffers(state.model)
        for name in names:
            keep = self.config.KEEP_LAST if name == LAST else 1
            save_folder(state.state_dict(), (self.folder / name).with_suffix(SHARDED), keep)

    def finish_saving(self) -> None:
        """Wait until all is written; all processes call it.  Raises UserError where it could not be."""
        on_main(lambda: self.saver.wait())

    def stop(self, state: TrainState) -> None:
        """Raises Stopped, the state being saved; all processes call it."""
        self.save(state, LAST)
        self.finish_saving()
        saved = self.folder / LAST
        raise Stopped(self.request.agreed_signal(), saved.with_suffix(SHARDED) if is_sharded(state.model) else saved)
