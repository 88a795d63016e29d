"""Every key of segmentation has an effect that can be seen: something of a run, or of what it reads, differs."""

import pytest

from vmamba.config.keys import COMMON, keys_of
from vmamba.errors import UserError
from vmamba.runtime.trainer import run

from .tiny import ROOT, differences, metrics, saved, tiny_config

SCENES = ("DATA.DATASET", "scenes", "MODEL.NUM_CLASSES", 11, "DATA.SCENES", [8, 2])
SLIDE = ("TEST.MODE", "slide", "DATA.CROP_SIZE", 16, "TEST.STRIDE", 16)

# key -> another value than TINY's, and what else has to be set for it to count
CHANGED = {
    "DATA.DATASET": ("ade20k",),
    "DATA.TRAIN_IMAGES": ("images/validation", "DATA.TRAIN_MAPS", "annotations/validation"),
    "DATA.TRAIN_MAPS": ("annotations/validation",),
    "DATA.VAL_IMAGES": ("images/training", "DATA.VAL_MAPS", "annotations/training"),
    "DATA.VAL_MAPS": ("annotations/nowhere",),
    "DATA.IGNORE_INDEX": (2,),
    "DATA.ZERO_IS_IGNORED": (True,),
    "DATA.CROP_SIZE": (40,),
    "DATA.SCALE": ([40, 64],),
    "DATA.SCENES": ([12, 2], *SCENES),
    "DATA.DIGITS": (1, *SCENES),
    "DATA.DIGIT_SIZES": ([0.4, 0.6], *SCENES),
    "DATA.CONTRAST": (True, *SCENES),
    "MODEL.SEGMENTER": ("fcn",),
    "MODEL.NUM_CLASSES": (6,),
    "MODEL.IN_CHANS": (1,),
    "MODEL.CHANNELS": (12,),
    "MODEL.AUX_CHANNELS": (6,),
    "MODEL.AUX_WEIGHT": (1.0,),
    "MODEL.DROPOUT": (0.5,),
    "MODEL.INIT_STD": (0.1,),
    "AUG.HFLIP": (0.0,),
    "AUG.RESIZE_RATIO": ([1.0, 1.0],),
    "AUG.MOST_OF_ONE_CLASS": (0.3,),
    "AUG.PHOTOMETRIC": (False,),
    "TEST.MODE": ("slide", "TEST.STRIDE", 16),
    "TEST.STRIDE": (5, *SLIDE),
    "TEST.SCALES": ([0.5, 1.0],),
    "TEST.FLIP": (True,),
}
ELSEWHERE = {  # keys whose effect another test shows
    "MODEL.SYNC_BN": "test_batch_norms_are_over_all_processes_of_gpus",
    "TEST.SAVE_PREDICTIONS": "test_saved_predictions_are_what_was_counted",
}


def test_no_key_is_left_out():
    common = {key.name: key for key in COMMON}
    own = {name for name, key in keys_of("segmentation").items() if common.get(name) != key}
    assert CHANGED.keys() | ELSEWHERE.keys() == own and not CHANGED.keys() & ELSEWHERE.keys()
    tests = "".join(path.read_text() for path in (ROOT / "tests/segmentation").glob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in tests] == []


def traces(folder, tag, *opts):
    """What can be seen of a run with `opts`."""
    try:
        config = tiny_config(folder, "TRAIN.EPOCHS", 1, "TAG", tag, "MODEL.INIT_STD", 1.0, *opts)
        run(config)
    except UserError as error:
        return str(error)
    numbers = [{name: line[name] for name in ("step", "train_loss", "mIoU", "aAcc")} for line in metrics(config)]
    return numbers, saved(config)["model"]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """(folder, the traces without the change), made once for all that share a start."""
    folder, known = tmp_path_factory.mktemp("keys"), {}

    def look(both):
        if str(both) not in known:
            known[str(both)] = traces(folder, f"before{len(known)}", *both)
        return folder, known[str(both)]

    return look


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_has_an_effect(key, before):
    value, *both = CHANGED[key]
    folder, unchanged = before(both)
    assert differences([traces(folder, key, *both, key, value)], [unchanged])


def test_without_a_change_nothing_differs(before):
    folder, unchanged = before([])
    assert not differences([traces(folder, "again")], [unchanged])
