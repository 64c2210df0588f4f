"""Pre-training that starts from weights: `--resume` with a file without a training state."""

from argparse import Namespace

import pytest
import timm
import torch
import transformers

from models_registry import create_classifier, create_pretrain_model
from runs import load, log, pretrain, run_two, same, small_run
from util.errors import BAD_INPUT, DONE
from util.positions import sincos_position_embedding

NAME = "mae_vit_tiny_patch16"
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
RATES = "--lr 0"  # so that the initial weights are saved


@pytest.fixture(scope="module")
def mae():
    """An autoencoder as `small_run` builds it, trained elsewhere."""
    torch.manual_seed(5)
    model = create_pretrain_model(NAME, 48, **DECODER)
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def begun_with(tmp_path, content, more="", code=DONE):
    """The checkpoint of a run that starts from a file and does not learn."""
    torch.save(content, tmp_path / "weights.pth")
    output = tmp_path / "run"
    options = f"--resume {tmp_path / 'weights.pth'} --epochs 1 {RATES} --weight_decay 0 {more}"
    assert pretrain(output, options) == code
    return load(output) if code == DONE else None


def encoder_of(state):
    return {n: v for n, v in state.items() if not n.startswith(("decoder", "mask_token"))}


def test_weights_alone_start_a_new_schedule(mae, tmp_path, capfd):
    saved = begun_with(tmp_path, {"model": mae.state_dict()})
    assert same(saved["model"], mae.state_dict())
    assert [record["epoch"] for record in log(tmp_path / "run")] == [0]
    said = capfd.readouterr().out
    assert "starting a new schedule with the weights of --resume" in said
    assert "MAE with decoder, " in said
    assert "the decoder is newly initialised" not in said


def test_for_an_encoder_alone_a_new_decoder_is_initialised_and_reported(mae, tmp_path, capfd):
    encoder = encoder_of(mae.state_dict())
    saved = begun_with(tmp_path, {"model": encoder, "args": Namespace(model="mae", lr=0.1)})
    assert same(encoder_of(saved["model"]), encoder)
    assert not torch.equal(saved["model"]["decoder_pred.weight"], mae.decoder_pred.weight)
    assert (
        "the decoder is newly initialised: the file holds an encoder only" in capfd.readouterr().out
    )


def test_only_the_weights_of_official_files_with_an_optimizer_are_used(mae, tmp_path, capfd):
    optimizer = torch.optim.AdamW(mae.parameters())
    official = {"model": mae.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 299}
    saved = begun_with(tmp_path, {**official, "scaler": {}, "args": Namespace(epochs=300)})
    assert same(saved["model"], mae.state_dict())
    assert saved["epoch"] == 0
    assert "the optimizer state is ignored" in capfd.readouterr().out


def test_a_run_started_from_weights_resumes_its_own_checkpoint(mae, tmp_path, capfd):
    torch.save(mae.state_dict(), tmp_path / "weights.pth")
    options = f"--resume {tmp_path / 'weights.pth'} --epochs"
    assert pretrain(tmp_path / "a", f"{options} 1") == DONE
    capfd.readouterr()
    assert pretrain(tmp_path / "a", f"{options} 2 --override_resume") == DONE
    assert "checkpoint-last.pth" in capfd.readouterr().out
    assert [record["epoch"] for record in log(tmp_path / "a")] == [0, 1]


def test_two_processes_start_from_the_same_weights(mae, tmp_path):
    torch.save({"model": encoder_of(mae.state_dict())}, tmp_path / "weights.pth")
    options = f"--resume {tmp_path / 'weights.pth'} --epochs 1 {RATES} --batch_size 4"
    run_two("main_pretrain", small_run(tmp_path / "run", options))
    assert same(encoder_of(load(tmp_path / "run")["model"]), encoder_of(mae.state_dict()))


def test_fixed_position_embeddings_are_recomputed_for_another_size(tmp_path, capfd):
    model = create_pretrain_model(NAME, 96, **DECODER)
    saved = begun_with(tmp_path, {"model": model.state_dict()})
    assert torch.equal(saved["model"]["pos_embed"], sincos_position_embedding(192, 3))
    assert torch.equal(saved["model"]["decoder_pos_embed"], sincos_position_embedding(32, 3))
    assert torch.equal(saved["model"]["blocks.3.attn.qkv.weight"], model.blocks[3].attn.qkv.weight)
    said = capfd.readouterr().out
    assert "recomputed for this input size: pos_embed, decoder_pos_embed" in said


