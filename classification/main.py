"""Opens main.py: python classification/main.py --cfg configs/vmamba_tiny.yaml"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "main.py"), run_name="__main__")
