"""The part of a report with figures: the images in figures/, embedded, with captions."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

from util.report.html import escaped, picture, section

CAPTIONS = {  # of the files that programs write, in the order of display
    "predictions": (
        "Right and wrong predictions",
        "Below each image: the predicted class with its probability, and the true one. Where there "
        "is a second picture, yellow marks what the model looked at most; it does not prove why "
        "the model decides as it does. Before you share this page, check that the licence of the "
        "data set allows it.",
    ),
    "confusion_matrix": (
        "Confusion matrix",
        "Each row is a true class: how its images were classified, in % and in number.",
    ),
    "classes": (
        "Classes",
        "Recall with its 95\u00a0% interval (Wilson) and F1. Wide intervals mean few images.",
    ),
    "reliability": (
        "Reliability",
        "Bars on the diagonal: well calibrated; of the predictions made with 80\u00a0% confidence, "
        "80\u00a0% are right. Hatched below it: overconfident; above it: underconfident.",
    ),
    "features": (
        "Feature map",
        "Every dot is an image. The model considers nearby images similar; sizes of groups and "
        "distances between them mean little (t-SNE).",
    ),
    "attention": (
        "What the model looks at",
        "Yellow marks what it looks at most. Attention rollout for a ViT, Grad-CAM of the "
        "predicted class for other networks. Neither proves why the model decides as it does.",
    ),
    "reconstructions": (
        "Reconstructions by mask ratio",
        "The same images with more and more patches masked. Filled in: the model’s "
        "reconstruction of masked patches, the image’s own pixels elsewhere.",
    ),
    "curves": ("Runs compared", "Each run has one colour in all panels."),
}
FIRST = "predictions"  # shown before the other figures
WIDE = ("attention", "reconstructions", "curves")  # too detailed for half the page


def figures_section(folder: Path, room: int) -> tuple[str, str]:
    """Images with predictions, and apart from them all other figures.

    Of reconstructions, the newest comes first, then the earlier ones, smaller.
    """
    paths = sorted(path for path in folder.glob("*.png") if path.is_file())
    epoch = {p: int(m[1]) for p in paths if (m := re.fullmatch(r"reconstruction\D*(\d+)", p.stem))}
    grids = sorted(epoch, key=lambda path: (epoch[path], path.name))
    newest = ""
    while grids and not newest:
        newest = _figure(grids.pop(), room, "newest")
    room -= len(newest) * 3 // 4
    others = _chosen([path for path in paths if path not in epoch], room // 2)
    room -= sum(path.stat().st_size for path in others)
    strip = [figure for path in _thinned(grids, room) if (figure := _figure(path, room))]
    plain = {path: figure for path in others if (figure := _figure(path, room))}
    missing = len(paths) - bool(newest) - len(strip) - len(plain)
    first = [plain.pop(path) for path in others[:1] if path in plain and path.stem == FIRST]
    parts = [section("Reconstructions", newest)]
    if strip:
        parts.append(f'<h3>Earlier</h3><div class="strip">{"".join(strip)}</div>')
    if plain:
        parts.append(f'<h2>Figures</h2><div class="plain">{"".join(plain.values())}</div>')
    if missing:
        parts.append(
            f'<p class="soft">{missing:,} of {len(paths):,} files in figures/ are not shown, '
            "to keep this page small or because they cannot be read.</p>"
        )
    return section("Images", "".join(first)), f"<section>{''.join(parts)}</section>" * bool(paths)


def _chosen(paths: list[Path], room: int) -> list[Path]:
    """Figures with captions, in order, that fit into `room` bytes; then others that still fit."""
    known = {path.stem: path for path in paths if path.stem in CAPTIONS}
    chosen = []
    for path in filter(None, map(known.get, CAPTIONS)):
        if path.stat().st_size <= room:
            chosen.append(path)
            room -= path.stat().st_size
    return chosen + _thinned([path for path in paths if path.stem not in known], room)


def _thinned(paths: list[Path], room: int) -> list[Path]:
    """The first of `paths` and every n-th after it, with the smallest n that fits `room` bytes."""
    sizes = [path.stat().st_size for path in paths]
    strides = (n for n in range(1, len(paths) + 1) if sum(sizes[::n]) <= room)
    return paths[:: next(strides, len(paths) + 1)] if sizes and sizes[0] <= room else []


def _figure(path: Path, room: int, kind: str = "") -> str:
    """A PNG file embedded as it is; "" if it is truncated or has more than `room` bytes."""
    try:
        data = path.read_bytes() if path.stat().st_size <= room else b""
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    name, source = escaped(path.stem), base64.b64encode(data).decode("ascii")
    caption = name
    if path.stem in CAPTIONS:
        name, sentence = CAPTIONS[path.stem]
        caption = f"<strong>{name}.</strong> {sentence}"
        kind = "wide" if path.stem in WIDE else ""
    image = (
        f'<img src="data:image/png;base64,{source}" alt="{name}" width="{width}" height="{height}">'
    )
    return (
        f'<figure class="{kind}">{picture(image, name, width)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )
