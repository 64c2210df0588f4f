"""A page to try checkpoints on: expressions of the faces in a picture; masks and reconstructions.

    python app.py --checkpoints FOLDER

Needs `pip install -r requirements/app.txt`. It is for this machine alone: pictures are neither sent
anywhere nor kept.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from inference.same_origin import OwnPages
from util.errors import BadInput, Fault
from util.options.groups import DEVICE
from util.options.parser import Parser, number
from util.options.predict import AROUND_FACES, DETECTORS, FACE_MARGIN, MARGIN, check_margin
from util.program import run_program

if TYPE_CHECKING:
    import gradio as gr

    from inference.page import Checkpoints
    from models_saved import Saved

MOST_BYTES = 20 * 2**20  # of an uploaded picture
KEPT = 600  # seconds that gradio keeps an uploaded picture
MOST_VISITORS = 30  # whose faces are kept in memory, some MB each
EXAMPLES = 5
INVITATION = "Upload or photograph a face."
TICK = "to find the faces in it, tick the box below it"
# The label of the faces stands above them, not on the first; they take no more room than they need.
CSS = """
footer {display: none !important}
#faces .grid-wrap {min-height: 0; padding-top: 2.5rem}
"""
# The models and the detector are for one thread at a time.
ONE_AT_A_TIME = {"show_progress": "minimal", "concurrency_id": "models", "concurrency_limit": 1}


def build_parser() -> Parser:
    """What `python app.py` takes."""
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
        type=number(int, low=1, high=65535),
        default=7860,
        help="port of the page, http://127.0.0.1:PORT (default: %(default)s)",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse what is seen without opening anything."""
    if not Path(args.checkpoints).is_dir():
        hint = "; run `make demo`, or name another" if args.checkpoints == "demo" else ""
        raise BadInput(f"--checkpoints {args.checkpoints}: no such folder{hint}")
    check_margin(args)


def work(args: argparse.Namespace) -> None:
    """Open the page on this machine's own address, until it is interrupted."""
    # Read when gradio is imported. No news of its use is sent, nothing is asked of the network.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise BadInput("gradio is not installed: pip install -r requirements/app.txt") from None
    from datasets.faces.detection import open_detector
    from inference.page import Checkpoints, faces_in
    from util.distributed import Place, pick_device

    checkpoints = Checkpoints(args.checkpoints, pick_device(args.device, Place()))
    detectors = {True: open_detector(args.detector), False: open_detector("none")}

    def find(path: str | None, detect: bool, saved: "Saved") -> tuple:
        if path is None:
            raise BadInput(INVITATION)
        faces, line = faces_in(path, detectors[detect], saved, args.face_margin)
        could_search = not detect and args.detector != "none"
        return faces, f"{line}; {TICK}" if could_search else line

    with tempfile.TemporaryDirectory(prefix="mae-sfer-") as folder:
        # Gradio's own is the same for all who use this machine, and outlives the program.
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(checkpoints, find, drawn_faces(folder))
        open_page(page, args.port)
        device = checkpoints.device
        print(f"http://127.0.0.1:{args.port} on {device}; Ctrl-C ends it", flush=True)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.default_int_handler)  # the pictures are deleted, too
        with suppress(KeyboardInterrupt):  # a second one: launchers pass on what they also get
            page.block_thread()


