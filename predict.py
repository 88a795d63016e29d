"""`vmamba predict` of this checkout: python predict.py --help"""

import sys
from pathlib import Path

# This checkout's packages, whatever else is called so.
sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from vmamba.commands.predict import parser

if __name__ == "__main__":
    parser().run()