def test_learnt_position_embeddings_are_interpolated_for_another_size(tmp_path, capfd):
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=7)
    saved = begun_with(tmp_path, model.state_dict())
    own, theirs = saved["model"]["pos_embed"], model.pos_embed
    assert own.shape == (1, 10, 192)
    assert torch.equal(own[:, 0], theirs[:, 0])
    grid = theirs[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    cubic = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", align_corners=False)
    torch.testing.assert_close(own[:, 1:], cubic.flatten(2).mT, atol=1e-5, rtol=0)
    said = capfd.readouterr().out
    assert "interpolated: pos_embed" in said
    assert "not used: head" in said


def test_weights_of_a_classifier_with_average_pooling_are_used_except_its_norm(tmp_path, capfd):
    model = create_classifier("vit_tiny_patch16", 7, 48)
    saved = begun_with(tmp_path, {"model": model.state_dict()})
    assert torch.equal(saved["model"]["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight)
    assert torch.equal(saved["model"]["norm.weight"], torch.ones(192))
    said = capfd.readouterr().out
    starts = ("  newly initialised: ", "; newly initialised: ")
    (new,) = (line for line in said.splitlines() if any(start in line for start in starts))
    assert "norm" in new.partition("newly initialised: ")[2].partition(";")[0].split(", ")
    assert "not used: fc_norm, head" in said


def test_pre_training_starts_from_a_file_of_transformers(tmp_path):
    config = transformers.ViTMAEConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=48,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    theirs.save_pretrained(tmp_path / "hf")
    options = f"--resume {tmp_path / 'hf' / 'model.safetensors'} --epochs 1 {RATES}"
    assert pretrain(tmp_path / "run", options) == DONE
    found = load(tmp_path / "run")["model"]["decoder_pred.weight"]
    assert torch.equal(found, theirs.decoder.decoder_pred.weight)


def test_fcmae_starts_from_a_dense_convnext(tmp_path, capfd):
    model = create_classifier("convnextv2_atto", 1000)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    options = f"--resume {tmp_path / 'weights.pth'} --epochs 1 {RATES} --weight_decay 0"
    assert pretrain(tmp_path / "run", options, family="fcmae") == DONE
    saved = load(tmp_path / "run")["model"]
    assert torch.equal(
        saved["encoder.stages.3.1.pwconv2.weight"], model.stages[3][1].pwconv2.weight
    )
    assert "not used: norm, head" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: create_pretrain_model("mae_vit_small_patch16", 48), "use --model mae_vit_small"),
        (lambda: create_classifier("convnextv2_atto", 7), "use --model convnextv2_atto"),
        (lambda: create_pretrain_model(NAME, 48, patch_size=8, **DECODER), "use --patch_size 8"),
        (lambda: create_pretrain_model(NAME, 48, decoder_depth=2), "decoder_blocks.1"),
    ],
)
def test_weights_of_another_model_are_refused_before_training(build, words, tmp_path, capfd):
    begun_with(tmp_path, {"model": build().state_dict()}, code=BAD_INPUT)
    line = capfd.readouterr().err
    assert "weights.pth" in line
    assert words in line
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_training_state_of_another_size_is_refused_with_the_difference(tmp_path, capfd):
    assert pretrain(tmp_path / "a", "--epochs 1") == DONE
    options = f"--resume {tmp_path / 'a' / 'checkpoint-last.pth'} --input_size 64"
    assert pretrain(tmp_path / "b", options) == BAD_INPUT
    assert "input_size 48 -> 64" in capfd.readouterr().err
    assert pretrain(tmp_path / "b", f"{options} --override_resume") == BAD_INPUT
    line = capfd.readouterr().err
    assert "size mismatch for pos_embed" in line
    assert "Error(s) in loading state_dict" not in line


def test_a_name_that_is_neither_a_file_nor_released_is_refused(tmp_path, capfd):
    assert pretrain(tmp_path, "--resume mae_vit_tiny_900e") == BAD_INPUT
    assert "did you mean mae_vit_tiny_" in capfd.readouterr().err
