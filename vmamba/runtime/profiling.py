"""PyTorch's profiler over a few steps of a run."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from vmamba.files import make_folder, write_text
from vmamba.text import counted

logger = logging.getLogger("vmamba")
BEFORE = 10  # steps of a start that are not recorded: the first ones compile and fill caches


class Profile:
    """Records `steps` steps of this process behind the first `BEFORE`, into profile.json, which chrome://tracing and
    Perfetto open, and profile.txt, the operators that took longest; 0: nothing."""

    def __init__(self, steps: int, folder: Path):
        self.folder, self.profiler = folder, None
        if steps:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *gpu],
                schedule=schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self.profiler.start()

    def step(self) -> None:
        """One more step is done."""
        if self.profiler:
            self.profiler.step()

    def close(self) -> None:
        if not self.profiler:
            return
        self.profiler.stop()
        done = self.profiler.step_num
        if done <= BEFORE:
            logger.warning(
                f"there is no profile: PROFILE records steps behind the first {BEFORE} of a start, and this one had "
                f"{done}; train longer"
            )
        self.profiler = None

    def _write(self, found: profile) -> None:
        """What cannot be written is a warning and no end of the run."""
        if found.step_num <= BEFORE:
            return
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            make_folder(self.folder)
            found.export_chrome_trace(str(self.folder / "profile.json"))
            write_text(self.folder / "profile.txt", found.key_averages().table(sort_by=by, row_limit=40))
            logger.info(
                f"the profile of {counted(found.step_num - BEFORE, 'step')} is in {self.folder / 'profile.json'}"
            )
        except Exception as error:
            logger.warning(f"cannot write a profile into '{self.folder}': {error}; the run goes on")
