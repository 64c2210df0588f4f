"""Fine-tuning end to end: from files as owners ship them to numbers, wherever it is interrupted."""

import csv
import json
import math
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from layouts import write_ferplus_csv, write_rafdb
from layouts_affectnet import write_affectnet_csv
from PIL import Image
from runs import (
    FAMILIES,
    SMALL,
    assert_same_run,
    command,
    finetune_command,
    finetune_options,
    finish,
    launched,
    load,
    log,
    run_here,
    run_two,
    same,
    signal_at,
    status,
)

import main_finetune
import main_pretrain
from datasets import open_labelled, open_source, plain
from datasets.finetune import choose_splits
from datasets.labelled import crop_face
from datasets.transforms import Normalise
from models_registry import create_classifier
from util.weights import load_pretrained

RAF_NAMES = ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Anger", "Neutral")  # ids 1 to 7
AFF_NAMES = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")
MEASURED = ("n", "accuracy", "uar", "macro_f1", "recall", "confusion_matrix", "log_loss", "classes")
EVERYTHING = (
    "--model_ema True --model_ema_decay 0.9 --model_ema_eval True --mixup 0.8 --cutmix 1.0 "
    "--reprob 0.25 --drop_path 0.1 --balance True --smoothing 0.1 --layer_decay 0.8 --clip_grad 5 "
    "--lr 0.001"
)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The data sets as their owners ship them: 56 and 40 training, 21 and 15 test images, …"""
    root = tmp_path_factory.mktemp("sets")
    write_rafdb(root / "rafdb", 8, 3)
    write_affectnet_csv(root / "affectnet", {"train": (5,) * 8, "test": (2,) * 7 + (1,)})
    votes = [[7, 2, 0, 0, 0, 0, 0, 0, 1, 0], [0, 5, 4, 0, 0, 0, 0, 0, 1, 0]]
    write_ferplus_csv(root / "ferplus", 2, 1, 2, votes=votes)
    return root


@pytest.fixture(scope="module")
def pretrained(sets, tmp_path_factory):
    """A pre-trained checkpoint of each family, by `main_pretrain.py` on an owner's layout."""
    root, paths = tmp_path_factory.mktemp("pretrained"), {}
    for name, family, data in (("vit", "mae", "affectnet"), ("convnext", "fcmae", "rafdb")):
        size = "--input_size 32 --model mae_vit_tiny_patch16" if name == "vit" else ""
        data = f"--data_path {sets / data} --num_workers 0 --epochs 1 --output_dir {root / name}"
        options = f"{SMALL} {FAMILIES[family]} {size} {data}"
        assert run_here(main_pretrain, options.split()) == 0
        paths[name] = root / name / "checkpoint-last.pth"
    return paths


@pytest.fixture(scope="module")
def finetune(sets, pretrained, tmp_path_factory):
    """Fine-tune here and now; the same options only once."""
    made = {}

    def run(family="vit", more="", data="rafdb"):
        if (family, more, data) not in made:
            folder = tmp_path_factory.mktemp("run")
            source = "" if "--finetune" in more else f"--finetune {pretrained[family]}"
            more_ = f"--data_path {sets / data} {source} {more}"
            assert run_here(main_finetune, finetune_options(folder, family, more_)) == 0
            made[family, more, data] = folder
        return made[family, more, data]

    return run


def evaluate(checkpoint, output, more):
    """`--eval` here and now; eval.json. The default --model is another one: it must not matter."""
    options = f"--eval --finetune {checkpoint} --output_dir {output} --num_workers 0 --batch_size 4"
    assert run_here(main_finetune, f"{options} {more}".split()) == 0
    return results(output)


def results(folder):
    return json.loads((folder / "eval.json").read_text())


