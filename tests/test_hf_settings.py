"""Settings of transformers beside weights: used if we support them, else noted or refused."""

import json
import os
from contextlib import suppress

import pytest
import transformers
from safetensors.torch import save_file

from backbones import family_of
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from exported import export
from models_registry import create_classifier
from models_saved import open_classifier, open_saved
from nasty import NASTY
from util.errors import DONE, BadInput
from util.weights import load_pretrained
from util.weights.hf_settings import check_config, described_beside
from util.weights.layouts import Architecture
from util.weights.layouts_foreign import to_transformers_vit

NAMES = ("happy", "sad", "neutral")
CONFIG = {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
CONFIG |= {"id2label": {str(k): name for k, name in enumerate(NAMES)}}
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ViT-Tiny of 32 pixels with 3 classes in transformers' layout."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = create_classifier("vit_tiny_patch16", 3, 32, global_pool="token")
    save_file({n: v.clone() for n, v in to_transformers_vit(model.state_dict()).items()}, path)
    return path


@pytest.fixture
def beside(weights, tmp_path):
    """The weights with other files beside them."""

    def write(config=CONFIG, processor=None):
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        os.link(weights, tmp_path / "model.safetensors")
        for name, content in (("config", config), ("preprocessor_config", processor)):
            if content is not None:
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                (tmp_path / f"{name}.json").write_bytes(content)
        return tmp_path / "model.safetensors"

    return write


def said(beside, processor, config=CONFIG):
    """Preprocessing and notes for weights with an input of 32 × 32 pixels."""
    settings, notes = described_beside(beside(config, processor), 32)
    return settings["preprocessing"], notes


# ---- classes


def test_classes_come_from_the_config(beside):
    assert open_classifier(beside()).classes == NAMES
    assert open_classifier(beside(), ("a", "b", "c")).classes == ("a", "b", "c")


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
        {"0": "a", "1": "b"},
        {"0": "a", "1": "b", "3": "c"},
        {"0": "a", "1": "b", "2": 3},
        {"0": "a", "1": "b", "2": ""},
        ["a", "b", "c"],
        "abc",
        None,
    ],
)
def test_invalid_labels_are_not_used_as_class_names(labels, beside):
    with pytest.raises(BadInput, match="has 3 classes, but does not name them"):
        open_classifier(beside({**CONFIG, "id2label": labels}))


@pytest.mark.parametrize("junk", [b"", b"[1]", b"{", b"\xff\xfe", DEEP, b'{"a":' + DEEP])
def test_files_without_a_json_object_are_ignored(junk, beside):
    saved = open_classifier(beside(junk, junk), NAMES)
    assert saved.preprocessing[:4] == (32, None, IMAGENET_MEAN, IMAGENET_STD)
    assert saved.notes == []


# ---- settings that the weights do not show


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 12}, "says num_attention_heads 12, but our vit_tiny.* has 3$"),
        ({"num_attention_heads": "3"}, "says num_attention_heads '3'"),
        ({"num_attention_heads": None}, "says num_attention_heads of another type"),
        ({"hidden_act": "gelu_new"}, "says hidden_act 'gelu_new', but our vit_tiny.* has gelu$"),
        ({"hidden_act": ["gelu"]}, "says hidden_act of another type"),
        ({"hidden_act": {"a": "\x1b[2J"}}, "says hidden_act of another type"),
    ],
)
def test_other_heads_or_another_activation_are_refused(changes, told, beside):
    path = beside({**CONFIG, **changes})
    model = create_classifier("vit_tiny_patch16", 5, 32)
    for read in (open_saved, lambda path: load_pretrained(model, path)):
        with pytest.raises(BadInput, match=told) as error:
            read(path)
        assert str(error.value).isprintable()


def test_another_name_of_the_same_activation_is_accepted(beside):
    assert open_classifier(beside({**CONFIG, "hidden_act": "gelu_python"})).notes == []


def test_a_config_beside_weights_in_another_layout_is_ignored(tmp_path):
    model = create_classifier("vit_tiny_patch16", 3, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_attention_heads": 12}))
    load_pretrained(model, tmp_path / "model.safetensors", keep_head=True)
    with pytest.raises(BadInput, match="but does not name them"):
        open_classifier(tmp_path / "model.safetensors")


def test_another_epsilon_is_noted(beside):
    _, notes = said(beside, None, {**CONFIG, "layer_norm_eps": 1e-12})
    assert notes == ["config.json: layer_norm_eps is 1e-12; 1e-06 is used instead"]


# ---- preprocessing

HALVES = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125]}
SQUARE = {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, **HALVES}
EDGE = {**SQUARE, "size": {"shortest_edge": 40}, "do_center_crop": True}
EDGE |= {"crop_size": {"height": 32, "width": 32}}
CONVNEXT = {**SQUARE, "image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.8}
CONVNEXT |= {"size": {"shortest_edge": 32}}


@pytest.mark.parametrize(
    ("processor", "crop_pct"),
    [
        (SQUARE, None),
        ({**SQUARE, "size": 32}, None),
        ({**SQUARE, "do_center_crop": False, "crop_size": 24}, None),
        ({**SQUARE, "do_center_crop": True, "crop_size": 32}, None),
        (EDGE, 0.8),
        ({**EDGE, "crop_size": 32}, 0.8),
        (CONVNEXT, 0.8),
        ({**CONVNEXT, "size": 32}, 0.8),
    ],
)
def test_resizing_and_cropping_are_taken_over(processor, crop_pct, beside):
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.125]}
    preprocessing |= {"input_size": 32, "crop_pct": crop_pct}
    for number, interpolation in ((2, "bilinear"), (3, "bicubic")):
        expected = {**preprocessing, "interpolation": interpolation}
        assert said(beside, {**processor, "resample": number}) == (expected, [])


