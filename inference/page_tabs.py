"""The tabs of the web page: what is on each, and what happens when an input changes."""

import random
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gradio as gr

from datasets.decode import UnreadableImage
from inference.page import (
    Checkpoints,
    Seen,
    enlarged,
    explain_faces,
    face_table,
    mask_and_reconstruct,
)
from inference.page_html import about, data_link, heat_caption, message
from inference.page_input import Asked, PictureInput
from inference.page_picture import Finder, Picture
from inference.predict import Predictor
from models_saved import SavedClassifier
from training.recorded import chance_warning, described
from util.errors import BadInput, ReadFault

INVITATION = "Upload or photograph a face, or click on an example."
# The models and the detector must be used by one thread at a time. What changes in the meantime is
# not lost: the last of the changes counts.
LATEST = {"concurrency_id": "models", "concurrency_limit": 1, "trigger_mode": "always_last"}
LATEST |= {"show_progress": "minimal"}

Updates = dict  # component -> its new value or properties
Opened = tuple[str, SavedClassifier, Predictor]  # a checkpoint's name and model


class Panel(NamedTuple):
    """A checkpoint's part of the expressions tab."""

    column: gr.Column
    about: gr.HTML
    result: gr.Column  # of the others
    bars: gr.Label
    attention: gr.Image
    caption: gr.HTML

    def show(self, one: Seen) -> Updates:
        """Show the result for one face."""
        caption = heat_caption(one.method, one.label)
        values = {self.bars: one.probabilities, self.attention: one.attention}
        return {**values, self.caption: caption, self.result: gr.Column(visible=True)}


class Expressions:
    """The tab with the expressions of the faces in a picture, by one checkpoint or by two."""

    def __init__(self, checkpoints: Checkpoints, finder: Finder, given: PictureInput) -> None:
        """Add the components."""
        self.checkpoints, self.finder, self.given = checkpoints, finder, given
        names = checkpoints.classifiers
        with gr.Row(elem_classes="choice"):
            wide = {"min_width": 320}  # for names with folders
            self.name = gr.Dropdown(names, value=names[0], label="Checkpoint", **wide)
            self.other = gr.Dropdown(
                [("no other", ""), *names],
                value="",
                label="Compare with",
                visible=len(names) > 1,
                **wide,
            )
        self.said = gr.HTML(message(INVITATION), elem_id="said")
        self.faces = gr.Gallery(
            label="Faces: choose one",
            columns=6,
            height="auto",
            elem_id="faces",
            object_fit="contain",
            allow_preview=False,
            visible=False,
            buttons=[],
        )
        with gr.Row():
            self.panels = [add_panel(1), add_panel(2)]
        self.table = gr.HTML()
        self.seen = gr.State([])  # for each face, what the checkpoints see

    def listen(self, page: gr.Blocks) -> None:
        """Update the tab when the page is opened and when an input changes."""
        given, parts = self.given, [part for panel in self.panels for part in panel]
        inputs = [given.photo, given.detect, self.name, self.other, given.asked]
        outputs = [given.boxes, given.whole, self.said, self.faces, self.table, self.seen, *parts]
        run = {"fn": self.judge, "inputs": inputs, "outputs": outputs}
        run |= {"show_progress_on": self.said, **LATEST}
        gr.on([page.load, *(part.change for part in inputs[:-1])], api_name="judge", **run)
        given.use_whole.then(api_visibility="private", **run)
        self.faces.select(self.choose, [self.seen], parts)

    def judge(
        self,
        path: str | None,
        detect: bool,
        name: str,
        other: str | None,
        asked: Asked,
    ) -> Iterator[Updates]:
        """Show what one checkpoint or two see in a picture, and before that what takes time."""
        updates = self.cleared()
        try:
            opened: list[Opened] = []
            names = dict.fromkeys(filter(None, (name, other)))  # the same one is shown once
            for panel, one in zip(self.panels, names, strict=False):
                if not self.checkpoints.is_open(one):
                    yield {self.said: message(f"Opening {one} …")}
                opened.append((one, *self.checkpoints.classifier(one)))
                updates[panel.about] = self.about(opened[-1])
                updates[panel.column] = gr.Column(visible=True)
            picture = open_given(self.finder, path, detect, asked)
            updates |= {**self.given.found(picture), self.said: message(picture.line)}
            if picture.faces:
                updates |= self.explain(picture, opened)
        except Exception as error:
            updates[self.said] = message(friendly(error))
        yield updates

    def cleared(self) -> Updates:
        """No results."""
        updates = {**self.given.found(None), self.faces: gr.Gallery(visible=False)}
        updates |= {self.table: "", self.seen: [], self.panels[1].column: gr.Column(visible=False)}
        for panel in self.panels:
            updates |= {panel.about: "", panel.result: gr.Column(visible=False)}
        return updates

    def explain(self, picture: Picture, opened: Sequence[Opened]) -> Updates:
        """Show the expressions in a picture, at first of its first face. Raises BadInput."""
        updates, seen = {}, {}
        for panel, one in zip(self.panels, opened, strict=False):
            name, saved, predictor = one
            crops, line = self.finder.crop(picture, saved)
            seen[name] = explain_faces(saved, predictor, crops)
            updates[panel.about] = self.about(one, line, *saved.notes)
        found = list(zip(*seen.values(), strict=True))
        labels = [" / ".join(one.label for one in views) for views in found]
        captions = [f"{k}: {label}" for k, label in enumerate(labels, 1)]
        thumbnails = list(zip(map(enlarged, crops), captions, strict=True))
        updates[self.faces] = gr.Gallery(thumbnails, visible=len(found) > 1, selected_index=0)
        link = data_link(face_table(picture, seen), "faces.csv", "Download as a table")
        return {**updates, self.table: link, self.seen: found, **self.show(found[0])}

    def about(self, one: Opened, *lines: str) -> str:
        """A checkpoint's model, how well it does, and further lines."""
        name, saved, _ = one
        return about(name, described(saved), [chance_warning(saved), *lines])

    def show(self, views: Sequence[Seen]) -> Updates:
        """Show what the checkpoints see in one face."""
        pairs = zip(self.panels, views, strict=False)
        return {part: value for panel, one in pairs for part, value in panel.show(one).items()}

    def choose(self, found: list, event: gr.SelectData) -> Updates:
        """Show another face."""
        return self.show(found[event.index])


