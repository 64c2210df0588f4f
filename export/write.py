"""Writes a saved model for other programs, and checks that it gives the same outputs there.

A target consists of a writer and a reader. The reader only has the written files: it opens them
with the other library's own function and returns the outputs, which must equal our model's.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datasets.synthetic.generator import SyntheticFaces
from export.huggingface import hf_form, image_processor
from export.model_card import Card, model_card
from export.model_code import COMMANDS, command_use, python_use
from export.onnx_graph import read_onnx, write_onnx
from export.weights import (
    S2D_PLACEHOLDER,
    classes_of,
    family,
    mae_sfer_form,
    s2d_form,
    settings_of,
    timm_config,
    timm_form,
    usage_differences,
    vit_size,
    without_decoder,
)
from models_saved import Saved, SavedAutoencoder, SavedClassifier, SavedEncoder, open_saved
from util.errors import Fault
from util.files import write_file, write_json
from util.states import State
from util.weights.hf_settings import CONFIG, PROCESSOR
from util.weights.layouts import identify_architecture

WEIGHTS = "model.safetensors"

# The largest difference allowed in an output, relative to our largest value. Summing in another
# order in fp32 changes about 1e-6 of it, and more in deeper models; a misplaced weight changes it
# completely.
TOLERANCE = 1e-4

NEW_NORM = (
    "FCMAE has no norm after pooling, but this library's model does: the norm is newly initialised "
    "and has to be fine-tuned. For features without it, average the last feature map."
)

OTHER_USE = (
    "`main_rafdb.py` squeezes the whole image into a square with bilinear resizing, normalises it "
    "with ImageNet's mean and std, and numbers the classes as RAF-DB does. This model was made for "
    "other conditions ({}), so expect other results there."
)

Outputs = dict[str, Tensor]


class ExternalOutputs(NamedTuple):
    """The outputs of another library for a probe, and its class names in its own order."""

    outputs: Outputs  # a subset of those of `compute`
    classes: Sequence[str] = ()


class ProbeImages(NamedTuple):
    """The input on which a model and its exported form are compared."""

    pixels: Tensor  # (N, 3, S, S) uint8
    imgs: Tensor  # the same, normalised
    noise: Tensor  # (N, L): the masking noise of an autoencoder


class Parity(NamedTuple):
    """The difference between another library's output and ours."""

    output: str
    difference: float  # largest absolute difference
    scale: float  # our largest absolute value

    @property
    def relative(self) -> float:
        """The difference relative to our largest value."""
        return self.difference / self.scale if self.scale else float(self.difference > 0)

    def __str__(self) -> str:
        if not self.difference:
            return f"{self.output} are equal"
        share = f"{self.relative:.1e} of the largest ({self.scale:.3g})"
        return f"{self.output} differ by at most {self.difference:.1e}, {share}"


class Target(NamedTuple):
    """A format in which a model can be exported."""

    write: Callable[[Saved, Path], None]
    read: Callable[[Path, ProbeImages], ExternalOutputs]
    keeps_head: bool = True  # whether a classifier is exported with its head


def make_probe(saved: Saved) -> ProbeImages:
    """A synthetic face and two noise images, always the same."""
    generator = torch.Generator().manual_seed(0)
    size = saved.preprocessing.input_size
    noise = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    face = saved.preprocessing.view(SyntheticFaces(8, 256, split="test").image(0))
    pixels = torch.cat([face[None], noise])
    patches = getattr(saved.model, "num_patches", 1)
    order = torch.rand(len(pixels), patches, generator=generator)
    return ProbeImages(pixels, saved.preprocessing.normalise(pixels), order)


@torch.no_grad()
def compute(saved: Saved, probe: ProbeImages) -> Outputs:
    """The outputs of our model: `features`, and `logits` or (with a decoder) `reconstructions`."""
    if isinstance(saved, SavedClassifier):
        features = saved.model.forward_features(probe.imgs)
        return {"logits": saved.model.head(features), "features": features}
    outputs = {"features": saved.model.forward_features(probe.imgs)}
    if isinstance(saved, SavedAutoencoder):
        pred = saved.model.reconstruct(probe.imgs, noise=probe.noise).pred
        outputs["reconstructions"] = pred
    return outputs


