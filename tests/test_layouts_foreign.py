"""Files of other libraries are read exactly, or refused if our models compute something else.

Files of transformers and timm are written here by these libraries. mmpretrain and S2D are not
installed: tests rename tensors independently of our tables, and compare mmpretrain's names with
those of files that mmpretrain 1.2.0 wrote.
"""

import re

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

from backbones.vit import ViTSize
from models_mae import MaskedAutoencoderViT, ViTClassifier
from models_registry import create_classifier, create_pretrain_model, normalise_head_input
from models_saved import SavedAutoencoder, SavedEncoder, open_classifier, open_saved
from util.errors import BadInput
from util.weights import load_pretrained
from util.weights.layouts import translate

SHALLOW = ViTSize(192, 2, 3, 16)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = tuple("abcdefg")

TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
TINY |= {"intermediate_size": 768, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 32, "decoder_intermediate_size": 128}
DECODER |= {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
PLAIN_BEIT = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
ATTO = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2], "layer_norm_eps": 1e-6}
HEAD = {"num_labels": 7}
PARTS = ("embed", "pos_embed", "blocks", "norm", "pred")  # of a decoder
THEIRS = {  # class of transformers, its settings
    "vit": ("ViTForImageClassification", "ViTConfig", {**TINY, **HEAD}),
    "vit encoder": ("ViTModel", "ViTConfig", TINY),
    "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", {**TINY, **DECODER, "norm_pix_loss": True}),
    "mae encoder": ("ViTMAEModel", "ViTMAEConfig", {**TINY, "mask_ratio": 0.0}),
    "beit": ("BeitForImageClassification", "BeitConfig", {**TINY, **PLAIN_BEIT, **HEAD}),
    "beit token": (
        "BeitForImageClassification",
        "BeitConfig",
        {**TINY, **PLAIN_BEIT, **HEAD, "use_mean_pooling": False},
    ),
    "convnext": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {**ATTO, **HEAD}),
    "convnext encoder": ("ConvNextV2Model", "ConvNextV2Config", ATTO),
}


