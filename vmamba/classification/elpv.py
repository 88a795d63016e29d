"""Photographs of solar cells by electroluminescence, of the package elpv-dataset (Buerhop-Lutz and others, EU PVSEC
2018, doi 10.4229/35thEUPVSEC20182018-5CV.3.15; CC BY-NC-SA 4.0): 2,624 cells of 44 modules, 300 x 300 pixels, gray."""

import random
from importlib.util import find_spec
from pathlib import Path

from vmamba.errors import UserError
from vmamba.files import read_text

GRADES = ("intact", "perhaps damaged", "probably damaged", "damaged")  # chances of damage 0, 1/3, 2/3 and 1
HELD_OUT = (
    0.25  # of each grade of each kind of cell, as Deitsch and others held out (doi 10.1016/j.solener.2019.02.067)
)


def read_cells(training: bool) -> list[tuple[str, int]]:
    """(file, grade) of the images to train on, or of those held out: always the same, whatever the seed.

    The package is found, not imported: its own function reads all images at once.
    Raises UserError where it is not installed.
    """
    package = find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise UserError("DATA.DATASET is elpv, whose images come with a package; install it: pip install elpv-dataset")
    folder = Path(package.submodule_search_locations[0], "data")
    groups: dict[tuple[str, int], list[str]] = {}  # by kind and grade
    for line in read_text(folder / "labels.csv").splitlines():
        name, chance, kind = line.split()
        groups.setdefault((kind, round(3 * float(chance))), []).append(name)
    cells = []
    for group, ((_, grade), names) in enumerate(sorted(groups.items())):
        held_out = {*random.Random(group).sample(sorted(names), round(HELD_OUT * len(names)))}
        cells += [(str(folder / name), grade) for name in sorted(names) if (name in held_out) is not training]
    return cells
