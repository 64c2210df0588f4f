"""Rebuilds a trained model from its checkpoint alone: architecture, weights, preprocessing."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from backbones import titles
from backbones.family import DECODER, OWN_OPTIONS
from datasets.augment import Augment, plain
from datasets.labels import canonical
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalise
from models_masked import MaskedAutoencoder
from models_registry import create_classifier, create_pretrain_model, normalise_head_input
from util.checkpoint.read import read_checkpoint
from util.download import check_classifier
from util.errors import BadInput, ReadFault
from util.options.trained import INTERPOLATIONS, trained_with
from util.safe_json import number, part
from util.states import State, root
from util.weights import check_alone, load_pretrained, pick_state, read_source
from util.weights.hf_settings import described_beside
from util.weights.layouts import Architecture, head_classes, identify_architecture, translate
from util.weights.layouts_foreign import TRANSFORMERS
from util.wording import without_head

LARGEST = 4096  # side length in pixels of an input

# Options that cannot be read off the weights, each with a check of the value, which is untrusted.
PRETRAINED_WITH: dict[str, Callable[[Any], bool]] = {
    "mask_ratio": lambda value: 0 < (number(value) or 0) < 1,
    "norm_pix_loss": lambda value: isinstance(value, int),
    "decoder_num_heads": lambda value: type(value) is int and value > 0,
}


class Preprocessing(NamedTuple):
    """How a picture becomes the input of a model; fine-tuned checkpoints contain these settings."""

    input_size: int  # side length in pixels
    crop_pct: float | None = None  # centre crop, as a share of the short side; None: squash to fit
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    # Margin added on each side of a face's box, as a share of its longer side; None: unknown, or
    # the training images were already cropped.
    face_margin: float | None = None
    interpolation: str = "bicubic"  # for resizing, see `plain`

    @property
    def view(self) -> Augment:
        """(H, W, 3) uint8 -> (3, S, S) uint8."""
        return plain(self.input_size, self.crop_pct, self.interpolation)

    @property
    def normalise(self) -> Normalise:
        """(N, 3, S, S) uint8 -> model input."""
        return Normalise(self.mean, self.std)


class SavedClassifier(NamedTuple):
    """An expression classifier, ready for use, on the CPU."""

    name: str  # for `create_classifier`
    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    checkpoint: dict[str, Any]  # the whole file; other programs' files may hold weights only
    notes: Sequence[str] = ()  # where it departs from the settings files beside it, a line each

    @property
    def flip(self) -> bool:
        """Whether it was tested with each image averaged with its mirror image."""
        return _options(self.checkpoint).get("eval_flip") is True


class SavedAutoencoder(NamedTuple):
    """A masked autoencoder with its trained decoder, ready for use, on the CPU."""

    name: str  # for `create_pretrain_model`
    model: MaskedAutoencoder
    preprocessing: Preprocessing
    checkpoint: dict[str, Any]
    notes: Sequence[str] = ()


class SavedEncoder(NamedTuple):
    """A masked autoencoder saved without its decoder; the model's decoder is untrained."""

    name: str  # for `create_pretrain_model`
    model: MaskedAutoencoder
    preprocessing: Preprocessing
    checkpoint: dict[str, Any]
    notes: Sequence[str] = ()


Saved = SavedClassifier | SavedAutoencoder | SavedEncoder


class _Opened(NamedTuple):
    """The content of a file: weights in our naming, their architecture, and settings for use."""

    checkpoint: dict[str, Any]
    weights: State
    held: Architecture
    settings: dict[str, Any]  # `classes`, `args`, `preprocessing`, also from files beside it
    notes: Sequence[str]

    @property
    def has_decoder(self) -> bool:
        return any(root(name) in DECODER for name in self.weights)


