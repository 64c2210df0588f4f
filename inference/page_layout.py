"""The layout of the web page, made with gradio: a picture beside a tab for each type of model."""

import gradio as gr

from inference.page import Checkpoints
from inference.page_input import add_examples, add_picture_input
from inference.page_picture import Examples, Finder
from inference.page_tabs import Expressions, Masks

KEPT = 600  # seconds that gradio keeps an uploaded picture
# On a narrow screen, results come directly below the picture, and choices below them.
CSS = """
footer {display: none !important}
#page {display: grid; gap: 1rem 1.5rem; grid-template: "picture results" auto
  "examples results" 1fr / minmax(0, 5fr) minmax(0, 7fr)}
#page > * {min-width: 0}
#picture {grid-area: picture; position: relative}
#results {grid-area: results}
#examples {grid-area: examples}
@media (max-width: 767px) {
  #page {grid-template: "picture" "results" "examples" / minmax(0, 1fr)}
  .choice {order: 1}
}
/* The boxes are scaled and centred exactly as the photo is. */
#photo .image-frame, #boxes {height: 296px}
#photo .image-frame img {width: 100%; height: 100%; object-fit: contain}
#boxes {position: absolute; inset: 0 0 auto; z-index: 1; pointer-events: none}
#boxes svg {position: absolute; inset: 0; width: 100%; height: 100%}
#said p {font-weight: 600}
.choice input {padding-right: 1.5rem; text-overflow: ellipsis}
.scale {display: flex; gap: .5rem; align-items: center; font-size: .875rem}
.scale span {flex: 1; height: .75rem; border-radius: .25rem}
.note {font-size: .875rem}
/* The label of the gallery above the faces instead of over the first one; no higher than needed. */
#faces .grid-wrap {min-height: 0; padding-top: 2.5rem}
"""


def build_page(checkpoints: Checkpoints, finder: Finder, examples: Examples) -> gr.Blocks:
    """The page: a picture, a tab for expressions and one for masks, examples to click on.

    A tab is only there if there are checkpoints for it.
    """
    page = gr.Blocks(title="MAE-SFER", analytics_enabled=False, delete_cache=(KEPT, KEPT))
    with page:
        gr.Markdown(
            "# MAE-SFER\nWhat a model sees in a face. Pictures stay on this machine and are "
            "deleted after some minutes."
        )
        tabs = []
        with gr.Row(elem_id="page"):  # see CSS for where its columns are
            with gr.Column(elem_id="picture"):
                given = add_picture_input(finder.detects)
            with gr.Column(elem_id="results"):
                if checkpoints.classifiers:
                    with gr.Tab("Expressions"):
                        tabs.append(Expressions(checkpoints, finder, given))
                if checkpoints.autoencoders:
                    with gr.Tab("Masks"):
                        tabs.append(Masks(checkpoints, finder, given))
            with gr.Column(elem_id="examples"):
                add_examples(examples, given.photo)
        for tab in tabs:
            tab.listen(page)
    return page
