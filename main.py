"""Train, evaluate (--eval) or time (--throughput) a model of any task: python main.py --cfg configs/vmamba_tiny.yaml

Alone, under torchrun, under torch.distributed.launch or under srun; --help lists the flags.
"""

import sys
from pathlib import Path

# This checkout's packages, whatever else is called so.
sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from vmamba.runtime.__main__ import main

if __name__ == "__main__":
    main(__doc__)
