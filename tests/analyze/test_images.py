"""The images of pictures are decoded as training decodes them, and folders are looked into the same way."""

import numpy as np
import pytest
from PIL import Image

from vmamba.analysis.images import read, squares
from vmamba.errors import UserError


def test_images_of_16_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [127] * 3, [255] * 3]


def test_what_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(UserError, match="cannot read '.*large.png': it has more pixels than the 80,000 that are taken"):
        read(tmp_path / "large.png")
    with pytest.raises(UserError, match="cannot read '.*none.png': No such file or directory; give another image"):
        read(tmp_path / "none.png")


def test_a_folder_with_too_few_images_says_what_it_holds_besides(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 7)).save(tmp_path / "a" / "1.gif")
    for name in ("2.heic", "._1.gif"):
        (tmp_path / name).touch()
    assert [image.size for image in squares(str(tmp_path), 1, 8)] == [(8, 8)]
    with pytest.raises(
        UserError, match=r"holds 1 image of the 2 asked for \(left out: 1 hidden image .*, 1 .heic .*\); lower"
    ):
        squares(str(tmp_path), 2, 8)
    with pytest.raises(UserError, match="cannot read '.*none': No such file or directory; check that it is there"):
        squares(str(tmp_path / "none"), 1, 8)
