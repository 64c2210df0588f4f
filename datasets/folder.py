"""Lists image files: those in a folder, at any depth, or those named in a list.

The names in a folder are sorted as bytes, so that the order is the same on every machine and file
system. A folder is listed anew at every start: that takes a second for 270,000 files, and the time
of a folder, which archivers and `touch` restore, does not show that it is unchanged.
"""

import hashlib
import heapq
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from datasets.annotation_files import evenly_spaced
from datasets.decode import load_rgb
from datasets.filetypes import (
    HEIF_ENDINGS,
    OTHER_ENDINGS,
    TRIED,
    VIDEO_ENDINGS,
    begins_like_image,
    ending,
    image_endings,
    is_hidden,
)
from datasets.listfile import bad, check_entries, read_list
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable


class FileList:
    """The paths of a data set: one bytes blob, and where each name starts in it.

    270,000 names take about 20 MB, which worker processes share: with a Python object for each
    name, reference counting would copy the memory pages. `digest` identifies the names and their
    order, wherever the data set is stored.
    """

    def __init__(
        self,
        root: str,
        blob: bytes,
        skipped: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`root`: absolute path of a folder; `blob`: names relative to it, each ended by a NUL.

        `skipped` counts the other files in the folder, by extension; `notes` say how a list of
        names was read.
        """
        self.root, self._blob = root, blob
        self.skipped, self.notes = dict(skipped or {}), list(notes)
        ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
        self._starts = np.concatenate(([0], ends + 1))  # (len + 1,) int64
        self.digest = hashlib.sha256(blob).hexdigest()

    @classmethod
    def of(
        cls,
        root: str,
        names: Iterable[bytes],
        skipped: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> "FileList":
        return cls(root, b"".join(name + b"\0" for name in names), skipped, notes)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def relative(self, i: int) -> str:
        """Name i, relative to `root` (absolute if a list has it so)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"file {i} of {len(self)}")
        i %= len(self)
        return os.fsdecode(self._blob[self._starts[i] : self._starts[i + 1] - 1])

    def __getitem__(self, i: int) -> str:
        return os.path.join(self.root, self.relative(i))


class ImageFiles:
    """A Source: the images of a FileList, decoded when they are needed."""

    def __init__(self, files: FileList) -> None:
        self.files, self.digest = files, files.digest

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        """Image i -> (H, W, 3) uint8. Raises UnreadableImage."""
        return load_rgb(self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]


def list_images(data_path: str | os.PathLike) -> FileList:
    """List the images of a folder (of its training split, if there is one), a text list or a CSV.

    Raises BadInput, saying what was found instead of images.
    """
    given = os.fsdecode(data_path)
    if not given:
        raise BadInput("--data_path is empty: give a folder of images or a list of files")
    path = os.path.abspath(os.path.expanduser(given))
    return _scan(path) if stat.S_ISDIR(_mode_of(path)) else _of_list(path)


def images_below(folder: str) -> FileList:
    """List the images of a folder, at any depth, sorted; there may be none.

    Raises BadInput for a folder that cannot be read.
    """
    top = os.path.abspath(folder)
    try:
        names, skipped = _walk(top)
    except BadInput as error:
        raise BadInput(str(error).removeprefix("--data_path ")) from None
    return FileList.of(top, sorted(names), skipped)


