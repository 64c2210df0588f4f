"""The original authors' fine-tuning (docs/published.md), compared with other implementations.

Augmentation and erasing are compared with torchvision's classes, which they used; learning rate,
decay and optimizer with slow versions of their rules; recipes with the table of their commands.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torchvision import transforms

import builders.finetune
import main_finetune
import main_pretrain
from datasets.augment import face_augment, plain
from datasets.sampler import GlobalBatchSampler
from datasets.transforms import centre_crop
from exported import refused
from finetuned import config, evaluate
from models_saved import open_saved
from runs import ROOT, finetune_options, load, run_here
from util.errors import BAD_INPUT, BadInput
from util.optim import set_rates
from util.positions import sincos_position_embedding

STEPS, EPOCHS = 384, 120  # of RAF-DB's recipes
# Their commands: recipe -> size, learning rate, epochs, mixup, weight decay, weights.
COMMANDS = {
    "rafdb_vit_base": ("base", 1e-5, 120, True, 0, "mae_vit_base_300e"),
    "rafdb_vit_base_no_mixup": ("base", 1e-4, 120, False, 0, "mae_vit_base_300e"),
    "rafdb_vit_tiny": ("tiny", 1e-4, 120, False, 0, "mae_vit_tiny_300e"),
    "ferplus_vit_base": ("base", 1e-5, 120, True, 1e-4, "mae_vit_base_300e"),
    "ferplus_vit_base_imagenet": ("base", 1e-5, 120, False, 0, "mae_pretrain_vit_base.pth"),
    "affectnet7_vit_base_60e": ("base", 1e-5, 60, True, 0, "mae_vit_base_300e"),
    "affectnet7_vit_tiny_60e": ("tiny", 1e-5, 60, True, 0, "mae_vit_tiny_300e"),
}
# The commands of their README, current and of 2025-05-22, that list all options.
README = {
    "affectnet7_vit_{}": "--batch_size 16 --accum_iter 2 --blr 5e-4 --layer_decay 0.65 "
    "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --epochs 10",
    "rafdb_convnextv2_base": "--model convnextv2_base --batch_size 32 --update_freq 4 "
    "--blr 6.25e-4 --epochs 100 --warmup_epochs 20 --layer_decay_type group --layer_decay 0.6 "
    "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 "
    "--model_ema True --model_ema_eval True --use_amp True",
    "pretrain_mae_vit_{}": "--batch_size 32 --accum_iter 4 --mask_ratio 0.75 --blr 1.5e-4 "
    "--epochs 300 --warmup_epochs 40 --weight_decay 0.05",
    "pretrain_convnextv2_base_one_gpu": "--model convnextv2_base --batch_size 64 --update_freq 8 "
    "--blr 1.5e-4 --epochs 400 --warmup_epochs 40",
    "pretrain_convnextv2_base": "--model convnextv2_base --batch_size 64 --update_freq 8 "
    "--blr 1.5e-4 --epochs 1600 --warmup_epochs 40",
}
README["affectnet8_vit_{}"] = README["affectnet7_vit_{}"]


def parse(recipe, *more):
    main = main_pretrain if recipe.startswith("pretrain") else main_finetune
    args = main.build_parser().parse([f"@{ROOT}/recipes/{recipe}.args", *more])
    main.check_options(args)
    return args


@pytest.fixture
def here():
    """The device that the parts of a run are built for."""
    return SimpleNamespace(device=torch.device("cpu"))


# --- the image ---


def published(size):
    """Their augmentation of a training image before normalisation."""
    bilinear = transforms.InterpolationMode.BILINEAR
    jitter = transforms.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.25)
    move = transforms.RandomAffine(0, (0.1, 0.1), (1.0, 1.25), interpolation=bilinear)
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter, move], p=0.5),
            transforms.Resize((size, size)),
            transforms.PILToTensor(),
        ]
    )


def face(height=100, width=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(100, 100), (90, 130)])
def test_aug_fer_equals_the_published_augmentation_with_equal_seeds(shape):
    ours, theirs, image = face_augment(112, 0.25, "bilinear"), published(112), face(*shape)
    seen = set()
    for seed in range(120):
        torch.manual_seed(seed)
        x = ours(image)
        torch.manual_seed(seed)
        assert torch.equal(x, theirs(Image.fromarray(image))), seed
        seen.add(x.numpy().tobytes())
    assert len(seen) > 40


def test_the_same_half_of_the_faces_is_recoloured_and_moved():
    flat = np.full((32, 32, 3), (150, 120, 100), np.uint8)
    slope = np.tile(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (1, 32, 3))
    recolour, move = (face_augment(32, jitter, "bilinear") for jitter in (0.25, 0.0))
    recoloured, moved = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        recoloured.append(recolour(flat)[:, 16, 16].tolist() != [150, 120, 100])
        torch.manual_seed(seed)
        moved.append(not np.array_equal(move(slope).permute(1, 2, 0), slope))
    assert np.mean(recoloured) == pytest.approx(0.5, abs=0.1)
    differ = np.flatnonzero(np.array(recoloured) != np.array(moved))
    assert len(differ) <= 4, "but for draws too small for a byte, both or neither"


@pytest.mark.parametrize("shape", [(100, 100), (60, 200), (400, 350)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_test_images_are_resized_like_by_pillow(shape, interpolation):
    image = face(*shape)
    way = Image.Resampling[interpolation.upper()]
    theirs = torch.tensor(np.asarray(Image.fromarray(image).resize((224, 224), way)))
    off = (plain(224, None, interpolation)(image).permute(1, 2, 0).int() - theirs.int()).abs()
    assert off.max() <= (1 if interpolation == "bilinear" else 2)
    assert off.float().mean() < 0.02
    central = centre_crop(image, 96, 0.5, interpolation)
    other = centre_crop(image, 96, 0.5, {"bilinear": "bicubic"}.get(interpolation, "bilinear"))
    assert not torch.equal(central, other)


def rectangle(x):
    """Top, left, height and width of the rectangle of zeros in (1, H, W)."""
    rows, columns = np.nonzero(x[0].numpy() == 0)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == height * width
    return rows.min(), columns.min(), height, width


def test_erased_rectangles_are_distributed_as_published_and_have_the_mean_colour(here):
    ours = builders.finetune.build_loss(parse("rafdb_vit_base"), here, 7).erase
    theirs = transforms.RandomErasing(scale=(0.02, 0.25))
    random.seed(0)
    torch.manual_seed(0)
    found = {}
    for name, erase in (("ours", lambda x: ours(x[None])[0]), ("theirs", theirs)):
        results = [erase(torch.ones(1, 224, 224)) for _ in range(4000)]
        assert all(((x == 0) | (x == 1)).all() for x in results)
        found[name] = np.array([rectangle(x) for x in results if (x == 0).any()], float)
        assert len(found[name]) / 4000 == pytest.approx(0.5, abs=0.03)
    (top, left, height, width), others = found["ours"].T, found["theirs"].T
    area, shape = height * width / 224**2, height / width
    assert area.min() == pytest.approx(0.02, abs=0.002)
    assert area.max() == pytest.approx(0.25, abs=0.01)
    assert 0.28 < shape.min() < 0.33
    assert 3.1 < shape.max() < 3.45
    for own, other in (
        (area, others[2] * others[3] / 224**2),
        (np.log(shape), np.log(others[2] / others[3])),
        (top, others[0]),
        (left, others[1]),
    ):
        assert ks_2samp(own, other).pvalue > 0.001


# --- the loss, the optimizer, the rate ---


def test_mixup_and_loss_equal_timms_defaults(here):
    loss = builders.finetune.build_loss(parse("rafdb_vit_base", "--reprob", "0"), here, 7)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
    imgs, labels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 7
    for seed in range(5):
        np.random.seed(seed)
        ours = loss(model, (imgs, torch.eye(7)[labels], []))
        np.random.seed(seed)
        x, targets = Mixup(num_classes=7)(loss.normalise(imgs), labels)
        torch.testing.assert_close(ours, SoftTargetCrossEntropy()(model(x), targets))


def test_without_mixup_the_loss_is_cross_entropy_on_hard_labels(here):
    loss = builders.finetune.build_loss(parse("rafdb_vit_tiny", "--reprob", "0"), here, 7)
    assert loss.mix is None
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))
    imgs, labels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 7
    theirs = nn.CrossEntropyLoss()(model(loss.normalise(imgs)), labels)
    torch.testing.assert_close(loss(model, (imgs, torch.eye(7)[labels], [])), theirs)


def published_rate(rate, epoch):
    """Their schedule."""
    if epoch >= 95:
        return 0.001 * rate
    if epoch >= 65:
        return 0.01 * rate
    if epoch >= 35:
        return 0.1 * rate
    return rate


@pytest.mark.parametrize("recipe", COMMANDS)
@pytest.mark.parametrize("processes", [1, 4])
def test_the_learning_rate_is_the_published_one_in_every_step(recipe, processes):
    args, base = parse(recipe), COMMANDS[recipe][1] * processes
    peak = args.blr * args.batch_size * args.accum_iter * processes / 256
    rate = main_finetune.learning_rate(args, peak, STEPS)
    for epoch in range(EPOCHS):
        found = {rate(epoch + step / STEPS) for step in range(STEPS)}
        assert list(found) == [pytest.approx(published_rate(base, epoch))], epoch


def build(recipe, *more):
    """A small model and the optimizer of a recipe."""
    args = parse(recipe, "--model", "vit_tiny_patch16", "--input_size", "32", *more)
    torch.manual_seed(0)
    model = builders.finetune.build_model(args, 8)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return model, builders.finetune.build_state(args, model, 1e-5, scaler).optimizer


def test_weight_decay_is_decoupled_with_their_exceptions():
    """Five steps of Adam with decoupled decay (apex's FusedAdam), computed in float64."""
    model, optimizer = build("ferplus_vit_base")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {n for n, _ in model.named_parameters()} - {"pos_embed"}
    x = {n: p.detach().double().clone() for n, p in trained.items()}
    m = {n: torch.zeros_like(value) for n, value in x.items()}
    v = {n: torch.zeros_like(value) for n, value in x.items()}
    generator, rate = torch.Generator().manual_seed(1), 1e-3
    set_rates(optimizer, rate)
    for t in range(1, 6):
        for name, p in trained.items():
            g = torch.randn(p.shape, generator=generator)
            p.grad, g = g, g.double()
            spared = p.ndim == 1 or name == "cls_token"
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            x[name] = x[name] - rate * (step + (0 if spared else 1e-4) * x[name])
        optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(p.detach().double(), x[name], atol=2e-7, rtol=2e-6)


def test_an_epoch_has_one_more_step_than_theirs_and_every_image():
    sampler = GlobalBatchSampler(12_271, 32)
    assert sampler.steps == 12_271 // 32 + 1 == STEPS
    seen = [draw % 12_271 for batch in sampler for _, draw in batch]
    assert len(seen) == 32 * STEPS
    assert set(seen) == set(range(12_271))


# --- the model ---


@pytest.mark.parametrize("model", ["vit_tiny_patch16", "convnextv2_atto"])
@pytest.mark.parametrize(
    ("more", "std"),
    [
        ("--head_init_std 0.3", 0.3),
        ("--finetune some.pth", 2e-5),
        ("--finetune some.pth --head_init_std 0.3", 0.3),
        ("--finetune some.pth --linear_probe", 0.01),
    ],
)
def test_a_new_head_has_the_given_std_or_that_of_the_official_scripts(model, more, std):
    argv = ["--model", model, "--input_size", "32", *more.split()]
    args = main_finetune.build_parser().parse(argv)
    main_finetune.check_options(args)
    head = builders.finetune.build_model(args, 64).head
    assert head.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not head.bias.any()


def test_recipes_initialise_the_head_like_timm():
    assert parse("rafdb_vit_base", "--finetune", "some.pth").head_init_std == 0.02
    assert parse("affectnet7_vit_base", "--finetune", "some.pth").head_init_std == 2e-5


def test_a_frozen_position_embedding_is_not_trained(finetune):
    fixed, learnt = (
        load(finetune("vit", f"{more} --lr 0.01"), "checkpoint-last.pth")["model"]["pos_embed"]
        for more in ("--freeze_pos_embed", "")
    )
    assert torch.equal(fixed, sincos_position_embedding(192, 2))
    assert not torch.equal(learnt, fixed)


# --- settings in checkpoints ---


def test_a_model_is_used_with_the_interpolation_of_its_training(finetune, sets, tmp_path):
    run = finetune("vit", "--aug fer --mixup 1 --freeze_pos_embed --cls_token")
    options = config(run)["options"]
    assert (options["train_interpolation"], options["test_interpolation"]) == ("bilinear",) * 2
    assert (options["reprob"], options["remode"], options["color_jitter"]) == (0.5, "const", 0.25)
    best = run / "checkpoint-best.pth"
    assert open_saved(best).preprocessing.interpolation == "bilinear"
    again = evaluate(best, tmp_path / "same", f"--data_path {sets / 'rafdb'}")
    assert again["differs_from_training"] == {}
    options = f"--data_path {sets / 'rafdb'} --test_interpolation bicubic"
    other = evaluate(best, tmp_path / "other", options)
    assert other["differs_from_training"] == {
        "test_interpolation": {"tested": "bicubic", "trained": "bilinear"}
    }
    assert other["log_loss"] != again["log_loss"]


def test_an_older_checkpoint_is_used_with_bicubic_interpolation(finetune, sets, tmp_path, capfd):
    """Regardless of the augmentation that the evaluation is given."""
    content = load(finetune(), "checkpoint-best.pth")
    del content["args"]["test_interpolation"]
    torch.save(content, tmp_path / "old.pth")
    more = f"--data_path {sets / 'rafdb'} --aug fer"
    result = evaluate(tmp_path / "old.pth", tmp_path / "out", more)
    assert result["differs_from_training"] == {}
    assert "--test_interpolation bicubic" in capfd.readouterr().out


def test_a_linear_probe_uses_the_interpolation_of_its_features(finetune, sets, tmp_path):
    source = finetune("vit", "--aug fer --mixup 1 --freeze_pos_embed --cls_token")
    options = f"--finetune {source / 'checkpoint-best.pth'} --data_path {sets / 'rafdb'} --epochs 1"
    run = finetune("vit", f"--linear_probe {options} --lr 0.1")
    options = config(run)["options"]
    assert (options["train_interpolation"], options["test_interpolation"]) == ("bilinear",) * 2


@pytest.mark.parametrize("kind", ["--linear_probe --lr 0.1", "--test_interpolation bilinear"])
def test_a_run_resumes_with_its_interpolations(kind, finetune, sets, tmp_path):
    source = finetune("vit", "--aug fer --mixup 1 --freeze_pos_embed --cls_token")
    options = f"{kind} --cls_token --finetune {source / 'checkpoint-best.pth'}"
    options = f"{options} --data_path {sets / 'rafdb'} --warmup_epochs 0"
    for epochs in (1, 2):
        argv = finetune_options(tmp_path / "run", more=f"{options} --epochs {epochs}")
        assert run_here(main_finetune, argv) == 0


def test_a_run_of_an_older_release_resumes_unless_its_augmentation_has_changed(
    finetune, sets, pretrained, tmp_path, capfd
):
    for aug, code in (("randaug", 0), ("fer", 2)):
        options = f"--aug {aug} --mixup 1" if aug == "fer" else ""
        run = tmp_path / aug
        run.mkdir()
        content = load(finetune("vit", options))
        for name in ("test_interpolation", "freeze_pos_embed", "head_init_std", "joint_jitter"):
            del content["run"][name]
        torch.save(content, run / "checkpoint-last.pth")
        more = f"{options} --epochs 3 --finetune {pretrained['vit']} --data_path {sets / 'rafdb'}"
        assert run_here(main_finetune, finetune_options(run, more=more)) == code
    assert "joint_jitter False -> True" in capfd.readouterr().err


@pytest.mark.parametrize("interpolation", ["lanczos", None, 3, ["bicubic"]])
def test_an_unknown_interpolation_is_refused(interpolation, finetune, tmp_path):
    content = load(finetune(), "checkpoint-best.pth")
    content["preprocessing"]["interpolation"] = interpolation
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="invalid preprocessing settings"):
        open_saved(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train_interpolation random", "--train_interpolation random: not with --aug fer"),
        ("--color_jitter 0.6", "--color_jitter 0.6: --aug fer also jitters the hue"),
        ("--head_init_std 0", "--head_init_std"),
        (
            "--model convnextv2_atto --freeze_pos_embed",
            "--freeze_pos_embed: not an option of convnextv2_atto",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message, tmp_path, capfd):
    argv = ["--aug", "fer", *options.split(), "--output_dir", str(tmp_path)]
    assert run_here(main_finetune, argv) == BAD_INPUT
    assert message in refused(capfd)


def test_freeze_pos_embed_is_ignored_when_a_convnext_is_evaluated(finetune, sets, tmp_path):
    best = finetune("convnext") / "checkpoint-best.pth"
    evaluate(best, tmp_path, f"--freeze_pos_embed --data_path {sets / 'rafdb'}")


# --- the recipes ---


@pytest.mark.parametrize("recipe", COMMANDS)
def test_a_recipe_equals_the_published_command(recipe):
    size, rate, epochs, mixup, decay, weights = COMMANDS[recipe]
    args = parse(recipe)
    assert args.model == f"vit_{size}_patch16"
    assert args.blr * 32 / 256 == pytest.approx(rate)
    assert (args.batch_size, args.accum_iter, args.epochs) == (32, 1, epochs)
    assert (args.mixup, args.smoothing) == ((1, 0.1) if mixup else (0, 0))
    assert (args.weight_decay, args.layer_decay, args.drop_path) == (decay, 1, 0)
    assert (args.cls_token, args.freeze_pos_embed, args.head_init_std) == (True, True, 0.02)
    assert (args.cutmix, args.cutmix_minmax, args.clip_grad) == (0, None, None)
    assert (args.aug, args.crop_pct, args.recount, args.resplit) == ("fer", None, 1, False)
    assert (args.balance, args.select, args.model_ema) == (False, "test", False)
    assert (args.schedule, args.step_epochs, args.step_factor) == ("step", [35, 65, 95], 0.1)
    assert (args.warmup_epochs, args.warmup_steps, args.weight_decay_end) == (0, -1, None)
    assert (args.opt, args.opt_betas, args.opt_eps) == ("adamw", [0.9, 0.999], None)
    assert (args.color_jitter, args.reprob, args.remode) == (0.25, 0.5, "const")
    assert (args.train_interpolation, args.test_interpolation) == ("bilinear", "bilinear")
    assert args.imagenet_default_mean_and_std
    assert args.data_set == recipe.split("_")[0].rstrip("78")
    assert args.nb_classes == (8 if args.data_set == "ferplus" else 7)
    assert f"--finetune {weights} " in (ROOT / "recipes" / f"{recipe}.args").read_text()


@pytest.mark.parametrize(
    ("name", "size"),
    [(n, s) for n in README for s in (("base", "small", "tiny") if "{}" in n else ("base",))],
)
def test_a_recipe_has_every_option_that_their_readme_names(name, size):
    recipe = name.format(size)
    main = main_pretrain if recipe.startswith("pretrain") else main_finetune
    named, args = main.build_parser().parse(README[name].split()), parse(recipe)
    for option in named.given:
        assert getattr(args, option) == getattr(named, option), option
    assert f"_{size}" in args.model


def test_the_table_of_results_has_the_numbers_of_the_recipes():
    """Their README: RAF-DB, AffectNet-7, AffectNet-8, FERPlus; second numbers are with tricks."""
    published = {
        "vit_base": ("91.07 or 91.79", "66.09", "62.42", "90.18 or 90.82"),
        "vit_small": ("90.03", "65.53", "62.06", "89.35"),
        "vit_tiny": ("88.72", "64.25", "61.45", "88.67"),
        "convnextv2_base": ("89.52", None, None, None),
    }
    sets = ("rafdb", "affectnet7", "affectnet8", "ferplus")
    rows = (ROOT / "README.md").read_text().splitlines()
    for model, numbers in published.items():
        (row,) = (r for r in rows if r.startswith(f"| `…{model}.args`"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        for data, number, cell in zip(sets, numbers, cells, strict=True):
            assert cell.removesuffix(" ~") == (number or "–")
            if number:
                recipe = (ROOT / "recipes" / f"{data}_{model}.args").read_text()
                assert f"accuracy {number} %" in recipe
                assert cell.endswith("~") == ("# Nearest: " in recipe), row


def test_every_recipe_is_documented_as_exact_or_nearest():
    page = (ROOT / "docs" / "published.md").read_text().splitlines()
    for path in ROOT.glob("recipes/*.args"):
        if "small_faces" in path.stem:  # ours
            assert f"(../recipes/{path.name})" in (ROOT / "docs" / "science.md").read_text()
            continue
        if path.stem.endswith("_fast"):  # ours
            continue
        (row,) = (line for line in page if f"[{path.stem}](../recipes/{path.name})" in line)
        if not path.stem.startswith("pretrain"):
            header = path.read_text()
            exact, nearest = "# Exact: " in header, "# Nearest: " in header
            assert exact != nearest, path
            assert row.endswith(f"| {'exact' if exact else 'nearest'} |"), path


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ("rafdb_vit_tiny", "ferplus", "RAF"),
        ("affectnet7_vit_tiny_60e", "rafdb", "AffectNet"),
        ("ferplus_vit_tiny", "affectnet", "FERPlus"),
    ],
)
def test_a_recipe_for_another_data_set_is_refused_in_one_line(
    recipe, data, message, sets, tmp_path, capfd
):
    argv = [f"@{ROOT}/recipes/{recipe}.args", "--data_path", str(sets / data)]
    assert run_here(main_finetune, [*argv, "--output_dir", str(tmp_path / "out")]) == BAD_INPUT
    line = refused(capfd)
    assert message in line
    assert str(sets / data) in line