def add_panel(number: int) -> Panel:
    """Add a checkpoint's description, a bar for each expression, and an attention map."""
    with gr.Column(visible=number == 1, min_width=240) as column:
        text = gr.HTML(elem_id=f"about{number}")
        with gr.Column(visible=False) as result:
            bars = gr.Label(label="Expression", elem_id=f"bars{number}")
            gr.Markdown("What the model looks at")
            attention = add_output(f"attention{number}")
            caption = gr.HTML(elem_id=f"caption{number}")
    return Panel(column, text, result, bars=bars, attention=attention, caption=caption)


class Masks:
    """The tab with the reconstruction of a masked face."""

    def __init__(self, checkpoints: Checkpoints, finder: Finder, given: PictureInput) -> None:
        """Add the components."""
        self.checkpoints, self.finder, self.given = checkpoints, finder, given
        names = checkpoints.autoencoders
        self.said = gr.HTML(message(INVITATION))
        self.picture = add_output("reconstruction")
        with gr.Row():
            self.ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="Mask ratio", elem_id="ratio")
            self.again = gr.Button("New mask", variant="primary")
        self.name = gr.Dropdown(names, value=names[0], label="Checkpoint")
        self.about = gr.HTML()

    def listen(self, page: gr.Blocks) -> None:
        """Update the tab when an input changes."""
        given = self.given
        inputs = [given.photo, given.detect, self.name, self.ratio, given.asked]
        outputs = [given.boxes, given.whole, self.said, self.about, self.picture]
        # On every change, not only when the slider is released: the ratio can also be typed.
        changes = [page.load, *(part.change for part in inputs)]
        run = {"show_progress_on": self.said, **LATEST}
        gr.on(changes, self.draw, inputs, outputs, api_name="draw", **run)
        other = lambda asked: asked._replace(seed=random.randrange(2**31))  # noqa: E731
        self.again.click(other, given.asked, given.asked, api_visibility="private")

    def draw(
        self,
        path: str | None,
        detect: bool,
        name: str,
        ratio: float,
        asked: Asked,
    ) -> Iterator[Updates]:
        """Mask the largest face of a picture, and reconstruct it."""
        updates = {**self.given.found(None), self.about: "", self.picture: None}
        try:
            if not self.checkpoints.is_open(name):
                yield {self.said: message(f"Opening {name} …")}
            saved = self.checkpoints.autoencoder(name)
            picture = open_given(self.finder, path, detect, asked)
            updates |= {**self.given.found(picture), self.said: message(picture.line)}
            if picture.faces:
                crops, line = self.finder.crop(picture, saved)
                updates[self.about] = about(name, saved.name, [line, *saved.notes])
                updates[self.picture] = mask_and_reconstruct(saved, crops[0], ratio, asked.seed)
        except Exception as error:
            updates[self.said] = message(friendly(error))
        yield updates


def add_output(name: str) -> gr.Image:
    """Add a picture for output."""
    buttons = ["fullscreen", "download"]
    return gr.Image(show_label=False, interactive=False, elem_id=name, buttons=buttons)


def open_given(finder: Finder, path: str | None, detect: bool, asked: Asked) -> Picture:
    """The picture that a visitor has given. Raises BadInput without one, and UnreadableImage."""
    if path is None:
        raise BadInput(INVITATION)
    return finder.open(path, detect and asked.whole != path)


def friendly(error: Exception) -> str:
    """An error message for users of the page; for a bug, the traceback goes to the terminal."""
    if isinstance(error, UnreadableImage):  # its own text has the path of the temporary copy
        return f"This picture cannot be read ({error.reason}). Try a JPEG or PNG file."
    if not isinstance(error, BadInput | ReadFault):
        traceback.print_exception(error)
        return f"Something went wrong ({type(error).__name__}); see the terminal for details."
    return str(error)
