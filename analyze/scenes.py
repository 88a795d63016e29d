"""What a detector and a segmenter trained on scenes of digits see in scenes held out, beside what is there.

python analyze/scenes.py --detector output/scenes_detection/default/best.pth --scenes 0 1 2 3
"""

from _door import Parser, share, whole

from vmamba.analysis.scene_pictures import scene_pictures


def parser() -> Parser:
    parser = Parser(scene_pictures, __doc__)
    parser.flag("--detector", metavar="FILE", help="a checkpoint of configs/scenes_detection.yaml")
    parser.flag("--segmenter", metavar="FILE", help="one of configs/scenes_segmentation.yaml")
    parser.flag("--scenes", type=whole(0), nargs="+", metavar="NUMBER", help="which of those held out")
    parser.flag("--score", type=share, help="least score of a detection in the picture")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoints'")
    parser.flag("--device")
    parser.flag("--output")
    return parser


if __name__ == "__main__":
    parser().run()
