"""The code in the model card that shows how to use the exported weights.

It is meant to run in the export folder, on a picture `face.jpg`. Tests run each piece of Python.
"""

from collections.abc import Mapping
from typing import Any

PICTURE = 'Image.open("face.jpg").convert("RGB")'
SHOW = "print(dict(zip(classes, p.tolist())))"
# Commands of the original authors' programs, which are started in their own folders.
COMMANDS = {
    "mae-sfer": (
        "python main_rafdb.py --resume --checkpoint-whole {file} "
        "--model-name vit_{size}_fixedpe_patch16_224{evaluate}"
    ),
    "s2d": "python run_class_finetuning.py --model s2d_{size}_patch16_224 --finetune {file}",
}


def command_use(to: str, file: str, size: str, classes: int) -> str:
    """The card's section for one of COMMANDS, in Markdown; `classes` 0: pre-trained only."""
    # With another number of classes, their program silently leaves the head as initialised.
    evaluate = f" --num_class {classes} --evaluate" if classes else ""
    command = COMMANDS[to].format(file=file, size=size, evaluate=evaluate)
    return f"With the path to `{file}` and the program's other options:\n\n```sh\n{command}\n```"


def python_use(to: str, loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    """The card's section for a library, in Markdown; arguments as in `code_for`."""
    code = code_for(to, loader, classifies, preprocessing)
    return f"In this folder, with a cropped face in `face.jpg`:\n\n```python\n{code}\n```"


def code_for(to: str, loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    """Python code for a target; `loader` is the class or function that opens the files."""
    maker = {"onnx": _onnx, "safetensors": _own, "timm": _timm, "hf": _hf}[to]
    return maker(loader, classifies, preprocessing)


def _onnx(loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    crop_pct, way = preprocessing["crop_pct"], f"Image.{preprocessing['interpolation'].upper()}"
    cut = f"face = face.resize((size, size), {way})"
    if crop_pct is not None:
        edge = f"bleed={(1 - crop_pct) / 2:.6g}"
        cut = f"face = ImageOps.fit(face, (size, size), {way}, {edge})"
    lines = [
        "import json",
        "import numpy as np",
        "import onnxruntime",
        f"from PIL import Image{'' if crop_pct is None else ', ImageOps'}",
        "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        "size = session.get_inputs()[0].shape[2]",
        f"face = {PICTURE}",
        cut,
        "images = np.asarray(face).transpose(2, 0, 1)[None]  # (1, 3, size, size), uint8",
    ]
    if classifies:
        lines += [
            'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])',
            'p = session.run(["probabilities"], {"images": images})[0][0]',
            SHOW,
        ]
    else:
        lines += [
            'features = session.run(["features"], {"images": images})[0]',
            "print(features.shape)",
        ]
    return "\n".join(lines)


def _own(loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    lines = [
        "# PYTHONPATH must contain the folder of MAE-SFER",
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        f"from models_saved import {loader}",
        "",
        f'saved = {loader}("model.safetensors")',
        "view, normalise = saved.preprocessing.view, saved.preprocessing.normalise",
        f"imgs = normalise(view(np.asarray({PICTURE}))[None])",
        "with torch.no_grad():",
    ]
    if classifies:
        lines += ["    p = saved.model(imgs).softmax(dim=-1)[0]", "classes = saved.classes", SHOW]
    else:
        lines += ["    features = saved.model.forward_features(imgs)", "print(features.shape)"]
    return "\n".join(lines)


def _timm(loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    lines = [
        "import timm",
        "import torch",
        "from PIL import Image",
        "",
        'model = timm.create_model("local-dir:.", pretrained=True).eval()',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        f"imgs = transform({PICTURE})[None]",
        "with torch.no_grad():",
    ]
    if classifies:
        lines += [
            "    p = model(imgs).softmax(dim=-1)[0]",
            'classes = model.pretrained_cfg["label_names"]',
            SHOW,
        ]
    else:
        lines += [
            "    features = model.forward_features(imgs)  # tokens or a feature map, not pooled",
            "print(features.shape)",
        ]
    return "\n".join(lines)


def _hf(loader: str, classifies: bool, preprocessing: Mapping[str, Any]) -> str:
    masks = loader.startswith("ViTMAE")
    name = "ViTMAEModel" if masks else loader
    settings = ", mask_ratio=0.0" if masks else ""
    lines = [
        "import torch",
        "from PIL import Image",
        f"from transformers import AutoImageProcessor, {name}",
        "",
        'processor = AutoImageProcessor.from_pretrained(".")',
        f'model = {name}.from_pretrained("."{settings}).eval()',
        f'inputs = processor({PICTURE}, return_tensors="pt")',
        "with torch.no_grad():",
    ]
    if classifies:
        lines += [
            "    p = model(**inputs).logits.softmax(dim=-1)[0]",
            "classes = model.config.id2label.values()",
            SHOW,
        ]
    elif masks:
        lines += [
            "    tokens = model(**inputs).last_hidden_state  # patches in arbitrary order",
            "features = tokens[:, 1:].mean(dim=1)",
            "print(features.shape)",
        ]
    else:
        lines += [
            "    features = model(**inputs).last_hidden_state.mean(dim=(2, 3))",
            "print(features.shape)",
        ]
    return "\n".join(lines)
