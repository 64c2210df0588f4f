"""Write small labelled data sets to disk as their owners ship them, with all quirks.

The pictures are synthetic faces that show the expression of their label, so that a run can learn
from them; with `drawn=False` they are plain colours, which is faster.
"""

import csv
import io
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.labels import EXPRESSIONS, ORDERS
from datasets.synthetic.generator import CLASSES, SyntheticFaces

SIDE = 64  # of a synthetic face, in pixels
USAGES = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
FER_FOLDERS = {"train": "FER2013Train", "val": "FER2013Valid", "test": "FER2013Test"}
VOTES = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]
VOTES += ["unknown", "NF"]


@cache
def drawn_faces(split):
    return SyntheticFaces(CLASSES * 10_000, SIDE, split="test" if split == "test" else "train")


def picture(expression, k, split, side, drawn=True):
    """The k-th face of a split with an expression, as an image of side × side pixels."""
    if not drawn:
        shade = zlib.crc32(f"{expression} {k} {split}".encode()).to_bytes(4, "big")
        return Image.new("RGB", (side, side), tuple(shade[:3]))
    faces, wanted = drawn_faces(split), EXPRESSIONS.index(expression)
    block = (k + 5_000 * (split == "val")) * CLASSES  # each holds every expression once
    index = next(i for i in range(block, block + CLASSES) if faces.label(i) == wanted)
    return Image.fromarray(faces.image(index)).resize((side, side), Image.Resampling.BICUBIC)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_lines(path, lines, newline="\n", last_newline=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = newline.join(lines) + (newline if last_newline else "")
    path.write_bytes(text.encode())


def write_rafdb(
    root,
    train_per_class=2,
    test_per_class=1,
    variant="list",
    *,
    images=("aligned",),
    ending=".jpg",
    list_name="list_patition_label.txt",
    between=" ",
    newline="\n",
    last_newline=True,
    extra=(),
    drawn=True,
):
    """`variant`: "list" and "split" as the owners ship them, "folder" as others repackage it.

    `extra`: further lines of the list. The k-th image of a class is number 7k + class + 1.
    """
    root, lines = Path(root), {"train": [], "test": []}
    for split, count in (("train", train_per_class), ("test", test_per_class)):
        for k in range(count):
            for place, expression in enumerate(ORDERS["rafdb"]):
                stem = f"{split}_{7 * k + place + 1:05d}"
                lines[split].append(f"{stem}.jpg{between}{place + 1}")
                face = picture(expression, k, split, 100, drawn)
                if variant == "folder":
                    folder = root / "DATASET" / split / str(place + 1)
                    save(face, folder / f"{stem}_aligned{ending}")
                for kind in images if variant != "folder" else ():
                    end = "_aligned" if kind.lower() == "aligned" else ""
                    save(face, root / "basic" / "Image" / kind / f"{stem}{end}{ending}")
    labels = root / "basic" / "EmoLabel"
    if variant == "list":
        every = [*lines["train"], *lines["test"], *extra]
        write_lines(labels / list_name, every, newline, last_newline)
    if variant == "split":
        for split in lines:
            write_lines(labels / f"{split}_label.txt", lines[split], newline, last_newline)
    return root


def fer_rows(order, counts, drawn):
    """(split, place of the expression in the order, grey image (48, 48)) of every image."""
    for split, count in counts.items():
        for k in range(count):
            for place, expression in enumerate(ORDERS[order]):
                face = picture(expression, k, split, 48, drawn).convert("L")
                yield split, place, np.asarray(face)


def clear_votes(place):
    """Seven votes for one emotion, two for the next, one for unknown, so that all rules agree."""
    counts = [0] * 10
    counts[place], counts[(place + 1) % 8], counts[8] = 7, 2, 1
    return counts


def csv_lines(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().splitlines()


def write_fer2013(
    root,
    train_per_class=2,
    val_per_class=1,
    test_per_class=1,
    *,
    header=("emotion", "pixels", "Usage"),
    extra=(),
    newline="\n",
    last_newline=True,
    drawn=True,
):
    """`fer2013.csv`; `extra`: further rows (emotion, pixels, Usage)."""
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    rows = [
        [place, " ".join(map(str, grey.ravel())), USAGES[split]]
        for split, place, grey in fer_rows("fer2013", counts, drawn)
    ]
    path = Path(root) / "fer2013.csv"
    write_lines(path, csv_lines([header, *rows, *extra]), newline, last_newline)
    return Path(root)


def write_ferplus_csv(
    root,
    train_per_class=2,
    val_per_class=1,
    test_per_class=1,
    *,
    votes=None,
    nameless=0,
    header=("Usage", "Image name", *VOTES),
    newline="\n",
    last_newline=True,
    drawn=True,
):
    """`fer2013.csv` and `fer2013new.csv`, row by row.

    `votes`: rows of ten cells to write instead of clear votes, from the first on; `nameless`: how
    many rows without an image name to add at the end of the training part.
    """
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    images, labels = [], []
    for number, (split, place, grey) in enumerate(fer_rows("ferplus", counts, drawn)):
        pixels = " ".join(map(str, grey.ravel()))
        images.append([0, pixels, USAGES[split]])
        labels.append([USAGES[split], f"fer{number:07d}.png", *clear_votes(place)])
    for _ in range(nameless):
        images.insert(8 * train_per_class, [0, " ".join(["0"] * 48 * 48), "Training"])
        labels.insert(8 * train_per_class, ["Training", "", *([0] * 9), 10])
    for row, cells in zip(labels, votes or [], strict=False):
        row[2:] = cells
    root = Path(root)
    write_lines(root / "fer2013.csv", csv_lines([["emotion", "pixels", "Usage"], *images]))
    lines = csv_lines([header, *labels])
    write_lines(root / "fer2013new.csv", lines, newline, last_newline)
    return root


def write_ferplus_folders(
    root,
    train_per_class=2,
    val_per_class=1,
    test_per_class=1,
    *,
    votes=None,
    box=True,
    header=False,
    newline="\n",
    last_newline=True,
    drawn=True,
):
    """`FER2013Train/fer0000000.png`, … and a `label.csv` in each folder; `votes` as above."""
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    rows = {split: [] for split in counts}
    root, votes = Path(root), list(votes or [])
    for number, (split, place, grey) in enumerate(fer_rows("ferplus", counts, drawn)):
        name = f"fer{number:07d}.png"
        save(Image.fromarray(grey), root / FER_FOLDERS[split] / name)
        cells = votes[number] if number < len(votes) else clear_votes(place)
        rows[split].append([name, *(["(0, 0, 48, 48)"] if box else []), *cells])
    for split, part in rows.items():
        first = [["Image name", *(["box"] if box else []), *VOTES]] if header else []
        path = root / FER_FOLDERS[split] / "label.csv"
        write_lines(path, csv_lines([*first, *part]), newline, last_newline)
    return root


def write_folder(root, splits, classes=EXPRESSIONS, *, ending=".png", side=SIDE, drawn=True):
    """Class folders: `splits` is {"train": images per class, …} or, without splits, a number.

    `classes`: folder names, or {folder name: expression shown}; the names of the 8 expressions in
    their order unless given. Names that are not expressions need the mapping or `drawn=False`.
    """
    root = Path(root)
    shown = classes if isinstance(classes, dict) else {name: name for name in classes}
    for split, count in splits.items() if isinstance(splits, dict) else [("", splits)]:
        for name, expression in shown.items():
            for k in range(count):
                kind = split if split in ("val", "test") else "train"
                face = picture(expression, k, kind, side, drawn)
                save(face, root / split / name / f"{k:04d}{ending}")
    return root
