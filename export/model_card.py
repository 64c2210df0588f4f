"""The model card, `README.md` beside exported weights: input, use, results, limits, licence.

Values may come from an untrusted checkpoint, so every one goes through `markdown`. The YAML at
the top contains only words of this file and a licence that has been checked.
"""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from util.options.trained import difference_lines
from util.safe_json import number, parse_object, part, read_text
from util.wording import one_line

CLIP = 200  # characters of any one value
MOST_LINES = 30  # of any one list
LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"  # the form of the Hugging Face Hub's identifiers
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}
# The training options that change results most. Paths are left out: they are private.
OPTIONS = (
    *("epochs", "batch_size", "accum_iter", "blr", "lr", "weight_decay", "layer_decay"),
    *("drop_path", "aug", "mixup", "cutmix", "smoothing", "reprob", "balance", "label_fraction"),
    *("distill_weight", "distill_temperature"),
    *("mask_ratio", "predict_ratio", "norm_pix_loss", "model_ema_eval", "linear_probe"),
    *("cls_token", "seed"),
)

LIMITS = """\
For research on facial expressions in still pictures, with faces cropped as in training.

- **An expression is not an emotion.** The model predicts the label that the annotators of one data
  set would give to a face. It does not show what a person feels; do not base decisions about people
  on it.
- **Bias.** Expression data sets are unbalanced in age, sex, skin colour, culture and pose, and
  their labels are opinions. Error rates differ between groups; they were not measured by group.
- **Confidence.** On data unlike the training data, probabilities are mostly too high.
- **Law.** Recognising people's emotions may be restricted where you are; find out first."""
ENCODER = """\
For fine-tuning or as a feature extractor: it has no classifier head. Face data sets are unbalanced
in age, sex, skin colour and culture, and so is what a model learns from them."""


class Card(NamedTuple):
    """The content of a model card."""

    to: str  # the target of the export
    name: str  # of the architecture
    loader: str  # the class or function that opens the files
    classes: Sequence[str]  # empty: pre-trained only
    preprocessing: dict[str, Any]
    use: str  # how to use the files beside it, in Markdown
    parity: str  # how close the outputs are to the original model's
    source: Path  # of the checkpoint
    checkpoint: dict[str, Any]  # its content
    note: str = ""  # what users of the exported model must know
    licence: str = ""  # of the weights, if stated


def markdown(value: object) -> str:
    """Any value as one line, escaped for Markdown, HTML and tables."""
    if isinstance(value, bool) or number(value) is not None:
        return str(value)
    words = value if isinstance(value, str) else type(value).__name__
    words = words if len(words) <= CLIP else words[:CLIP] + " …"
    shown = one_line(words)
    return html.escape(re.sub(r"([!-%'-/:;=?@\[-`{-~])", r"\\\1", shown), quote=False)


