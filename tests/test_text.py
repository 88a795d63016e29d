"""Names that are no text are told in one line, and texts are read in the encodings that systems write."""

import os

import pytest

from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some


def test_any_name_can_be_told_to_any_stream():
    name = os.fsdecode(b"caf\xc3\xa9 \xff\n\x1b[31m")
    assert printable(name) == "café \\udcff\\n\\x1b[31m"
    assert some([name, 2]).encode() == "café \\udcff\\n\\x1b[31m, 2".encode()
    assert some(range(7)) == "0, 1, 2, 3, 4 and 2 more" and some([]) == "nothing"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "map.txt").write_bytes("naïve 1\r\n".encode(encoding))
    assert read_text(tmp_path / "map.txt") == "naïve 1\r\n"


@pytest.mark.parametrize(
    "content, why",
    [
        ("naïve".encode("latin-1"), "byte 2 does not fit utf-8"),
        ("a 1".encode("utf-16-le"), "byte 1 is zero"),
        ("naïve".encode("utf-16")[:-1], "byte 10 does not fit utf-16"),
    ],
)
def test_another_encoding_is_a_sentence(tmp_path, content, why):
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"map.txt' is no text in UTF-8, .*: {why}; save it in UTF-8"):
        read_text(tmp_path / "map.txt")


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read '.*map.txt': No such file"):
        read_text(tmp_path / "map.txt")