def open_page(page: "gr.Blocks", port: int) -> None:
    """Serve a page to this machine's own browsers. Raises Fault for a port that is taken."""
    import gradio as gr
    from starlette.middleware import Middleware

    try:
        page.launch(
            server_name="127.0.0.1",  # nobody else's business
            server_port=port,
            app_kwargs={"middleware": [Middleware(OwnPages)]},
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
        raise Fault(f"--port {port}: is taken; name another") from None


def drawn_faces(folder: str) -> list[str]:
    """A few faces that the demo's models have not seen, of the kind they know; -> paths."""
    from datasets.synthetic.generator import SyntheticFaces
    from util.report.figures import save_png

    faces = SyntheticFaces(EXAMPLES, size=256, split="test", lab=True)
    paths = [str(Path(folder, f"drawn-{i + 1}.png")) for i in range(EXAMPLES)]
    for i, path in enumerate(paths):
        save_png(faces.image(i), path)
    return paths


def build_page(
    checkpoints: "Checkpoints", find: "Callable[[str, bool, Saved], tuple]", examples: list[str]
) -> "gr.Blocks":
    """The page: a tab for expressions, one for masks, whichever there are checkpoints for.

    `find(path, detect, saved)`: the faces of a picture for a model and a line about them, see
    `faces_in`.
    """
    import gradio as gr

    page = gr.Blocks(title="MAE-SFER", analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with page:
        gr.Markdown(
            "# MAE-SFER\nWhat a model sees in a face. Pictures stay on this machine and are "
            "deleted after some minutes."
        )
        if checkpoints.classifiers:
            with gr.Tab("Expressions"):
                add_expressions(checkpoints, find, examples)
        if checkpoints.autoencoders:
            with gr.Tab("Masks"):
                add_masks(checkpoints, find, examples)
    return page


def add_expressions(checkpoints: "Checkpoints", find: "Callable", examples: list[str]) -> None:
    """Picture in; faces, a bar for each expression and what the model looks at out."""
    import gradio as gr

    from inference.page import look

    with gr.Row():
        with gr.Column():
            photo, detect, name = add_inputs(checkpoints.classifiers)
            add_examples(examples, photo, detect)
        with gr.Column():
            said = gr.HTML(message(INVITATION))
            faces = gr.Gallery(
                label="Faces: choose one",
                columns=6,
                height="auto",
                elem_id="faces",
                object_fit="contain",
                allow_preview=False,
                visible=False,
                buttons=[],
            )
            bars = gr.Label(label="Expression", elem_id="bars")
            gr.Markdown("What the model looks at")
            attention = add_picture("attention", height=336)
    seen = gr.State([])

    def judge(path: str | None, detect: bool, name: str) -> list:
        try:
            saved, predictor = checkpoints.classifier(name)
            pictures, line = find(path, detect, saved)
            found = look(saved, predictor, pictures)
        except Exception as error:
            return [message(friendly(error)), gr.Gallery(visible=False), None, None, []]
        thumbnails = [(one.picture, one.label) for one in found]
        gallery = gr.Gallery(thumbnails, visible=len(found) > 1, selected_index=0)
        return [message(line), gallery, found[0].probabilities, found[0].attention, found]

    def choose(found: list, event: gr.SelectData) -> list:
        return [found[event.index].probabilities, found[event.index].attention]

    inputs, outputs = [photo, detect, name], [said, faces, bars, attention, seen]
    for part in inputs:
        part.change(judge, inputs, outputs, **ONE_AT_A_TIME)
    faces.select(choose, [seen], [bars, attention])


def add_masks(checkpoints: "Checkpoints", find: "Callable", examples: list[str]) -> None:
    """Picture in; original, masked, reconstructed and pasted out, as the slider says."""
    import gradio as gr

    from inference.page import hide

    with gr.Row():
        with gr.Column(scale=2):
            photo, detect, name = add_inputs(checkpoints.autoencoders)
            ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Mask ratio", elem_id="ratio")
            again = gr.Button("New mask", variant="primary")
            add_examples(examples, photo, detect)
        with gr.Column(scale=3):
            said = gr.HTML(message(INVITATION))
            picture = add_picture("reconstruction")
    seed = gr.State(0)

    def draw(path: str | None, detect: bool, name: str, ratio: float, seed: int) -> list:
        try:
            saved = checkpoints.autoencoder(name)
            pictures, line = find(path, detect, saved)
            return [message(line), hide(saved, pictures[0], ratio, seed)]
        except Exception as error:
            return [message(friendly(error)), None]

    inputs, outputs = [photo, detect, name, ratio, seed], [said, picture]
    for part in (photo, detect, name, seed):
        part.change(draw, inputs, outputs, **ONE_AT_A_TIME)
    # Not only when the mouse lets go of it: numbers are typed, too.
    ratio.change(draw, inputs, outputs, trigger_mode="always_last", **ONE_AT_A_TIME)
    again.click(lambda: random.randrange(2**31), None, seed)


def add_inputs(names: list[str]) -> tuple:
    """What both tabs take: a picture, whether faces are to be found in it, a checkpoint."""
    import gradio as gr

    photo = photograph()
    detect = gr.Checkbox(True, label="Find faces in it; else all of it is taken for one")
    return photo, detect, gr.Dropdown(names, value=names[0], label="Checkpoint")


def add_examples(paths: list[str], photo: "gr.Image", detect: "gr.Checkbox") -> None:
    """Drawn faces to click on; models learn them whole, so that no face is looked for in them."""
    import gradio as gr

    examples = gr.Examples([[path] for path in paths], [photo], label="Drawn faces")
    examples.dataset.click(lambda: False, None, detect)


def add_picture(name: str, **options: object) -> "gr.Image":
    """A picture that is shown."""
    import gradio as gr

    buttons = ["fullscreen", "download"]
    return gr.Image(show_label=False, interactive=False, elem_id=name, buttons=buttons, **options)


def photograph() -> "gr.Image":
    """Where a picture is uploaded, pasted or taken; what the program gets of it is its path.

    Gradio would open the file itself, and know nothing to say of one that is no picture.
    """
    import gradio as gr

    sources = ["upload", "webcam", "clipboard"]
    photo = gr.Image(type="filepath", sources=sources, label="Picture", height=336)
    photo.preprocess = uploaded
    return photo


def uploaded(payload: "gr.data_classes.ImageData | None") -> str | None:
    """The path of a picture that was uploaded; a request may name any.

    Gradio checks those paths only that say of themselves to be of a file.
    """
    import gradio as gr

    if payload is None or not payload.path:
        return None
    if Path(os.environ["GRADIO_TEMP_DIR"]).resolve() not in Path(payload.path).resolve().parents:
        raise gr.Error("This picture was not uploaded.")
    return payload.path


def message(text: str) -> str:
    """A line of the page; names and reasons come from anywhere."""
    from util.report.html import text as safe

    return f"<p>{safe(text)}</p>"


def friendly(error: Exception) -> str:
    """What went wrong, for whoever sits before the page; a bug's traceback is in the terminal."""
    from datasets.decode import UnreadableImage

    if isinstance(error, UnreadableImage):  # without the path of the temporary copy
        return f"This is no picture that can be read ({error.reason}). Take a JPEG or PNG file."
    if not isinstance(error, BadInput):
        traceback.print_exception(error)
        return f"Something went wrong ({type(error).__name__}); the terminal says more."
    return str(error)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