def predictions(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def measured(result):
    return {name: result[name] for name in MEASURED}


def unaugmented(data, split, crop_pct=0.875):
    """The images of a split as a test sees them, normalised (n, 3, 32, 32), and their labels."""
    images = open_labelled(str(data)).splits[split]
    view = plain(32, crop_pct)
    pixels = torch.stack([view(images.source.image(i)) for i in range(len(images))])
    return Normalise()(pixels), images.labels


# --- the two commands of the README ---

COMMANDS = {
    "convnext": (
        "rafdb/basic",
        "--model convnextv2_atto --batch_size 4 --update_freq 4 --blr 6.25e-4 --epochs 2 "
        "--warmup_epochs 1 --layer_decay_type group --layer_decay 0.6 --weight_decay 0.05 "
        "--drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True "
        "--model_ema_eval True --use_amp True",
    ),
    "vit": (
        "affectnet",
        "--model mae_vit_tiny_patch16 --batch_size 4 --accum_iter 2 --blr 5e-4 --layer_decay 0.65 "
        "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --epochs 2",
    ),
}


@pytest.mark.parametrize("family", COMMANDS)
def test_the_published_commands_run_on_the_owners_files(family, sets, pretrained, tmp_path):
    data, options = COMMANDS[family]
    options += f" --data_path {sets / data} --finetune {pretrained[family]} --input_size 32"
    options += f" --num_workers 1 --output_dir {tmp_path}"
    output = finish(launched("main_finetune.py", options.split(), processes=2))
    assert "tensors loaded from 'model'" in output
    assert status(tmp_path) == "done"

    result, rows = results(tmp_path), predictions(tmp_path)
    count = {"rafdb/basic": 21, "affectnet": 15}[data]
    assert result["n"] == len(rows) == len({row["path"] for row in rows}) == count
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert result["accuracy"] == pytest.approx(100 * right)
    expected = {"test_acc1", "test_uar"} | ({"test_acc1_ema"} if family == "convnext" else set())
    records = log(tmp_path)
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(expected <= record.keys() for record in records)
    chosen = "test_acc1_ema" if family == "convnext" else "test_acc1"
    assert result["accuracy"] == pytest.approx(max(record[chosen] for record in records))
    assert load(tmp_path, "checkpoint-best.pth")["epoch"] == result["epoch"]
    Image.open(tmp_path / "figures" / "confusion_matrix.png").verify()
    assert f"{result['accuracy']:.2f}" in (tmp_path / "report.html").read_text()


# --- interrupted ---


@pytest.fixture(scope="module")
def undisturbed(sets, pretrained, finetune, tmp_path_factory):
    """Finished runs with everything on, by (family, processes), made when first asked for."""
    made = {}

    def make(family, processes):
        if processes == 1:
            return finetune(family, EVERYTHING)
        if family not in made:
            made[family] = tmp_path_factory.mktemp("undisturbed")
            more = everything(sets, pretrained, family)
            run_two("main_finetune", finetune_options(made[family], family, more))
        return made[family]

    return make


def everything(sets, pretrained, family):
    return f"--data_path {sets / 'rafdb'} --finetune {pretrained[family]} {EVERYTHING}"


def go_on(processes, options):
    if processes == 1:
        assert run_here(main_finetune, options) == 0
    else:
        run_two("main_finetune", options)


def assert_same_end(ours, undisturbed):
    assert_same_run(ours, undisturbed)
    assert results(ours) == results(undisturbed)
    assert predictions(ours) == predictions(undisturbed)
    a, b = load(ours, "checkpoint-best.pth"), load(undisturbed, "checkpoint-best.pth")
    assert same(a["model_ema"], b["model_ema"])


@pytest.mark.parametrize(("family", "processes"), [("convnext", 1), ("vit", 2)])
def test_stopped_in_mid_epoch_fine_tuning_ends_the_same(
    family, processes, sets, pretrained, undisturbed, tmp_path
):
    more = everything(sets, pretrained, family)
    arguments = finetune_command(tmp_path, family, more, processes)
    code, output = signal_at(arguments, "epoch 1/2  step 2/")
    assert code == (75 if processes == 1 else 1), output
    assert status(tmp_path) == "resumable"
    assert load(tmp_path)["step"] >= 2

    go_on(processes, finetune_options(tmp_path, family, f"{more} --num_workers 2"))
    assert_same_end(tmp_path, undisturbed(family, processes))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_fine_tuning_ends_the_same(processes, sets, pretrained, undisturbed, tmp_path):
    more = f"{everything(sets, pretrained, 'vit')} --save_steps 2"
    arguments = finetune_command(tmp_path, "vit", more, processes)
    signal_at(arguments, "epoch 1/2  step 4/", signal.SIGKILL)
    killed = load(tmp_path)
    assert (killed["epoch"], killed["step"] % 2) == (0, 0)
    go_on(processes, finetune_options(tmp_path, "vit", f"{more} --num_workers 1"))
    assert_same_end(tmp_path, undisturbed("vit", processes))


def test_a_resume_keeps_the_best_checkpoint_from_worse_epochs(sets, finetune, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finetune(), folder)
    for path in folder.glob("checkpoint-*.pth"):
        path.unlink()
    saved = load(finetune())
    torch.save(saved | {"best": 99.9, "best_epoch": 0}, folder / "checkpoint-last.pth")
    torch.save(load(finetune(), "checkpoint-0.pth"), folder / "checkpoint-best.pth")
    best = (folder / "checkpoint-best.pth").read_bytes()
    more = f"--data_path {sets / 'rafdb'} --epochs 3 --finetune {saved['run']['finetune']}"
    assert run_here(main_finetune, finetune_options(folder, "vit", more)) == 0
    assert (folder / "checkpoint-best.pth").read_bytes() == best
    assert (load(folder)["epoch"], load(folder)["best"], load(folder)["best_epoch"]) == (2, 99.9, 0)
    assert (results(folder)["epoch"], results(folder)["last"]["epoch"]) == (0, 2)


# --- evaluation ---


def assert_close(a, b):
    """Equal but for the last bits of numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-6, rel=1e-6)
    else:
        assert a == b


@pytest.mark.parametrize("more", ["", "--dist_eval False --eval_flip --amp bf16"])
def test_two_processes_evaluate_as_one(more, sets, finetune, tmp_path):
    checkpoint = finetune("convnext", EVERYTHING) / "checkpoint-best.pth"
    more = f"--data_path {sets / 'rafdb'} {more}"
    one, two = tmp_path / "one", tmp_path / "two"
    expected = evaluate(checkpoint, one, more)
    options = f"--eval --finetune {checkpoint} --output_dir {two} --num_workers 1 --batch_size 4"
    run_two("main_finetune", f"{options} {more}".split())
    assert_close(results(two), expected)
    assert results(two)["confusion_matrix"] == expected["confusion_matrix"]
    assert [row["path"] for row in predictions(two)] == [row["path"] for row in predictions(one)]
    assert len({row["path"] for row in predictions(two)}) == 21
    for a, b in zip(predictions(two), predictions(one), strict=True):
        assert (a["label"], a["prediction"]) == (b["label"], b["prediction"])


def test_evaluation_obeys_amp_and_flip(sets, finetune, tmp_path):
    checkpoint = finetune("vit") / "checkpoint-best.pth"
    data = f"--data_path {sets / 'rafdb'}"
    usual = evaluate(checkpoint, tmp_path / "usual", data)
    half = evaluate(checkpoint, tmp_path / "half", f"{data} --amp bf16")
    assert half["log_loss"] != usual["log_loss"]
    assert half["log_loss"] == pytest.approx(usual["log_loss"], abs=0.02)

    model = create_classifier("vit_tiny_patch16", 7, 32)
    load_pretrained(model, checkpoint, keep_head=True)
    x, labels = unaugmented(sets / "rafdb", "test")
    with torch.no_grad():
        p = (model.eval()(x).softmax(1) + model(x.flip(3)).softmax(1)) / 2
    flipped = evaluate(checkpoint, tmp_path / "flipped", f"{data} --eval_flip")
    expected = float(-p[torch.arange(21), torch.from_numpy(labels)].log().mean())
    assert flipped["log_loss"] == pytest.approx(expected, abs=1e-5)
    assert flipped["log_loss"] != usual["log_loss"]
    assert (flipped["flip"], usual["flip"]) == (True, False)


@pytest.mark.parametrize(("family", "more"), [("vit", ""), ("convnext", EVERYTHING)])
def test_our_checkpoint_is_evaluated_without_saying_what_it_is(
    family, more, sets, finetune, tmp_path
):
    folder = finetune(family, more)
    result = evaluate(
        folder / "checkpoint-best.pth", tmp_path, f"--data_path {sets / 'rafdb'} --crop_pct 0.5"
    )
    assert_close(measured(result), measured(results(folder)))
    assert result["epoch"] == results(folder)["epoch"]
    assert result["weights"] == ("model_ema" if more else "model")


def test_without_a_name_the_best_of_the_output_dir_is_evaluated(sets, finetune, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finetune(), folder)
    (folder / "eval.json").unlink()
    options = f"--eval --data_path {sets / 'rafdb'} --output_dir {folder} --num_workers 0"
    assert run_here(main_finetune, options.split()) == 0
    assert_close(measured(results(folder)), measured(results(finetune())))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("vit_tiny_patch16", "vit_tiny_patch16_224", {"img_size": 32, "global_pool": "avg"}),
        ("convnextv2_atto", "convnextv2_atto", {}),
    ],
)
def test_a_checkpoint_of_timm_has_the_accuracy_it_has_in_timm(
    ours, theirs, options, sets, tmp_path
):
    torch.manual_seed(3)
    model = timm.create_model(theirs, num_classes=7, **options).eval()
    head = model.get_classifier()
    torch.nn.init.normal_(head.weight, std=0.5)
    x, labels = unaugmented(sets / "rafdb", "test")
    with torch.no_grad():
        logits = model(x)
        head.bias -= logits.mean(0)  # else one class would win everywhere
        p = model(x).softmax(1)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    more = f"--model {ours} --input_size 32 --data_path {sets / 'rafdb'}"
    result = evaluate(tmp_path / "timm.pth", tmp_path / "out", more)
    right = (p.argmax(1).numpy() == labels).mean()
    assert result["accuracy"] == pytest.approx(100 * right)
    rows = predictions(tmp_path / "out")
    found = np.array([[float(row[f"p_{name}"]) for name in RAF_NAMES] for row in rows])
    np.testing.assert_allclose(found, p, atol=2e-4)


# --- across data sets ---


def affectnet_truth(root):
    """The name of the expression of every validation image, by the owner's list."""
    lines = (root / "Manually_Annotated_file_lists" / "validation.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    return {row[0]: AFF_NAMES[int(row[6])] for row in rows}


def assert_counts_only(folder, truth, names):
    """predictions.csv holds the images of `truth`, and eval.json what follows from it."""
    rows, result = predictions(folder), results(folder)
    assert len(rows) == len(truth) == result["n"]
    right = Counter()
    for row in rows:
        name = next(name for path, name in truth.items() if row["path"].endswith(path))
        assert row["label"] == name
        p = {n: float(row[f"p_{n}"]) for n in names}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert p[row["prediction"]] == max(p.values())
        right[name] += row["prediction"] == name
    assert [key for key in rows[0] if key.startswith("p_")] == [f"p_{n}" for n in names]
    assert result["classes"] == list(names)
    assert result["accuracy"] == pytest.approx(100 * right.total() / len(rows))
    recalls = [right[n] / sum(t == n for t in truth.values()) for n in names]
    assert result["uar"] == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
def test_seven_classes_are_tested_on_those_of_affectnets_eight(flag, sets, finetune, tmp_path):
    checkpoint = finetune() / "checkpoint-best.pth"
    data = f"--data_path {sets / 'rafdb'}" if flag == "--eval_data_path" else ""
    result = evaluate(checkpoint, tmp_path, f"{data} {flag} {sets / 'affectnet'}")
    truth = affectnet_truth(sets / "affectnet")
    common = {path: name for path, name in truth.items() if name != "Contempt"}
    assert len(common) == 14
    assert_counts_only(tmp_path, common, RAF_NAMES)
    assert result["data"].startswith("AffectNet-8")


def test_eight_classes_are_tested_on_rafdbs_seven(sets, finetune, tmp_path):
    checkpoint = finetune(data="affectnet") / "checkpoint-best.pth"
    evaluate(checkpoint, tmp_path, f"--data_path {sets / 'rafdb'}")
    list_file = sets / "rafdb" / "basic" / "EmoLabel" / "list_patition_label.txt"
    rows = [line.split() for line in list_file.read_text().splitlines()]
    truth = {
        name.replace(".jpg", "_aligned.jpg"): RAF_NAMES[int(label) - 1]
        for name, label in rows
        if name.startswith("test")
    }
    assert_counts_only(tmp_path, truth, AFF_NAMES[:7])


def test_training_can_be_tested_on_ferplus_under_a_named_rule(sets, finetune):
    folder = finetune(more=f"--eval_data_path {sets / 'ferplus'} --label_rule majority")
    result = results(folder)
    assert result["data"] == "FERPlus, CSV files"
    assert "--label_rule majority" in result["rule"]
    assert (result["n"], result["classes"]) == (14, list(RAF_NAMES))
    assert {row["label"] for row in predictions(folder)} == set(RAF_NAMES)


# --- frozen backbones ---

LINEAR = "--linear_probe --lr 0.5 --batch_size 8"


def assert_frozen(folder, checkpoint):
    """All that was loaded is as it was; the head is not."""
    before, after = torch.load(checkpoint, weights_only=True)["model"], load(folder)["model"]
    before = {name.removeprefix("encoder."): value for name, value in before.items()}
    trained = [name for name in after if name in before and not name.startswith("head")]
    assert len(trained) > 100
    assert all(torch.equal(before[name], after[name]) for name in trained)
    head = next(name for name in after if name.startswith("head") and after[name].ndim == 2)
    assert not same(load(folder, "checkpoint-0.pth")["model"][head], after[head])


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_a_frozen_backbone_keeps_its_bits(family, finetune, pretrained):
    assert_frozen(finetune(family, "--freeze_backbone --lr 0.01"), pretrained[family])


def test_a_linear_probe_trains_a_normalised_head_alone_and_can_be_evaluated(
    sets, finetune, pretrained, tmp_path
):
    folder = finetune(more=LINEAR)
    assert_frozen(folder, pretrained["vit"])
    saved = load(folder)
    assert saved["model"]["head.0.num_batches_tracked"] == 14
    assert saved["model"]["head.0.running_mean"].abs().sum() > 0
    assert "trust_coeff" in saved["optimizer"]["param_groups"][0]  # LARS
    result = evaluate(folder / "checkpoint-best.pth", tmp_path, f"--data_path {sets / 'rafdb'}")
    assert_close(measured(result), measured(results(folder)))


def test_ranks_evaluate_a_linear_probe_with_the_same_statistics(sets, pretrained, tmp_path):
    more = f"--data_path {sets / 'rafdb'} --finetune {pretrained['vit']} {LINEAR} --epochs 1"
    run_two("main_finetune", finetune_options(tmp_path / "two", "vit", f"{more} --warmup_epochs 0"))
    data = f"--data_path {sets / 'rafdb'}"
    result = evaluate(tmp_path / "two" / "checkpoint-last.pth", tmp_path / "one", data)
    assert_close(measured(result), measured(results(tmp_path / "two")))


def test_nearest_neighbours_equal_a_slow_reference(sets, finetune, pretrained):
    folder = finetune(more="--knn --crop_pct 1.0")
    model = create_classifier("vit_tiny_patch16", 7, 32)
    load_pretrained(model, pretrained["vit"])
    features = {}
    for split in ("train", "test"):
        x, labels = unaugmented(sets / "rafdb", split, 1.0)
        with torch.no_grad():
            features[split] = model.eval().forward_features(x).double().numpy(), labels
    votes = np.zeros((21, 7))
    for i, query in enumerate(features["test"][0]):
        similar = []
        for x, label in zip(*features["train"], strict=True):
            cosine = query @ x / (np.linalg.norm(query) * np.linalg.norm(x))
            similar.append((cosine, label))
        for cosine, label in sorted(similar, reverse=True)[:20]:
            votes[i, label] += math.exp(cosine / 0.07)
    votes /= votes.sum(1, keepdims=True)
    rows = predictions(folder)
    found = np.array([[float(row[f"p_{name}"]) for name in RAF_NAMES] for row in rows])
    np.testing.assert_allclose(found, votes, atol=2e-5)
    right = (votes.argmax(1) == features["test"][1]).mean()
    assert results(folder)["accuracy"] == pytest.approx(100 * right)
    assert not list(folder.glob("checkpoint*"))


# --- what is trained on, and how the best is chosen ---


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_best_is_chosen_on_held_out_training_images(sets, finetune):
    folder = finetune(more="--select val --val_fraction 0.25 --lr 0.002")
    assert config(folder)["data"]["count"] == 56 - 14
    records, saved, result = log(folder), load(folder), results(folder)
    assert saved["best"] == max(record["val_acc1"] for record in records)
    assert saved["best_epoch"] == int(np.argmax([record["val_acc1"] for record in records]))
    assert (result["split"], result["selected_on"], result["n"]) == ("test", "val", 21)
    assert result["accuracy"] == pytest.approx(records[saved["best_epoch"]]["test_acc1"])

    data = open_labelled(str(sets / "rafdb"))
    train, tests = choose_splits(data, None, "val", 0.25, 0, "")
    assert tests["val"].counts(7).tolist() == [2] * 7
    names = [{s.source.name(i) for i in range(len(s))} for s in (train, *tests.values())]
    assert sum(map(len, names)) == len(set.union(*names)) == 56 + 21


def test_a_fraction_of_labels_leaves_every_class_its_share(finetune):
    folder = finetune(more="--label_fraction 0.5 --disable_eval")
    assert config(folder)["data"]["count"] == 28
    assert status(folder) == "done"
    assert not (folder / "eval.json").exists()
    assert not any(key.startswith("test") for record in log(folder) for key in record)


def test_classes_are_balanced_for_affectnet_unless_told_otherwise(finetune):
    assert load(finetune(data="affectnet"))["run"]["balance"] is True
    assert load(finetune())["run"]["balance"] is False
    assert load(finetune("convnext", EVERYTHING))["run"]["balance"] is True


def test_votes_are_soft_targets_and_their_rule_is_named(finetune):
    folder = finetune(more="--label_rule votes --aug none", data="ferplus")
    assert "--label_rule votes" in results(folder)["rule"]
    assert not same(
        load(folder)["model"],
        load(finetune(more="--label_rule argmax --aug none", data="ferplus"))["model"],
    )


# --- schedules, optimizers, averages ---


def test_the_rate_falls_in_steps(finetune):
    more = "--schedule step --step_epochs 1 --step_factor 0.1 --lr 0.01 --warmup_epochs 0"
    records = log(finetune(more=f"{more} --opt sgd --momentum 0.8 --aug fer"))
    assert [record["train_lr"] for record in records] == pytest.approx([0.01, 0.001])


def test_warm_up_and_weight_decay_go_by_steps(finetune):
    more = "--warmup_steps 56 --lr 0.056 --weight_decay 0.04 --weight_decay_end 0.4 --opt adam"
    folder = finetune(more=more)
    assert [r["train_lr"] for r in log(folder)] == pytest.approx([0.013, 0.027])
    decays = {group["weight_decay"] for group in load(folder)["optimizer"]["param_groups"]} - {0.0}
    last = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * 27 / 28))
    assert list(decays) == pytest.approx([last])