def compare(to: str, ours: Outputs, theirs: Outputs) -> list[Parity]:
    """Compare output by output. Raises Fault for one that differs by more than the tolerance."""
    found = []
    for name, value in theirs.items():
        own, wrong = ours[name], ""
        if value.shape != own.shape:
            wrong = f"{name} have shape {tuple(value.shape)} instead of {tuple(own.shape)}"
        else:
            off, scale = (x.abs().max().item() for x in (value.float() - own, own))
            found.append(Parity(name, off, scale))
            if not found[-1].relative <= TOLERANCE:  # NaN compares false
                wrong = f"{found[-1]}; the limit is {TOLERANCE:.0e}"
        if wrong:
            raise Fault(f"--to {to}: {wrong}; nothing was written")
    return found


def export(saved: Saved, to: str, folder: Path) -> list[Parity]:
    """Write all files of a target except the model card, and compare the outputs.

    Raises Fault if they differ, BadInput for a model that the target does not support, OSError.
    """
    target, probe = TARGETS[to], make_probe(saved)
    with quiet():
        target.write(saved, folder)
        theirs = target.read(folder, probe)
    if list(theirs.classes) != list(classes_of(saved) if target.keeps_head else ()):
        raise Fault(f"--to {to}: the exported classes differ in name or order; nothing was written")
    return compare(to, compute(saved, probe), theirs.outputs)


def card_of(
    saved: Saved, to: str, source: Path, parity: list[Parity], folder: Path, licence: str = ""
) -> str:
    """The model card for the files that were exported to a folder."""
    classes = classes_of(saved) if TARGETS[to].keeps_head else ()
    preprocessing = settings_of(saved)["preprocessing"]
    if to in COMMANDS:
        file, size = next(folder.glob("*.pth")).name, vit_size(saved)
        loader, use = COMMANDS[to].split()[1], command_use(to, file, size, len(classes))
    else:
        loader = _loader(saved, to, folder)
        use = python_use(to, loader, bool(classes), preprocessing)
    return model_card(
        Card(
            to=to,
            name=saved.name,
            loader=loader,
            classes=classes,
            preprocessing=preprocessing,
            use=use,
            parity="; ".join(map(str, parity)),
            note=note_of(saved, to),
            source=source,
            checkpoint=saved.checkpoint,
            licence=licence,
        )
    )


def note_of(saved: Saved, to: str) -> str:
    """What a user of the exported model must know about its use there; "" if nothing."""
    if to in ("timm", "hf") and family(saved).new_norm == "norm" and not classes_of(saved):
        return NEW_NORM
    if (
        to == "mae-sfer"
        and isinstance(saved, SavedClassifier)
        and (other := usage_differences(saved))
    ):
        return OTHER_USE.format(other)
    return ""


def _loader(saved: Saved, to: str, folder: Path) -> str:
    """The class or function of a library that opens the files in a folder."""
    if to == "hf":
        return architecture(folder)
    if to == "safetensors":
        return "open_classifier" if isinstance(saved, SavedClassifier) else "open_saved"
    return {"onnx": "onnxruntime", "timm": "timm.create_model"}[to]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings, logs and output of exporters and loaders."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_weights(path: Path, state: State, settings: dict[str, Any]) -> None:
    """Write safetensors, with the settings for opening it again as JSON in its header.

    Raises OSError.
    """
    own = {name: value.detach().clone().contiguous() for name, value in state.items()}  # no views
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    write_file(path, save(own, {"format": "pt", **metadata}))


# --- safetensors, with our own names ---


def write_own(saved: Saved, folder: Path) -> None:
    """Write `model.safetensors`, and its settings in readable form to `config.json`."""
    settings, state = settings_of(saved), saved.model.state_dict()
    if isinstance(saved, SavedEncoder):  # its decoder is untrained
        state = without_decoder(state)
    write_weights(folder / WEIGHTS, state, settings)
    write_json(folder / CONFIG, {"model": saved.name, **settings})


def read_own(folder: Path, probe: ProbeImages) -> ExternalOutputs:
    """Read with `models_saved.open_saved`."""
    saved = open_saved(folder / WEIGHTS)
    return ExternalOutputs(compute(saved, probe), classes_of(saved))


# --- timm ---


def write_timm(saved: Saved, folder: Path) -> None:
    """Write the files that `timm.create_model("local-dir:…", pretrained=True)` reads."""
    form = timm_form(saved)
    write_weights(folder / WEIGHTS, form.state, settings_of(saved, plain_head=True))
    write_json(folder / CONFIG, timm_config(saved, form))