def open_saved(
    source: str | Path, classes: Sequence[str] = (), cache_dir: str | None = None
) -> Saved:
    """Open any trained model: a classifier if it has a head, else an autoencoder or encoder.

    `source`: a path or a released name. `classes` and errors as in `open_classifier`; BadInput too
    if classes are given for a model without a head.
    """
    if classes:
        check_classifier(source, "--classes:")
    opened = _open(source, cache_dir)
    if head_classes(opened.weights):
        return _classifier(source, opened, classes)
    if classes:
        raise BadInput(f"--classes: {without_head(source)}")
    return _autoencoder(source, opened) if opened.has_decoder else _encoder(source, opened)


def open_classifier(source: str | Path, classes: Sequence[str] = ()) -> SavedClassifier:
    """Open a classifier from a checkpoint of any known layout.

    The architecture is inferred from the tensors. `classes`: class names in output order, for
    files that do not contain them. Raises BadInput if it is not a fine-tuned model, or if its
    classes are not named.
    """
    check_classifier(source)
    opened = _recognised(source, read_checkpoint(source))
    if not head_classes(opened.weights):
        raise BadInput(without_head(source))
    return _classifier(source, opened, classes)


def open_autoencoder(source: str | Path, cache_dir: str | None = None) -> SavedAutoencoder:
    """Open a masked autoencoder from a pre-training checkpoint. Raises BadInput for any other."""
    opened = _open(source, cache_dir)
    if not opened.has_decoder:
        raise BadInput(
            f"{source}: has no decoder, so it cannot reconstruct images; use a pre-training "
            "checkpoint"
        )
    return _autoencoder(source, opened)


def _classifier(source: str | Path, opened: _Opened, classes: Sequence[str]) -> SavedClassifier:
    saved, weights, held, settings, notes = opened
    total = head_classes(weights)
    names = tuple(classes) or _classes(settings)
    if len(names) != total:
        told = f"but --classes names {len(names)}" if classes else "but does not name them"
        raise BadInput(
            f"{source}: has {total} classes, {told}; list them in output order with --classes A,B,…"
        )
    if (own := _classes(settings)) and canonical(names) != canonical(own):
        notes = [*notes, f"using the classes of --classes; the checkpoint names {', '.join(own)}"]
    preprocessing = _preprocessing(source, opened)
    options = held.family.options_of_classifier(weights, held.patch)
    name, size = held.classifier, preprocessing.input_size
    model = _built(source, lambda: create_classifier(name, total, size, **options))
    if "head.1.weight" in weights:
        normalise_head_input(model)  # trained with --linear_probe
    load_pretrained(model, source, key=_key(saved), keep_head=True, checkpoint=saved)
    return SavedClassifier(
        name,
        model.eval(),
        classes=names,
        preprocessing=preprocessing,
        checkpoint=saved,
        notes=notes,
    )


def _autoencoder(source: str | Path, opened: _Opened) -> SavedAutoencoder:
    weights, family = opened.weights, opened.held.family
    given = {**family.pretrain_defaults, **_options(opened.settings)}
    known = [n for n in PRETRAINED_WITH if n not in OWN_OPTIONS or n in family.pretrain_options]
    options = {name: given[name] for name in known if given.get(name) is not None}
    for name, value in options.items():
        if not PRETRAINED_WITH[name](value):
            raise BadInput(f"{source}: holds an invalid {name}: {value!r:.40}")
    options["decoder_depth"] = family.decoder_depth(weights)
    return SavedAutoencoder(
        *_pretrained(source, opened, lambda: weights["mask_token"].numel(), options)
    )


def _encoder(source: str | Path, opened: _Opened) -> SavedEncoder:
    return SavedEncoder(*_pretrained(source, opened, lambda: 64, {"decoder_depth": 1}))