@pytest.mark.parametrize(
    ("more", "known"),
    [
        ("--opt sgd --momentum 0.8", {"momentum": 0.8}),
        ("--opt adam --opt_betas 0.8 0.99", {"betas": (0.8, 0.99)}),
    ],
)
def test_the_optimizer_asked_for_is_used(more, known, finetune):
    group = load(finetune(more=f"{more} --disable_eval --epochs 1"))["optimizer"]["param_groups"][0]
    assert {name: group[name] for name in known} == known


def test_an_average_in_main_memory_is_the_same_average(finetune):
    apart = finetune("convnext", f"{EVERYTHING} --model_ema_eval False --model_ema_force_cpu")
    together = finetune("convnext", EVERYTHING)
    assert same(load(apart)["model_ema"], load(together)["model_ema"])
    assert not same(load(together)["model_ema"], load(together)["model"])


# --- pre-training on labelled sets, and its probe ---


def test_pretraining_draws_the_labelled_training_images(sets, pretrained):
    assert config(pretrained["vit"].parent)["data"]["count"] == 40
    assert config(pretrained["convnext"].parent)["data"]["count"] == 56
    source = open_source(str(sets / "rafdb"))
    assert {source.name(i).rpartition("/")[2][:6] for i in range(len(source))} == {"train_"}


