"""Labelled images by index, whatever they are made of; reading one raises UnreadableImage."""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from yacs.config import CfgNode

from vmamba.data.archives import Archive, Tars
from vmamba.data.images import decode, reading
from vmamba.data.names import Labelled, checksum
from vmamba.errors import UserError
from vmamba.text import counted, printable

T = TypeVar("T")


class Source:
    """Samples of (image, label).  The image is a file of `archive`; or what the samples hold, which are read on access:
    an image or an open file of `place`, or without a place the path of a file."""

    def __init__(
        self,
        samples: Sequence,
        *,
        archive: Archive | Tars | None = None,
        place: str | None = None,
        by_user: bool = False,  # samples are made by code of a user's module
        drawn_by: str = "",  # the key by which some of the images that are there are held out
        classes: Sequence[Any] = (),  # what the data set calls them, by their numbers; none where it does not tell
    ):
        self.samples = Labelled(samples) if place is None else samples
        self.archive, self.place, self.by_user, self.drawn_by = archive, place, by_user, drawn_by
        self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """For a sentence."""
        if self.place is not None:
            return printable(f"image {index} of {self.place}")
        return printable(os.path.join(self.archive.place(index) if self.archive else "", self.samples[index][0]))

    def load(self, index: int, channels: int, decode: Callable[..., T] = decode) -> tuple[T, int]:
        """The image of so many channels, as `decode` or `decode_pixels` gives it, and its label.  Raises
        UnreadableImage; UserError for a mistake of a user's code, which no other image would mend."""
        name = self.name(index)
        with reading(name), _mistakes(name) if self.by_user else nullcontext():
            file, label = self.read(index)
        return decode(file, channels, name), label

    def read(self, index: int) -> tuple[Any, int]:
        """The bytes of the image's file, or what else `decode` takes, and its label.  May raise any Exception;
        UserError for a label that is no number."""
        image, label = self.samples[index][:2]
        if self.archive:
            image = self.archive.read(index)
        elif isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        try:
            return image, int(-1 if label is None else label)
        except (TypeError, ValueError) as error:
            name = self.name(index)
            raise UserError(f"label {label!r:.40} of '{name}' is no class's number; give 0, 1, 2, ...") from error

    def labels(self) -> Sequence[int] | None:
        """Of all samples; None where only reading every image would tell."""
        if type(self.samples) is list:  # one of another class may give other samples than it holds
            return [sample[1] for sample in self.samples]
        return getattr(self.samples, "targets", None)

    def contents(self, root: str) -> dict[str, str]:
        """For `Loader.contents`; files below `root` are told by their names there."""
        labels = [] if (found := self.labels()) is None else found
        names = () if self.place is not None else self.samples.names
        return {"checksum": checksum(names, labels, root), "drawn_by": self.drawn_by}


# What code raises that is wrong, unlike what a file that is damaged makes it raise.
_MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)


@contextmanager
def _mistakes(name: str) -> Iterator[None]:
    """A mistake of a registered data set's code, while it makes a sample, is one sentence with its place."""
    try:
        yield
    except _MISTAKES as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the code that makes {name} raised {type(error).__name__} ({printable(error)}) in '{place.filename}', "
            f"line {place.lineno}; mend it"
        ) from error


def check_class_count(what: str, classes: int, config: CfgNode, training: bool, names: Sequence[str] = ()) -> None:
    """Raises UserError where `what` does not have the model's classes; `names` are those of its folders, sorted."""
    if classes == 1 and training:
        raise UserError(f"{what} has one class, and training tells classes apart; add another or choose other data")
    if classes != config.MODEL.NUM_CLASSES:
        shown = [*names[:5], "...", names[-1]] if len(names) > 6 else names  # at the ends lies what is no word
        named = f" ({', '.join(map(printable, shown))})" if names else ""
        raise UserError(
            f"{what} has {counted(classes, 'class', 'classes')}{named}, but MODEL.NUM_CLASSES is "
            f"{config.MODEL.NUM_CLASSES}; set it to {classes} (main.py: --opts MODEL.NUM_CLASSES {classes}) or choose "
            "another data path"
        )
