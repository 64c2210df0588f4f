"""Write AffectNet to disk as its owners ship it, with synthetic faces that can be learned from.

`counts` are images of each expression by split: `{"train": (4,) * 8, "test": (2,) * 8}`; a shorter
tuple leaves out the last expressions.
"""

import json
from functools import cache
from itertools import cycle

import numpy as np
from PIL import Image

from datasets.synthetic.generator import SyntheticFaces

FACE = 64  # pixels
WHOLE_FACE = 1 / 6  # with this margin, boxes of the 2017 lists hold the whole face
HEADER = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,"
    "expression,valence,arousal"
)
ENDINGS = ("jpg", "JPG", "jpeg", "png", "bmp", "tif")
LISTS = {"train": "training.csv", "test": "validation.csv"}


@cache
def draw(split, counts):
    """[(label, uint8 (FACE, FACE, 3))] of `counts` synthetic faces per class, classes mixed."""
    faces = SyntheticFaces(8 * max(counts), FACE, seed=7, split=split)
    left = list(counts) + [0] * (8 - len(counts))
    drawn = []
    for i in range(len(faces)):
        label = faces.label(i)
        if left[label]:
            left[label] -= 1
            drawn.append((label, faces.image(i)))
    return drawn


def write_affectnet_csv(
    root,
    counts,
    lists="Manually_Annotated_file_lists",
    images="Manually_Annotated_compressed/Manually_Annotated_Images",
):
    """The 2017 release: faces somewhere in a photograph, with boxes that need margin WHOLE_FACE.

    As in the original release, the validation list has no header.
    """
    for folder in (root / lists, root / images):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, of_split in counts.items():
        rows = [HEADER] if split == "train" else []
        for (label, face), ending in zip(draw(split, of_split), cycle(ENDINGS)):
            name = f"{rng.integers(1, 4)}/{rng.bytes(28).hex()}.{ending}"
            (root / images / name).parent.mkdir(exist_ok=True)
            left, top = rng.integers(0, FACE, 2)
            photograph = np.full((2 * FACE, 2 * FACE, 3), rng.integers(0, 256, 3), np.uint8)
            photograph[top : top + FACE, left : left + FACE] = face
            Image.fromarray(photograph).save(root / images / name, quality=95)
            # The box leaves some of the head out, as detectors' boxes do.
            box = f"{left + FACE // 8},{top + FACE // 8},{FACE * 3 // 4},{FACE * 3 // 4}"
            rows.append(f"{name},{box},1.5;2.5;3.5;4.5,{label},-0.1,0.25")
        (root / lists / LISTS[split]).write_text("".join(f"{row}\n" for row in rows))


def write_affectnet_npy(root, counts):
    """The npy release: ids start from 0 in both splits, labels as text, integer or float."""
    folders, kinds = {"train": "train_set", "test": "val_set"}, cycle((str, int, float))
    for split, of_split in counts.items():
        folder = _folder(root / folders[split])
        for i, (label, face) in enumerate(draw(split, of_split)):
            Image.fromarray(face).save(folder / "images" / f"{i}.jpg", quality=95)
            np.save(folder / "annotations" / f"{i}_exp.npy", np.array(next(kinds)(label)))
            for other in ("val", "aro"):
                np.save(folder / "annotations" / f"{i}_{other}.npy", np.array("-0.25"))


def write_affectnet_plus(root, counts, keys=("Human-Label", "human-label", "Human_Label")):
    """AffectNet+ with each of the keys in turn."""
    folders, keys = {"train": "train_set", "test": "validation_set"}, cycle(keys)
    for split, of_split in counts.items():
        folder = _folder(root / "human_annotated" / folders[split])
        for i, (label, face) in enumerate(draw(split, of_split)):
            Image.fromarray(face).save(folder / "images" / f"{i}.jpg", quality=95)
            record = {"name": f"{i}.jpg", "Soft-Label": [0.5] * 8, next(keys): label}
            (folder / "annotations" / f"{i}.json").write_text(json.dumps(record))


def _folder(split):
    for part in ("images", "annotations"):
        (split / part).mkdir(parents=True)
    return split