def model_card(card: Card) -> str:
    """The whole file, in Markdown."""
    result = find_result(card) if card.classes else {}
    made = "fine-tuned to classify facial expressions" if card.classes else "pre-trained on faces"
    parts = [
        front_matter(card),
        f"# `{card.name}`, {made}",
        f"Exported by MAE-SFER for `{card.loader}`. Compared with the original: {card.parity}.",
        _classes(card.classes),
        card.note,
        f"## Input\n\n{_input(card)}",
        f"## Use\n\n{card.use}",
        _results(result, data_roots(card)) if card.classes else "",
        _training(card, result),
        f"## Intended use and limits\n\n{LIMITS if card.classes else ENCODER}",
        f"## Licence\n\n{_licence(card)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def front_matter(card: Card) -> str:
    """The metadata that the Hugging Face Hub reads, in YAML."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=card.licence if re.fullmatch(LICENCE, card.licence) else None,
        library_name=LIBRARIES.get(card.to),
        pipeline_tag="image-classification" if card.classes else "image-feature-extraction",
        tags=["facial-expression-recognition", "masked-autoencoder"],
    )
    return f"---\n{data.to_yaml()}\n---"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells must be Markdown already."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _classes(classes: Sequence[str]) -> str:
    if not classes:
        return "It has no classifier head; fine-tuning adds one."
    return "## Classes\n\n" + table(
        ["output", "class"], [[str(k), markdown(name)] for k, name in enumerate(classes)]
    )


def _input(card: Card) -> str:
    own = card.preprocessing
    size, share = own["input_size"], own["crop_pct"]
    cut = (
        "the whole picture, squeezed into a square"
        if share is None
        else f"a central square with {share:.4g} of the short side"
    )
    mean, std = (", ".join(f"{v:.4g}" for v in own[name]) for name in ("mean", "std"))
    line = f"RGB, {cut}, resized to {size} × {size} pixels"
    line += f" ({own['interpolation']} with antialiasing)"
    margin = number(own.get("face_margin"))
    faces = "Each picture shows one face, cropped as in training."
    if margin is not None:
        faces = (
            "In training, faces were cropped from photographs: a square around the centre of the "
            f"face's box, with {margin:.4g} of the box's longer side added on each side. Crop "
            "pictures in the same way."
        )
    if card.to == "onnx":
        line = f"`images`, uint8, (N, 3, {size}, {size}): {line}. The model normalises them."
    else:
        line = f"{line}, scaled to 0–1, then normalised with mean {mean} and std {std}."
    return f"{line} {faces}"


def find_result(card: Card) -> dict[str, Any]:
    """The results of exactly the exported weights in `eval.json` beside the checkpoint; else {}.

    Epoch, classes and checkpoint entry must match, and the file name too if the results are those
    of `--eval`. Results of nearest neighbours are not the model's and are ignored.
    """
    result = parse_object(read_text(card.source.parent / "eval.json"))
    made_by, epoch = part(result, "made_by"), card.checkpoint.get("epoch")
    if type(epoch) is not int or result.get("classes") != list(card.classes):
        return {}
    if result.get("weights") != card.checkpoint.get("evaluated"):
        return {}
    if made_by.get("kind") == "knn" or "classifier" in result:
        return {}
    tested = made_by.get("checkpoint") if made_by.get("kind") == "eval" else card.source.name
    if not (isinstance(tested, str) and os.path.basename(tested) == card.source.name):
        return {}
    if result.get("epoch") == epoch:
        return result
    last = part(result, "last")
    names = ("data", "rule", "split", "flip", "n", "train_data", "report", "left_out")
    about = {name: result.get(name) for name in (*names, "differs_from_training")}
    return {**about, **last, "is_last": True} if last.get("epoch") == epoch else {}


def data_roots(card: Card) -> list[str]:
    """The data folders named in the files beside the checkpoint, longest first."""
    beside = (parse_object(read_text(card.source.parent / n)) for n in ("config.json", "eval.json"))
    config, result = beside
    options = part(config, "options")
    given = [options.get("data_path"), options.get("eval_data_path")]
    given.append(part(result, "made_by").get("data"))
    paths = [os.path.abspath(os.path.expanduser(p)) for p in given if isinstance(p, str) and p]
    return sorted({p.rstrip("/") for p in paths} - {""}, key=len, reverse=True)


def without_folders(line: str, roots: Sequence[str]) -> str:
    """A line with paths relative to the data folders, and other paths reduced to file names."""
    for root in roots:
        line = line.replace(f"{root}/", "")
    return re.sub(r"(?<![^\s('\":=])~?/(?:[^\s/]+/)*(?=[^\s/])", "", line)


def _results(result: dict[str, Any], roots: Sequence[str]) -> str:
    rows = []
    for key, name in (("accuracy", "accuracy (WAR)"), ("uar", "mean class recall (UAR)")):
        if (value := number(result.get(key))) is not None:
            rows.append([name, f"{value:.2f} %{_interval(result.get(f'{key}_ci'))}"])
    if (value := number(result.get("macro_f1"))) is not None:
        rows.append(["macro-F1", f"{value:.2f} %"])
    for name, value in part(result, "recall").items():
        if (share := number(value)) is not None:
            rows.append([f"recall of {markdown(name)}", f"{share:.1f} %"])
    if not rows:
        return "## Results\n\nThe checkpoint came without results for this epoch."
    told = [f"{markdown(result.get('n'))} images of {markdown(result.get('data'))}"]
    told += [f"split {markdown(result.get('split'))}"]
    if rule := result.get("rule"):
        told.append(f"label rule {markdown(rule)}")
    if result.get("flip") is True:
        told.append("predictions averaged over each image and its mirror image")
    if chosen := result.get("selected_on"):
        flatters = ", which flatters the result" if chosen == result.get("split") else ""
        told.append(f"the best epoch on {markdown(chosen)}{flatters}")
    if result.get("is_last") is True:
        told.append("the last epoch, not chosen by results")
    about = f"{'; '.join(told)}.\n\n" + table(["", ""], rows)
    return f"## Results\n\n{about}{_otherwise(result)}{_report(result, roots)}"


def _otherwise(result: dict[str, Any]) -> str:
    """Where testing differed from training, and what is left out of the results."""
    found = part(result, "differs_from_training")
    both = {n: v for n, v in found.items() if isinstance(v, dict) and {"tested", "trained"} <= {*v}}
    lines = difference_lines(both)
    left_out = part(result, "left_out")
    for name, count in part(left_out, "images").items():
        if (images := number(count)) is not None:
            lines.append(f"left out: {images:,.0f} images of {name}, unknown to the model")
    if isinstance(answers := left_out.get("answers"), list) and answers:
        names = ", ".join(str(name) for name in answers)
        lines.append(f"left out of the model's predictions, as the data do not have it: {names}")
    if unreadable := number(result.get("unreadable")):
        lines.append(f"left out: {unreadable:,.0f} images that could not be read")
    return f"\n\nDiffers from training, or left out:\n\n{_listed(lines)}" if lines else ""


def _report(result: dict[str, Any], roots: Sequence[str]) -> str:
    """The run's report on its data, such as image counts beside the published ones."""
    lines = result.get("report")
    lines = [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
    shown = [without_folders(line.strip(), roots) for line in lines]
    return f"\n\nThe data:\n\n{_listed(shown)}" if lines else ""


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown(line)}" for line in lines[:MOST_LINES])


def _interval(value: object) -> str:
    """` (95 % interval 1.00–2.00)`; "" for anything but two numbers."""
    ends = value if isinstance(value, list) else []
    low, high = (number(end) for end in ends) if len(ends) == 2 else (None, None)
    return "" if low is None or high is None else f" (95 % interval {low:.2f}–{high:.2f})"


def _training(card: Card, result: dict[str, Any]) -> str:
    given = card.checkpoint.get("args")
    given = given if isinstance(given, dict) else getattr(given, "__dict__", {})
    values = {name: given.get(name) for name in OPTIONS}
    kinds = (str, bool, int, float)
    rows = [[f"`{n}`", markdown(v)] for n, v in values.items() if isinstance(v, kinds) and v != ""]
    lines = [f"Exported from {markdown(card.source.name)}"]
    if type(epoch := card.checkpoint.get("epoch")) is int:
        lines.append(f"epoch {epoch}")
    if isinstance(begun := given.get("finetune"), str) and begun:
        lines.append(f"started from {markdown(os.path.basename(begun))}")
    if isinstance(teacher := given.get("teacher"), str) and teacher:
        lines.append(f"distilled from {markdown(os.path.basename(teacher))}")
    if isinstance(pseudo := given.get("pseudo_labels"), str) and pseudo:
        lines.append(f"also trained on the pseudo-labels of {markdown(os.path.basename(pseudo))}")
    if data := result.get("train_data") or card.checkpoint.get("trained_on"):
        lines.append(f"trained on {markdown(data)}")
    told = "## Training\n\n" + ", ".join(lines) + "."
    return told + ("\n\n" + table(["option", ""], rows) if rows else "")


def _licence(card: Card) -> str:
    stated = f"`{card.licence}`" if card.licence else "not stated; state it before you publish them"
    return (
        f"Licence of these weights: {stated}.\n\nThe training data, and weights that training "
        "started from, may have owners whose terms limit how a model made from them may be used "
        "and shared: read them before you use or publish it. The code of MAE-SFER is licensed "
        "under Apache-2.0."
    )
