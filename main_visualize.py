"""Draw figures of a trained model: reconstructions, attention maps, results, a feature map.

    python main_visualize.py --checkpoint RUN/checkpoint-best.pth --data_path RAF-DB
    python main_visualize.py --figures curves --runs RUN RUN …

The content of the checkpoint determines which figures are possible; docs/visualization.md shows
each.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from util.errors import BadInput
from util.evaluation_dir import FigureSource, evaluation_folder, tests_other_images
from util.files import unusable
from util.options.parser import Options
from util.options.trained import OF_DATA
from util.options.visualize import FIGURES, build_parser, check_options
from util.program import run_program

if TYPE_CHECKING:
    import numpy as np

# The options that, beside checkpoint and data set, change the figures.
NAMED = ("data_set", "split", *OF_DATA, "classes")


def work(args: Options) -> None:
    """Draw the figures, writing each as soon as it is done, then update an existing report.

    Raises BadInput for a folder that cannot be written to.
    """
    # Only now: --help and wrong options should not have to wait for numpy.
    from util.report.figures import save_png
    from util.report.page import write_report

    folder, opened = args.output_dir, None
    if args.checkpoint and set(args.figures or FIGURES) != {"curves"}:
        # Only here: curves should not have to wait for torch.
        from builders.visualize import draw_model, open_model

        opened = open_model(args)
        folder = folder_for(args, opened.drawn)
    output = Path(folder)

    def save(name: str, picture: "np.ndarray") -> None:
        path = output / "figures" / f"{name}.png"
        save_png(picture, path)
        print(path, flush=True)

    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        if opened:
            for name, picture in draw_model(args, opened):
                save(name, picture)
        if args.runs and "curves" in (args.figures or FIGURES):
            save("curves", draw_curves(args.runs))
        if (output / "report.html").exists():
            print(f"report: {write_report(output)}")
    except OSError as error:
        if not str(error.filename or "").startswith(str(output)):
            raise
        raise BadInput(f"--output_dir {args.output_dir}: {unusable(error)}") from None


def folder_for(args: Options, drawn: FigureSource) -> str:
    """The folder to write to: `--output_dir`, or a subfolder if that holds other results.

    So the figures in a report always belong to its numbers.
    """
    folder = args.output_dir
    if not tests_other_images(folder, drawn):
        return folder
    given = {name: getattr(args, name) for name in NAMED if name in args.given}
    options = {name: ",".join(v) if isinstance(v, tuple) else v for name, v in given.items()}
    named = evaluation_folder(
        "visualize", args.checkpoint, data_path=args.data_path, output_dir=None, options=options
    )
    own = os.path.join(folder, "visualize", os.path.basename(named))
    print(f"{folder} holds other results and keeps its figures; these go to {own}", flush=True)
    return own


def draw_curves(runs: list[str]) -> "np.ndarray":
    """The learning curves of several runs in the same panels. Raises BadInput if there are none."""
    from util.report.curves import compared_curves
    from util.summary import read_log, short_names

    paths = list(dict.fromkeys(Path(os.path.abspath(run)) for run in runs))
    logs = dict(zip(short_names(paths), map(read_log, paths), strict=True))
    for name, path in zip(logs, paths, strict=True):
        if not logs[name]:
            raise BadInput(f"--runs {path}: has no log.txt with an epoch in it; leave it out")
    picture = compared_curves(logs)
    if picture is None:
        raise BadInput(f"--runs {' '.join(runs)}: their log.txt has no values that can be drawn")
    return picture


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
