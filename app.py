"""A local web page to try checkpoints: expressions of the faces in a picture, reconstructions.

    python app.py --checkpoints FOLDER

Needs `pip install -r requirements/app.txt`. The page is only reachable from this machine; pictures
are not sent anywhere and not kept.
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

from inference.same_origin import SameOriginOnly
from util.errors import BadInput, Fault
from util.options.groups import DEVICE
from util.options.parser import Parser, bounded
from util.options.predict import AROUND_FACES, DETECTORS, FACE_MARGIN, MARGIN, check_margin
from util.program import run_program

if TYPE_CHECKING:
    import gradio as gr

    from inference.page import Checkpoints
    from models_saved import Saved

MOST_BYTES = 20 * 2**20  # size limit of an uploaded picture
KEPT = 600  # seconds that gradio keeps an uploaded picture
MOST_VISITORS = 30  # sessions whose faces are kept in memory, some MB each
EXAMPLES = 5
INVITATION = "Upload or photograph a face."
TICK = "to find the faces in it, tick the box below the picture"
# Puts the label of the gallery above the faces instead of over the first one, and makes the gallery
# no higher than needed.
CSS = """
footer {display: none !important}
#faces .grid-wrap {min-height: 0; padding-top: 2.5rem}
"""
# The models and the detector must be used by one thread at a time.
ONE_AT_A_TIME = {"show_progress": "minimal", "concurrency_id": "models", "concurrency_limit": 1}


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
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise BadInput("gradio is not installed: pip install -r requirements/app.txt") from None
    from datasets.faces.detection import open_detector
    from inference.page import Checkpoints, faces_in
    from util.distributed import ProcessInfo, pick_device

    checkpoints = Checkpoints(args.checkpoints, pick_device(args.device, ProcessInfo()))
    detectors = {True: open_detector(args.detector), False: open_detector("none")}

    def find(path: str | None, detect: bool, saved: "Saved") -> tuple:
        if path is None:
            raise BadInput(INVITATION)
        faces, line = faces_in(path, detectors[detect], saved, args.face_margin)
        could_search = not detect and args.detector != "none"
        return faces, f"{line}; {TICK}" if could_search else line

    with tempfile.TemporaryDirectory(prefix="mae-sfer-") as folder:
        # Gradio's default folder is shared by all users of this machine, and outlives the program.
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(checkpoints, find, example_faces(folder))
        open_page(page, args.port)
        device = checkpoints.device
        print(f"http://127.0.0.1:{args.port} on {device}; Ctrl-C stops it", flush=True)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, signal.default_int_handler)  # so that pictures are deleted
        with suppress(KeyboardInterrupt):  # launchers may send a second signal
            page.block_thread()


def open_page(page: "gr.Blocks", port: int) -> None:
    """Serve a page to browsers on this machine. Raises Fault for a port that is in use."""
    import gradio as gr
    from starlette.middleware import Middleware

    try:
        page.launch(
            server_name="127.0.0.1",  # not reachable from other machines
            server_port=port,
            app_kwargs={"middleware": [Middleware(SameOriginOnly)]},
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


def example_faces(folder: str) -> list[str]:
    """Write synthetic faces, of the demo's kind but not its training images; return their paths."""
    from datasets.synthetic.generator import SyntheticFaces
    from util.report.figures import save_png

    faces = SyntheticFaces(EXAMPLES, size=256, split="test", lab=True)
    paths = [str(Path(folder, f"face-{i + 1}.png")) for i in range(EXAMPLES)]
    for i, path in enumerate(paths):
        save_png(faces.image(i), path)
    return paths


def build_page(
    checkpoints: "Checkpoints", find: "Callable[[str, bool, Saved], tuple]", examples: list[str]
) -> "gr.Blocks":
    """The page: a tab for expressions and one for masks, if there are checkpoints for them.

    `find(path, detect, saved)` returns the faces of a picture for a model and a line about them,
    see `faces_in`. `examples`: paths of pictures to click on.
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
    """Add the tab with the faces of a picture, a bar for each expression, and an attention map."""
    import gradio as gr

    from inference.page import explain_faces

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
            found = explain_faces(saved, predictor, pictures)
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
    """Add the tab with reconstructions of a masked face, and a slider for the mask ratio."""
    import gradio as gr

    from inference.page import mask_and_reconstruct

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
            return [message(line), mask_and_reconstruct(saved, pictures[0], ratio, seed)]
        except Exception as error:
            return [message(friendly(error)), None]

    inputs, outputs = [photo, detect, name, ratio, seed], [said, picture]
    for part in (photo, detect, name, seed):
        part.change(draw, inputs, outputs, **ONE_AT_A_TIME)
    # On every change, not only when the slider is released: the ratio can also be typed.
    ratio.change(draw, inputs, outputs, trigger_mode="always_last", **ONE_AT_A_TIME)
    again.click(lambda: random.randrange(2**31), None, seed)


def add_inputs(names: list[str]) -> tuple:
    """The inputs of both tabs: a picture, whether to find faces in it, a checkpoint."""
    import gradio as gr

    photo = photograph()
    detect = gr.Checkbox(True, label="Find faces in the picture (otherwise it is used whole)")
    return photo, detect, gr.Dropdown(names, value=names[0], label="Checkpoint")


def add_examples(paths: list[str], photo: "gr.Image", detect: "gr.Checkbox") -> None:
    """Add synthetic faces to click on. Models are trained on them whole, so detection is off."""
    import gradio as gr

    examples = gr.Examples([[path] for path in paths], [photo], label="Synthetic faces")
    examples.dataset.click(lambda: False, None, detect)


def add_picture(name: str, **options: object) -> "gr.Image":
    """Add a picture for output."""
    import gradio as gr

    buttons = ["fullscreen", "download"]
    return gr.Image(show_label=False, interactive=False, elem_id=name, buttons=buttons, **options)


def photograph() -> "gr.Image":
    """An input for a picture, uploaded, pasted or photographed, whose value is the file's path.

    By default gradio opens the file itself, without a helpful message for unreadable ones.
    """
    import gradio as gr

    sources = ["upload", "webcam", "clipboard"]
    photo = gr.Image(type="filepath", sources=sources, label="Picture", height=336)
    photo.preprocess = uploaded
    return photo


def uploaded(payload: "gr.data_classes.ImageData | None") -> str | None:
    """The path of an uploaded picture. Raises gr.Error for a path outside the upload folder.

    A request may contain any path, and gradio only checks those that are marked as files.
    """
    import gradio as gr

    if payload is None or not payload.path:
        return None
    if Path(os.environ["GRADIO_TEMP_DIR"]).resolve() not in Path(payload.path).resolve().parents:
        raise gr.Error("This picture was not uploaded.")
    return payload.path


def message(text: str) -> str:
    """A line of text on the page, escaped because it may contain file names and the like."""
    from util.report.html import escaped as safe

    return f"<p>{safe(text)}</p>"


def friendly(error: Exception) -> str:
    """An error message for users of the page; for a bug, the traceback goes to the terminal."""
    from datasets.decode import UnreadableImage

    if isinstance(error, UnreadableImage):  # its own text has the path of the temporary copy
        return f"This picture cannot be read ({error.reason}). Try a JPEG or PNG file."
    if not isinstance(error, BadInput):
        traceback.print_exception(error)
        return f"Something went wrong ({type(error).__name__}); see the terminal for details."
    return str(error)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
