"""main_visualize: every figure that a checkpoint allows, of the right images, in its folder."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_visualize
from datasets.decode import UnreadableImage
from engine_pretrain import reconstruct
from inference.visualize import FigureData, Viewer, in_turn, pick_images
from models_saved import open_autoencoder, open_saved
from runs import load, run_here
from util.errors import BAD_INPUT, BadInput, Fault
from util.report.figures import ratio_grid
from util.seeding import FIGURE, generator
from util.states import root
from util.weights.layouts import DECODER

CHARTS = ("confusion_matrix", "classes", "reliability")


def visualize(*options):
    return run_here(main_visualize, [*map(str, options), "--num_workers", "0"])


def names(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_fine_tuned_checkpoint_gets_the_charts_of_its_own_evaluation(
    family, sets, finetune, tmp_path, capfd
):
    run = finetune(family)
    options = ["--checkpoint", run / "checkpoint-best.pth", "--data_path", sets / "rafdb"]
    assert visualize(*options, "--output_dir", tmp_path) == 0
    assert names(tmp_path) == {*CHARTS, "attention", "features"}
    for chart in CHARTS:
        file = f"figures/{chart}.png"
        assert (tmp_path / file).read_bytes() == (run / file).read_bytes()
    told = capfd.readouterr().out.split()
    assert {path for path in told if path.endswith(".png")} == {
        str(path) for path in tmp_path.glob("figures/*.png")
    }


def test_a_pre_trained_checkpoint_gets_reconstructions_and_a_feature_map(
    sets, pretrained, tmp_path
):
    options = ["--checkpoint", pretrained["vit"], "--data_path", sets / "rafdb"]
    assert visualize(*options, "--output_dir", tmp_path, "--mask_ratios", 0.75, 0.5) == 0
    assert names(tmp_path) == {"reconstructions", "features"}
    shown = picture(tmp_path / "figures/reconstructions.png")
    assert visualize(*options, "--output_dir", tmp_path / "again", "--mask_ratios", 0.5, 0.75) == 0
    assert (picture(tmp_path / "again/figures/reconstructions.png") == shown).all()
    seed = [*options, "--figures", "reconstructions", "--seed", 1, "--output_dir", tmp_path / "b"]
    assert visualize(*seed) == 0
    assert names(tmp_path / "b") == {"reconstructions"}
    other = picture(tmp_path / "b/figures/reconstructions.png")
    # Of the default ratios, 0.9 would leave none of four patches visible and is skipped.
    assert other.shape == shown.shape
    assert (other != shown).any()


def test_patches_masked_at_a_low_ratio_are_masked_at_higher_ones(pretrained):
    saved = open_autoencoder(pretrained["vit"])
    rng = np.random.default_rng(0)
    faces = Faces(rng.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8))
    viewer = Viewer(saved, FigureData(faces, None, (), ()), torch.device("cpu"), 4, 0, seed=3)
    shown = viewer.reconstructions(2, [0.25, 0.75])
    imgs, _ = pick_images(faces, None, saved.preprocessing.view, 2, 3)
    noise = generator(FIGURE, 3, 1).random((2, saved.model.num_patches), dtype=np.float32)
    noise = torch.from_numpy(noise)
    few, many = (reconstruct(saved.model, viewer.normalise, imgs, r, noise) for r in (0.25, 0.75))
    removed = [(stage.masked != stage.original).any(axis=3) for stage in (few, many)]
    assert (removed[0] <= removed[1]).all()
    assert removed[0].sum() < removed[1].sum()
    columns = [(0.25, few.masked, few.reconstructed), (0.75, many.masked, many.reconstructed)]
    expected = ratio_grid(few.original, columns, saved.name)
    assert (shown == expected).all()


class Faces:
    """Images in memory; None is an unreadable one."""

    digest = ""

    def __init__(self, images):
        self.images = list(images)

    def __len__(self):
        return len(self.images)

    def image(self, i):
        if self.images[i] is None:
            raise UnreadableImage(self.name(i), "is torn")
        return self.images[i]

    def name(self, i):
        return f"{i}.jpg"


def test_shown_images_are_readable_and_of_all_classes_in_turn():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 7)
    order = in_turn(labels, 0)
    assert sorted(order) == list(range(60))
    assert [set(labels[order[i : i + 3]]) for i in (0, 3, 6)] == [{0, 1, 2}] * 3
    assert not (order == in_turn(labels, 1)).all()

    def view(image):
        return torch.from_numpy(image).permute(2, 0, 1)

    images = [np.full((4, 4, 3), i, np.uint8) for i in range(60)]
    for torn in order[:4]:
        images[torn] = None
    imgs, chosen = pick_images(Faces(images), labels, view, 6, 0)
    assert imgs[:, 0, 0, 0].tolist() == chosen.tolist()
    assert not set(order[:4]) & set(chosen.tolist())
    assert sorted(labels[chosen]) == labels[chosen].tolist()
    assert set(labels[chosen]) == {0, 1, 2}
    assert len(pick_images(Faces([*images[:2], images[5]]), None, view, 6, 0)[0]) <= 3
    with pytest.raises(
        BadInput, match=r"none of the images tried can be read \(the last: .\.jpg: is torn"
    ):
        pick_images(Faces([None] * 3), None, view, 2, 0)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_an_encoder_without_a_decoder_gets_a_feature_map(family, sets, pretrained, tmp_path, capfd):
    state = load(pretrained[family].parent)["model"]
    kept = {name: value for name, value in state.items() if root(name) not in DECODER}
    assert len(kept) < len(state)
    torch.save({"model": kept}, tmp_path / "encoder.pth")
    options = ["--checkpoint", tmp_path / "encoder.pth", "--data_path", sets / "rafdb"]
    assert visualize(*options) == 0
    assert names(tmp_path) == {"features"}
    assert visualize(*options, "--figures", "reconstructions") == BAD_INPUT
    assert "encoder.pth has no decoder" in capfd.readouterr().err


def test_reconstructions_need_no_labels(pretrained, tmp_path, capfd):
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    options = ["--checkpoint", pretrained["convnext"], "--data_path", tmp_path / "images"]
    options += ["--output_dir", tmp_path]
    assert visualize(*options) == 0
    assert names(tmp_path) == {"reconstructions"}
    assert "warning" not in capfd.readouterr().out
    assert visualize(*options, "--figures", "features") == BAD_INPUT
    assert "has no labels to colour it by" in capfd.readouterr().err
    assert visualize(*options, "--split", "test") == BAD_INPUT
    assert "--split: these images have no labels" in capfd.readouterr().err


def test_images_without_labels_are_cropped_as_in_training_or_this_is_reported(
    sets, pretrained, tmp_path, capfd
):
    options = ["--checkpoint", pretrained["vit"], "--data_set", "none", "--output_dir", tmp_path]
    options += ["--figures", "reconstructions", "--mask_ratios", 0.5]
    assert visualize(*options, "--data_path", sets / "affectnet") == 0
    assert "warning" not in capfd.readouterr().out
    assert visualize(*options, "--data_path", sets / "affectnet", "--face_margin", 0) == 0
    said = capfd.readouterr().out
    assert "warning: drawn with --face_margin 0; trained with --face_margin 0.15" in said
    assert visualize(*options, "--data_path", sets / "rafdb") == 0
    said = capfd.readouterr().out
    assert "warning: drawn with whole images; trained with --face_margin 0.15" in said


def test_figures_are_saved_beside_the_checkpoint_and_shown_in_its_report(sets, finetune, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finetune("convnext"), run)
    before = (run / "status.json").read_text()
    options = ["--checkpoint", run / "checkpoint-best.pth", "--data_path", sets / "rafdb"]
    assert visualize(*options, "--figures", "attention", "--count", 3) == 0
    page = (run / "report.html").read_text()
    for heading in ("What the model looks at", "Classes", "Reliability", "Confusion matrix"):
        assert f"<strong>{heading}.</strong>" in page
    assert "Feature map" not in page
    # A failed visualisation does not change the status of the run.
    assert visualize(*options, "--figures", "reconstructions") == BAD_INPUT
    assert (run / "status.json").read_text() == before


def test_runs_can_be_compared_without_a_checkpoint(finetune, pretrained, tmp_path, capfd):
    runs = [finetune("vit"), finetune("convnext")]
    assert visualize("--runs", *runs, "--output_dir", tmp_path) == 0
    assert names(tmp_path) == {"curves"}
    (tmp_path / "empty").mkdir()
    assert visualize("--runs", runs[0], tmp_path / "empty", "--output_dir", tmp_path) == BAD_INPUT
    assert "empty: has no log.txt with an epoch in it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "--checkpoint is missing"),
        ("--checkpoint {fine}", "--data_path is missing"),
        ("--checkpoint {fine} --data_path {data} --figures eyes", "must be some of reconstr"),
        ("--checkpoint {fine} --data_path {data} --figures attention,curves", "with --runs DIR"),
        ("--figures curves --runs {data}/none", "none: no such folder"),
        (
            "--checkpoint {fine} --data_path {data} --figures reconstructions",
            "has no decoder; use a pre-training checkpoint",
        ),
        (
            "--checkpoint {pre} --data_path {data} --figures features,confusion",
            "--figures confusion: {pre} was pre-trained only; use a fine-tuned checkpoint",
        ),
        ("--checkpoint {fine} --data_path {data} --split val", "has no such split; it has train"),
        ("--checkpoint {fine} --data_path {data} --data_set none", "need labels"),
        ("--checkpoint mae_vit_base_300e --data_path {data}", "name a folder; mae_vit_base_300e"),
        ("--checkpoint {fine} --data_path {data} --mask_ratios 1", "--mask_ratios: must be"),
        ("--checkpoint {pre} --data_path {data} --mask_ratios 0.9", "--mask_ratios 0.9 leaves 0"),
        ("--checkpoint {fine} --data_path {data} --output_dir {fine}/x", "is a file or inside one"),
    ],
)
def test_wrong_options_give_one_error_line(
    options, said, sets, pretrained, finetune, tmp_path, capfd
):
    places = {"fine": finetune() / "checkpoint-best.pth", "pre": pretrained["vit"]}
    places["data"] = sets / "rafdb"
    options = options.format(**places).split()
    if "--output_dir" not in options and "mae_vit_base_300e" not in options:
        options += ["--output_dir", tmp_path]
    capfd.readouterr()
    assert visualize(*options) == BAD_INPUT
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said.format(**places) in lines[0]
    assert not list(tmp_path.glob("figures/*"))


def test_labels_of_another_data_set_are_mapped_to_the_models_classes(sets, finetune, tmp_path):
    """AffectNet has Contempt and another order than RAF-DB."""
    best = finetune("convnext") / "checkpoint-best.pth"
    options = ["--checkpoint", best, "--data_path", sets / "affectnet", "--output_dir", tmp_path]
    assert visualize(*options, "--figures", "attention,confusion") == 0
    assert names(tmp_path) == {"attention", "confusion_matrix"}


def test_too_few_images_give_no_feature_map(pretrained):
    saved = open_saved(pretrained["convnext"])
    faces = Faces([np.zeros((40, 40, 3), np.uint8)] * 4)
    data = FigureData(faces, np.zeros(4, int), ("a",), (0,))
    viewer = Viewer(saved, data, torch.device("cpu"), 4, 0, seed=0)
    with pytest.raises(BadInput, match="4 images can be read; a feature map needs at least 5"):
        viewer.features()


def test_features_that_are_not_finite_give_no_feature_map(pretrained, monkeypatch):
    saved = open_saved(pretrained["convnext"])
    monkeypatch.setattr(saved.model, "forward_features", lambda x: x.mean((2, 3)) * float("inf"))
    faces = Faces([np.full((40, 40, 3), 40 * i, np.uint8) for i in range(6)])
    data = FigureData(faces, np.zeros(6, int), ("a",), (0,))
    with pytest.raises(Fault, match="not finite"):
        Viewer(saved, data, torch.device("cpu"), 4, 0, seed=0).features()
