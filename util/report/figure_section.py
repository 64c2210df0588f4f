"""The part of a report with figures: the images in figures/, embedded, with captions."""

import base64
import io
import re
from pathlib import Path

from PIL import Image

from util.report.html import escaped

CAPTIONS = {  # of the files that programs write, in the order of display
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
WIDE = ("attention", "reconstructions", "curves")  # too detailed for the width of a phone


def figures_section(folder: Path, room: int) -> str:
    """The newest reconstruction large, earlier ones in a strip, then all other figures."""
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
    plain = [figure for path in others if (figure := _figure(path, room))]
    parts = [newest and f"<h2>Reconstructions</h2>{newest}"]
    if strip:
        parts.append(f'<h3>Earlier</h3><div class="strip" tabindex="0">{"".join(strip)}</div>')
    if plain:
        parts.append(f'<h2>Figures</h2><div class="plain">{"".join(plain)}</div>')
    if missing := len(paths) - bool(newest) - len(strip) - len(plain):
        parts.append(
            f'<p class="soft">{missing:,} of {len(paths):,} files in figures/ are not shown, '
            "to keep this page small or because they cannot be read.</p>"
        )
    return f"<section>{''.join(parts)}</section>" if paths else ""


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
    focus = ' tabindex="0"' if kind == "wide" else ""  # so that the keyboard can scroll it
    return (
        f'<figure class="{kind}"><div{focus}><img src="data:image/png;base64,{source}" '
        f'alt="{name}" width="{width}" height="{height}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
