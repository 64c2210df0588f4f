"""What prediction writes: rows and messages, and beside them annotated pictures and features."""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.decode import UnreadableImage, load_rgb
from datasets.faces.pictures import FoundFaces
from inference.annotate import annotated, file_name
from inference.predict import Prediction
from util.errors import BadInput
from util.files import disk_errors, replacing, unusable
from util.predictions import NO_FACE, OK, UNREADABLE, RowWriter, inert
from util.wording import one_line


def say(text: str) -> None:
    """Print a line to standard error, above the progress bar."""
    tqdm.write(one_line(text), sys.stderr)


def labels_of(prediction: Prediction, classes: Sequence[str]) -> list[str]:
    """The most probable class of each face."""
    return [classes[k] for k in prediction.probabilities.argmax(axis=1)]


def write_picture(
    rows: RowWriter, picture: FoundFaces, prediction: Prediction, classes: Sequence[str]
) -> Counter:
    """Write the rows of a picture; returns the counts to add to the totals. Raises Fault."""
    path = inert(picture.path)
    if not picture.faces:
        status = UNREADABLE if picture.problem else NO_FACE
        say(f"{picture.path}: {picture.problem or 'no face found'}")
        rows.picture(path, status)
        return Counter({status: 1})
    labels, p = labels_of(prediction, classes), prediction.probabilities.tolist()
    faces = enumerate(zip(picture.faces, labels, p, strict=True))
    rows.write([[path, k, *f.box, f.score, label, OK, *row] for k, (f, label, row) in faces])
    return Counter({OK: 1, "faces": len(labels)})


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
            labels = labels_of(prediction, self._classes)
            self._rows.append((inert(picture.path), labels, prediction.features))

    def _draw(self, picture: FoundFaces, prediction: Prediction) -> None:
        p = prediction.probabilities.max(axis=1, initial=0)
        named = zip(labels_of(prediction, self._classes), p, strict=True)
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
