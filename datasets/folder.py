"""Lists image files: those in a folder, at any depth, or those named in a list.

The names in a folder are sorted as bytes, so that the order is the same on every machine and file
system. They can be kept in a cache file; a restart then only checks when each folder last changed.
"""

import hashlib
import heapq
import json
import os
import stat
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
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
    reads_heif,
)
from datasets.listfile import bad, check_entries, read_list
from datasets.split_names import split_called
from util.errors import BadInput
from util.wording import printable

CACHE_VERSION = 3
# If a folder changed this shortly before the scan, it may have changed again within the same tick
# of the file system's clock, without a new modification time. Its cached listing is not used.
RACY_NS = 2_000_000_000


class FileList:
    """The paths of a data set: one bytes blob, and where each name starts in it.

    270,000 names take about 20 MB, which worker processes share: with a Python object for each
    name, reference counting would copy the memory pages. `digest` identifies the names and their
    order, wherever the data set is stored.
    """

    def __init__(self, root: str, blob: bytes, skipped: Mapping[str, int] | None = None) -> None:
        """`root`: absolute path of a folder; `blob`: names relative to it, each ended by a NUL.

        `skipped` counts the other files in the folder, by extension.
        """
        self.root, self._blob, self.skipped = root, blob, dict(skipped or {})
        ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0)
        self._starts = np.concatenate(([0], ends + 1))  # (len + 1,) int64
        self.digest = hashlib.sha256(blob).hexdigest()

    @classmethod
    def of(
        cls, root: str, names: Iterable[bytes], skipped: Mapping[str, int] | None = None
    ) -> "FileList":
        return cls(root, b"".join(name + b"\0" for name in names), skipped)

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


def list_images(data_path: str | os.PathLike, cache: str | os.PathLike | None = None) -> FileList:
    """List the images of a folder (of its training split, if there is one), a text list or a CSV.

    `cache` is a file that keeps the result; it is used until a folder (or the list) has changed.
    Raises BadInput, saying what was found instead of images.
    """
    given = os.fsdecode(data_path)
    if not given:
        raise BadInput("--data_path is empty: give a folder of images or a list of files")
    path = os.path.abspath(os.path.expanduser(given))
    mode = _mode_of(path)
    files, stamps = (_read_cache(cache, path) if cache else None), None
    scanned_ns = time.time_ns()  # taken before the scan, so that changes during it are newer
    if files is None:
        files, stamps = _scan(path) if stat.S_ISDIR(mode) else _of_list(path)
    if not stat.S_ISDIR(mode):
        check_entries(path, len(files), files.relative)
    if cache and stamps is not None:
        _write_cache(cache, path, scanned_ns=scanned_ns, files=files, stamps=stamps)
    return files


def images_below(folder: str) -> FileList:
    """List the images of a folder, at any depth, sorted; there may be none.

    Raises BadInput for a folder that cannot be read.
    """
    top = os.path.abspath(folder)
    try:
        names, _, skipped = _walk(top)
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


def _stamp(path: str | bytes, st: os.stat_result | None = None) -> list[int]:
    """[modification time in ns, size (0 for folders)]: differs if a folder or list has changed."""
    st = st or os.stat(path)
    return [st.st_mtime_ns, 0 if stat.S_ISDIR(st.st_mode) else st.st_size]


def _scan(path: str) -> tuple[FileList, dict[str, list[int]]]:
    """The images below a folder or its training split, sorted, and the stamp of every folder."""
    for root in [*_training(path), path]:
        names, stamps, others = _walk(root)
        if names:
            return FileList.of(root, sorted(names), others), stamps
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


def _walk(top: str) -> tuple[list[bytes], dict[str, list[int]], Counter]:
    """Image names relative to `top`, stamp of every folder, number of other files by extension.

    Files of unknown extension are images if they begin like one. A folder that can be reached twice
    is listed once: under its real name if that is below `top`, else under the first link in byte
    order. So the result does not depend on the file system's own order.
    """
    names, stamps, others, unknown = [], {}, Counter(), defaultdict(list)
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
            st = os.stat(folder)
            if _identity(st) in seen:
                continue
            seen.add(_identity(st))
            stamps[os.fsdecode(folder)] = _stamp(folder, st)  # taken before the folder is listed
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
    return names, stamps, others


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


def _of_list(path: str) -> tuple[FileList, dict[str, list[int]]]:
    """The files that a text list or CSV names, in its order, and the list's own stamp.

    If it has a column of splits, only those of the training split.
    """
    try:
        stamps = {path: _stamp(path)}  # taken before the list is read
    except OSError as e:
        raise bad(path, f"cannot be read ({e.strerror})") from None
    names = map(os.fsencode, read_list(path).training())
    return FileList.of(os.path.dirname(path), names), stamps


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _read_cache(cache: str | os.PathLike, path: str) -> FileList | None:
    """The cached list, if it is intact and nothing has changed since; None otherwise."""
    try:
        with open(cache, "rb") as file:
            check, _, head = file.readline().partition(b" ")
            if check != _sha256(head):
                return None
            header = json.loads(head)
            expected = {"version": CACHE_VERSION, "data_path": path, "heif": reads_heif()}
            if any(header[name] != value for name, value in expected.items()):
                return None
            newest = header["scanned_ns"] - RACY_NS
            for folder, stamp in header["stamps"].items():
                if stamp[0] > newest or _stamp(folder) != stamp:
                    return None
            skipped = {str(kind): int(count) for kind, count in header["skipped"].items()}
            files = FileList(header["root"], file.read(), skipped)
        return files if files.digest == header["digest"] else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _write_cache(
    cache: str | os.PathLike,
    path: str,
    scanned_ns: int,
    files: FileList,
    stamps: dict[str, list[int]],
) -> None:
    """Write a line `sha256 JSON`, then the names, atomically. Failures are ignored."""
    header = {"version": CACHE_VERSION, "data_path": path, "heif": reads_heif()}
    header |= {"root": files.root, "skipped": files.skipped}
    header |= {"scanned_ns": scanned_ns, "digest": files.digest, "stamps": stamps}
    head = json.dumps(header).encode() + b"\n"  # ASCII: JSON escapes unusual names
    temporary = f"{os.fspath(cache)}.{uuid.uuid4().hex}.tmp"  # several ranks may write at once
    try:
        with open(temporary, "wb") as file:
            file.write(_sha256(head) + b" " + head + files._blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, cache)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
