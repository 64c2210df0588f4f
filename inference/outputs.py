"""What prediction writes: rows and messages, and beside them annotated pictures and features."""

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.decode import UnreadableImage, load_rgb
from datasets.faces.pictures import FoundFaces
from datasets.filetypes import VIDEO_ENDINGS
from inference.annotate import annotated, file_name
from inference.predict import Prediction
from util.errors import BadInput
from util.files import disk_errors, replacing, unusable
from util.predictions import NO_FACE, OK, UNREADABLE, RowWriter, inert
from util.wording import one_line

# Cropped faces are about as wide as high; cameras' pictures are more oblong, 4:3 or 3:2.
MOST_OBLONG = 1.25


def say(text: str) -> None:
    """Print a line to standard error, above the progress bar."""
    tqdm.write(one_line(text), sys.stderr)


def status_of(picture: FoundFaces) -> str:
    """OK, NO_FACE or UNREADABLE."""
    return UNREADABLE if picture.problem else OK if picture.faces else NO_FACE


def write_picture(
    rows: RowWriter, picture: FoundFaces, prediction: Prediction, classes: Sequence[str]
) -> None:
    """Write the rows of a picture. Raises Fault."""
    path = inert(picture.path)
    if not picture.faces:
        say(f"{picture.path}: {picture.problem or 'no face found'}")
        rows.picture(path, status_of(picture))
        return
    labels, p = prediction.labels(classes), prediction.probabilities.tolist()
    faces = enumerate(zip(picture.faces, labels, p, strict=True))
    rows.write([[path, k, *f.box, f.score, label, OK, *row] for k, (f, label, row) in faces])


class Totals:
    """Counts the pictures and faces, and those that look like faces cropped already."""

    def __init__(self) -> None:
        self.faces, self._pictures, self._square = 0, Counter(), 0

    def add(self, picture: FoundFaces) -> None:
        """Count a picture."""
        self._pictures[status_of(picture)] += 1
        self.faces += len(picture.faces)
        if status_of(picture) == NO_FACE:
            self._square += max(picture.size) < MOST_OBLONG * min(picture.size)

    def __getitem__(self, status: str) -> int:
        """The number of pictures of a status."""
        return self._pictures[status]

    def line(self, skipped: Mapping[str, int]) -> str:
        """A line to print at the end; `skipped`: other files in the folders, by extension."""
        faces, pictures = (
            f"{count:,} {noun}{'s' * (count != 1)}"
            for count, noun in ((self.faces, "face"), (self._pictures.total(), "picture"))
        )
        text = f"{faces} in {self[OK]:,} of {pictures}"
        text += f"; without a face: {self[NO_FACE]:,}; unreadable: {self[UNREADABLE]:,}"
        if videos := sum(count for kind, count in skipped.items() if kind in VIDEO_ENDINGS):
            text += f"; videos, not read: {videos:,}"
        if self[NO_FACE] and 2 * self._square > self[NO_FACE]:
            text += "; if the pictures are cropped faces already, use --detector none"
        return text


class OtherOutputs:
    """The outputs beside the rows: --annotated and --features."""

    def __init__(
        self, annotated: str | None, features: str | None, classes: Sequence[str], count: int
    ) -> None:
        """`count`: number of pictures to come. Raises BadInput for paths that are not writable."""
        self._folder = Path(annotated).expanduser() if annotated else None
        self._file = Path(features).expanduser() if features else None
        self._classes, self._count, self._number = classes, count, 0
        self._rows: list[tuple] = []
        if self._folder:
            check_writable("--annotated", self._folder)
        if self._file:
            check_writable("--features", self._file.parent)
            if self._file.is_dir():
                raise BadInput(f"--features {self._file}: is a folder; name a file")

    def add(self, picture: FoundFaces, prediction: Prediction) -> None:
        """Add the next picture and the prediction for its faces. Raises Fault if the disk fails."""
        if self._folder and not picture.problem:
            self._draw(picture, prediction)
        self._number += 1
        if self._file:
            labels = prediction.labels(self._classes)
            self._rows.append((inert(picture.path), labels, prediction.features))

    def _draw(self, picture: FoundFaces, prediction: Prediction) -> None:
        p = prediction.probabilities.max(axis=1, initial=0)
        named = zip(prediction.labels(self._classes), p, strict=True)
        with suppress(UnreadableImage), disk_errors(self._folder):  # deleted in the meantime
            drawn = annotated(
                load_rgb(picture.path),
                [face.box for face in picture.faces],
                [f"{label} {share:.0%}" for label, share in named],
            )
            name = file_name(picture.path, self._number, self._count)
            drawn.save(self._folder / name, quality=90)

    def finish(self) -> None:
        """Write the features of all faces. Raises Fault if the disk fails."""
        if not self._file:
            return
        with disk_errors(self._file), replacing(self._file) as file:
            np.savez(
                file,
                features=np.concatenate([features for *_, features in self._rows]),
                path=np.array([path for path, labels, _ in self._rows for _ in labels], str),
                face=np.array([k for _, labels, _ in self._rows for k in range(len(labels))], int),
                label=np.array([label for _, labels, _ in self._rows for label in labels], str),
            )


def check_writable(flag: str, folder: Path) -> None:
    """Create a folder and check that files can be written to it. Raises BadInput if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"{flag} {folder}: {unusable(error)}") from None
