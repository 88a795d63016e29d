"""How good a model's features are without a head: DINO's weighted k-NN of the held-out images.

python analyze/knn.py output/vmamba_digits/default
python analyze/knn.py --cfg configs/vmamba_digits.yaml
"""

from _door import Parser, above_zero, whole

from vmamba.analysis.knn import knn


def parser() -> Parser:
    parser = Parser(knn, __doc__)
    parser.flag("run", nargs="?", metavar="RUN", help="a run's folder, or a checkpoint (default: the model of --cfg)")
    parser.flag("--cfg", metavar="FILE", help="model and data (default: the run's own)")
    parser.flag("--opts", nargs="+", metavar=("KEY", "VALUE"), help="set any key of the config (default: none)")
    parser.flag("--k", type=whole(1), nargs="+", metavar="K", help="numbers of neighbours")
    parser.flag("--temperature", type=above_zero, metavar="T", help="of the neighbours' weights")
    parser.flag("--weights", choices=("auto", "ema", "model"), help="which of the checkpoint's")
    parser.flag("--device")
    parser.flag("--output")
    parser.imports()
    return parser


if __name__ == "__main__":
    parser().run()
