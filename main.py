"""Train, evaluate (--eval) or time (--throughput) a model of any task: python main.py --cfg configs/vmamba_tiny.yaml

Alone, under torchrun, under torch.distributed.launch or under srun; --help lists the flags.
"""

import sys
from pathlib import Path

# This checkout's packages, whatever else is called so.
sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from vmamba.config import argument_parser, config_from_args
from vmamba.runtime.cli import exit_code
from vmamba.runtime.trainer import run

if __name__ == "__main__":
    args = argument_parser(__doc__).parse_args()
    sys.exit(exit_code(lambda: run(config_from_args(args))))
