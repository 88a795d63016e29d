"""The keys that only segmentation has, and its own defaults of common ones."""

from vmamba.config.keys import key, share, switch

_SIDES = dict(kinds=(int, [int]), at_least=1, length=2)

KEYS = (
    key(
        "DATA.DATASET",
        "ade20k",
        "ade20k; folders of images and of maps of classes; scenes of digits, made here",
        choices=("ade20k", "folders", "scenes"),
    ),
    key("DATA.TRAIN_IMAGES", "images/training", "below DATA_PATH, of folders"),
    key("DATA.TRAIN_MAPS", "annotations/training", "likewise; a map has its image's name with another suffix"),
    key("DATA.VAL_IMAGES", "images/validation", "likewise"),
    key("DATA.VAL_MAPS", "annotations/validation", "likewise"),
    key("DATA.IGNORE_INDEX", 255, "pixels of this label do not count", at_least=0, at_most=255),
    switch("DATA.ZERO_IS_IGNORED", "labels count from 1 in the maps; of ade20k they do"),
    key("DATA.CROP_SIZE", 512, "a side in pixels, or [height, width]; trained on", **_SIDES),
    key(
        "DATA.SCALE", [512, 2048], "images are fitted into this short and long side", at_least=1, length=2, rising=True
    ),
    key("DATA.SCENES", [1000, 200], "scenes to train on, and held out", at_least=1, length=2),
    key("DATA.DIGITS", 8, "at most in a scene", at_least=1),
    key(
        "DATA.DIGIT_SIZES",
        [0.2, 0.5],
        "from and to, as shares of a scene's side",
        above=0,
        at_most=1,
        length=2,
        rising=True,
    ),
    switch("DATA.CONTRAST", "digits of scenes are dark where it is light, light where it is dark; false: either"),
    #
    key("MODEL.SEGMENTER", "upernet", "what stands on the backbone MODEL.NAME", choices=("upernet",)),
    key("MODEL.NUM_CLASSES", 150, "of the data set", at_least=1, at_most=254, also="nb_classes"),
    key("MODEL.IN_CHANS", 3, "images are read as RGB", at_least=3, at_most=3, also="in_channels"),
    key("MODEL.CHANNELS", 512, "of the head", at_least=1),
    key("MODEL.AUX_CHANNELS", 256, "of the auxiliary head", at_least=1),
    key("MODEL.AUX_WEIGHT", 0.4, "of the auxiliary head's loss", at_least=0),
    share("MODEL.DROPOUT", 0.1, "of channels in the heads"),
    key("MODEL.INIT_STD", 0.01, "of the predictions' random weights; more for narrow heads", at_least=0),
    switch("MODEL.SYNC_BN", "batch norms over the processes of several GPUs", default=True),
    #
    share("AUG.HFLIP", 0.5, "probability of a horizontal flip"),
    key(
        "AUG.RESIZE_RATIO",
        [0.5, 2.0],
        "SCALE is multiplied by a number drawn from here",
        above=0,
        length=2,
        rising=True,
    ),
    share(
        "AUG.MOST_OF_ONE_CLASS", 0.75, "a crop with as much of one class is drawn again, ten times at most; 1: none is"
    ),
    switch("AUG.PHOTOMETRIC", "distort brightness, contrast, saturation and hue", default=True),
    #
    key("TEST.MODE", "whole", "of inference: the whole image, or windows of CROP_SIZE", choices=("whole", "slide")),
    key("TEST.STRIDE", 341, "of windows, a side in pixels, or [height, width]", **_SIDES),
    key("TEST.SCALES", [1.0], "of SCALE, whose predictions are averaged", above=0),
    switch(
        "TEST.SAVE_PREDICTIONS", "keep those of --eval in the run's folder, below predictions/", flag="save-predictions"
    ),
    switch("TEST.FLIP", "average with the mirrored image's predictions"),
)
