"""predict.py: what a checkpoint of each task says of images, as JSON and as pictures."""

import io
import json
import weakref
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

import vmamba
from vmamba.analysis import zoo
from vmamba.analysis.classes import category_numbers, class_names
from vmamba.analysis.drawing import _label_place, beside, colour, draw_objects, paint
from vmamba.analysis.prediction import find_images, predict, readable
from vmamba.analysis.scene_pictures import NAMES, scene_pictures
from vmamba.classification.transforms import build_transform
from vmamba.config import get_config
from vmamba.data.scenes import scene
from vmamba.detection.roi_heads import pasted_in_parts
from vmamba.errors import UserError
from vmamba.runtime.task import open_task

SMALL = ["MODEL.OPTIONS.dims", 8]
CONFIGS = {
    "classification": ("configs/vmamba_digits.yaml", []),
    "detection": ("configs/scenes_detection.yaml", ["MODEL.CHANNELS", 16, "MODEL.HIDDEN", 16, "TEST.SCORE", 0.0]),
    "segmentation": ("configs/scenes_segmentation.yaml", ["MODEL.CHANNELS", 16, "MODEL.AUX_CHANNELS", 8]),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each task: (file, config, model)."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for task, (file, options) in CONFIGS.items():
        config = get_config(file, [*SMALL, *options])
        torch.manual_seed(0)
        model = open_task(config).build_model().eval()
        content = {"model": model.state_dict(), "config": yaml.safe_load(config.dump())}
        torch.save(content, folder / f"{task}.pth")
        found[task] = folder / f"{task}.pth", config, model
    return found


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    scene(0, False, 64).image.save(folder / "scene.png")
    scene(1, False, 64).image.convert("L").save(folder / "more" / "scene.png")
    Image.new("RGB", (300, 3), "red").save(folder / "wide.bmp")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("task", CONFIGS)
def test_every_image_has_a_picture_and_an_entry(checkpoints, pictures, tmp_path, task, caplog):
    file, *_ = checkpoints[task]
    told = predict(str(file), [str(pictures)], score=0.0, device="cpu", output=str(tmp_path / "out"))
    assert set(told) == {str(pictures / name) for name in ("scene.png", "more/scene.png", "wide.bmp")}
    assert {each["picture"] for each in told.values()} == {"scene.png", "more_scene.png", "wide.png"}
    assert "left out: cannot read" in caplog.text and "broken.jpg" in caplog.text
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"] == told
    with Image.open(tmp_path / "out" / "scene.png") as picture:
        assert picture.height >= 256  # small images are enlarged to be readable


def test_the_best_classes_are_the_models(checkpoints, pictures, tmp_path):
    file, config, model = checkpoints["classification"]
    (told,) = predict(str(file), [str(pictures / "scene.png")], device="cpu", output=str(tmp_path / "out")).values()
    image = build_transform(config, training=False)(scene(0, False, 64).image.convert("L"))
    chances = model(image[None]).softmax(1)[0]
    assert [each["class"] for each in told["top"]] == chances.topk(5).indices.tolist()
    assert [each["name"] for each in told["top"]] == [str(each["class"]) for each in told["top"]]
    np.testing.assert_allclose([each["probability"] for each in told["top"]], chances.topk(5).values.tolist(), 1e-5)


def test_shares_of_classes_are_those_of_the_pixels(checkpoints, pictures, tmp_path):
    file, *_ = checkpoints["segmentation"]
    told = predict(str(file), [str(pictures / "wide.bmp")], device="cpu", output=str(tmp_path / "out"))
    classes = next(iter(told.values()))["classes"]
    shares = [each["share"] for each in classes]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert all(each["name"] == ["background", *map(str, range(10))][each["class"]] for each in classes)


def test_classes_of_one_name_stay_apart(checkpoints, pictures, tmp_path):
    file, config, _ = checkpoints["segmentation"]
    (tmp_path / "names.txt").write_text("thing\n" * config.MODEL.NUM_CLASSES)
    options = dict(device="cpu", output=str(tmp_path / "out"))
    (named,) = predict(str(file), [str(pictures / "scene.png")], names=str(tmp_path / "names.txt"), **options).values()
    (told,) = predict(str(file), [str(pictures / "scene.png")], **options).values()
    assert len(named["classes"]) > 1 and {each["name"] for each in named["classes"]} == {"thing"}
    assert [(each["class"], each["share"]) for each in named["classes"]] == [
        (each["class"], each["share"]) for each in told["classes"]
    ]


def test_objects_are_in_cocos_form_and_in_the_pixels_of_the_file(checkpoints, pictures, tmp_path):
    file, *_ = checkpoints["detection"]
    told = predict(str(file), [str(pictures / "wide.bmp")], device="cpu", output=str(tmp_path / "out"))
    objects = next(iter(told.values()))["objects"]
    assert objects and all(each["segmentation"]["size"] == [3, 300] for each in objects)
    for each in objects:
        x, y, width, height = each["bbox"]
        assert 0 <= x <= x + width <= 300.01 and 0 <= y <= y + height <= 3.01
        assert each["name"] == str(each["class"]) and each["category_id"] == each["class"] + 1  # as the scenes' truth


def test_categories_have_their_files_numbers_where_something_tells_them(tmp_path):
    coco = get_config(None, ["TASK", "detection", "DATA.DATA_PATH", str(tmp_path)])
    assert category_numbers(coco, class_names(coco))[::11] == [1, 13, 24, 38, 50, 61, 76, 88]  # person to teddy bear
    own = ["TASK", "detection", "DATA.DATA_PATH", str(tmp_path), "DATA.VAL_ANNOTATIONS", "val.json"]
    assert class_names(get_config(None, own))[:2] == ["class 0", "class 1"]  # 80 too, but not of COCO's file
    three = get_config(None, [*own, "MODEL.NUM_CLASSES", 3])
    assert category_numbers(three, class_names(three)) == [0, 1, 2]
    categories = [{"id": number, "name": "a thing"} for number in (90, 7, 13)]
    (tmp_path / "val.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    assert category_numbers(three, ["a thing"] * 3) == [7, 13, 90]
    assert category_numbers(three, ["a thing", "another", "a thing"]) == [0, 1, 2]  # the file is another one now


def test_masks_of_many_objects_do_not_lie_in_memory_together(checkpoints, pictures, tmp_path, monkeypatch):
    made, most = [], []

    def watched(*args):
        for part in pasted_in_parts(*args):
            made.append(weakref.ref(part))
            yield part
            most.append(sum(each() is not None for each in made))

    monkeypatch.setattr("vmamba.detection.roi_heads._PIXELS", 1)  # a mask at a time
    monkeypatch.setattr("vmamba.detection.mask_rcnn.pasted_in_parts", watched)
    file, *_ = checkpoints["detection"]
    told = predict(str(file), [str(pictures / "scene.png")], score=0.0, device="cpu", output=str(tmp_path / "out"))
    assert len(made) == 2 * len(next(iter(told.values()))["objects"]) > 40 and max(most) == 1  # told, and drawn


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 1), (2048, 128)),
        ((3, 3000), (128, 2048)),
        ((2000, 30), (2048, 128)),
        ((200, 90), (284, 128)),
        ((64, 64), (256, 256)),
        ((1, 1), (256, 256)),
        ((800, 600), (800, 600)),
        ((7000, 5000), (2048, 1463)),
    ],
)
def test_pictures_are_readable_whatever_the_images_form(size, expected):
    picture = readable(Image.new("RGB", size))
    assert picture.size == expected
    label = "a long name of a class 97%"
    drawn = draw_objects(picture, [[0, 0, *expected]], lambda number: torch.ones(3, 2, dtype=torch.bool), [label])
    assert drawn.height == expected[1] and drawn.width >= max(expected[0], 150)


