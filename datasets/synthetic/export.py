"""Writes synthetic faces as the files of a data set, to try what is to run on the real one later.

The layout is that of RAF-DB's owners: see `datasets.fer.rafdb`.
"""

from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from datasets.fer.rafdb import CLASSES, LISTS, SYNTHETIC
from datasets.synthetic.generator import SPLITS, SyntheticFaces
from util.errors import BadInput
from util.files import disk_errors, write_file

SIDE = 100  # pixels, as RAF-DB's aligned images, which are cropped to the face, too
QUALITY = 95  # of JPEG


def export_rafdb(folder: str | Path, counts: tuple[int, int], seed: int) -> None:
    """Write `counts` training and test images and their labels, balanced over RAF-DB's classes.

    The labels are written last: without them, the folder is not taken for a data set. Raises
    BadInput for a folder that has files or cannot be written, Fault if the disk fails later.
    """
    root = Path(folder).expanduser()
    images, labels = root / "basic" / "Image" / "aligned", root / "basic" / "EmoLabel"
    with disk_errors(f"--export {folder}", BadInput):
        if root.exists() and any(root.iterdir()):
            raise BadInput(f"--export {folder}: is not empty; name a new folder")
        for path in (images, labels):
            path.mkdir(parents=True)
    rows = []
    for split, count in zip(SPLITS, counts, strict=True):
        # Eight images each have every expression once; RAF-DB has no contempt.
        faces = SyntheticFaces(8 * (count // 7 + 1), SIDE, seed, split, lab=True)
        shown = ((i, faces.classes[faces.label(i)]) for i in range(len(faces)))
        chosen = islice(((i, name) for i, name in shown if name in CLASSES), count)
        for number, (i, name) in enumerate(tqdm(chosen, split, count, leave=False), 1):
            stem = f"{split}_{number:05d}"
            with disk_errors(images):
                path = images / f"{stem}_aligned.jpg"
                Image.fromarray(faces.image(i)).save(path, quality=QUALITY)
            rows.append(f"{stem}.jpg {CLASSES.index(name) + 1}\n")
    with disk_errors(labels):
        # So that no result on them is taken for one on RAF-DB.
        write_file(labels / SYNTHETIC, "Synthetic faces, by python -m datasets.synthetic\n")
        write_file(labels / LISTS[0], "".join(rows))
