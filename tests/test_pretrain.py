"""Complete pre-trainings: on photographs, of every family, with options that keep the result."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from datasets import open_images
from datasets.labelled import crop_face
from finetuned import config
from main_pretrain import build_parser, check_options, work
from runs import FAMILIES, SMALL, log
from util.errors import BadInput
from util.program import run_program


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs: 96 small grey ones and 8 crops of a large colour one."""
    folder = tmp_path_factory.mktemp("photographs")
    for k, face in enumerate(skimage.data.lfw_subset()[:96]):  # the second half are not faces
        Image.fromarray((255 * face).astype(np.uint8)).resize((64, 64)).save(folder / f"{k}.png")
    (folder / "colour").mkdir()
    astronaut = Image.fromarray(skimage.data.astronaut())
    for k in range(8):
        box = (150 + 5 * k, 2 * k, 320 + 5 * k, 190 + 2 * k)
        astronaut.crop(box).save(folder / "colour" / f"{k}.jpeg", quality=92)
    return folder


def run(options):
    argv = f"{SMALL} --num_workers 0 {options}".split()
    assert run_program(build_parser, check_options, work, argv) == 0


SLOW = {"resnet": pytest.mark.long}


@pytest.mark.parametrize("family", [pytest.param(f, marks=SLOW.get(f, ())) for f in FAMILIES])
def test_the_loss_falls_on_real_photographs(family, photographs, tmp_path):
    run(
        f"{FAMILIES[family]} --data_path {photographs} --output_dir {tmp_path} --epochs 10 "
        "--norm_pix_loss False --lr 1e-3 --clip_grad 1 --vis_freq 5"
    )
    losses = [record["train_loss"] for record in log(tmp_path)]
    assert sum(losses[-3:]) / 3 < 0.85 * losses[0], losses
    picture = Image.open(tmp_path / "figures" / "reconstruction-0009.png")
    assert picture.width > 400
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert FAMILIES[family].split()[1] in page


@pytest.mark.parametrize(
    "option", ["--num_workers 2", "--grad_checkpointing", "--save_steps 1", "--print_freq 7"]
)
def test_options_of_speed_saving_and_logging_do_not_change_the_result(option, tmp_path):
    for name, more in (("a", ""), ("b", option)):
        run(f"{FAMILIES['fcmae']} --epochs 1 --output_dir {tmp_path / name} {more}")
    a, b = (torch.load(tmp_path / n / "checkpoint-0.pth", weights_only=True) for n in "ab")
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, msg=name)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            f"{FAMILIES['mae']} --predict_ratio 0.5",
            "48 px, 75% of 9 patches masked, 50% of those predicted; fp32 on cpu, fused attention "
            "kernel",
        ),
        (f"{FAMILIES['mae']} --amp bf16", "attention in separate steps"),
        (FAMILIES["fcmae"], "windowed convolution"),
    ],
)
def test_the_log_shows_what_is_predicted_and_with_which_kernels(options, told, tmp_path, capsys):
    run(f"{options} --epochs 1 --output_dir {tmp_path}")
    assert told in capsys.readouterr().out


def test_predict_ratio_is_refused_for_fcmae():
    parse, model = build_parser().parse, ["--model", "convnextv2_atto"]
    check_options(parse([*model, "--predict_ratio", "1"]))
    with pytest.raises(
        BadInput, match=r"^--predict_ratio: not an option of convnextv2_atto, .* MAE"
    ):
        check_options(parse([*model, "--predict_ratio", "0.25"]))


def test_bf16_is_close_to_fp32(tmp_path):
    for name, more in (("a", ""), ("b", "--amp bf16")):
        run(f"{FAMILIES['mae']} --output_dir {tmp_path / name} {more}")
    exact, rough = log(tmp_path / "a"), log(tmp_path / "b")
    assert rough[-1]["train_loss"] != exact[-1]["train_loss"]
    assert rough[-1]["train_loss"] == pytest.approx(exact[-1]["train_loss"], rel=0.02)


@pytest.mark.parametrize("family", ["mae", pytest.param("fcmae", marks=pytest.mark.long)])
def test_a_compiled_model_is_close_to_the_eager_one(family, tmp_path):
    for name, more in (("a", ""), ("b", "--compile")):
        run(f"{FAMILIES[family]} --epochs 1 --output_dir {tmp_path / name} {more}")
    eager, compiled = log(tmp_path / "a"), log(tmp_path / "b")
    assert compiled[-1]["train_loss"] == pytest.approx(eager[-1]["train_loss"], rel=1e-4)


def test_tensorboard_steps_are_thousandths_of_epochs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(f"{FAMILIES['mae']} --output_dir {tmp_path} --log_dir {tmp_path}/events --vis_freq 1")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train_loss", "lr", "grad_norm", "images_per_s"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("reconstruction")] == [1000, 2000]
    assert events.Scalars("train_loss")[-1].step == 2000


def test_pre_training_uses_the_training_split_of_labelled_data(sets, pretrained):
    assert config(pretrained["vit"].parent)["data"]["count"] == 40
    assert config(pretrained["convnext"].parent)["data"]["count"] == 56
    source = open_images(str(sets / "rafdb")).source
    assert {source.name(i).rpartition("/")[2][:6] for i in range(len(source))} == {"train_"}


def test_pre_training_on_affectnet_uses_cropped_faces(sets):
    root = sets / "affectnet"
    source = open_images(str(root)).source
    lines = (root / "Manually_Annotated_file_lists" / "training.csv").read_text().splitlines()[1:]
    images = root / "Manually_Annotated_compressed" / "Manually_Annotated_Images"
    assert len(source) == len(lines)
    for i in (0, 17, 39):
        name, *box = lines[i].split(",")[:5]
        assert source.name(i).endswith(name)
        photograph = np.asarray(Image.open(images / name).convert("RGB"))
        np.testing.assert_array_equal(source.image(i), crop_face(photograph, map(int, box), 0.15))
        assert max(source.image(i).shape) < 64 < min(photograph.shape[:2])


def test_a_few_steps_can_be_profiled(tmp_path, capsys):
    run(f"{FAMILIES['mae']} --output_dir {tmp_path} --profile 2")
    steps = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {f"ProfilerStep#{k}" for k in (10, 11)} <= {event.get("name") for event in steps}
    assert f"--profile 2: wrote {tmp_path}/trace.json" in capsys.readouterr().out
