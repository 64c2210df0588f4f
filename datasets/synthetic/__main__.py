"""Writes a contact sheet of the synthetic faces.

python -m datasets.synthetic --output docs/synthetic_faces.png
"""

import argparse

from datasets.synthetic.generator import contact_sheet


def main() -> None:
    """Draw the sheet and save it."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.synthetic",
        description="Save a contact sheet of synthetic faces: one column per expression.",
    )
    parser.add_argument(
        "--output",
        default="docs/synthetic_faces.png",
        metavar="FILE.png",
        help="image file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=6,
        help="faces per expression; the upper half shows one person per row (default: %(default)s)",
    )
    parser.add_argument(
        "--cell",
        type=int,
        default=112,
        metavar="PIXELS",
        help="side length of a face in pixels (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    sheet = contact_sheet(args.rows, args.cell, args.seed)
    # A palette keeps the file small; as it is fitted to the sheet and dithered, it is not noticed.
    palette = sheet.quantize(256, kmeans=3)
    sheet.quantize(256, palette=palette).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
