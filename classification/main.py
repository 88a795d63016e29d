"""Train, evaluate (--eval) or time (--throughput) a classifier: python main.py --cfg configs/vmamba_tiny.yaml

Alone, under torchrun, under torch.distributed.launch or under srun; --help lists the flags.
"""

import sys

from vmamba.classification.engine import run
from vmamba.config import argument_parser, config_from_args
from vmamba.runtime.cli import exit_code

if __name__ == "__main__":
    args = argument_parser(__doc__).parse_args()
    sys.exit(exit_code(lambda: run(config_from_args(args))))