@torch.no_grad()
def read_timm(folder: Path, probe: ProbeImages) -> ExternalOutputs:
    """Logits or an encoder's features; ConvNeXt's are taken before the newly initialised norm."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if model.num_classes:
        return ExternalOutputs({"logits": model(probe.imgs)}, model.pretrained_cfg["label_names"])
    if hasattr(model, "blocks"):
        return ExternalOutputs({"features": model(probe.imgs)})
    return ExternalOutputs({"features": model.forward_features(probe.imgs).mean(dim=(2, 3))})


# --- Hugging Face's transformers ---


def write_hf(saved: Saved, folder: Path) -> None:
    """Write the files that `from_pretrained` of the class named in `config.json` reads."""
    form = hf_form(saved)
    write_weights(folder / WEIGHTS, form.state, settings_of(saved, plain_head=True))
    write_json(folder / CONFIG, form.config)
    write_json(folder / PROCESSOR, image_processor(saved.preprocessing))


def architecture(folder: Path) -> str:
    """The class that `config.json` names."""
    return json.loads((folder / CONFIG).read_text())["architectures"][0]


@torch.no_grad()
def read_hf(folder: Path, probe: ProbeImages) -> ExternalOutputs:
    """Logits, or an encoder's features and (ViTMAE with its decoder) reconstructions."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = architecture(folder)

    def load(name: str, **settings: object) -> nn.Module:
        cls = getattr(transformers, name)
        return cls.from_pretrained(folder, local_files_only=True, **settings).eval()

    if name.endswith("ForImageClassification"):
        model = load(name)
        classes = [model.config.id2label[k] for k in range(model.config.num_labels)]
        return ExternalOutputs({"logits": model(probe.imgs).logits}, classes)
    if name == "ConvNextV2Model":
        return ExternalOutputs(
            {"features": load(name)(probe.imgs).last_hidden_state.mean(dim=(2, 3))}
        )
    tokens = load("ViTMAEModel", mask_ratio=0.0)(probe.imgs).last_hidden_state
    outputs = {"features": tokens[:, 1:].mean(dim=1)}
    if name == "ViTMAEForPreTraining":
        outputs["reconstructions"] = load(name)(probe.imgs, noise=probe.noise).logits
    return ExternalOutputs(outputs)


# --- the original authors' programs ---


def write_mae_sfer(saved: Saved, folder: Path) -> None:
    """Write the file that MAE-SFER's `main_rafdb.py --resume --checkpoint-whole FILE` reads."""
    _write_torch(folder, *mae_sfer_form(saved))


def write_s2d(saved: Saved, folder: Path) -> None:
    """Write the file from which S2D's `run_class_finetuning.py` starts."""
    _write_torch(folder, *s2d_form(saved))


def _write_torch(folder: Path, name: str, content: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save(content, data)
    write_file(folder / name, data.getvalue())


@torch.no_grad()
def read_token_vit(folder: Path, probe: ProbeImages) -> ExternalOutputs:
    """Read with timm's ViT, the model of both programs; every tensor must fit."""
    import timm

    content = torch.load(next(folder.glob("*.pth")), weights_only=True)
    state = content.get("model_state_dict", content.get("model"))
    state = {name: value for name, value in state.items() if name not in S2D_PLACEHOLDER}
    held, classes = identify_architecture(state), content.get("classes", ())
    made = {"patch_size": held.patch, "num_classes": len(classes)}
    model = timm.create_model(f"{held.classifier}_224", **made).eval()
    model.load_state_dict(state)
    tokens = model.forward_features(probe.imgs)
    if "model" in content:  # pre-trained; see MaskedAutoencoderViT.forward_features
        return ExternalOutputs({"features": tokens[:, 1:].mean(dim=1)})
    outputs = {"features": tokens[:, 0]}
    if classes:
        outputs["logits"] = model.head(tokens[:, 0])
    return ExternalOutputs(outputs, classes)


TARGETS = {
    "onnx": Target(
        write_onnx, lambda folder, probe: ExternalOutputs(*read_onnx(folder, probe.pixels))
    ),
    "safetensors": Target(write_own, read_own),
    "timm": Target(write_timm, read_timm),
    "hf": Target(write_hf, read_hf),
    "mae-sfer": Target(write_mae_sfer, read_token_vit),
    "s2d": Target(write_s2d, read_token_vit, keeps_head=False),
}
