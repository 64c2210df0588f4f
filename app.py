"""A page to try checkpoints on: expressions of the faces in a picture; masks and reconstructions.

    python app.py --checkpoints FOLDER

Needs `pip install -r requirements-app.txt`. It is for this machine alone: pictures are neither sent
anywhere nor kept.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from util.errors import BadInput, Fault
from util.options import RATE, Parser, number
from util.options_predict import DETECTORS, MARGIN
from util.program import run_program

if TYPE_CHECKING:
    import gradio as gr

    from engine_page import Checkpoints, Seen

MOST_BYTES = 20 * 2**20  # of an uploaded picture
KEPT = 600  # seconds that gradio keeps an uploaded picture
EXAMPLES = 6
CSS = "footer {display: none !important} #said {font-size: 1.1em}"


def build_parser() -> Parser:
    """What `python app.py` takes."""
    parser = Parser("A page that shows what a classifier or a masked autoencoder makes of faces.")
    parser.add_argument(
        "--checkpoints", default="demo", help="folder to choose from (default: the demo's)"
    )
    parser.add_argument("--detector", choices=DETECTORS, default=DETECTORS[0])
    parser.add_argument("--face_margin", type=RATE, default=MARGIN, help="around a face")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--port", type=number(int, low=1, high=65535), default=7860)
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse what is seen without opening anything."""
    if not Path(args.checkpoints).is_dir():
        hint = "; run `make demo`, or name another" if args.checkpoints == "demo" else ""
        raise BadInput(f"--checkpoints {args.checkpoints}: no such folder{hint}")