def test_pretraining_on_affectnet_sees_faces_not_photographs(sets):
    root = sets / "affectnet"
    source = open_source(str(root))
    lines = (root / "Manually_Annotated_file_lists" / "training.csv").read_text().splitlines()[1:]
    images = root / "Manually_Annotated_compressed" / "Manually_Annotated_Images"
    assert len(source) == len(lines)
    for i in (0, 17, 39):
        name, *box = lines[i].split(",")[:5]
        assert source.name(i).endswith(name)
        photograph = np.asarray(Image.open(images / name).convert("RGB"))
        np.testing.assert_array_equal(source.image(i), crop_face(photograph, map(int, box), 0.15))
        assert max(source.image(i).shape) < 64 < min(photograph.shape[:2])


PRETRAIN = "--input_size 32 --num_workers 0 --data_path synthetic:24"
SCORES = ("probe_knn_acc1", "probe_knn_uar", "probe_linear_acc1", "probe_linear_uar")


def test_a_probe_measures_and_changes_nothing(sets, tmp_path):
    probe = f"--probe_data_path {sets / 'rafdb'} --probe_freq 1"
    for name, more in (("with", probe), ("without", "")):
        options = command(tmp_path / name, "mae", f"{PRETRAIN} {more}")[2:]
        assert run_here(main_pretrain, options) == 0
    for record in log(tmp_path / "with"):
        assert all(0 <= record[score] <= 100 for score in SCORES)
    assert same(load(tmp_path / "with")["model"], load(tmp_path / "without")["model"])
    assert same(load(tmp_path / "with")["optimizer"], load(tmp_path / "without")["optimizer"])


def test_a_probe_on_two_processes_equals_one(sets, tmp_path):
    # Without learning all see the same weights, and only the probe is compared.
    more = f"{PRETRAIN} --lr 0 --epochs 1 --probe_data_path {sets / 'rafdb'} --probe_freq 1"
    assert run_here(main_pretrain, command(tmp_path / "one", "mae", more)[2:]) == 0
    run_two("main_pretrain", command(tmp_path / "two", "mae", f"{more} --batch_size 4")[2:])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [one[0][s] for s in SCORES] == pytest.approx([two[0][s] for s in SCORES], abs=1e-6)