def _mode_of(path: str) -> int:
    """The `st_mode` of a path. Raises BadInput unless it is a folder or a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise bad(path, f"is a link to {target}, which does not exist") from None
        parent = os.path.dirname(path)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        tail = printable(os.path.relpath(path, parent).split(os.sep)[0])
        what = f"does not exist; {printable(parent)} does, but has no {tail}"
        raise bad(path, f"{what}: check the spelling") from None
    except (OSError, ValueError) as e:
        raise bad(path, f"cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise bad(path, "is neither a folder nor a file; give a folder of images or a list")
    return mode


def _scan(path: str) -> FileList:
    """The images below a folder or its training split, sorted."""
    for root in [*_training(path), path]:
        names, others = _walk(root)
        if names:
            return FileList.of(root, sorted(names), others)
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]
    kinds = ", ".join(f"{n} {printable(kind) or 'without an extension'}" for kind, n in most)
    seen = f"but {others.total()} other files: mostly {kinds}" if others else "nor any other file"
    heif = " (HEIC needs pip install pillow-heif)" if HEIF_ENDINGS & others.keys() else ""
    raise bad(
        path, f"holds no images, {seen}{heif}; give a folder of jpg, jpeg, png, … files (any depth)"
    )


def _training(path: str) -> list[str]:
    """The folders of training images in a folder; one that is called `train` comes first."""
    try:
        names = [name for name in os.listdir(path) if split_called(name) == "train"]
    except OSError:  # reported by `_walk`
        return []
    folders = [os.path.join(path, name) for name in sorted(names, key=lambda n: (n != "train", n))]
    return list(filter(os.path.isdir, folders))


def _walk(top: str) -> tuple[list[bytes], Counter]:
    """Image names relative to `top`, and the number of other files by extension.

    Files of unknown extension are images if they begin like one. A folder that can be reached twice
    is listed once: under its real name if that is below `top`, else under the first link in byte
    order. So the result does not depend on the file system's own order.
    """
    names, others, unknown = [], Counter(), defaultdict(list)
    above = os.path.realpath(top)
    seen = set()  # (st_dev, st_ino), beginning with the folders above, as links to them are loops
    while above != (above := os.path.dirname(above)):
        with suppress(OSError):
            seen.add(_identity(os.stat(above)))
    folders, links = [b""], []
    while folders or links:
        relative = folders.pop() if folders else heapq.heappop(links)
        folder = os.path.join(os.fsencode(top), relative)
        try:
            identity = _identity(os.stat(folder))
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                _sort_out(
                    entries,
                    relative,
                    names=names,
                    folders=folders,
                    links=links,
                    others=others,
                    unknown=unknown,
                )
        except OSError as e:
            where = printable(os.fsdecode(e.filename or folder))
            what = f"cannot read {where} ({e.strerror}); make it readable or move it out"
            raise bad(top, what) from None
    for kind, paths in unknown.items():
        images = _images_among(top, paths)
        names += images
        if len(images) < len(paths):
            others[kind] += len(paths) - len(images)
    return names, others


def _images_among(top: str, paths: list[bytes]) -> list[bytes]:
    """The files that begin like images, of `paths` that all have one unknown extension."""
    paths = sorted(paths)
    tried = set(evenly_spaced(len(paths), TRIED))  # spread: files of one folder may be alike
    found = []
    for part in (tried, set(range(len(paths))) - tried):
        some = [paths[i] for i in part]
        found += [p for p in some if begins_like_image(os.path.join(os.fsencode(top), p))]
        if not found:  # the others may be hundreds of thousands: they are not opened
            break
    return found


def _identity(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _sort_out(
    entries: Iterable[os.DirEntry],
    relative: bytes,
    names: list[bytes],
    folders: list[bytes],
    links: list[bytes],
    others: Counter,
    unknown: dict[str, list[bytes]],
) -> None:
    """Sort one folder's entries into image names, folders, linked folders (a heap) and others.

    Files with an unknown extension, or without one, go to `unknown`, by extension. Does not ask the
    file system about files with an image's extension: 270,000 requests take minutes on a network
    disk, and a dangling link is noticed when it is read.
    """
    images, known = image_endings(), HEIF_ENDINGS | VIDEO_ENDINGS | OTHER_ENDINGS
    for entry in entries:
        name = os.fsdecode(entry.name)
        if is_hidden(name):
            continue
        path = os.path.join(relative, entry.name)
        if entry.is_dir(follow_symlinks=False):
            folders.append(path)
        elif (kind := ending(name)) in images:
            names.append(path)
        elif entry.is_symlink() and os.path.isdir(entry.path):
            heapq.heappush(links, path)
        elif kind in known:
            others[kind] += 1
        else:
            unknown[kind].append(path)


def _of_list(path: str) -> FileList:
    """The files that a text list or CSV names, in its order.

    If it has a column of splits, only those of the training split.
    """
    listed = read_list(path)
    names, notes = listed.training(), listed.notes()
    check_entries(path, names, listed)
    if len(names) < len(listed.names):
        count = f"{len(names):,} training images of {len(listed.names):,} in the list"
        notes.append(f"only the {count} are used")
    elif listed.splits and not any(split_called(split) == "train" for split in listed.splits):
        name = printable(os.path.basename(path))
        notes.append(f"warning: {name} has no training split: all its images are used")
    return FileList.of(os.path.dirname(path), map(os.fsencode, names), notes=notes)