def work(args: argparse.Namespace) -> None:
    """Open the page on this machine's own address, until it is interrupted."""
    # Read when gradio is imported. No news of its use is sent, nothing is asked of the network.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio as gr
    except ImportError:
        raise BadInput("gradio is not installed: pip install -r requirements-app.txt") from None
    from datasets.faces import open_detector
    from engine_page import Checkpoints
    from util.distributed import Place, pick_device

    checkpoints = Checkpoints(args.checkpoints, pick_device(args.device, Place()))
    detectors = {True: open_detector(args.detector), False: open_detector("none")}
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(checkpoints, detectors, args.face_margin, drawn_faces(folder))
        try:
            page.launch(
                server_name="127.0.0.1",  # nobody else's business
                server_port=args.port,
                max_file_size=MOST_BYTES,
                allowed_paths=[folder],
                theme=gr.themes.Soft(font=["system-ui", "sans-serif"]),
                css=CSS,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            raise Fault(f"--port {args.port}: is taken; name another") from None
        device = checkpoints.device
        print(f"http://127.0.0.1:{args.port} on {device}; Ctrl-C ends it", flush=True)
        page.block_thread()


def drawn_faces(folder: str) -> list[str]:
    """A few faces of the project's own, to try without a photograph; -> paths."""
    from datasets.synthetic import SyntheticFaces
    from util.figures import save_png

    faces = SyntheticFaces(EXAMPLES, size=256)
    paths = [str(Path(folder, f"drawn-{i + 1}.png")) for i in range(EXAMPLES)]
    for i, path in enumerate(paths):
        save_png(faces.image(i), path)
    return paths


def build_page(
    checkpoints: "Checkpoints", detectors: dict, margin: float, examples: list[str]
) -> "gr.Blocks":
    """The page: a tab for expressions, one for masks, whichever there are checkpoints for."""
    import gradio as gr

    page = gr.Blocks(title="MAE-SFER", analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with page:
        gr.Markdown(
            "# MAE-SFER\nWhat a model sees in a face. Pictures stay on this machine and are "
            "deleted after some minutes."
        )
        if checkpoints.classifiers:
            with gr.Tab("Expressions"):
                add_expressions(checkpoints, detectors, margin, examples)
        if checkpoints.autoencoders:
            with gr.Tab("Masks"):
                add_masks(checkpoints, examples)
    return page


def add_expressions(
    checkpoints: "Checkpoints", detectors: dict, margin: float, examples: list[str]
) -> None:
    """Picture in; faces, a bar for each expression and what the model looks at out."""
    import gradio as gr

    from datasets.decode import UnreadableImage
    from engine_page import look

    with gr.Row():
        with gr.Column():
            photo = photograph()
            find = gr.Checkbox(True, label="Find faces in it (else all of it is the face)")
            names = checkpoints.classifiers
            name = gr.Dropdown(names, value=names[0], label="Checkpoint")
            gr.Examples([[path, False] for path in examples], [photo, find], label="Drawn faces")
        with gr.Column():
            said = gr.HTML(message("Upload or photograph a face."), elem_id="said")
            faces = gr.Gallery(
                label="Faces: choose one", columns=6, height=130, allow_preview=False, visible=False
            )
            bars = gr.Label(label="Expression", elem_id="bars")
            attention = gr.Image(label="What the model looks at", interactive=False, height=336)
    seen = gr.State([])

    def judge(path: str | None, name: str, find: bool) -> list:
        def told(text: str) -> list:
            return [message(text), gr.Gallery(visible=False), None, None, []]

        if path is None:
            return told("Upload or photograph a face.")
        try:
            saved, predictor = checkpoints.classifier(name)
            found = look(saved, predictor, detectors[find], path, margin)
        except (BadInput, UnreadableImage) as error:
            return told(friendly(error))
        if not found:
            return told(
                "No face was found. Take a picture with a larger or less turned face, or untick "
                "“Find faces” if all of it is a face."
            )
        count = "1 face" if len(found) == 1 else f"{len(found)} faces, the largest first"
        pictures = [(one.picture, one.label) for one in found]
        gallery = gr.Gallery(pictures, visible=True, selected_index=0)
        return [message(count), gallery, *shown(found, 0), found]

    def choose(found: list["Seen"], event: gr.SelectData) -> list:
        return shown(found, event.index)

    outputs = [said, faces, bars, attention, seen]
    for part in (photo, name, find):
        part.change(judge, [photo, name, find], outputs, show_progress="minimal")
    faces.select(choose, [seen], [bars, attention])


def shown(found: list["Seen"], index: int) -> list:
    """The bars and the overlay of one face."""
    return [found[index].probabilities, found[index].attention]


def add_masks(checkpoints: "Checkpoints", examples: list[str]) -> None:
    """Picture in; original, masked, reconstructed and pasted out, as the slider says."""
    import gradio as gr

    from datasets.decode import UnreadableImage
    from engine_page import hide

    with gr.Row():
        with gr.Column(scale=2):
            photo = photograph()
            names = checkpoints.autoencoders
            name = gr.Dropdown(names, value=names[0], label="Checkpoint")
            ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Mask ratio", elem_id="ratio")
            again = gr.Button("New mask", variant="primary")
            gr.Examples([[path] for path in examples], [photo], label="Drawn faces")
        with gr.Column(scale=3):
            said = gr.HTML(message("Upload or photograph a face."))
            picture = gr.Image(label="Reconstruction", interactive=False, elem_id="hidden")
    seed = gr.State(0)

    def draw(path: str | None, name: str, ratio: float, seed: int) -> list:
        if path is None:
            return [message("Upload or photograph a face."), None]
        try:
            return ["", hide(checkpoints.autoencoder(name), path, ratio, seed)]
        except (BadInput, UnreadableImage) as error:
            return [message(friendly(error)), None]

    inputs, outputs = [photo, name, ratio, seed], [said, picture]
    for part in (photo, name, seed):
        part.change(draw, inputs, outputs, show_progress="minimal")
    ratio.release(draw, inputs, outputs, show_progress="minimal")
    again.click(lambda: random.randrange(2**31), None, seed)


def photograph() -> "gr.Image":
    """Where a picture is uploaded, pasted or taken.

    Gradio's own would open the file itself, and know nothing to say of one that is no picture.
    """
    import gradio as gr

    class Photograph(gr.Image):
        is_template = True  # in the browser it is its parent

        def preprocess(self, payload: "gr.data_classes.ImageData | None") -> str | None:
            return payload and payload.path

    return Photograph(
        type="filepath", sources=["upload", "webcam", "clipboard"], label="Picture", height=336
    )


def message(text: str) -> str:
    """A line of the page; names and reasons come from anywhere."""
    from util.markup import text as safe

    return f"<p>{safe(text)}</p>"


def friendly(error: Exception) -> str:
    """What went wrong, without the path of the temporary copy."""
    from datasets.decode import UnreadableImage

    if isinstance(error, UnreadableImage):
        return f"This is no picture that can be read ({error.reason}). Take a JPEG or PNG file."
    return str(error)


if __name__ == "__main__":
    sys.exit(run_program(build_parser, check_options, work))