def _pretrained(
    source: str | Path, opened: _Opened, width: Callable[[], int], options: dict[str, Any]
) -> tuple[str, MaskedAutoencoder, Preprocessing, dict[str, Any], Sequence[str]]:
    """The fields of a SavedAutoencoder or SavedEncoder whose decoder has this width."""
    saved, held = opened.checkpoint, opened.held
    preprocessing = _preprocessing(source, opened)
    if "patch_size" in held.family.pretrain_options:
        options["patch_size"] = _masked_patch(opened)
    size = preprocessing.input_size
    model = _built(
        source,
        lambda: create_pretrain_model(held.name, size, decoder_embed_dim=width(), **options),
    )
    load_pretrained(model, source, key=_key(saved), checkpoint=saved)
    return held.name, model.eval(), preprocessing, saved, opened.notes


class TrainingRecord(NamedTuple):
    """How a checkpoint was trained, as far as it or the files beside it record."""

    trained: dict[str, Any]  # fine-tuning options by name, see `trained_with`
    classes: tuple[str, ...]  # in output order; () if they are not named
    notes: Sequence[str]  # where it departs from the settings files beside it, a line each


def training_record(
    source: str | Path, saved: dict[str, Any], key: str = "", prefix: str = ""
) -> TrainingRecord:
    """How a checkpoint was trained, from its recorded options or else inferred from its tensors.

    `saved` is the content of the file; `key` and `prefix` as in `load_pretrained`. Raises BadInput
    for invalid values.
    """
    own = trained_with(saved, source)
    try:
        opened = _recognised(source, saved, key, prefix)
    except BadInput:  # loading it into a model raises a more specific error
        return TrainingRecord(own, _classes(saved), ())
    if own:
        return TrainingRecord(own, _classes(saved), ())
    held, weights = opened.held, opened.weights
    trained: dict[str, Any] = {"model": held.name}
    if held.family.free_patch:
        trained["patch_size"] = held.patch
    if held.family.fixed_input:
        trained["input_size"] = _input_size(weights, held)
    if head_classes(weights):
        built = held.family.options_of_classifier(weights, held.patch)
        trained |= {"cls_token": built["global_pool"] == "token"} if "global_pool" in built else {}
    notes = list(opened.notes)
    if isinstance(opened.settings.get("preprocessing"), dict):
        preprocessing = _preprocessing(source, opened)
        trained |= _as_options(preprocessing)
        if "imagenet_default_mean_and_std" not in trained:
            numbers = f"mean {preprocessing.mean} and std {preprocessing.std}"
            notes.append(f"trained with {numbers}, which no option here can set")
    return TrainingRecord(trained, _classes(opened.settings), notes)


def _as_options(preprocessing: Preprocessing) -> dict[str, Any]:
    """The equivalent fine-tuning options; those without an equivalent value are left out."""
    options = {
        "input_size": preprocessing.input_size,
        "crop_pct": preprocessing.crop_pct,
        "test_interpolation": preprocessing.interpolation,
    }
    known = {True: (IMAGENET_MEAN, IMAGENET_STD), False: ((0.5,) * 3, (0.5,) * 3)}
    seen = [*preprocessing.mean, *preprocessing.std]
    for flag, (mean, std) in known.items():
        if all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(seen, (*mean, *std), strict=True)):
            options["imagenet_default_mean_and_std"] = flag
    return options


class Peeked(NamedTuple):
    """What a file contains, as far as can be seen without reading its weights."""

    kind: str  # classifier, autoencoder or encoder; "" if it is not a known checkpoint
    best: float  # of fine-tuning: the best accuracy so far, in percent; else 0


def peek(path: str | Path) -> Peeked:
    """Fast for files of any size: reads no weights, except layouts whose tensors must be merged."""
    try:
        opened = _recognised(path, read_checkpoint(path, peek=True))
    except (BadInput, ReadFault):
        return Peeked("", 0.0)
    if head_classes(opened.weights):
        return Peeked("classifier", number(opened.checkpoint.get("best")) or 0.0)
    return Peeked("autoencoder" if opened.has_decoder else "encoder", 0.0)


