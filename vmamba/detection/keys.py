"""The keys that only detection has, and its own defaults of common ones."""

from vmamba.config.keys import key, share, switch

_SIDES = dict(kinds=([int],), at_least=1)

KEYS = (
    key("DATA.DATASET", "coco", "coco, or of its form; scenes of digits, made here", choices=("coco", "scenes")),
    key("DATA.TRAIN_IMAGES", "train2017", "folder below DATA_PATH"),
    key("DATA.TRAIN_ANNOTATIONS", "annotations/instances_train2017.json", "file below DATA_PATH"),
    key("DATA.VAL_IMAGES", "val2017", "likewise"),
    key("DATA.VAL_ANNOTATIONS", "annotations/instances_val2017.json", "likewise"),
    key(
        "DATA.SCALE", [800, 1333], "images are fitted into this short and long side", at_least=1, length=2, rising=True
    ),
    key("DATA.DIVISOR", 32, "images are padded to multiples of it", at_least=1),
    key("DATA.MOST_OBJECTS", 300, "of an image to train on; of more these are drawn", at_least=1),
    key("DATA.LEAST_SIDE", 32, "smaller images are not trained on", at_least=0),
    switch("DATA.GROUP_BY_ASPECT", "a micro-batch is of upright or of wide images", default=True),
    key("DATA.SCENES", [1000, 200], "scenes to train on, and held out", at_least=1, length=2),
    key("DATA.SCENE_SIDE", 128, "of a scene, in pixels", at_least=32),
    #
    key("MODEL.DETECTOR", "mask_rcnn", "what stands on the backbone MODEL.NAME", choices=("mask_rcnn",)),
    key("MODEL.NUM_CLASSES", 80, "of the data set", at_least=1, also="nb_classes"),
    key("MODEL.CHANNELS", 256, "of the pyramid and the heads", at_least=1),
    key("MODEL.HIDDEN", 1024, "of the box head's two layers", at_least=1),
    key("MODEL.RPN_SAMPLES", 256, "anchors an image that a step reads", at_least=1),
    key("MODEL.SAMPLES", 512, "proposals an image that a step reads", at_least=1),
    key("MODEL.PROPOSALS", [1000, 1000], "kept of an image in training, and in testing", at_least=1, length=2),
    #
    share("AUG.HFLIP", 0.5, "probability of a horizontal flip"),
    key("AUG.SHORT_SIDES", [], "one is drawn in the place of SCALE's; empty: that one", **_SIDES),
    share("AUG.CROP", 0.0, "probability of scaling to one of CROP_SHORT_SIDES and cropping before that"),
    key("AUG.CROP_SHORT_SIDES", [400, 500, 600], "see CROP", **_SIDES),
    key("AUG.CROP_SIDES", [384, 600], "least and most of a side of the crop", at_least=1, length=2, rising=True),
    #
    switch(
        "TEST.SAVE_PREDICTIONS", "keep those of --eval in the run's folder, below predictions/", flag="save-predictions"
    ),
    share("TEST.SCORE", 0.05, "predictions have more than it"),
    share("TEST.NMS", 0.5, "of two boxes of a class that overlap more, the better is kept"),
    key("TEST.MOST", 100, "predictions an image", at_least=1),
)