def stirred(model):
    """A model without parameters at zero or one, so that a tensor in a wrong place is noticed."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.05 if parameter.ndim > 1 else 0.2)
    return model.eval()


def build(name, settings, more):
    config = getattr(transformers, settings)(**more)
    return stirred(getattr(transformers, name)(config))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A transformers model and its folder written by `save_pretrained`; each made once."""
    made = {}

    def write(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("theirs")
            model = build(*THEIRS[kind])
            model.save_pretrained(folder)
            made[kind] = model, folder
        return made[kind]

    return write


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The tensors that transformers saves for a model with few blocks, by kind."""
    made = {}

    def write(kind):
        if kind not in made:
            name, settings, more = THEIRS[kind]
            folder = tmp_path_factory.mktemp("shallow")
            build(name, settings, {**more, "num_hidden_layers": 2}).save_pretrained(folder)
            made[kind] = load_file(folder / "model.safetensors")
        return made[kind]

    return write


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def answers(kind, model):
    """The outputs of transformers' model, under our names."""
    if kind == "mae":
        noise = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
        return {"noise": noise, "pred": model(IMAGES, noise=noise).logits}
    output = model(IMAGES)
    if hasattr(output, "logits"):
        return {"logits": output.logits}
    if kind == "convnext encoder":
        return {"features": output.last_hidden_state.mean((2, 3))}
    return {"features": output.last_hidden_state[:, 1:].mean(1)}


def assert_answers(saved, wanted):
    if "logits" in wanted:
        assert_same(saved.model(IMAGES), wanted["logits"])
    elif "pred" in wanted:
        assert_same(saved.model.reconstruct(IMAGES, noise=wanted["noise"]).pred, wanted["pred"])
    else:
        assert isinstance(saved, SavedEncoder)
        assert_same(saved.model.forward_features(IMAGES), wanted["features"])


# ---- transformers


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@torch.no_grad()
def test_transformers_models_have_the_same_outputs_here(kind, file, written, tmp_path):
    """For files saved by the library, and for its state dict saved by torch."""
    model, folder = written(kind)
    if file == "pytorch_model.bin":
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        torch.save(model.state_dict(), tmp_path / file)
        folder = tmp_path
    saved = open_saved(folder / file, CLASSES if "num_labels" in THEIRS[kind][2] else ())
    assert saved.notes == []
    assert_answers(saved, answers(kind, model))
    if kind == "mae":
        assert isinstance(saved, SavedAutoencoder)
        assert saved.model.decoder_blocks[0].attn.num_heads == 4
        assert (saved.model.norm_pix_loss, saved.model.mask_ratio) == (True, 0.75)


@pytest.mark.parametrize(
    ("kind", "layout", "unused"),
    [
        ("vit encoder", "ViT", {"norm", "pooler"}),
        ("mae", "ViTMAE", {"norm", "mask_token", *(f"decoder_{name}" for name in PARTS)}),
        ("beit", "BEiT", set()),
        ("convnext", "ConvNeXt V2", set()),
        ("convnext encoder", "ConvNeXt V2", set()),
    ],
)
def test_fine_tuning_starts_from_transformers_models(kind, layout, unused, written):
    name = "convnextv2_atto" if "convnext" in kind else "vit_tiny_patch16"
    source = written(kind)[1] / "model.safetensors"
    report = load_pretrained(create_classifier(name, 3, 32), source)
    assert report.layout == f"transformers {layout}"
    assert {name.split(".")[0] for name in report.unexpected} == unused
    fresh = {"head"} | ({"fc_norm"} if "norm" in unused else set())
    assert {name.split(".")[0] for name in report.missing} == fresh


def test_transformers_decoder_is_read_under_the_names_of_both_releases(written):
    """5.24 saves `decoder_encoder.layer`; 4.50 and our export save `decoder_layers`."""
    state = load_file(written("mae")[1] / "model.safetensors")
    old = {n.replace("decoder_encoder.layer.", "decoder_layers."): v for n, v in state.items()}
    new = {n.replace("decoder_layers.", "decoder_encoder.layer."): v for n, v in old.items()}
    assert old.keys() != new.keys()
    (first, layout), (second, _) = translate(old), translate(new)
    assert layout == "transformers ViTMAE"
    assert first.keys() == second.keys()
    assert "decoder_blocks.1.attn.qkv.weight" in first
    assert all(torch.equal(first[name], second[name]) for name in first)


BEIT = {**TINY, **HEAD, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "settings", "more", "expected"),
    [
        ("Beit", "BeitConfig", {**BEIT, **PLAIN_BEIT, "layer_scale_init_value": 0.1}, "lambda_1"),
        ("Beit", "BeitConfig", {**BEIT, **PLAIN_BEIT, "use_mask_token": True}, "mask_token"),
        (
            "Beit",
            "BeitConfig",
            {**BEIT, **PLAIN_BEIT, "use_relative_position_bias": True},
            "relative_position_bias_table",
        ),
        (
            "Beit",
            "BeitConfig",
            {**BEIT, **PLAIN_BEIT, "use_shared_relative_position_bias": True},
            "relative_position_bias_table",
        ),
        ("Beit", "BeitConfig", {**BEIT, "layer_scale_init_value": 0.0}, "missing pos_embed"),
        ("ViT", "ViTConfig", {**BEIT, "qkv_bias": False}, "missing blocks.0.attn.qkv.bias"),
        ("DeiT", "DeiTConfig", BEIT, "no ViT, ConvNeXt V2 or ResNet in a known layout"),
    ],
)
def test_models_that_compute_something_else_are_refused(name, settings, more, expected, tmp_path):
    build(f"{name}ForImageClassification", settings, more).save_pretrained(tmp_path)
    model = ViTClassifier(SHALLOW, 7, input_size=32)
    for keep_head in (True, False):
        with pytest.raises(BadInput, match=re.escape(expected)):
            load_pretrained(model, tmp_path / "model.safetensors", keep_head=keep_head)


# ---- the authors' own fine-tuning


@torch.no_grad()
def test_the_authors_fine_tuned_files_are_opened(tmp_path):
    theirs = stirred(timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32))
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    content = {
        "epoch": 7,
        "train_loss": 0.25,
        "model_state_dict": theirs.state_dict(),
        "optimizer_state_dict": torch.optim.Adam(parameters).state_dict(),
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}},
    }
    torch.save(content, tmp_path / "theirs.pth")
    saved = open_classifier(tmp_path / "theirs.pth", CLASSES)
    assert_same(saved.model(IMAGES), theirs(IMAGES))
    report = load_pretrained(create_classifier("vit_tiny_patch16", 3, 32), tmp_path / "theirs.pth")
    assert report.entry == "model_state_dict"
    assert "head replaced: 7 -> 3 classes" in str(report)


# ---- S2D