def _open(source: str | Path, cache_dir: str | None) -> _Opened:
    """A checkpoint of a supported architecture. Raises BadInput for any other."""
    return _recognised(source, read_source(source, cache_dir))


def _recognised(
    source: str | Path, saved: dict[str, Any], key: str = "", prefix: str = ""
) -> _Opened:
    weights, layout = translate(pick_state(source, saved, key or _key(saved), prefix)[0])
    held = identify_architecture(weights)
    if held is None or not held.name or held.in_chans != 3:
        what = f"holds {held}" if held else f"holds no {titles()} in a known layout"
        raise BadInput(f"{source}: {what}; use a checkpoint of one of this project's models")
    check_alone(source, weights)
    if "preprocessing" in saved or not layout.startswith(TRANSFORMERS):
        return _Opened(saved, weights, held=held, settings=saved, notes=())
    beside = described_beside(source, _input_size(weights, held))
    return _Opened(
        saved, weights, held=held, settings={**beside.settings, **saved}, notes=beside.notes
    )


def _built(source: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose sizes come from an untrusted file. Raises BadInput if they conflict."""
    try:
        return build()
    except (ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise BadInput(f"{source}: its sizes contradict each other ({error})") from None


def _key(saved: dict[str, Any]) -> str:
    """The checkpoint entry with the weights that were evaluated."""
    key = saved.get("evaluated")
    return key if isinstance(key, str) else "model|module"


def _classes(saved: dict[str, Any]) -> tuple[str, ...]:
    """The class names in a checkpoint, ours or mmpretrain's; () without any."""
    names = saved.get("classes", part(part(saved, "meta"), "dataset_meta").get("classes"))
    names = names if isinstance(names, list | tuple) else ()
    return tuple(name for name in names if isinstance(name, str))


def _options(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that saved it, {} if unknown."""
    given = saved.get("args")
    return given if isinstance(given, dict) else getattr(given, "__dict__", {})


def _preprocessing(source: str | Path, opened: _Opened) -> Preprocessing:
    """The recorded settings, else ImageNet's defaults at the size of the position embedding."""
    settings, held = opened.settings, opened.held
    own = settings.get("preprocessing")
    margin = trained_with(opened.checkpoint, source).get("face_margin")
    if isinstance(own, dict):
        own = {"input_size": None, **own}
        own = {"face_margin": margin, **own}
        made = Preprocessing(**{n: own[n] for n in Preprocessing._fields if n in own})
    else:
        size = _input_size(opened.weights, held) or _options(settings).get("input_size")
        made = Preprocessing(size or 224, face_margin=margin)
    three = all(
        isinstance(v, list | tuple) and len(v) == 3 and None not in map(number, v)
        for v in (made.mean, made.std)
    )
    share = 1 if made.crop_pct is None else number(made.crop_pct)
    size = made.input_size
    masked = not head_classes(opened.weights)
    step = held.family.patch_step(held.name, _masked_patch(opened), masked)
    fits = type(size) is int and 0 < size <= LARGEST and size % step == 0
    fits = fits and (made.face_margin is None or (number(made.face_margin) or 0) >= 0)
    fits = fits and made.interpolation in INTERPOLATIONS
    if not (three and all(made.std) and share and 0 < share <= 1 and fits):
        raise BadInput(f"{source}: invalid preprocessing settings: {made}")
    return made


def _masked_patch(opened: _Opened) -> int:
    """Side length in pixels of a ViT's patches, or of the patches that were masked."""
    given = _options(opened.settings).get("patch_size")
    return opened.held.family.masked_patch(opened.weights, opened.held.patch, given)


def _input_size(weights: State, held: Architecture) -> int | None:
    """The input side length in pixels that the position embedding is for; None without one."""
    if "pos_embed" not in weights:
        return None
    patches = weights["pos_embed"].shape[1] - 1 if weights["pos_embed"].ndim == 3 else 0
    return held.patch * math.isqrt(max(patches, 1))
