"""Writes a saved model as ONNX, and runs it with onnxruntime."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.weights import classes_of, family, settings_of, timm_form
from models_saved import Saved, SavedClassifier
from util.files import write_json

ONNX, PREPROCESSING = "model.onnx", "preprocessing.json"
ONE_FILE = 1.9e9  # bytes of weights in a single file; ONNX files (protobuf) are limited to 2 GiB
OPSET = 20  # the first with GELU as a single operation


class Deployed(nn.Module):
    """A model that takes raw pixels, so that users cannot forget or change the normalisation."""

    def __init__(self, saved: Saved) -> None:
        super().__init__()
        self.normalise = saved.preprocessing.normalise
        self.model, self.classifies = saved.model, isinstance(saved, SavedClassifier)
        if family(saved).timm_features and not self.classifies:
            import timm

            form = timm_form(saved)
            self.model = timm.create_model(form.architecture, num_classes=0, **form.arguments)
            self.model.load_state_dict(form.state)
        elif not self.classifies:
            self.model = FeatureExtractor(saved.model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, S, S) uint8 -> logits and probabilities (N, K), or features (N, D)."""
        answer = self.model(self.normalise(images))
        return (answer, answer.softmax(dim=-1)) if self.classifies else (answer,)


class FeatureExtractor(nn.Module):
    """The pooled features of a model without a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, 3, S, S) normalised -> (N, D)."""
        return self.model.forward_features(imgs)


def write_onnx(saved: Saved, folder: Path) -> None:
    """Write `model.onnx`, for any batch size and with its settings, and `preprocessing.json`."""
    model = Deployed(saved).eval()
    size = saved.preprocessing.input_size
    names = ["logits", "probabilities"] if model.classifies else ["features"]
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
        input_names=["images"],
        output_names=names,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    settings = {"model": saved.name, "classes": list(classes_of(saved))}
    settings["preprocessing"] = settings_of(saved)["preprocessing"]
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    program.model.metadata_props.update({**metadata, "model": saved.name})
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(folder / ONNX, external_data=weights > ONE_FILE)
    write_json(folder / PREPROCESSING, {"input": "images", "outputs": names, **settings})


def read_onnx(folder: Path, pixels: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """Run onnxruntime on (N, 3, S, S) uint8 -> logits or features, and the class names.

    The first image is a batch of its own, to test two batch sizes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(folder / ONNX), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(names, {"images": part.numpy()}) for part in (pixels[:1], pixels[1:])]
    joined = [torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)]
    outputs = dict(zip(names, joined, strict=True))
    outputs.pop("probabilities", None)
    return outputs, json.loads(session.get_modelmeta().custom_metadata_map["classes"])
