"""Predict the expressions of the faces in pictures with a fine-tuned checkpoint.

    python main_predict.py --checkpoint FILE photos/ --output predictions.csv

Writes one row per face, and one for each picture that cannot be read or shows no face.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from util.errors import BadInput, Fault
from util.files import disk_errors, replacing
from util.options.predict import build_parser, check_options, find_format
from util.predictions import NO_FACE, OK, UNREADABLE, RowWriter, inert, open_rows
from util.program import run_program
from util.wording import one_line

if TYPE_CHECKING:
    import torch

    from datasets.faces.pictures import FoundFaces
    from inference.predict import Prediction


def work(args: argparse.Namespace) -> None:
    """Predict all pictures. Wrong options are reported before the first picture is read."""
    from tqdm import tqdm

    from datasets.faces.detection import open_detector
    from datasets.faces.pictures import Pictures, list_pictures
    from datasets.filetypes import skipped_line
    from inference.predict import Predictor, face_margin, predict_pictures, whole_line
    from models_saved import open_classifier
    from training.run import worker_count
    from util.distributed import ProcessInfo, pick_device

    paths, skipped = list_pictures(args.images)
    open_detector(args.detector)
    saved = open_classifier(args.checkpoint, args.classes, args.cache_dir)
    predictor = Predictor(saved, pick_device(args.device, ProcessInfo()))
    # Names from a file may contain characters that cannot be encoded.
    classes = [name.encode("utf-8", "backslashreplace").decode() for name in saved.classes]
    margin, cut = face_margin(saved, args.face_margin)
    if args.detector == "none":
        cut = whole_line(saved.preprocessing.face_margin)
    pictures = Pictures(
        paths, args.detector, margin=margin, min_score=args.min_score, view=predictor.view
    )
    workers = min(worker_count(args.num_workers, ProcessInfo()), len(paths))
    if args.num_workers is None:
        workers = min(workers, len(paths) // 16)  # starting a worker takes time, too
    beside = Beside(args.annotated, args.features, classes, len(paths))
    kind, counts = find_format(args.format, args.output), Counter()
    with open_rows(args.output, kind, classes) as rows:
        say(
            f"{saved.name}, {len(classes)} classes, fp32 on {device_name(predictor.device)}; "
            f"detector: {args.detector}; {len(paths):,} pictures"
        )
        for line in (cut, *skipped_line(skipped), *(f"note: {note}" for note in saved.notes)):
            say(line)
        # A progress bar would be mixed with the rows if both were on the same terminal.
        hidden = True if args.output is None and sys.stdout.isatty() else None
        found = pictures.in_order(workers)
        found = tqdm(found, total=len(paths), unit="picture", disable=hidden)
        for picture, prediction in predict_pictures(found, predictor, args.batch_size):
            if not all(map(all_finite, prediction)):
                raise Fault(f"{args.checkpoint}: its outputs for {picture.path} are not finite")
            counts += write_picture(rows, picture, prediction, classes)
            beside.add(picture, prediction)
    beside.finish()
    conclude(counts)


def all_finite(values: Sequence) -> bool:
    """Whether an array has no NaN or infinite values."""
    import numpy as np

    return bool(np.isfinite(values).all())


def device_name(device: "torch.device") -> str:
    """A device in words, with the model name if it is a GPU."""
    import torch

    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"


def say(text: str) -> None:
    """Print a line to standard error, above the progress bar."""
    from tqdm import tqdm

    with suppress(OSError):
        tqdm.write(one_line(text), sys.stderr)


def labels_of(prediction: "Prediction", classes: Sequence[str]) -> list[str]:
    """The most probable class of each face."""
    return [classes[k] for k in prediction.probabilities.argmax(axis=1)]


def write_picture(
    rows: RowWriter, picture: "FoundFaces", prediction: "Prediction", classes: Sequence[str]
) -> Counter:
    """Write the rows of a picture; returns the counts to add to the totals."""
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


def conclude(counts: Counter) -> None:
    """Print the totals. Raises Fault (exit code 1) if any picture has no prediction."""
    text = f"{counts['faces']:,} faces in {counts[OK]:,} of {counts.total() - counts['faces']:,}"
    text += f" pictures; without a face: {counts[NO_FACE]:,}; unreadable: {counts[UNREADABLE]:,}"
    if counts[NO_FACE] or counts[UNREADABLE]:
        hint = "; if the pictures are faces already, use --detector none" * bool(counts[NO_FACE])
        raise Fault(text + hint)
    say(text)


class Beside:
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

    def add(self, picture: "FoundFaces", prediction: "Prediction") -> None:
        """Add the next picture, with the prediction for its faces."""
        if self._folder and not picture.problem:
            self._draw(picture, prediction)
        self._number += 1
        if self._file:
            labels = labels_of(prediction, self._classes)
            self._rows.append((inert(picture.path), labels, prediction.features))

    def _draw(self, picture: "FoundFaces", prediction: "Prediction") -> None:
        from datasets.decode import UnreadableImage, load_rgb
        from inference.annotate import annotated, file_name

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
        """Write the features of all faces."""
        if not self._file:
            return
        import numpy as np

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
        raise BadInput(f"{flag}: {folder} cannot be written to ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
