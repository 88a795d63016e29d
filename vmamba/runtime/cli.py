"""What every door does around its one call: errors become a sentence, and the process an exit code."""

import os
import sys
from collections.abc import Callable

from vmamba.errors import UserError
from vmamba.runtime.stop import Stopped
from vmamba.runtime.streams import tolerant_streams
from vmamba_kernels import BackendError


def exit_code(main: Callable[[], object], resumes: bool = False) -> int:
    """Call `main`: 0 at its end, 1 and one sentence on stderr for what the user can mend, 128 + signal when a signal
    stopped it.  Anything else is a bug and keeps its traceback.

    Args:
        resumes: whether the same command goes on where it was interrupted.
    """
    with tolerant_streams():
        try:
            main()
        except (UserError, BackendError) as error:
            _say(f"error: {error}")
            return 1
        except Stopped as stop:
            _say(str(stop))
            return 128 + stop.signum
        except KeyboardInterrupt as interrupt:
            goes_on = "goes on from what is saved" if resumes else "begins anew"
            _say(f"interrupted; {str(interrupt) or f'the same command {goes_on}'}")
            return 130
        return 0


def _say(sentence: str) -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    print(sentence if rank == "0" else f"[rank {rank}] {sentence}", file=sys.stderr, flush=True)