def test_a_map_is_painted_in_its_legends_colours_but_for_the_background():
    image = Image.new("RGB", (4, 2), (200, 100, 0))
    found = np.asarray(paint(image, torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]]), ["background", "cat", "dog"])).astype(
        int
    )
    grey = np.asarray(image.convert("L"))[0, 0]
    assert (found[0, 0] == grey).all()
    for place, label in (((0, 2), 1), ((1, 1), 1), ((1, 3), 2)):
        assert found[place] == pytest.approx(grey + (np.array(colour(label)) - grey) * 160 / 255, abs=1)
    colours = [colour(number) for number in range(150)]
    assert len(set(colours)) > 140 and len(set(colours[:12])) == 12


def test_names_in_letters_that_no_font_has_are_told_once(caplog):
    picture = Image.new("RGB", (64, 64))
    for _ in range(2):
        beside(picture, ["cat 29%", "\U0003fff0\U0003fff1 29%"])  # which are no letters
    assert caplog.text.count("no font here has \\U0003fff0, \\U0003fff1; pictures show boxes") == 1
    caplog.clear()
    beside(picture, ["Katze 29%"])
    assert not caplog.text


def test_labels_of_objects_lie_in_the_picture_and_cover_no_other():
    random = np.random.default_rng(0)
    taken = []
    for _ in range(30):
        x, y = random.uniform(0, 400, 2)
        box = (x, y, x + random.uniform(5, 90), y + random.uniform(5, 90))
        taken.append(_label_place(box, (40, 15), (400, 400), taken))
        assert (taken[-1][2] - taken[-1][0], taken[-1][3] - taken[-1][1]) == pytest.approx((40, 15))
        assert 0 <= taken[-1][0] <= taken[-1][2] <= 400 and 0 <= taken[-1][1] <= taken[-1][3] <= 400
    covered = [
        (a, b)
        for a, b in combinations(taken, 2)
        if min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
    ]
    assert covered == []
    box = (100, 50, 160, 90)
    assert _label_place(box, (40, 15), (400, 400), []) == (100, 35, 140, 50)  # above
    assert _label_place(box, (40, 15), (400, 400), [(100, 35, 140, 50)]) == (100, 90, 140, 105)  # or below
    assert _label_place(box, (40, 15), (400, 400), [(0, 0, 400, 400)]) == (100, 35, 140, 50)


