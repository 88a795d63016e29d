"""Opens main.py: python segmentation/main.py --cfg configs/scenes_segmentation.yaml"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "main.py"), run_name="__main__")
