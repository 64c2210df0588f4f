"""Random access to decoded images in one process: the packed store against other libraries.

    pip install pyarrow litdata mosaicml-streaming
    python benchmarks/packed_libraries.py

All hold the same uint8 images, uncompressed, in the file system's cache. Each reads the same images
in the same random order, the way its documentation reads a single image. webdataset is left out, as
it reads tar files from start to end, not single images.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from timing import Report, alternate, parser, pin

from datasets.labelled import digest_of
from datasets.packed.pack import finish
from datasets.packed.store import PackedImages
from datasets.packed.store_writer import Parts
from datasets.transforms import crop_and_resize, random_crop_box

Read = Callable[[int], np.ndarray]


def draw(count: int) -> list[np.ndarray]:
    """Random noise in the shapes of photographs with a short side of 256."""
    rng = np.random.default_rng(0)
    widths = rng.integers(256, 400, count)
    return [rng.integers(0, 256, (256, int(w), 3), np.uint8) for w in widths]


def ours(images: list[np.ndarray], folder: Path) -> Read:
    """The packed store."""
    plan = {"format": "MAE-SFER packed store", "version": 1, "short_side": 256, "settings": {}}
    parts = Parts(folder, plan)
    for image in images:
        parts.add(image)
    parts.end_part()
    finish(parts, plan, [f"{i}.png" for i in range(len(images))], {"all": len(images)}, None)
    return PackedImages(folder).image


def arrow(images: list[np.ndarray], folder: Path) -> Read:
    """A memory-mapped Arrow file."""
    import pyarrow as pa

    folder.mkdir()
    path, names = str(folder / "images.arrow"), ("pixels", "height", "width")
    schema = pa.schema(zip(names, (pa.large_binary(), pa.int32(), pa.int32()), strict=True))
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as out:
        for start in range(0, len(images), 100):
            rows = [
                {"pixels": image.tobytes(), "height": image.shape[0], "width": image.shape[1]}
                for image in images[start : start + 100]
            ]
            out.write(pa.RecordBatch.from_pylist(rows, schema))
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    pixels, height, width = (table[name] for name in names)

    def read(i: int) -> np.ndarray:
        flat = np.frombuffer(pixels[i].as_buffer(), np.uint8)
        return flat.reshape(height[i].as_py(), width[i].as_py(), 3)

    return read


def litdata(images: list[np.ndarray], folder: Path) -> Read:
    """litdata's chunks."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=2**26)
    for i, image in enumerate(images):
        writer.add_item(i, {"image": image})
    writer.done()
    writer.merge(1)
    data = StreamingDataset(str(folder))
    return lambda i: data[i]["image"]


def streaming(images: list[np.ndarray], folder: Path) -> Read:
    """mosaicml-streaming's MDS shards."""
    from streaming import LocalDataset, MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "ndarray:uint8"}) as writer:
        for image in images:
            writer.write({"image": image})
    data = LocalDataset(str(folder))
    return lambda i: data[i]["image"]


PEERS = {
    "packed store": ours,
    "pyarrow": arrow,
    "litdata": litdata,
    "mosaicml-streaming": streaming,
}


def open_all(images: list[np.ndarray], folder: Path) -> dict[str, Read]:
    """The readers of what is installed, after a check that each returns every image."""
    reads = {}
    for name, build in PEERS.items():
        try:
            reads[name] = build(images, folder / name)
        except ImportError as error:
            print(f"- {name}: not installed (pip install {name}; {error})")
            continue
        for i, image in enumerate(images):
            assert np.array_equal(reads[name](i), image), f"{name}, image {i}"
    return reads


def main() -> None:
    """Time reading an image and copying a crop, and reading it and resizing the crop."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument(
        "--count", type=int, default=1000, help="number of images (default: %(default)s)"
    )
    options = options.parse_args()
    pin(options.threads)
    report = Report("Packed store and libraries", options)
    images, rng = draw(options.count), np.random.default_rng(1)
    order = rng.permutation(options.count).tolist()
    boxes = [random_crop_box(*images[i].shape[:2], rng) for i in order]

    wanted = list(zip(order, boxes, strict=True))
    few = wanted[::10]  # resizing takes at least ten times as long

    def copied(read: Read) -> list[np.ndarray]:
        return [read(i)[y : y + h, x : x + w].copy() for i, (x, y, w, h) in wanted]

    def resized(read: Read) -> list[np.ndarray]:
        return [crop_and_resize(read(i), box, 224).numpy() for i, box in few]

    with tempfile.TemporaryDirectory() as folder:
        reads = open_all(images, Path(folder))
        rows = {name: [name] for name in reads}
        for work, count in ((copied, len(wanted)), (resized, len(few))):
            assert len({digest_of(*work(read)) for read in reads.values()}) == 1
            seconds = alternate({n: partial(work, r) for n, r in reads.items()}, options.rounds)
            for name, taken in seconds.items():
                rows[name] += [count / taken, seconds["packed store"] / taken]
    columns = ["", "crop copied, images/s", "ratio", "crop resized to 224, images/s", "ratio "]
    report.table("Random order, one process", columns, list(rows.values()))
    report.close()


if __name__ == "__main__":
    main()