def test_names_of_a_file_and_patterns(checkpoints, pictures, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    options = dict(device="cpu", output=str(tmp_path / "out"))
    file = str(checkpoints["classification"][0])
    (told,) = predict(file, [str(pictures / "s*.png")], names=str(tmp_path / "names.txt"), **options).values()
    assert told["top"][0]["name"] == f"digit {told['top'][0]['class']}"
    (tmp_path / "names.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match=r"names.txt' names 2 classes, and the model has 10"):
        predict(file, [str(pictures)], names=str(tmp_path / "names.txt"), **options)


def test_a_released_file_says_by_its_weights_what_it_is(pictures, tmp_path):
    model = vmamba.create_model("vmamba_nano", num_classes=4)
    torch.save({"model": vmamba.to_released(model)}, tmp_path / "released.pth")
    told = predict(
        str(tmp_path / "released.pth"), [str(pictures / "scene.png")], device="cpu", output=str(tmp_path / "out")
    )
    assert len(next(iter(told.values()))["top"]) == 4
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds neither a config nor a head that is known; give --cfg"):
        predict(str(tmp_path / "other.pth"), [str(pictures)], device="cpu", output=str(tmp_path / "out"))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_doors_of_classifiers_say_that_a_checkpoint_is_of_another_task(checkpoints, task):
    with pytest.raises(UserError, match=f"is of a run of {task}, whose model is no classifier; see predict.py"):
        zoo.create("vmamba_nano", 64, checkpoints[task][0])


def test_a_released_segmenter_may_lack_its_auxiliary_head(tmp_path):
    weights = {
        "backbone.patch_embed.0.weight": torch.zeros(2, 3, 3, 3),
        "decode_head.conv_seg.weight": torch.zeros(1, 1, 1, 1),
    }
    torch.save(weights, tmp_path / "s.pth")
    with pytest.raises(UserError, match="the backbone in .* is none of the models by name"):
        predict(str(tmp_path / "s.pth"), [str(tmp_path / "s.pth")], output=str(tmp_path / "out"))


def test_what_is_no_image_is_a_sentence(checkpoints, pictures, tmp_path):
    with pytest.raises(UserError, match="there is no image at '.*nowhere"):
        find_images([str(tmp_path / "nowhere*")])
    with pytest.raises(UserError, match="none of 1 image could be read"):
        predict(str(checkpoints["classification"][0]), [str(pictures / "broken.jpg")], output=str(tmp_path / "out"))


def test_nothing_is_written_over_what_is_read(checkpoints, pictures, tmp_path):
    """Under whatever path or link: of an image, of the file of names."""
    file = str(checkpoints["classification"][0])
    before = (pictures / "scene.png").read_bytes()
    (tmp_path / "linked").symlink_to(pictures)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "scene.png").symlink_to(pictures / "scene.png")
    over = "scene.png' would be written over '.*scene.png', which is read here; choose another --output"
    for output in (pictures, tmp_path / "linked", tmp_path / "links", pictures / "more" / ".."):
        with pytest.raises(UserError, match=over):
            predict(str(tmp_path / "not looked for"), [str(pictures / "scene.png")], output=str(output))
    names = tmp_path / "out" / "predictions.json"
    names.parent.mkdir()
    names.write_text("names\n" * 10)
    with pytest.raises(UserError, match="predictions.json' would be written over '.*predictions.json'"):
        predict(file, [str(pictures)], names=str(names), output=str(tmp_path / "out"))
    assert (pictures / "scene.png").read_bytes() == before and names.read_text() == "names\n" * 10
    assert sorted(path.name for path in pictures.iterdir()) == ["broken.jpg", "more", "scene.png", "wide.bmp"]


def test_only_its_own_files_are_replaced(checkpoints, pictures, tmp_path):
    """A photo's neighbour of the same name is not one of them, nor another program's predictions.json."""
    file, out = str(checkpoints["classification"][0]), tmp_path / "out"
    for _ in range(2):  # a command may be given twice
        predict(file, [str(pictures / "scene.png")], device="cpu", output=str(out))
    other = pictures / "wide.png"
    scene(2, False, 32).image.save(other)
    before = other.read_bytes()
    with pytest.raises(UserError, match="wide.png' is there already and is no picture of a prediction; remove it, or"):
        predict(file, [str(pictures / "wide.bmp")], device="cpu", output=str(pictures))
    assert other.read_bytes() == before and not (pictures / "predictions.json").exists()
    for text in ('{"images": []}', "[1]", "mine"):
        (out / "predictions.json").write_text(text)
        with pytest.raises(UserError, match="predictions.json' is there already and is no table of predictions"):
            predict(file, [str(pictures / "scene.png")], device="cpu", output=str(out))
        assert (out / "predictions.json").read_text() == text


def test_an_image_given_twice_is_one_and_no_two_pictures_have_one_name(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/b.png", "y/b.png", "x_b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        scene(0, False, 32).image.save(tmp_path / name)
    file, options = str(checkpoints["classification"][0]), dict(device="cpu", output="out")
    told = predict(file, ["x/b.png", str(tmp_path / "x" / "b.png"), "y/../x/b.png", "x"], **options)
    assert {name: each["picture"] for name, each in told.items()} == {"x/b.png": "b.png"}
    told = predict(file, ["x/b.png", "y/b.png", "x_b.png"], **options)
    assert list(told) == ["x/b.png", "y/b.png", "x_b.png"]
    assert len({each["picture"] for each in told.values()}) == 3
    assert all((tmp_path / "out" / each["picture"]).is_file() for each in told.values())


def test_held_out_scenes_are_drawn_as_predicted_beside_the_truth(checkpoints, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    files = {task: str(checkpoints[task][0]) for task in ("detection", "segmentation")}
    options = dict(device="cpu", output=str(tmp_path / "out"), score=0.0)
    told = scene_pictures(detector=files["detection"], segmenter=files["segmentation"], scenes=[0, 3], **options)
    images = [axes.images[0].get_array() for axes in figures[0].axes]
    assert len(images) == 2 * 4
    for row, (task, (side, *settings)) in enumerate(
        {"detection": (128,), "segmentation": (64, 2, (0.45, 0.75), True)}.items()
    ):
        made = scene(3, False, side, *settings)
        made.image.save(tmp_path / f"{task}.png")
        (alone,) = predict(files[task], [str(tmp_path / f"{task}.png")], **options).values()
        picture = np.asarray(Image.open(tmp_path / "out" / alone.pop("picture")))
        assert told[task][3] == alone and told[task].keys() == {0, 3}
        seen, truth = images[4 * row + 1], images[4 * row + 3]  # predict.py's picture may have a legend at its right
        assert np.array_equal(seen, picture[:, : seen.shape[1]]) and not np.array_equal(seen, truth)
    assert np.array_equal(truth, np.asarray(paint(readable(made.image), torch.from_numpy(made.classes), NAMES)))
    assert json.loads((tmp_path / "out" / "scenes.json").read_text())["detection"]["3"] == told["detection"][3]


def test_scenes_are_for_models_of_scenes(checkpoints, tmp_path):
    one, other = (str(checkpoints[task][0]) for task in ("detection", "segmentation"))
    with pytest.raises(UserError, match="is of a run of segmentation on scenes; give one of configs/scenes_detection"):
        scene_pictures(detector=other, segmenter=one, device="cpu", output=str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint '.*absent.pth'"):
        scene_pictures(detector="absent.pth", segmenter=other, device="cpu", output=str(tmp_path))


@pytest.mark.parametrize("task", CONFIGS)
def test_a_model_and_what_it_says_in_two_lines(checkpoints, pictures, tmp_path, task):
    file = checkpoints[task][0]
    told = predict(str(file), [str(pictures / "scene.png")], output=str(tmp_path / "out"))
    expected = {name: value for name, value in told[str(pictures / "scene.png")].items() if name != "picture"}
    model = vmamba.load_model(file)
    assert not model.training and len(model.class_names) == model.config.MODEL.NUM_CLASSES
    with Image.open(pictures / "scene.png") as image:
        assert vmamba.predict(model, [image, pictures / "scene.png"]) == [expected, expected]
    assert vmamba.predict(file, str(pictures / "scene.png")) == [expected]
    if task == "detection":
        least = sorted(each["score"] for each in expected["objects"])[len(expected["objects"]) // 2]
        (found,) = vmamba.predict(model, pictures / "scene.png", score=least)
        assert found["objects"] == [each for each in expected["objects"] if each["score"] >= least]


def test_a_runs_folder_is_its_best_and_what_is_no_model_is_a_sentence(checkpoints, pictures, tmp_path):
    file = checkpoints["classification"][0]
    (tmp_path / "last.pth").write_bytes(file.read_bytes())
    content = torch.load(file, weights_only=True)
    for weight in content["model"].values():
        weight.mul_(2)
    assert torch.equal(*[vmamba.load_model(place).classifier.head.weight for place in (tmp_path, file)])
    torch.save(content, tmp_path / "best.pth")
    assert torch.equal(vmamba.load_model(tmp_path).classifier.head.weight, content["model"]["classifier.head.weight"])
    with pytest.raises(UserError, match="has neither best.pth nor last.pth; name the folder of a run, or a file"):
        vmamba.load_model(pictures)
    with pytest.raises(UserError, match="this VSSM does not tell what its images and classes are; take it from"):
        vmamba.predict(vmamba.create_model("vmamba_digits"), pictures / "scene.png")
    with pytest.raises(UserError, match="broken.jpg"):
        vmamba.predict(file, pictures / "broken.jpg")


@pytest.mark.parametrize(("below", "share"), [("train", 0.0), ("val", 0.0), ("", 0.2)])
def test_classes_are_called_as_their_folders(tmp_path, below, share):
    for name in ("tulip", "daisy"):
        (tmp_path / below / name).mkdir(parents=True)
    options = ["DATA.DATA_PATH", str(tmp_path), "MODEL.NUM_CLASSES", 2, "DATA.VAL_FRACTION", share]
    assert class_names(get_config(None, options)) == ["daisy", "tulip"]
    assert class_names(get_config(None, [*options, "DATA.DATA_PATH", "gone"])) == ["class 0", "class 1"]


def test_an_array_is_an_image_and_what_is_none_is_a_sentence(checkpoints, tmp_path):
    model = vmamba.load_model(checkpoints["segmentation"][0])
    array = np.random.default_rng(0).integers(0, 256, (40, 48, 4), np.uint8)
    expected = vmamba.predict(model, Image.fromarray(array[..., :3]))
    assert vmamba.predict(model, array[..., :3]) == vmamba.predict(model, [array]) == expected  # of RGBA the colours
    assert vmamba.predict(model, np.stack([array[..., :3]] * 2)) == expected * 2
    gray = vmamba.predict(model, Image.fromarray(array[..., 0]))
    assert vmamba.predict(model, array[..., 0]) == vmamba.predict(model, array[..., :1]) == gray
    words = "give an image of Pillow, a file's path, or an array of NumPy"
    for image, sentence in (
        (None, f"image 1 of 1 is None .NoneType.; {words}"),
        (3, "image 1 of 1 is 3 .int.;"),
        ([array[..., 0], {"a": 1}], "image 2 of 2 is {'a': 1} .dict.;"),
        (torch.zeros(3, 8, 8), f"image 1 of 1 is a Tensor; {words}"),
        (array / 255, "cannot read 'image 1 of 1': its values are float64; scale them to 0..255 and convert them"),
        (
            array.transpose(2, 0, 1),
            r"its shape is \(4, 40, 48\); an array is \(H, W\), or \(H, W, channels\) of 1, 3 or 4",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            vmamba.predict(model, image)
    transform = vmamba.build_transform(vmamba.create_model("vmamba_digits"))
    assert torch.equal(transform(array), transform(Image.fromarray(array)))
    for image in (None, 3, torch.zeros(3, 8, 8)):
        with pytest.raises(UserError, match=f"the image is .*; {words}"):
            transform(image)
    with pytest.raises(UserError, match="this is a NoneType, no model; give what vmamba.create_model or timm's gives"):
        vmamba.flops(None, 64)


def test_arrays_of_many_channels(tmp_path):
    config = get_config(None, ["MODEL.NAME", "vmamba_digits", "MODEL.NUM_CLASSES", 3, "MODEL.IN_CHANS", 13, *SMALL,
                               "DATA.MEAN", 0.5, "DATA.STD", 0.5, "DATA.IMG_SIZE", 16])  # fmt: skip
    torch.save({"model": open_task(config).build_model().state_dict(), "config": yaml.safe_load(config.dump())},
               tmp_path / "bands.pth")  # fmt: skip
    array = np.random.default_rng(0).integers(0, 256, (20, 24, 13), np.uint8)
    np.save(tmp_path / "bands.npy", array)
    model = vmamba.load_model(tmp_path / "bands.pth")
    assert vmamba.predict(model, array) == vmamba.predict(model, tmp_path / "bands.npy")
    with pytest.raises(
        UserError, match=r"'image 1 of 1': its values have the shape \(20, 24, 3\), and MODEL.IN_CHANS is"
    ):
        vmamba.predict(model, array[..., :3])


def test_an_image_in_memory_is_read_as_its_file(checkpoints, tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "deep.png")
    file = checkpoints["segmentation"][0]
    with Image.open(tmp_path / "deep.png") as image:
        in_memory, from_file = vmamba.predict(file, [image, tmp_path / "deep.png"])
    assert in_memory == from_file
    with pytest.raises(UserError, match="image 1 of 1"):
        vmamba.predict(file, Image.new("F", (8, 8)))


@pytest.mark.parametrize("task", CONFIGS)
def test_a_model_of_any_dtype_takes_images_and_stays_in_its_mode(checkpoints, task):
    image, model = scene(0, False, 64).image, vmamba.load_model(checkpoints[task][0])
    wanted = vmamba.predict(model, image)
    assert [*wanted[0]] == [*vmamba.predict(model.double(), image)[0]]
    if task == "classification":
        (found,) = vmamba.predict(model, image)
        best = [each["probability"] for each in wanted[0]["top"]]
        assert best == pytest.approx([each["probability"] for each in found["top"]], abs=1e-6)
    for dtype in (torch.float16, torch.bfloat16) if task == "classification" else (torch.bfloat16,):
        assert [*wanted[0]] == [*vmamba.predict(model.to(dtype), image)[0]]
    model = vmamba.load_model(checkpoints[task][0]).train()
    inside = [*model.modules()][-1].eval()  # as a frozen layer is
    modes = [module.training for module in model.modules()]
    assert vmamba.predict(model, image) == wanted
    with pytest.raises(UserError):
        vmamba.predict(model, [None])
    assert modes == [module.training for module in model.modules()] and not inside.training


@pytest.mark.parametrize("task", CONFIGS)
def test_names_that_are_not_one_a_class_are_a_sentence(checkpoints, pictures, task):
    file, config, _ = checkpoints[task]
    classes = config.MODEL.NUM_CLASSES
    names = [f"n{number}" for number in range(classes)]
    model = vmamba.load_model(file, names=names)
    (told,) = vmamba.predict(model, pictures / "scene.png")
    assert {each["name"] for each in next(iter(told.values()))} <= {*names}
    for given, count in ((["a", "b"], "2 classes"), ((), "0 classes")):
        with pytest.raises(UserError, match=f"names names {count}, and the model has {classes}"):
            vmamba.load_model(file, names=given)
    for given in (3, [1] * classes, {"a": 1}):
        with pytest.raises(UserError, match="names is .*; give a list with the name of each class, or a file"):
            vmamba.load_model(file, names=given)
    for given in (["x"], None, "x" * classes, [None] * classes):
        model.class_names = given
        with pytest.raises(UserError, match=f"class_names .*; set it to a list of {classes} names, one a class"):
            vmamba.predict(model, pictures / "scene.png")


def test_names_of_another_head_are_not_taken_for_its_own(checkpoints, pictures):
    model = vmamba.load_model(checkpoints["classification"][0])
    model.reset_classifier(5)
    with pytest.raises(UserError, match="class_names of this VSSM has 10; set it to a list of 5 names, one a class"):
        vmamba.predict(model, pictures / "scene.png")
    model.class_names = [*"abcde"]
    (told,) = vmamba.predict(model, pictures / "scene.png")
    assert {each["name"] for each in told["top"]} == {*"abcde"}
    model.reset_classifier(0)
    with pytest.raises(UserError, match="this classifier has no classes"):
        vmamba.predict(model, pictures / "scene.png")


def test_one_image_of_a_kind_that_python_can_go_through(checkpoints, pictures):
    model, path = vmamba.load_model(checkpoints["classification"][0]), pictures / "scene.png"
    wanted = vmamba.predict(model, path)
    with path.open("rb") as file:
        assert vmamba.predict(model, file) == wanted
    assert vmamba.predict(model, io.BytesIO(path.read_bytes())) == wanted
    with pytest.raises(UserError, match="image 1 of 1 is {'a.png': 1} .dict.; give an image of Pillow"):
        vmamba.predict(model, {"a.png": 1})
    for size in ((0, 5), (5, 0)):
        with pytest.raises(
            UserError, match=f"cannot read 'image 1 of 1': it is {size[0]} x {size[1]} pixels, so there"
        ):
            vmamba.predict(model, Image.new("RGB", size))
