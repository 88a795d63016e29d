"""A simulation of many processes that load their own batches and step together: how long all wait for the slowest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmamba.analysis.tables import check_json, markdown, write_json

_FIRST = 50  # steps left out, in which the loading processes get ahead
_SLOW = 20  # times as long takes a batch that the disk is slow for


def waiting(
    *,
    processes: Sequence[int] = (1, 8, 64, 512),
    workers: Sequence[int] = (10, 12, 16, 20),
    needed: int = 10,
    ahead: int = 2,
    spread: float = 0.3,
    slow: float = 0.0,
    steps: int = 300,
    output: str = "output/waiting",
) -> list[dict[str, str]]:
    """Print and write the share of time that a step waits for data, by processes and loading workers of each.

    Args:
        needed: workers of a process that load as fast as it trains: cores as a run's log names them.
        ahead: batches that each worker is ahead by (DATA.PREFETCH_FACTOR).
        spread: of a batch's time, of its logarithm.
        slow: share of batches that take twenty times as long.
        output: the folder that gets waiting.json.
    """
    check_json(Path(output, "waiting.json"), "workers")
    rows = []
    for count in workers:
        shares = {
            f"{n} processes": f"{share_waited(n, count, needed, ahead, spread, slow, steps):.1%}" for n in processes
        }
        rows.append({"workers": f"{count} ({count / needed:.1f} of those needed)", **shares})
    print(markdown(rows))
    write_json(Path(output, "waiting.json"), rows)
    return rows


def share_waited(
    processes: int, workers: int, needed: int, ahead: int = 2, spread: float = 0.3, slow: float = 0.0, steps: int = 300
) -> float:
    """Of the time of all, a device's step being 1: a batch takes `needed` on average, and its worker begins the next
    when it has one, but no more than `ahead` each that are not used."""
    random = np.random.default_rng(0)
    work = needed * random.lognormal(-(spread**2) / 2, spread, (processes, steps))
    work *= np.where(random.random((processes, steps)) < slow, _SLOW, 1)
    free = np.zeros((processes, workers))  # when each worker has nothing to do
    starts = np.zeros(steps + 1)
    for step in range(steps):
        worker, earlier = step % workers, step - workers * ahead
        begin = np.maximum(free[:, worker], starts[earlier] if earlier >= 0 else 0)
        free[:, worker] = begin + work[:, step]
        ready = free[:, worker].max()  # for the slowest process all wait
        starts[step] = max(starts[step - 1] + 1 if step else 0, ready)
    trained = steps - 1 - min(_FIRST, steps // 2)
    return float(1 - trained / (starts[steps - 1] - starts[steps - 1 - trained]))