def as_s2d(state, head="head.fc_cls"):
    """A ViT's tensors under S2D's names, with some of the tensors that S2D adds."""
    made = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        new = {"norm": "ln_post", "head": head}.get(first, first)
        made[f"{new}.{rest}" if rest else new] = value
    more = {
        "patch_embed_prompt.proj.weight": (192, 128, 1, 1),
        "temporal_embedding": (1, 16, 192),
        "prompt_norms.0.weight": (192,),
        "prompt_blocks.0.fovea.smooth": (1,),
        "prompt_blocks.0.TMA.T_Adapter.attn.qkv.weight": (144, 48),
        "prompt_blocks.0.TMA.norm.weight": (192,),
    }
    return {**made, **{name: torch.ones(shape) for name, shape in more.items()}}


@pytest.mark.parametrize("head", ["head.fc_cls", "fc_cls"])
def test_fine_tuning_starts_from_s2d_but_it_is_not_used_as_a_classifier(head, tmp_path):
    vit = stirred(create_classifier("vit_tiny_patch16", 7, 32, global_pool="token"))
    path = tmp_path / "s2d.pth"
    torch.save({"model": as_s2d(vit.state_dict(), head)}, path)
    model = create_classifier("vit_tiny_patch16", 3, 32, global_pool="token").eval()
    report = load_pretrained(model, path)
    assert report.layout == "S2D"
    assert torch.equal(model.forward_features(IMAGES), vit.forward_features(IMAGES))
    told = "patch_embed_prompt, temporal_embedding, prompt_norms, prompt_blocks"
    assert str(report).endswith(
        f"head replaced: 7 -> 3 classes; newly initialised: head; not used: {told}"
    )
    wanted = (
        r"S2D's model, .* without patch_embed_prompt, .* fine-tune from it instead: .*--finetune"
    )
    with pytest.raises(BadInput, match=wanted):
        load_pretrained(model, path, keep_head=True)
    for read in (open_saved, open_classifier):
        with pytest.raises(BadInput, match=wanted):
            read(path, CLASSES)


# ---- mmpretrain


def as_mmpretrain(state):
    """A ViT's or MAE's tensors under mmpretrain's names."""
    inner = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    outer = {"patch_embed.proj": "backbone.patch_embed.projection", "norm": "backbone.ln1"}
    outer |= {"fc_norm": "backbone.ln2", "decoder_norm": "neck.ln1", "head.0": "neck.bn"}
    outer |= {"decoder_embed": "neck.decoder_embed", "decoder_pred": "neck.decoder_pred"}
    token = "fc_norm.weight" not in state
    outer |= dict.fromkeys(("head", "head.1"), "head.layers.head" if token else "head.fc")
    made = {}
    for name, value in state.items():
        path, _, kind = name.rpartition(".")
        if "blocks" in path:
            first, number, part = path.split(".", 2)
            base = "neck.decoder_blocks" if first == "decoder_blocks" else "backbone.layers"
            new = f"{base}.{number}.{inner.get(part, part)}.{kind}"
        elif path:
            new = f"{outer[path]}.{kind}"
        else:
            new = f"backbone.{name}" if name in ("cls_token", "pos_embed") else f"neck.{name}"
        made[new] = value
    return {"meta": {"dataset_meta": {"classes": list(CLASSES)}}, "state_dict": made}


# Names and shapes in files of mmpretrain 1.2.0: ViT-Tiny, 32 px, decoder width 32, 7 classes.
OF_MMPRETRAIN = {
    "backbone": """cls_token 1,1,192 pos_embed 1,5,192
        patch_embed.projection.weight 192,3,16,16 patch_embed.projection.bias 192""",
    "backbone.layers.0": """ln1.weight 192 ln1.bias 192 attn.qkv.weight 576,192 attn.qkv.bias 576
        attn.proj.weight 192,192 attn.proj.bias 192 ln2.weight 192 ln2.bias 192
        ffn.layers.0.0.weight 768,192 ffn.layers.0.0.bias 768
        ffn.layers.1.weight 192,768 ffn.layers.1.bias 192""",
    "neck": """mask_token 1,1,32 decoder_pos_embed 1,5,32 decoder_embed.weight 32,192
        decoder_embed.bias 32 ln1.weight 32 ln1.bias 32 decoder_pred.weight 768,32
        decoder_pred.bias 768""",
    "neck.decoder_blocks.0": """ln1.weight 32 ln1.bias 32 attn.qkv.weight 96,32 attn.qkv.bias 96
        attn.proj.weight 32,32 attn.proj.bias 32 ln2.weight 32 ln2.bias 32
        ffn.layers.0.0.weight 128,32 ffn.layers.0.0.bias 128
        ffn.layers.1.weight 32,128 ffn.layers.1.bias 32""",
}
BESIDE = {  # names and shapes beside the encoder, by kind of file
    "mae": "backbone.ln1.weight 192 backbone.ln1.bias 192",
    "avg": """backbone.ln2.weight 192 backbone.ln2.bias 192 head.fc.weight 7,192 head.fc.bias 7""",
    "token": """backbone.ln1.weight 192 backbone.ln1.bias 192 head.layers.head.weight 7,192
        head.layers.head.bias 7""",
    "probe": """backbone.ln1.weight 192 backbone.ln1.bias 192 neck.bn.running_mean 192
        neck.bn.running_var 192 neck.bn.num_batches_tracked - head.layers.head.weight 7,192
        head.layers.head.bias 7""",
}