def test_a_classifier_uses_the_settings_beside_it(beside):
    saved = open_classifier(beside(processor={**EDGE, "resample": 1}))
    assert saved.preprocessing[:4] == (32, 0.8, [0.5, 0.4, 0.3], [0.5, 0.25, 0.125])
    assert saved.notes == ["preprocessor_config.json: resample is 1; 3 (bicubic) is used instead"]
    saved = open_classifier(beside(processor={**EDGE, "resample": 2}))
    assert (saved.preprocessing.interpolation, saved.notes) == ("bilinear", [])


def test_programs_print_notes_on_differing_settings(beside, tmp_path, capfd):
    source = beside(processor={**SQUARE, "resample": 1})
    assert export(source, "safetensors", tmp_path / "out") == DONE
    assert "note: preprocessor_config.json: resample is 1; 3 (bicubic)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_rescale": True, "rescale_factor": 1 / 255}, [0.5, 0.4, 0.3], [0.5, 0.25, 0.125]),
        ({"do_normalize": False}, [0, 0, 0], [1, 1, 1]),
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5] * 3, [0.25] * 3),
        ({"rescale_factor": 2 / 255, **HALVES}, [0.25, 0.2, 0.15], [0.25, 0.125, 0.0625]),
        (
            {"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [25.5] * 3},
            [0.2] * 3,
            [0.1] * 3,
        ),
    ],
)
def test_normalisation_is_taken_over(changes, mean, std, beside):
    preprocessing, _ = said(beside, {**SQUARE, **changes})
    assert preprocessing["mean"] == pytest.approx(mean)
    assert preprocessing["std"] == pytest.approx(std)


RESIZES = "its resizing and cropping are not supported; whole pictures are squeezed"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"resample": 1}, "resample is 1; 3 (bicubic) is used instead"),
        ({"resample": ["\n"]}, "resample is of another type; 3 (bicubic) is used instead"),
        ({"do_resize": False}, RESIZES),
        ({"size": {"shortest_edge": 32}}, RESIZES),
        ({"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32}, RESIZES),
        ({"size": {"height": 32, "width": 48}}, RESIZES),
        ({"size": {"height": 10**300, "width": 10**300}}, RESIZES),
        ({"size": {"shortest_edge": 0}, "do_center_crop": True, "crop_size": -3}, RESIZES),
        ({"size": "32"}, RESIZES),
        (
            {"size": {"height": 64, "width": 64}},
            "its pictures are 64 px wide; 32 px is used instead",
        ),
    ],
)
def test_unsupported_preprocessing_is_noted(changes, note, beside):
    preprocessing, notes = said(beside, {**SQUARE, **changes})
    assert (preprocessing["input_size"], preprocessing["crop_pct"]) == (32, None)
    assert notes == [f"preprocessor_config.json: {note}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": "x"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0, 1, 1]},
        {"image_std": [1, None, 1]},
        {"image_std": {"a": 1}},
        {**CONVNEXT, "crop_pct": 3},
        {**CONVNEXT, "crop_pct": "0.8"},
    ],
)
def test_invalid_preprocessing_is_refused(changes, beside):
    with pytest.raises(BadInput, match="invalid preprocessing settings"):
        open_classifier(beside(processor={**SQUARE, **changes}))


@pytest.mark.parametrize(
    ("name", "options", "crop_pct"),
    [
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}, None),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "resample": 2}, 0.875),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "resample": 3}, None),
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
            0.8,
        ),
    ],
)
def test_settings_written_by_transformers_are_read(name, options, crop_pct, tmp_path):
    processor = getattr(transformers, name)(**options, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(tmp_path)
    settings, notes = described_beside(tmp_path / "model.safetensors", None)
    size = options["size"].get("shortest_edge", 32) if name != "BitImageProcessor" else 32
    assert settings["preprocessing"] == {
        "input_size": size,
        "crop_pct": crop_pct,
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "interpolation": "bilinear" if options.get("resample") == 2 else "bicubic",
    }
    assert notes == []


NESTED = json.loads("[" * 500 + "]" * 500)
JUNK = [None, True, -2, 10**30, 1.5, float("nan"), [], {}, {"a": 1}, NESTED, *NASTY[::6]]
KEYS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "id2label", "image_size")
KEYS += ("mask_ratio", "norm_pix_loss", "decoder_num_attention_heads")
OF_PIXELS = ("size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor")
OF_PIXELS += ("do_normalize", "image_mean", "image_std", "resample", "crop_pct")
OF_PIXELS += ("image_processor_type",)


@pytest.mark.parametrize("key", [*KEYS, *OF_PIXELS])
def test_any_value_is_read_or_is_bad_input(key, beside):
    held = Architecture(family_of("vit_tiny_patch16"), 192, (12,), 16, 3)
    for base in (SQUARE, EDGE, CONVNEXT) if key in OF_PIXELS else (SQUARE,):
        for junk in [*JUNK, *({"height": j, "width": j, "shortest_edge": j} for j in JUNK)]:
            path = beside({**CONFIG, key: junk}, {**base, key: junk})
            for size in (None, 32):
                _, notes = described_beside(path, size)
                assert all(line.isprintable() and len(line) < 200 for line in notes)
            with suppress(BadInput):
                check_config(path, held)


@pytest.mark.parametrize("junk", [NESTED, "x", 0, {"height": 0, "width": 0}])
def test_invalid_preprocessing_gives_one_error_line(junk, beside):
    for key in ("image_mean", "rescale_factor", "crop_pct"):
        with pytest.raises(BadInput, match="invalid preprocessing settings") as error:
            open_classifier(beside(processor={**CONVNEXT, key: junk, "image_std": junk}))
        assert len(str(error.value)) < 400
