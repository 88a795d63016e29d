"""Opens classification/main.py: python main.py --cfg configs/vmamba_digits.yaml"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent / "classification" / "main.py"), run_name="__main__")