def written_by_mmpretrain(kind):
    """Names and shapes in a file, with the number 0 for all blocks."""
    parts = {"": BESIDE[kind]}
    parts |= {f"{b}.": t for b, t in OF_MMPRETRAIN.items() if kind == "mae" or "back" in b}
    found = {}
    for base, text in parts.items():
        words = text.split()
        found |= {base + name: value for name, value in zip(words[::2], words[1::2], strict=True)}
    return found


@pytest.fixture(scope="module")
def ours():
    """Our models, in the sizes of mmpretrain's files."""
    made = {"mae": create_pretrain_model("mae_vit_tiny_patch16", 32, decoder_embed_dim=32)}
    for kind, pool in [("avg", "avg"), ("token", "token"), ("probe", "token")]:
        made[kind] = create_classifier("vit_tiny_patch16", 7, 32, global_pool=pool)
    normalise_head_input(made["probe"])
    made["probe"].head[0].running_mean.uniform_(-1, 1)
    return {kind: stirred(model) for kind, model in made.items()}


@pytest.mark.parametrize("kind", BESIDE)
@torch.no_grad()
def test_mmpretrains_files_are_opened(kind, ours, tmp_path):
    model, content = ours[kind], as_mmpretrain(ours[kind].state_dict())
    state = content["state_dict"]
    shapes = {
        re.sub(r"(layers|blocks)\.\d+\.(?=ln|attn|ffn)", r"\1.0.", name): (
            ",".join(map(str, value.shape)) or "-"
        )
        for name, value in state.items()
    }
    assert shapes == written_by_mmpretrain(kind)
    torch.save(content, tmp_path / "theirs.pth")
    saved = open_saved(tmp_path / "theirs.pth")
    if kind == "mae":
        noise = torch.rand(3, 4)
        pred = model.reconstruct(IMAGES, noise=noise).pred
        return assert_answers(saved, {"noise": noise, "pred": pred})
    assert saved.classes == CLASSES
    assert torch.equal(saved.model(IMAGES), model(IMAGES))
    report = load_pretrained(create_classifier("vit_tiny_patch16", 3, 32), tmp_path / "theirs.pth")
    assert (report.layout, report.entry) == ("mmpretrain ViT", "state_dict")
    assert report.replaced_head == "7 -> 3 classes"


NORM = torch.ones(192)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"backbone.ln1.weight": NORM, "backbone.ln1.bias": NORM}, "norm.weight, norm.bias"),
        ({"backbone.pre_norm.weight": NORM}, "norm_pre.weight"),
        ({"backbone.layers.0.attn.gamma1.weight": NORM}, "layers.0.attn.gamma1.weight"),
        ({"head.layers.pre_logits.weight": torch.ones(192, 192)}, "pre_logits.weight"),
        ({"neck.fc.weight": torch.ones(192, 192)}, "neck.fc.weight"),
    ],
)
def test_mmpretrains_other_vits_are_refused_as_classifiers(more, expected, ours, tmp_path):
    state = {**as_mmpretrain(ours["avg"].state_dict())["state_dict"], **more}
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    with pytest.raises(BadInput, match=f"unexpected {re.escape(expected)}"):
        open_classifier(tmp_path / "theirs.pth", CLASSES)


# ---- complete files only


def kinds_of(state, without=()):
    """One name, the last, of all that differ only in numbers."""
    names = {re.sub(r"\d+", "0", name): name for name in state}
    return [name for name in names.values() if not name.startswith(without)]


