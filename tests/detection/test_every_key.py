"""Every key that detection adds has an effect that can be seen: something of a run differs where the key does.

That the common keys have one is shown by a run of classification, which the same trainer does.
"""

import pytest

from vmamba.config import output_folder
from vmamba.config.keys import COMMON
from vmamba.detection import keys
from vmamba.errors import UserError
from vmamba.runtime.trainer import run

from ..classification.tiny import ROOT, metrics, saved
from .tiny import SPLITS, tiny_config

CROP = ("AUG.CROP", 1.0, "AUG.CROP_SHORT_SIDES", "[60]", "AUG.CROP_SIDES", "[30, 50]")
SCENES = ("DATA.DATASET", "scenes", "MODEL.NUM_CLASSES", 10, "DATA.SCENES", "[2, 1]", "DATA.SCENE_SIDE", 64)
# key -> another value than TINY's, and what else has to be set for it to count
CHANGED = {
    "DATA.DATASET": ("scenes",),
    "DATA.TRAIN_IMAGES": (SPLITS["val"][0],),
    "DATA.TRAIN_ANNOTATIONS": (SPLITS["val"][1], "DATA.TRAIN_IMAGES", SPLITS["val"][0]),
    "DATA.VAL_IMAGES": (SPLITS["train"][0],),
    "DATA.VAL_ANNOTATIONS": (SPLITS["train"][1], "DATA.VAL_IMAGES", SPLITS["train"][0]),
    "DATA.SCALE": ([40, 64],),
    "DATA.DIVISOR": (8,),
    "DATA.MOST_OBJECTS": (1, "TRAIN.STEPS", 3),
    "DATA.LEAST_SIDE": (41,),
    "DATA.GROUP_BY_ASPECT": (False,),
    "DATA.SCENES": ([3, 1], *SCENES),
    "DATA.SCENE_SIDE": (56, *SCENES),
    "MODEL.NUM_CLASSES": (4,),
    "MODEL.CHANNELS": (10,),
    "MODEL.HIDDEN": (10,),
    "MODEL.RPN_SAMPLES": (4,),
    "MODEL.SAMPLES": (4,),
    "MODEL.PROPOSALS": ([3, 20],),
    "AUG.HFLIP": (1.0,),
    "AUG.SHORT_SIDES": ([40],),
    "AUG.CROP": (1.0, *CROP[2:]),
    "AUG.CROP_SHORT_SIDES": ([30], *CROP),
    "AUG.CROP_SIDES": ([30, 31], *CROP),
    "TEST.SCORE": (0.9,),
    "TEST.NMS": (0.01,),
    "TEST.MOST": (2,),
}
ELSEWHERE = {  # keys whose effect another test shows
    "MODEL.DETECTOR": "test_an_unknown_detector_names_those_there_are",
    "TEST.SAVE_PREDICTIONS": "test_saved_predictions_are_what_was_evaluated",
}


def test_no_key_is_left_out():
    own = {each.name for each in keys.KEYS}
    assert CHANGED.keys() | ELSEWHERE.keys() == own and not CHANGED.keys() & ELSEWHERE.keys()
    assert own & {each.name for each in COMMON} == {"DATA.DATASET", "MODEL.NUM_CLASSES"}  # with other defaults
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "detection").glob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in tests] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


def traces(folder, output, *opts):
    """What can be seen of a run with `opts` in the folder `output`: of one step, and an evaluation."""
    try:
        steps = ("TRAIN.STEPS", 1, "TRAIN.EPOCHS", 0, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EMA.ENABLE", False)
        config = tiny_config(folder, *steps, "DATA.BATCH_SIZE", 2, "OUTPUT", folder / output, *opts)
        results = run(config)
    except UserError as error:
        return str(error).replace(output, "")
    assert output_folder(config).exists()
    return results, metrics(config), [weight.sum().item() for weight in saved(config)["model"].values()]


@pytest.fixture(scope="module")
def before(folder):
    """The traces without the change, made once for all that share a start."""
    known = {}

    def look(both):
        if str(both) not in known:
            known[str(both)] = traces(folder, f"before{len(known)}", *both)
        return known[str(both)]

    return look


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_has_an_effect(key, folder, before):
    value, *both = CHANGED[key]
    assert traces(folder, key, *both, key, value) != before(both)


def test_without_a_change_nothing_differs(folder, before):
    assert traces(folder, "again") == before([])
