"""CSV files that say which images there are and of which class each is."""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmamba.data.folders import file_at
from vmamba.errors import UserError
from vmamba.files import read_text
from vmamba.text import printable, some

HEADER = ["image", "label"]  # a first line that names the columns, which may be left out


@dataclass(frozen=True)
class Line:
    image: str  # a file's path
    label: str
    place: str  # "'labels.csv', line 3"
    file: tuple[int, int] | None  # see `file_at`


def read_labels(path: Path, root: Path, check: bool = True) -> list[Line]:
    """The lines "image,label" of a file; paths of images are relative to `root`, or absolute.

    A label in another Unicode form is the same one.

    Raises UserError, naming the line, for what is none, an image that is listed twice, and, with `check`, one that is
    not there, or that has another label by another name (a link).
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True, strict=True)
    lines: dict[str, Line] = {}  # by the image's path, however it is spelled
    by_file: dict[tuple[int, int], Line] = {}
    first = True
    try:
        for row in rows:
            place = f"'{printable(path)}', line {rows.line_num}"
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            is_first, first = first, False
            if is_first and [field.lower() for field in fields] == HEADER:
                continue
            if len(fields) != 2 or not all(fields):
                raise UserError(
                    f"{place}: '{printable(','.join(row))}' is not an image and a label with a comma between"
                )
            image = os.path.join(root, fields[0])
            known = lines.get(os.path.normpath(image))
            if known:
                raise UserError(f"{place}: '{printable(fields[0])}' stands in {known.place} already; remove one")
            file = file_at(image) if check else None
            if check and file is None:
                header = f"; a line of names is {','.join(HEADER)}" if is_first else ""
                raise UserError(f"{place}: there is no file '{printable(image)}'; mend or remove the line{header}")
            line = Line(image, unicodedata.normalize("NFC", fields[1]), place, file)
            same = by_file.setdefault(file, line) if file else line
            if same.label != line.label:
                raise UserError(
                    f"{place}: '{printable(fields[0])}' is the file of {same.place} by a link, and its label there is "
                    f"'{printable(same.label)}', not '{printable(line.label)}'; remove one"
                )
            lines[os.path.normpath(image)] = line
    except csv.Error as error:
        raise UserError(f"'{printable(path)}', line {rows.line_num}: {error}; mend it") from error
    if not lines:
        raise UserError(f"'{printable(path)}' names no image; give it lines of an image, a comma and a label")
    return list(lines.values())


def classes_of(lines: Sequence[Line]) -> list[str]:
    """The labels in the order of their classes' numbers: numbers as they are, "0", "1", ..., else names sorted.

    Raises UserError for numbers that leave a class out.
    """
    labels = {line.label for line in lines}
    if not all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels)
    for line in lines:
        if not re.fullmatch("0|[1-9][0-9]{0,5}", line.label):
            raise UserError(
                f"{line.place}: label {printable(line.label):.40} is no class's number as 0, 1, 2, ... are; write it "
                "so, or give all classes names"
            )
    numbers = {int(label) for label in labels}
    missing = sorted({*range(max(numbers) + 1)} - numbers)
    if missing:
        file = lines[0].place.rpartition(", line")[0]
        raise UserError(
            f"{file} has labels up to {max(numbers)} and no image of {some(missing)}; number the classes from 0 on, "
            "without gaps, or give them names"
        )
    return [str(number) for number in sorted(numbers)]


def labelled(lines: Sequence[Line], classes: Sequence[str]) -> list[tuple[str, int]]:
    """(image, label's number).  Raises UserError, naming the line, for a label that is none of the classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    for line in lines:
        if line.label not in numbers:
            raise UserError(
                f"{line.place}: '{printable(line.label)}' is none of the training images' classes ({some(classes)})"
            )
    return [(line.image, numbers[line.label]) for line in lines]
