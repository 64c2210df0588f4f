"""The packed store: a data set decoded once, whose flat uint8 files are memory-mapped.

A folder with `part-00000.bin`, … (pixels, image after image), `index.npy` (offset, height, width of
each), `names.bin`, `labels.npy` and `targets.npy` if there are labels and targets, and
`manifest.json`, which holds the hash of every other file and of itself. `datasets.packed.pack`
writes it.
"""

import hashlib
import json
import os
from bisect import bisect_right
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np

from datasets.decode import UnreadableImage
from datasets.folder import FileList
from datasets.labelled import LabelledImages, LabelledSet, Subset
from util.errors import BadInput
from util.wording import printable

FORMAT, VERSION = "MAE-SFER packed store", 1
MANIFEST, JOURNAL = "manifest.json", "packing.jsonl"
INDEX, NAMES, LABELS, TARGETS = "index.npy", "names.bin", "labels.npy", "targets.npy"
MOST_SIDE = 2**20  # pixels, so that the product of two sides fits into 64 bits
ANEW = "remove the folder and pack it again (main_pack.py)"


def is_store(folder: Path) -> bool:
    """Whether a folder is a packed store, even an unfinished or damaged one."""
    marks = (MANIFEST, INDEX, NAMES, part_name(0))
    there = [os.path.isfile(folder / mark) for mark in (JOURNAL, *marks)]
    return there[0] or sum(there[1:]) > 1


def part_name(number: int) -> str:
    """The name of the file with part `number` of the pixels."""
    return f"part-{number:05d}.bin"


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a finished store of this version. Raises BadInput for any other."""
    path = folder / MANIFEST
    if not path.is_file() and (folder / JOURNAL).is_file():
        raise _bad(folder, "is unfinished: rerun the same main_pack.py command to resume")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        kind, version, known = (manifest[key] for key in ("format", "version", "digest"))
    except OSError as e:
        raise _bad(folder, f"its {MANIFEST} cannot be read ({e.strerror}); {ANEW}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _bad(folder, f"its {MANIFEST} is damaged; {ANEW}") from None
    if kind != FORMAT or version != VERSION:
        found = f"{printable(str(kind))}, version {version}"
        raise _bad(folder, f"is a {found}; this program reads version {VERSION}: {ANEW}")
    if known != manifest_digest(manifest):
        raise _bad(folder, f"its {MANIFEST} has been edited; {ANEW}")
    return manifest


def manifest_digest(manifest: dict) -> str:
    """Hash of everything in a manifest, and so of all bytes of its store."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, as `sha256sum` prints it."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _bad(folder: Path, what: str) -> BadInput:
    return BadInput(f"packed store {printable(str(folder))}: {what}")


