"""The input of the web page: a picture with boxes around its faces, and examples to click on."""

import os
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from inference.annotate import svg_boxes
from inference.page_picture import Examples, Picture


class Asked(NamedTuple):
    """What a visitor has asked for with buttons."""

    seed: int = 0  # of the masks
    whole: str | None = None  # the path of a picture to use whole, as no face was found in it


class PictureInput(NamedTuple):
    """The input of all tabs."""

    photo: gr.Image
    boxes: gr.HTML  # over the photo
    detect: gr.Checkbox
    whole: gr.Button
    use_whole: gr.events.Dependency  # on a click on it
    asked: gr.State

    def found(self, picture: Picture | None) -> dict:
        """What to show of the faces in a picture: component -> value or properties."""
        boxes = "" if picture is None or picture.whole else svg_boxes(picture.image, picture.boxes)
        missing = picture is not None and not picture.faces
        return {self.boxes: boxes, self.whole: gr.Button(visible=missing)}


def add_picture_input(detects: bool) -> PictureInput:
    """Add a picture, whether to find faces in it, and a button to do without.

    `detects`: whether there is a detector.
    """
    photo = photograph()
    boxes = gr.HTML(elem_id="boxes")
    label = "Find faces in the picture (otherwise it is used whole)"
    detect = gr.Checkbox(detects, label=label, visible=detects)
    whole = gr.Button("Use the whole picture", visible=False)
    asked = gr.State(Asked())
    own = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    # Boxes of the last picture disappear at once, not only when faces are found in the next one.
    photo.change(lambda: "", None, boxes, **own)
    use_whole = whole.click(
        lambda path, asked: asked._replace(whole=path), [photo, asked], asked, **own
    )
    return PictureInput(photo, boxes, detect, whole=whole, use_whole=use_whole, asked=asked)


def add_examples(examples: Examples, photo: gr.Image) -> None:
    """Add pictures to click on."""
    if examples.photographs:
        gr.Examples([[path] for path in examples.photographs], [photo], label="Photographs")
    gr.Examples([[path] for path in examples.synthetic], [photo], label="Synthetic faces")


def photograph() -> gr.Image:
    """An input for a picture, uploaded, pasted or photographed, whose value is the file's path.

    By default gradio opens the file itself, without a helpful message for unreadable ones.
    """
    photo = gr.Image(
        type="filepath",
        sources=["upload", "webcam", "clipboard"],
        label="Picture",
        show_label=False,  # it would cover a part of the picture
        height=336,
        elem_id="photo",
    )
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
