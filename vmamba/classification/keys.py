"""The keys that only classification has."""

from vmamba.config.keys import key, share, switch

_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

KEYS = (
    key(
        "DATA.DATASET",
        "imagenet",
        "imagenet (folders), digits, elpv, cifar10, cifar100, one of timm's (torch/, hfds/), or a registered one",
    ),
    key(
        "DATA.IMG_SIZE",
        224,
        "a side in pixels, or [height, width]",
        kinds=(int, [int]),
        at_least=1,
        length=2,
        flag="img-size",
    ),
    key(
        "DATA.DECODE",
        "pillow",
        "torchvision: JPEGs decoded by it, augmented by batches where the model computes; nvjpeg: both on the GPU",
        choices=("pillow", "torchvision", "nvjpeg"),
    ),
    key("DATA.INTERPOLATION", "bicubic", "of resizing", choices=_FILTERS),
    switch("DATA.ZIP_MODE", "read train.zip, train_map.txt, val.zip, val_map.txt instead of folders", flag="zip"),
    key(
        "DATA.CACHE_MODE",
        "part",
        "archives: part is read ahead once a machine, full held",
        choices=("no", "part", "full"),
        flag="cache-mode",
    ),
    share("DATA.VAL_FRACTION", 0.0, "of each class's images held out, where there is no val/; 0: there is"),
    key("DATA.TRAIN_LABELS", "", "CSV file in DATA_PATH, of lines image,label, in the place of folders"),
    key("DATA.VAL_LABELS", "", "likewise"),
    key(
        "DATA.CLASS_MAP",
        "",
        "with --eval, of which class a folder is: imagenet, by its WordNet number; numbers, by its name; or a file of "
        "lines folder,class",
        also="imagenet-v2 imagenet-a imagenet-r imagenet-sketch",
    ),
    key(
        "DATA.SAMPLER",
        "shuffled",
        "balanced: of each class as many images an epoch, those of small ones several times",
        choices=("shuffled", "balanced"),
    ),
    key("DATA.TRAIN_SPLIT", "train", "its name, for data sets opened by timm"),
    key("DATA.VAL_SPLIT", "validation", "likewise"),
    #
    share("MODEL.LABEL_SMOOTHING", 0.1, "of the targets"),
    key(
        "TRAIN.LOSS",
        "cross_entropy",
        "cross_entropy; bce: each class by itself, as DeiT III; or a registered one",
        also="binary_cross_entropy",
    ),
    key(
        "TRAIN.CLASS_WEIGHTS",
        "",
        "balanced: by the inverse of a class's images; or a weight for each; empty: none",
        kinds=(str, [float]),
        choices=("", "balanced"),
        at_least=0,
    ),
    key(
        "TRAIN.MESA",
        0.0,
        "weight of the loss against what the average of the weights (TRAIN.EMA) says, arXiv 2205.14083; 0: off",
        at_least=0,
    ),
    share("TRAIN.MESA_START", 0.25, "share of the run before that loss counts"),
    #
    key(
        "DISTILL.TEACHER",
        "",
        "what says the classes too: a run's checkpoint or folder, one of our names, or timm/<name>; empty: nobody",
        also="distillation teacher",
    ),
    key(
        "DISTILL.KIND",
        "soft",
        "against its chances (Hinton), or hard: its first answer (DeiT)",
        choices=("soft", "hard"),
    ),
    share("DISTILL.WEIGHT", 0.5, "of that loss; the labels have the rest"),
    key("DISTILL.TEMPERATURE", 1.0, "that soft chances are drawn at", above=0),
    #
    key("AUG.SIZES", [], "sides that a step's images have, drawn; empty: IMG_SIZE", kinds=([int],), at_least=1),
    key(
        "AUG.SIZE_SCHEDULE",
        "progressive",
        "from the first side to the last over the run, as timm's scheduled batches; constant: any at any time",
        choices=("progressive", "constant"),
        also="progressive_resizing",
    ),
    key("AUG.SIZE_SPREAD", 0.65, "deviation of the sides about the one whose turn it is, in places", at_least=0),
    share("AUG.SIZE_MIX", 0.1, "of the steps at any of them"),
    key(
        "AUG.SCALE",
        [0.08, 1.0],
        "least and most share of an image's area that a crop shows; up to IMG_SIZE 32 there is none, and no RATIO",
        above=0,
        at_most=1,
        length=2,
        rising=True,
    ),
    key("AUG.RATIO", [0.75, 4 / 3], "least and most width of a crop over its height", above=0, length=2, rising=True),
    key(
        "AUG.REPEATS",
        1,
        "versions of an image in a step, of so many fewer images an epoch",
        at_least=1,
        also="aug_repeats",
    ),
    share("AUG.HFLIP", 0.5, "probability of a horizontal flip"),
    share("AUG.VFLIP", 0.0, "of a vertical one"),
    key("AUG.COLOR_JITTER", 0.4, "applies where AUTO_AUGMENT is off", at_least=0),
    key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "timm's notation; null: off", kinds=(None, str)),
    share("AUG.REPROB", 0.25, "probability of random erasing"),
    key("AUG.REMODE", "pixel", "what erased regions are filled with", choices=("const", "rand", "pixel")),
    key("AUG.RECOUNT", 1, "erased regions", at_least=1),
    key("AUG.MIXUP", 0.8, "alpha; 0: off", at_least=0),
    key("AUG.CUTMIX", 1.0, "alpha; 0: off", at_least=0),
    share("AUG.CUTMIX_MINMAX", None, "[least, most] of a side to cut; null: by CUTMIX", kinds=(None, [float])),
    share("AUG.MIXUP_PROB", 1.0, "of a micro-batch being mixed"),
    share("AUG.MIXUP_SWITCH_PROB", 0.5, "of cutmix where both are on"),
    key("AUG.MIXUP_MODE", "batch", "one draw a micro-batch, a pair or an image", choices=("batch", "pair", "elem")),
    #
    switch("TEST.CROP", "resize, and crop the centre; false: resize to IMG_SIZE", default=True),
    key(
        "TEST.CROP_PCT",
        0.875,
        "share of the resized image's sides that the crop keeps; up to IMG_SIZE 32 all",
        above=0,
        at_most=1,
    ),
)
