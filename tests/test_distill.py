"""Distillation: the teacher's part of the loss, its input, and runs that learn from a teacher."""

import math

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

import main_finetune
from datasets.labels import ORDERS, shared_classes
from datasets.transforms import Normalise
from engine_finetune import ClassifierLoss
from engine_train import Trainer
from exported import export, refused
from finetuned import EVERYTHING, RAF_NAMES, assert_close, config, evaluate, measured, results
from layouts import write_folder
from models_registry import create_classifier
from models_saved import Preprocessing, SavedClassifier, open_classifier
from runs import (
    assert_same_run,
    finetune_options,
    load,
    log,
    run,
    run_here,
    same,
    start_ranks,
    stop_in_mid_epoch,
)
from training.distill import Teacher
from util.errors import BAD_INPUT, DONE, RESUMABLE, BadInput

NAMES = ("Happy", "Sad", "Fear", "Anger")
SIDE = 8
HALF = (0.5, 0.5, 0.5)


def linear(classes=4, seed=0):
    """A confident classifier of few pixels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, classes))
    nn.init.normal_(model[1].weight, std=0.1)
    return model


def saved_as(model, classes=NAMES, **preprocessing):
    seen = Preprocessing(**{"input_size": SIDE, **preprocessing})
    return SavedClassifier("toy", model, tuple(classes), seen, {})


def teacher_of(saved, classes=NAMES, normalise=None, weight=0.5, temperature=3.0):
    return Teacher("file", saved, classes, normalise or Normalise(), weight, temperature)


def batch(count=6, side=SIDE):
    torch.manual_seed(1)
    imgs = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return imgs, torch.rand(count, 4).softmax(1), []


# --- the loss ---


def softmax(row, temperature=1.0):
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def slow_loss(student, teacher, targets, weight, temperature):
    """The loss of rows of logits and targets, in Python; None for classes the teacher lacks."""
    total = 0.0
    for z, t, y in zip(student, teacher, targets, strict=True):
        usual = -sum(a * math.log(b) for a, b in zip(y, softmax(z), strict=True))
        known = [k for k, value in enumerate(t) if value is not None]
        p = softmax([t[k] for k in known], temperature)
        q = softmax([z[k] for k in known], temperature)
        apart = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += (1 - weight) * usual + weight * temperature**2 * apart
    return total / len(student)


def slow_gradient(student, *rest, step=1e-5):
    """The gradient of `slow_loss` by finite differences."""
    gradient = np.zeros((len(student), len(student[0])))
    for place in np.ndindex(gradient.shape):
        moved = []
        for sign in (1, -1):
            rows = [list(row) for row in student]
            rows[place[0]][place[1]] += sign * step
            moved.append(slow_loss(rows, *rest))
        gradient[place] = (moved[0] - moved[1]) / (2 * step)
    return gradient


class Given(nn.Module):
    """A student that returns these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_loss_and_gradient_equal_a_slow_reference(weight, temperature):
    imgs, targets, _ = batch()
    model, student = linear(), Given(torch.randn(6, 4))
    with torch.no_grad():
        told = model(Normalise()(imgs)).tolist()
    teacher = teacher_of(saved_as(model), weight=weight, temperature=temperature)
    loss = ClassifierLoss(Normalise(), smoothing=0.1, teacher=teacher)(student, (imgs, targets, []))
    loss.backward()
    rest = told, (0.9 * targets + 0.1 / 4).tolist(), weight, temperature
    assert loss.item() == pytest.approx(slow_loss(student.logits.tolist(), *rest), rel=1e-5)
    expected = slow_gradient(student.logits.tolist(), *rest)
    np.testing.assert_allclose(student.logits.grad, expected, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


def test_the_temperature_hardly_changes_the_size_of_the_gradient():
    sizes = []
    for temperature in (20.0, 40.0):
        student = Given(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)))
        teacher = teacher_of(saved_as(linear()), weight=1.0, temperature=temperature)
        ClassifierLoss(Normalise(), teacher=teacher)(student, batch()).backward()
        sizes.append(float(student.logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_with_weight_1_a_student_learns_from_the_teacher_and_not_from_labels():
    imgs, _, _ = batch(16)
    model, student = linear(), linear(seed=5)
    with torch.no_grad():
        expected = model(Normalise()(imgs))
    wrong = nn.functional.one_hot((expected.argmax(1) + 1) % 4, 4).float()
    loss = ClassifierLoss(Normalise(), teacher=teacher_of(saved_as(model), weight=1.0))
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(student, (imgs, wrong, []))
        value.backward()
        optimizer.step()
    assert value < 1e-3
    with torch.no_grad():
        torch.testing.assert_close(
            student(Normalise()(imgs)).softmax(1), expected.softmax(1), atol=0.02, rtol=0
        )


def test_bf16_logits_are_compared_in_fp32():
    teacher = teacher_of(saved_as(linear()))
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ClassifierLoss(Normalise(), teacher=teacher)(linear(seed=5), batch())
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# --- classes ---


def test_classes_are_matched_by_name_in_any_spelling_and_order():
    assert shared_classes(NAMES, ("anger", "x", "happiness", "sad")) == ([0, 1, 3], [2, 3, 0])
    assert shared_classes(ORDERS["rafdb"], ORDERS["affectnet"])[1] == [3, 4, 5, 1, 2, 6, 0]


def test_another_class_order_and_additional_classes_change_nothing():
    """The teacher's additional classes are left out of its softmax."""
    model, turned = linear(), linear(6)
    order = [2, 0, 3, 1]  # of our classes among the teacher's, after an additional one
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(turned[1], part)[1:5] = getattr(model[1], part)[order]
    names = ["Contempt", *(NAMES[k].lower() for k in order), "Other"]
    losses = [
        ClassifierLoss(Normalise(), teacher=teacher_of(saved))(linear(seed=5), batch())
        for saved in (saved_as(model), saved_as(turned, names))
    ]
    torch.testing.assert_close(*losses)
    (line,) = teacher_of(saved_as(turned, names)).lines[1:]
    assert line == "left out: the teacher's Contempt, Other, which the data set does not have"


def test_a_class_that_the_teacher_lacks_is_learned_from_labels_only():
    imgs, targets, _ = batch()
    model, student = linear(3), Given(torch.randn(6, 4))
    with torch.no_grad():
        told = [[a, b, None, c] for a, b, c in model(Normalise()(imgs)).tolist()]
    teacher = teacher_of(saved_as(model, ("Happy", "Sad", "Anger")), weight=0.4)
    loss = ClassifierLoss(Normalise(), teacher=teacher)(student, (imgs, targets, []))
    loss.backward()
    rest = told, targets.tolist(), 0.4, 3.0
    assert loss.item() == pytest.approx(slow_loss(student.logits.tolist(), *rest), rel=1e-5)
    np.testing.assert_allclose(
        student.logits.grad, slow_gradient(student.logits.tolist(), *rest), atol=1e-6
    )
    assert teacher.lines[1] == "the teacher does not know Fear: it teaches the other 3 classes"


@pytest.mark.parametrize(
    ("classes", "weight", "expected"),
    [
        (("cat", "dog", "cow"), 0.5, r"file: its classes \(cat, dog, cow\) .* fewer than two"),
        (("cat", "sad", "cow"), 0.5, r"\(cat, sad, cow\) .* data set's \(Happy, Sad, Fear, Anger"),
        (("happy", "sad", "fear"), 1.0, "file: does not know Anger, .* --distill_weight 1; lower"),
    ],
)
def test_a_teacher_that_cannot_teach_these_classes_is_refused(classes, weight, expected):
    with pytest.raises(BadInput, match=expected):
        teacher_of(saved_as(linear(3), classes), weight=weight)


# --- what the teacher sees ---


class Seeing(nn.Module):
    """Remembers its input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        self.shown, self.learns = x.clone(), torch.is_grad_enabled()
        return self.model(x)


def test_the_teacher_sees_the_same_erased_and_mixed_images_as_the_student():
    student, model = Seeing(linear(seed=5)), Seeing(linear())
    teacher = teacher_of(saved_as(model.train(), mean=HALF, std=HALF))
    mix = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=4, multi_label=True)
    erase = RandomErasing(1.0, mode="pixel", device="cpu")
    ClassifierLoss(Normalise(), mix=mix, erase=erase, teacher=teacher)(student, batch())
    assert (student.learns, model.learns, model.training) == (True, False, False)
    ours, theirs = Normalise(), Normalise(HALF, HALF)
    pixels = [x * n.std + n.mean for x, n in ((student.shown, ours), (model.shown, theirs))]
    torch.testing.assert_close(*pixels, atol=1e-3, rtol=0)
    assert not torch.allclose(pixels[0], batch()[0].float(), atol=1)


def test_with_equal_normalisation_the_teacher_sees_identical_input():
    student, model = Seeing(linear(seed=5)), Seeing(linear())
    ClassifierLoss(Normalise(), teacher=teacher_of(saved_as(model)))(student, batch())
    assert torch.equal(student.shown, model.shown)


@pytest.mark.parametrize(("name", "size"), [("convnextv2_atto", 64), ("vit_tiny_patch16", 16)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_teacher_may_have_another_family_size_and_normalisation(name, size, interpolation):
    torch.manual_seed(0)
    model = create_classifier(name, 4, size).eval()
    nn.init.normal_(model.head.weight)
    seen = {"input_size": size, "mean": HALF, "std": HALF, "interpolation": interpolation}
    teacher = teacher_of(saved_as(model, **seen))
    imgs, _, _ = batch(3, side=32)
    with torch.no_grad():
        resized = nn.functional.interpolate(imgs.float(), size, mode=interpolation, antialias=True)
        expected = model((resized / 255 - 0.5) / 0.5)
    found = teacher.logits(Normalise()(imgs))
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)
    assert expected.std() > 0.05


def test_the_digest_depends_on_everything_that_changes_the_teachers_outputs():
    plain = teacher_of(saved_as(linear())).digest
    assert teacher_of(saved_as(linear()), weight=0.2).digest == plain
    others = [
        saved_as(linear(seed=1)),
        saved_as(linear(), NAMES[::-1]),
        saved_as(linear(), mean=HALF),
        saved_as(linear(), input_size=16),
        saved_as(linear(), interpolation="bilinear"),
    ]
    assert len({plain, *(teacher_of(saved).digest for saved in others)}) == 6


# --- runs ---


@pytest.fixture(scope="module")
def large(finetune):
    """A ConvNeXt whose EMA weights were evaluated."""
    return finetune("convnext", EVERYTHING) / "checkpoint-best.pth"


@pytest.fixture(scope="module")
def other(large, tmp_path_factory):
    """A teacher with eight classes in another order, 64 px and another normalisation."""
    path = tmp_path_factory.mktemp("other") / "other.pth"
    torch.manual_seed(0)
    model = create_classifier("vit_tiny_patch16", 8, 64)
    nn.init.normal_(model.head.weight)
    seen = {"input_size": 64, "mean": list(HALF), "std": list(HALF), "face_margin": None}
    content = {"model": model.state_dict(), "classes": list(ORDERS["affectnet"])}
    torch.save({**content, "preprocessing": seen}, path)
    return path


def data_of(sets):
    return f"--data_path {sets / 'rafdb'}"


def options(sets, pretrained, folder, more):
    source = f"{data_of(sets)} --finetune {pretrained['vit']}"
    return finetune_options(folder, "vit", f"{source} {more}")


def test_a_run_learns_from_a_teacher_and_reports_it(
    sets, pretrained, finetune, large, tmp_path, capfd
):
    more = f"{EVERYTHING} --teacher {large} --distill_weight 0.7"
    assert run_here(main_finetune, options(sets, pretrained, tmp_path / "run", more)) == DONE
    said, known = capfd.readouterr().out, load(large.parent, large.name)
    line = f"teacher {large}: convnextv2_atto, 32 px, 7 classes, trained on RAF-DB basic, aligned, "
    assert f"{line}test accuracy {known['best']:.2f} %; weight 0.7, temperature 3\n" in said

    saved, alone = load(tmp_path / "run"), load(finetune(more=EVERYTHING))
    assert saved.keys() == alone.keys()
    for part in ("model", "model_ema"):
        assert saved[part].keys() == alone[part].keys()
        assert not same(saved[part], alone[part])
    assert len(saved["optimizer"]["state"]) == len(alone["optimizer"]["state"])
    asked = {"teacher": str(large), "distill_weight": 0.7, "distill_temperature": 3.0}
    for where in (saved["args"], config(tmp_path / "run")["options"]):
        assert {name: where[name] for name in asked} == asked
    assert not any(alone["args"][name] for name in asked)
    # Results are the student's.
    result = evaluate(tmp_path / "run" / "checkpoint-best.pth", tmp_path / "eval", data_of(sets))
    assert_close(measured(result), measured(results(tmp_path / "run")))
    described, _, digest = results(tmp_path / "run")["teacher"].rpartition("; ")
    assert described.startswith("convnextv2_atto, 32 px, 7 classes, trained on RAF-DB basic")
    assert digest == saved["run"]["teacher"]
    assert "teacher" not in results(finetune(more=EVERYTHING))

    best = tmp_path / "run" / "checkpoint-best.pth"
    assert export(best, "safetensors", tmp_path / "exported") == DONE
    card = (tmp_path / "exported" / "README.md").read_text().replace("\\", "")
    assert "distilled from checkpoint-best.pth" in card
    assert "| `distill_weight` | 0.7 |" in card
    assert str(large.parent) not in card


def test_a_teacher_does_not_change_the_students_initial_weights(sets, pretrained, large, tmp_path):
    more = "--lr 0 --min_lr 0 --label_fraction 0.5 --epochs 1 --warmup_epochs 0 --disable_eval"
    for name, teacher in (("with", f"--teacher {large}"), ("without", "")):
        argv = options(sets, pretrained, tmp_path / name, f"{more} {teacher}")
        assert run_here(main_finetune, argv) == DONE
    assert same(load(tmp_path / "with")["model"], load(tmp_path / "without")["model"])
    assert log(tmp_path / "with") != log(tmp_path / "without")


def test_a_teacher_uses_the_weights_that_were_evaluated(large):
    own = load(large.parent, large.name)
    assert own["evaluated"] == "model_ema"
    teacher = teacher_of(open_classifier(large), RAF_NAMES)
    assert same(dict(teacher.model.state_dict()), own["model_ema"])
    assert not same(own["model_ema"], own["model"])


def test_the_teachers_accuracy_is_reported_only_for_the_epoch_that_had_it(large):
    saved = open_classifier(large)
    later = {**saved.checkpoint, "epoch": saved.checkpoint["epoch"] + 1}
    assert "accuracy" in teacher_of(saved, RAF_NAMES).lines[0]
    assert "accuracy" not in teacher_of(saved._replace(checkpoint=later), RAF_NAMES).lines[0]


@pytest.mark.parametrize(
    "more",
    [
        "--freeze_backbone --amp bf16",
        "--linear_probe --batch_size 8 --distill_weight 1",
        "--accum_iter 2 --drop_path 0.1 --mixup 0.8 --grad_checkpointing",
    ],
)
def test_distillation_works_with_other_training_options(
    more, sets, pretrained, large, other, tmp_path
):
    losses = []
    for teacher in (large, other):
        folder = tmp_path / teacher.stem
        more_ = f"{more} --teacher {teacher} --epochs 1 --warmup_epochs 0 --disable_eval"
        assert run_here(main_finetune, options(sets, pretrained, folder, more_)) == DONE
        losses.append(log(folder)[0]["train_loss"])
    assert losses[0] != losses[1]
    assert all(map(math.isfinite, losses))


def test_only_the_student_is_compiled(sets, pretrained, large, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compiled.append(module))
    more = f"--compile --teacher {large} --epochs 1 --warmup_epochs 0 --disable_eval"
    assert run_here(main_finetune, options(sets, pretrained, tmp_path, more)) == DONE
    assert compiled
    assert all(hasattr(module, "attn") for module in compiled)


def test_faces_cropped_differently_from_the_teachers_are_reported(sets, finetune, tmp_path, capfd):
    teacher = finetune(data="affectnet") / "checkpoint-best.pth"
    more = f"{data_of(sets)} --teacher {teacher} --epochs 1 --warmup_epochs 0 --disable_eval"
    assert run_here(main_finetune, finetune_options(tmp_path, "vit", more)) == DONE
    said = capfd.readouterr().out
    margin = "taught with whole images; the teacher was trained with --face_margin 0.15"
    assert f"warning: {margin}" in said
    assert "left out: the teacher's Contempt, which the data set does not have" in said


def test_classes_are_given_to_a_teacher_that_does_not_name_them(sets, finetune, tmp_path, capfd):
    content = load(finetune(), "checkpoint-best.pth")
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    more = f"{data_of(sets)} --epochs 1 --warmup_epochs 0 --disable_eval"
    more += f" --teacher {tmp_path / 'weights.pth'}"
    assert run_here(main_finetune, finetune_options(tmp_path / "a", "vit", more)) == BAD_INPUT
    line = refused(capfd)
    assert f"--teacher {tmp_path / 'weights.pth'}: has 7 classes, but does not name them" in line
    assert "--classes A,B" in line
    named = f"{more} --classes {','.join(RAF_NAMES[::-1])}"
    assert run_here(main_finetune, finetune_options(tmp_path / "a", "vit", named)) == DONE
    assert load(tmp_path / "a")["classes"] == list(RAF_NAMES)
    named = f"{more} --classes {','.join(RAF_NAMES)}"
    assert run_here(main_finetune, finetune_options(tmp_path / "b", "vit", named)) == DONE
    assert log(tmp_path / "a")[0]["train_loss"] != log(tmp_path / "b")[0]["train_loss"]


# --- resuming, and several processes ---


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_stopped_in_mid_epoch_ends_the_same(processes, sets, pretrained, other, tmp_path):
    """Also if the teacher's file has been moved."""
    moved = tmp_path / "moved.pth"
    moved.write_bytes(other.read_bytes())
    more = f"{EVERYTHING} --label_fraction 0.5 --teacher {other}"
    whole, parts = (options(sets, pretrained, tmp_path / name, more) for name in ("whole", "parts"))
    run("main_finetune", whole, processes)
    if processes == 1:
        usual = stop_in_mid_epoch()
        try:
            codes = [run_here(main_finetune, parts)]
        finally:
            Trainer._step = usual
    else:
        ranks = start_ranks("main_finetune", parts, before=stop_in_mid_epoch)
        for rank in ranks:
            rank.join(240)
        codes = [rank.exitcode for rank in ranks]
    assert codes == [RESUMABLE] * processes
    stopped = load(tmp_path / "parts")
    assert (stopped["epoch"], stopped["step"]) == (0, 1)
    run("main_finetune", [*parts, "--teacher", str(moved)], processes)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_two_processes_learn_like_one(sets, pretrained, other, tmp_path):
    more = f"--teacher {other} --drop_path 0 --reprob 0 --lr 0.001 --epochs 1 --warmup_epochs 0"
    run("main_finetune", options(sets, pretrained, tmp_path / "one", more))
    more += " --batch_size 2"
    run("main_finetune", options(sets, pretrained, tmp_path / "two", more), 2)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-4, rtol=0)
    assert one["run"]["teacher"] == two["run"]["teacher"]
    losses = [log(tmp_path / name)[0]["train_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


TAUGHT = "--warmup_epochs 0 --disable_eval"


@pytest.fixture(scope="module")
def taught(sets, pretrained, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    more = f"{TAUGHT} --teacher {other} --epochs 1"
    assert run_here(main_finetune, options(sets, pretrained, folder, more)) == DONE
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("--teacher {large}", "teacher {digest} -> "),
        ("--distill_weight 0.25", "distill_weight 0.5 -> 0.25"),
        ("--distill_temperature 2", "distill_temperature 3.0 -> 2.0"),
        ("--teacher=", "distill_temperature 3.0 -> None, teacher {digest} -> None"),
        ("--teacher {gone}", "--teacher {gone}: no such file"),
    ],
)
def test_resuming_with_another_teacher_is_refused(
    change, expected, sets, pretrained, large, other, taught, tmp_path, capfd
):
    names = {
        "large": large,
        "gone": tmp_path / "gone.pth",
        "digest": load(taught)["run"]["teacher"],
    }
    more = f"{TAUGHT} --teacher {other} {change.format(**names)} --epochs 2"
    assert run_here(main_finetune, options(sets, pretrained, taught, more)) == BAD_INPUT
    assert expected.format(**names) in refused(capfd)


def test_a_run_of_an_older_release_without_teachers_resumes(sets, pretrained, tmp_path):
    more = f"{TAUGHT} --epochs"
    assert run_here(main_finetune, options(sets, pretrained, tmp_path, f"{more} 1")) == DONE
    saved = load(tmp_path)
    for name in ("teacher", "distill_weight", "distill_temperature"):
        assert saved["run"].pop(name) is None
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    assert run_here(main_finetune, options(sets, pretrained, tmp_path, f"{more} 2")) == DONE
    assert load(tmp_path)["epoch"] == 1


# --- options ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--distill_weight 0.5", "--distill_weight --teacher"),
        ("--distill_temperature 2", "--distill_temperature --teacher"),
        ("--teacher {own} --distill_weight 0", "--distill_weight > 0 '0'"),
        ("--teacher {own} --distill_weight 1.5", "--distill_weight <= 1 '1.5'"),
        ("--teacher {own} --distill_temperature 0", "--distill_temperature > 0"),
        ("--teacher /nowhere/x.pth", "--teacher /nowhere/x.pth no such file"),
        ("--teacher {pretrained}", "--teacher {pretrained} pre-trained only"),
        ("--teacher {own} --data_path {animals}", "--teacher {own} cat, cow Surprise fewer"),
        ("--knn --finetune {own} --teacher {own} --classes a,b", "--classes --eval"),
    ],
)
def test_wrong_options_are_named(given, expected, pretrained, finetune, tmp_path, capfd):
    animals = tmp_path / "animals"
    names = {"own": finetune() / "checkpoint-best.pth", "pretrained": pretrained["vit"]}
    names["animals"] = animals
    if "animals" in given:
        write_folder(animals, {"train": 4, "test": 2}, ("cat", "cow"), drawn=False)
    more = f"--data_path synthetic:16:8 {given.format(**names)}"
    assert run_here(main_finetune, finetune_options(tmp_path / "out", "vit", more)) == BAD_INPUT
    line = refused(capfd)
    for text in expected.format(**names).split():
        assert text in line
    assert not list(tmp_path.glob("out/checkpoint*"))


@pytest.mark.parametrize("program", ["--eval", "--knn"])
def test_an_evaluation_reports_that_a_teacher_has_no_effect(
    program, sets, finetune, tmp_path, capfd
):
    more = f"{program} --finetune {finetune() / 'checkpoint-best.pth'} --teacher /nowhere/x.pth"
    assert (
        run_here(main_finetune, finetune_options(tmp_path, "vit", f"{data_of(sets)} {more}")) == 0
    )
    assert "--teacher has no effect: it teaches in training" in capfd.readouterr().out
