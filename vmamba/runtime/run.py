"""What every part of a run needs to know, and how it saves."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from yacs.config import CfgNode

from vmamba.config import output_folder
from vmamba.runtime.checkpoint import LAST, save_checkpoint
from vmamba.runtime.distributed import World, on_main
from vmamba.runtime.history import History
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

    def save(self, state: TrainState, name: str) -> None:
        """Write `state` into the run's folder; all processes call it."""
        state.gather_random_states()
        on_main(lambda: save_checkpoint(state, self.folder / name))

    def stop(self, state: TrainState) -> None:
        """Raises Stopped, the state being saved; all processes call it."""
        self.save(state, LAST)
        raise Stopped(self.request.agreed_signal(), self.folder / LAST)
