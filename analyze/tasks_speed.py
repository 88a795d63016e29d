"""Time Mask R-CNN or UperNet on several backbones beside each other, and on images of many sizes.

python analyze/tasks_speed.py --task segmentation --image-size 512 512 --batch 8
"""

from _door import Parser, side, whole

from vmamba.analysis.speed import DTYPES
from vmamba.analysis.tasks_speed import MODES, TASKS, tasks_speed
from vmamba.models.compilation import COMPILE_MODES


def parser() -> Parser:
    parser = Parser(tasks_speed, __doc__)
    parser.flag("--task", choices=TASKS, help="detection (Mask R-CNN) or segmentation (UperNet)")
    parser.flag("--backbones", nargs="+", metavar="MODEL", help="ours, timm/..., or torchvision: its own Mask R-CNN")
    parser.flag("--image-size", "size", type=side, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images")
    parser.flag("--batch", type=whole(1), metavar="IMAGES", help="images a step")
    parser.flag("--dtype", choices=tuple(DTYPES), help="of autocast")
    parser.flag("--modes", nargs="+", choices=MODES, help="what is timed")
    parser.flag("--warm-up", type=whole(0), metavar="STEPS", help="steps before those that count")
    parser.flag("--repeats", type=whole(1), metavar="STEPS", help="steps of which the median counts")
    parser.flag(
        "--random-sizes", type=whole(0), metavar="STEPS", help="steps of training, each at another size (default: 0)"
    )
    parser.flag("--compile", choices=tuple(COMPILE_MODES), help="torch.compile every model (default: not)")
    parser.flag("--deterministic", action="store_true", help="with PyTorch's deterministic algorithms")
    parser.flag("--device")
    parser.flag("--output")
    parser.flag("--markdown", metavar="FILE", help="one more file for the table (default: none)")
    return parser


if __name__ == "__main__":
    parser().run()
