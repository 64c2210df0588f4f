"""A local web page to try checkpoints: expressions of the faces in a picture, reconstructions.

    python app.py --checkpoints FOLDER

Needs `pip install -r requirements/app.txt`. The page is only reachable from this machine; pictures
are not sent anywhere and not kept.
"""

import argparse
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by python -P

from inference.same_origin import SameOriginOnly
from inference.upload_limits import UploadLimits
from util.distributed import ProcessInfo, pick_device
from util.errors import BadInput, Fault
from util.options.groups import DEVICE
from util.options.parser import Parser, bounded
from util.options.predict import AROUND_FACES, DETECTORS, FACE_MARGIN, MARGIN, check_margin
from util.program import run_program

if TYPE_CHECKING:
    import gradio as gr

MOST_BYTES = 20 * 2**20  # size limit of an uploaded picture
MOST_VISITORS = 30  # sessions whose faces are kept in memory, some MB each


def build_parser() -> Parser:
    """All options."""
    parser = Parser(
        "Open a local web page to try checkpoints on pictures: predicted expressions, attention, "
        "masked reconstructions."
    )
    parser.add_argument(
        "--checkpoints",
        default="demo",
        metavar="DIR",
        help="folder with checkpoints, also in subfolders (default: demo, from `make demo`)",
    )
    parser.add_argument(
        "--detector",
        choices=DETECTORS,
        default=DETECTORS[0],
        help="face detector; none: each picture is one face already (default: %(default)s)",
    )
    parser.add_argument(
        "--face_margin",
        type=FACE_MARGIN,
        help=f"{AROUND_FACES} (default: as in training, {MARGIN} if unknown)",
    )
    parser.add_argument("--device", default="auto", help=f"{DEVICE} (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=bounded(int, low=1, high=65535),
        default=7860,
        help="port of the page, http://127.0.0.1:PORT (default: %(default)s)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises BadInput for errors that can be found without opening a file."""
    if not Path(args.checkpoints).is_dir():
        hint = "; run `make demo`, or name another folder" if args.checkpoints == "demo" else ""
        raise BadInput(f"--checkpoints {args.checkpoints}: no such folder{hint}")
    check_margin(args)


def work(args: argparse.Namespace) -> None:
    """Serve the page on 127.0.0.1 until interrupted."""
    # Gradio reads these when it is imported. They turn off usage statistics and network requests.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if sys.stderr.isatty():
        print("loading gradio and PyTorch; this can take a minute …", file=sys.stderr)
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise BadInput("gradio is not installed: pip install -r requirements/app.txt") from None
    from datasets.faces.detection import open_detector
    from inference.page import Checkpoints
    from inference.page_layout import build_page
    from inference.page_picture import Finder, example_pictures

    checkpoints = Checkpoints(args.checkpoints, pick_device(args.device, ProcessInfo()))
    with tempfile.TemporaryDirectory(prefix="mae-sfer-") as folder:
        # Gradio's default folder is shared by all users of this machine, and outlives the program.
        os.environ["GRADIO_TEMP_DIR"] = folder
        examples = example_pictures(folder)
        finder = Finder(open_detector(args.detector), args.face_margin, examples.synthetic)
        page = build_page(checkpoints, finder, examples)
        open_page(page, args.port, folder)
        device = checkpoints.device
        print(f"http://127.0.0.1:{args.port} on {device}; Ctrl-C stops it", flush=True)
        with suppress(KeyboardInterrupt):  # a second Ctrl-C
            page.block_thread()


def open_page(page: "gr.Blocks", port: int, folder: str) -> None:
    """Serve a page to browsers on this machine; pictures go to `folder`.

    Raises Fault for a port that is in use.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    from inference.page_layout import CSS, KEPT

    # Gradio looks every KEPT seconds for pictures that are older than that.
    limits = Middleware(UploadLimits, folder=folder, most_bytes=MOST_BYTES, kept_for=2 * KEPT)
    page.queue(max_size=MOST_VISITORS)
    try:
        page.launch(
            server_name="127.0.0.1",  # not reachable from other machines
            server_port=port,
            app_kwargs={"middleware": [Middleware(SameOriginOnly), limits]},
            max_file_size=MOST_BYTES,
            state_session_capacity=MOST_VISITORS,
            enable_monitoring=False,
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"]),
            css=CSS,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        raise Fault(f"--port {port}: is already in use; choose another") from None


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