def damages(state, name):
    """States with the tensor missing, renamed, in another shape, not finite, or with one added."""
    rest, value = {n: v for n, v in state.items() if n != name}, state[name]
    yield rest
    yield {**rest, f"{name}2": value}
    yield {**rest, name: value[..., :-1]}
    yield {**rest, name: torch.full_like(value, torch.nan)}
    if re.search(r"(layers?|blocks)\.\d", name):
        yield {**state, f"{name}2": value}


NOT_LOADED_OF_S2D = ("head", "prompt", "patch_embed_prompt", "temporal")


def test_a_foreign_file_is_read_completely_or_refused(shallow):
    def vit(pool):
        return stirred(ViTClassifier(SHALLOW, 7, input_size=32, global_pool=pool))

    mae = MaskedAutoencoderViT(
        SHALLOW, 32, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4
    )
    for state, model, keep_head in [
        (shallow("vit"), vit("token"), True),
        (shallow("beit"), vit("avg"), True),
        (shallow("mae"), mae, False),
        (as_mmpretrain(vit("avg").state_dict())["state_dict"], vit("avg"), True),
        (as_mmpretrain(mae.state_dict())["state_dict"], mae, False),
        (as_s2d(vit("token").state_dict()), vit("token"), False),
    ]:
        load_pretrained(model, "x", keep_head=keep_head, checkpoint=state)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for name in kinds_of(state, NOT_LOADED_OF_S2D if "ln_post.bias" in state else ()):
            for damaged in damages(state, name):
                with pytest.raises(BadInput) as error:
                    load_pretrained(model, "x", keep_head=keep_head, checkpoint=damaged)
                assert re.match(
                    r"x: (does not fit the model: (missing|unexpected|wrong shape) [\w.]+|"
                    r"[\w.]+ is not finite|no ViT, ConvNeXt|holds (no head|a ViT|vit))|"
                    "x: its head has",
                    str(error.value),
                )
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_a_foreign_convnext_is_read_completely_or_refused(written):
    state = load_file(written("convnext")[1] / "model.safetensors")
    model = create_classifier("convnextv2_atto", 7)
    load_pretrained(model, "x", keep_head=True, checkpoint=state)
    for name in kinds_of(state):
        for damaged in damages(state, name):
            with pytest.raises(BadInput, match=r"^x: "):
                load_pretrained(model, "x", keep_head=True, checkpoint=damaged)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("layer.1.attention.attention.key.weight", r"missing blocks\.1\.attn\.qkv\.weight; "),
        ("layer.0.attention.attention.key.bias", r"missing blocks\.0\.attn\.qkv\.bias; "),
        ("layer.0.layernorm_after.bias", r"missing blocks\.0\.norm2\.bias$"),
        ("embeddings.cls_token", r"missing cls_token$"),
    ],
)
def test_a_missing_tensor_is_named(lost, expected, shallow):
    state = {n: v for n, v in shallow("vit").items() if not n.endswith(lost)}
    assert len(state) == len(shallow("vit")) - 1
    with pytest.raises(BadInput, match=expected):
        load_pretrained(ViTClassifier(SHALLOW, 7, input_size=32), "x", checkpoint=state)


def test_queries_keys_and_values_that_do_not_fit_are_refused(shallow):
    """Although their shapes add up to the right one, or as they are not plain fp32 tensors."""
    name = "vit.encoder.layer.0.attention.attention.{}.weight"
    keys, values = (shallow("vit")[name.format(part)] for part in ("key", "value"))
    for other in (
        {"key": keys[:100], "value": torch.cat([values, values[:92]])},
        {"key": keys.to_sparse()},
        {"key": keys.double()},
        {"key": keys.to("meta")},
        {"query": torch.tensor(1.0), "key": torch.tensor(1.0), "value": torch.tensor(1.0)},
    ):
        state = {**shallow("vit"), **{name.format(part): v for part, v in other.items()}}
        with pytest.raises(BadInput, match=r"missing blocks\.0\.attn\.qkv\.weight; unexpected"):
            load_pretrained(ViTClassifier(SHALLOW, 7, input_size=32), "x", checkpoint=state)


def test_two_tensors_with_one_name_are_refused(shallow):
    state = {**shallow("vit"), "layernorm.weight": torch.ones(192)}
    with pytest.raises(BadInput, match="in a known layout"):
        load_pretrained(ViTClassifier(SHALLOW, 7, input_size=32), "x", checkpoint=state)