class PackedImages:
    """All images of a store, as a Source: read-only views into the memory map.

    Each process maps a part when it first needs it. Pickling keeps only the path and the manifest.
    """

    def __init__(self, folder: Path) -> None:
        """Raises BadInput for a store that is unfinished, truncated, edited or of another version.

        All files except the pixels are hashed; of these only the sizes are checked, see `verify`.
        """
        manifest = read_manifest(folder)
        try:
            for number, part in enumerate(manifest["parts"]):
                if part["file"] != part_name(number):
                    raise _bad(folder, f"its {MANIFEST} names {printable(part['file'])}; {ANEW}")
                _check_size(folder, part["file"], part["bytes"])
            for name, known in manifest["files"].items():
                _check_file(folder, name, known)
            self._load(folder, manifest)
            fits = self._index_fits() and self._labels_fit()
        except BadInput:
            raise
        # Hashes find damage, but a malicious store has correct ones, and can contain anything.
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise _bad(folder, f"is not a valid store ({type(e).__name__}: {e}); {ANEW}") from None
        if not fits:
            raise _bad(folder, f"{INDEX} does not fit the pixels; {ANEW}")

    def _index_fits(self) -> bool:
        """Whether images follow one another, each within one part, and fill the parts."""
        index, end = self._index, self.manifest["bytes"]
        if index.ndim != 2 or index.shape[1] != 3 or index.dtype != np.int64:
            return False
        offsets, sides = index[:, 0], index[:, 1:]
        if (sides < 1).any() or (sides > MOST_SIDE).any():
            return False
        ends = offsets + 3 * sides[:, 0] * sides[:, 1]
        follow = np.array_equal(ends, np.append(offsets[1:], end))
        return follow and self._starts[-1] == end and np.isin(self._starts[:-1], offsets).all()

    def _labels_fit(self) -> bool:
        """Whether there are as many names and labels as images, and the splits add up to these."""
        n, sizes, known = len(self), self.manifest["splits"].values(), self.manifest["set"]
        if min(sizes, default=0) < 0 or sum(sizes) != n or len(self._names) != n:
            return False
        if not known:
            return True
        labels, classes = np.load(self.folder / LABELS), len(known["classes"])
        if TARGETS in self.manifest["files"]:
            targets = np.load(self.folder / TARGETS, mmap_mode="r")
            if targets.shape != (n, classes):
                return False
        return labels.shape == (n,) and np.isin(labels, np.arange(classes)).all()

    def _load(self, folder: Path, manifest: dict) -> None:
        self.folder, self.manifest, self.digest = folder, manifest, manifest["digest"]
        self._index = np.asarray(np.load(folder / INDEX, mmap_mode="r"))  # (n, 3) int64
        self._names = FileList("", (folder / NAMES).read_bytes())
        sizes = [part["bytes"] for part in manifest["parts"]]
        self._starts = list(accumulate(sizes, initial=0))
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> tuple[Path, dict]:
        return self.folder, self.manifest

    def __setstate__(self, state: tuple[Path, dict]) -> None:
        self._load(*state)

    def __len__(self) -> int:
        return len(self._index)

    def image(self, i: int) -> np.ndarray:
        """Image i -> (H, W, 3) uint8, read-only. Raises UnreadableImage if its part is missing."""
        offset, height, width = self._index[i].tolist()
        part = bisect_right(self._starts, offset) - 1
        if part not in self._maps:
            self._maps[part] = self._map(part)
        start = offset - self._starts[part]
        return self._maps[part][start : start + 3 * height * width].reshape(height, width, 3)

    def _map(self, part: int) -> np.ndarray:
        """The bytes of a part, (n,) uint8. Raises UnreadableImage if some are missing."""
        path, size = self.folder / part_name(part), self._starts[part + 1] - self._starts[part]
        try:
            _check_size(self.folder, path.name, size)
            # Not as np.memmap: slicing that takes longer than all the rest of `image`.
            return np.asarray(np.memmap(path, np.uint8, mode="r"))
        except (OSError, BadInput) as e:
            reason = getattr(e, "strerror", None) or str(e)
        raise UnreadableImage(str(path), reason, of_disk=True)

    def name(self, i: int) -> str:
        """The image's path below `--data_path` when it was packed."""
        return self._names.relative(i)

    def split(self, name: str) -> Subset:
        """The images of one split."""
        splits = self.manifest["splits"]
        start = sum(splits[other] for other in takewhile(name.__ne__, splits))
        return Subset(self, np.arange(start, start + splits[name]))

    def labelled(self) -> LabelledSet:
        """The set that was packed. Raises BadInput for images without labels."""
        known = self.manifest["set"]
        if not known:
            what = "is a packed store of images without labels; use it for pre-training"
            raise _bad(self.folder, what)
        labels, targets = np.load(self.folder / LABELS), None
        if TARGETS in self.manifest["files"]:
            targets = np.load(self.folder / TARGETS)
        splits = {}
        for name in self.manifest["splits"]:
            images = self.split(name)
            rows = None if targets is None else targets[images.indices]
            splits[name] = LabelledImages(images, labels[images.indices], rows)
        published = {
            s: tuple(n) if isinstance(n, list) else n for s, n in known["published"].items()
        }
        return LabelledSet(
            known["name"],
            known["title"],
            classes=tuple(known["classes"]),
            splits=splits,
            rule=known["rule"],
            notes=(*known["notes"], *self.notes()),
            published=published,
            options=self._options(known),
        )

    def _options(self, known: dict) -> dict[str, object]:
        """See LabelledSet; for stores that do not record them, derived from the packing options."""
        if "options" in known:
            return dict(known["options"])
        options = {k: v for k, v in self.manifest["settings"].items() if v is not None}
        if "cropped by its owners" in known["title"]:
            options.pop("face_margin", None)
        counted = {"nb_classes": len(known["classes"])} if known["name"] == "affectnet" else {}
        return {**counted, **options}

    def notes(self) -> list[str]:
        """The notes from packing, and a description of the store."""
        found = [*self.manifest.get("notes", ()), *self.manifest.get("duplicates", ())]
        return [*found, self.described()]

    def described(self) -> str:
        """One line: the number of images, their size and that of the store."""
        side, missing = self.manifest["short_side"], len(self.manifest["left_out"])
        size = f"short side at most {side}" if side else "at their own size"
        left_out = f"; {missing:,} unreadable ones left out" if missing else ""
        return f"packed: {len(self):,} images, {size}, {gigabytes(self._starts[-1])}{left_out}"

    def verify(self) -> None:
        """Hash all pixels. Raises BadInput naming the first part that has changed since packing."""
        for part in self.manifest["parts"]:
            if file_digest(self.folder / part["file"]) != part["sha256"]:
                raise _bad(self.folder, f"{part['file']} has changed since it was packed; {ANEW}")


def _check_file(folder: Path, name: str, known: str) -> None:
    """Raise BadInput if a file has changed since packing, or is not one of a store's files."""
    if name not in (INDEX, NAMES, LABELS, TARGETS):
        raise _bad(folder, f"its {MANIFEST} names {printable(name)}; {ANEW}")
    try:
        found = file_digest(folder / name)
    except OSError as e:
        raise _bad(folder, f"{name} cannot be read ({e.strerror}); {ANEW}") from None
    if found != known:
        raise _bad(folder, f"{name} has changed since it was packed (truncated or edited); {ANEW}")


def _check_size(folder: Path, name: str, size: int) -> None:
    """Raise BadInput unless a part has its original size."""
    try:
        found = (folder / name).stat().st_size
    except OSError as e:
        raise _bad(folder, f"{name} cannot be read ({e.strerror}); {ANEW}") from None
    if found != size:
        raise _bad(folder, f"{name} has {found:,} bytes instead of {size:,}; {ANEW}")


def gigabytes(count: float) -> str:
    """Format a number of bytes, such as `1.5 GB` or `3.2 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
