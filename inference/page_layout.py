"""The layout of the web page, made with gradio: what is on it, and what happens on a change."""

import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from datasets.decode import UnreadableImage
from inference.page import INVITATION, Checkpoints, explain_faces, mask_and_reconstruct
from models_saved import Saved
from util.errors import BadInput, ReadFault
from util.report.html import escaped

KEPT = 600  # seconds that gradio keeps an uploaded picture
# Puts the label of the gallery above the faces instead of over the first one, and makes the gallery
# no higher than needed.
CSS = """
footer {display: none !important}
#faces .grid-wrap {min-height: 0; padding-top: 2.5rem}
"""
# The models and the detector must be used by one thread at a time.
ONE_AT_A_TIME = {"show_progress": "minimal", "concurrency_id": "models", "concurrency_limit": 1}


def build_page(
    checkpoints: Checkpoints, find: Callable[[str, bool, Saved], tuple], examples: list[str]
) -> gr.Blocks:
    """The page: a tab for expressions and one for masks, if there are checkpoints for them.

    `find(path, detect, saved)` returns the faces of a picture for a model and a line about them,
    see `faces_in`. `examples`: paths of pictures to click on.
    """
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


def add_expressions(checkpoints: Checkpoints, find: Callable, examples: list[str]) -> None:
    """Add the tab with the faces of a picture, a bar for each expression, and an attention map."""
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


def add_masks(checkpoints: Checkpoints, find: Callable, examples: list[str]) -> None:
    """Add the tab with reconstructions of a masked face, and a slider for the mask ratio."""
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
    photo = photograph()
    detect = gr.Checkbox(True, label="Find faces in the picture (otherwise it is used whole)")
    return photo, detect, gr.Dropdown(names, value=names[0], label="Checkpoint")


def add_examples(paths: list[str], photo: gr.Image, detect: gr.Checkbox) -> None:
    """Add synthetic faces to click on. Models are trained on them whole, so detection is off."""
    examples = gr.Examples([[path] for path in paths], [photo], label="Synthetic faces")
    examples.dataset.click(lambda: False, None, detect)


def add_picture(name: str, **options: object) -> gr.Image:
    """Add a picture for output."""
    buttons = ["fullscreen", "download"]
    return gr.Image(show_label=False, interactive=False, elem_id=name, buttons=buttons, **options)


def photograph() -> gr.Image:
    """An input for a picture, uploaded, pasted or photographed, whose value is the file's path.

    By default gradio opens the file itself, without a helpful message for unreadable ones.
    """
    sources = ["upload", "webcam", "clipboard"]
    photo = gr.Image(type="filepath", sources=sources, label="Picture", height=336)
    photo.preprocess = uploaded
    return photo


def uploaded(payload: gr.data_classes.ImageData | None) -> str | None:
    """The path of an uploaded picture. Raises gr.Error for a path outside the upload folder.

    A request may contain any path, and gradio only checks those that are marked as files.
    """
    if payload is None or not payload.path:
        return None
    if Path(os.environ["GRADIO_TEMP_DIR"]).resolve() not in Path(payload.path).resolve().parents:
        raise gr.Error("This picture was not uploaded.")
    return payload.path


def message(text: str) -> str:
    """A line of text on the page, escaped because it may contain file names and the like."""
    return f"<p>{escaped(text)}</p>"


def friendly(error: Exception) -> str:
    """An error message for users of the page; for a bug, the traceback goes to the terminal."""
    if isinstance(error, UnreadableImage):  # its own text has the path of the temporary copy
        return f"This picture cannot be read ({error.reason}). Try a JPEG or PNG file."
    if not isinstance(error, BadInput | ReadFault):
        traceback.print_exception(error)
        return f"Something went wrong ({type(error).__name__}); see the terminal for details."
    return str(error)
