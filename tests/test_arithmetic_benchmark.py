"""benchmarks/arithmetic.py: bytes, FLOPs, launches and gradients against counting by hand."""

import importlib
import sys

import pytest
import torch

from models_registry import create_pretrain_model
from runs import ROOT


@pytest.fixture
def arithmetic(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("benchmarks.arithmetic")


def test_an_operator_takes_the_longer_of_its_bytes_and_its_flops(arithmetic):
    with arithmetic.Cost() as narrow:
        torch.ones(1024, 8) @ torch.ones(8, 1024)
    with arithmetic.Cost() as wide:
        torch.ones(2048, 4096, device="meta") @ torch.ones(4096, 2048, device="meta")
    product = 4 * (2 * 1024 * 8 + 1024 * 1024)
    filled = 4 * 2 * 1024 * 8
    assert narrow.memory == pytest.approx((product + filled) / arithmetic.MEMORY)
    assert narrow.matrix == 0
    assert wide.matrix == pytest.approx(2 * 2048 * 4096 * 2048 / arithmetic.MATRIX)
    assert narrow.operators == wide.operators == 3


def test_time_per_image_falls_with_the_batch_to_a_limit(arithmetic):
    few, parameters = arithmetic.micro_batch("convnextv2_atto", 8)
    many, _ = arithmetic.micro_batch("convnextv2_atto", 64)
    assert few.launch == many.launch == pytest.approx(2.5e-6 * 700, rel=0.3)
    assert 4 < many.memory / few.memory < 8  # gradients do not grow with it
    model = create_pretrain_model("convnextv2_atto")
    assert parameters == sum(p.numel() for p in model.parameters())


def test_gradients_exchanged_by_hand(arithmetic):
    usual, one_card = arithmetic.Network(), arithmetic.Network(cards=1)
    assert usual.seconds(10**8, 1) == 0
    assert usual.seconds(10**8, 8) == pytest.approx(2 * 7 / 8 * 4e8 / 450e9)
    assert usual.seconds(10**8, 64) == pytest.approx(2 * 63 / 64 * 4e8 / 400e9)
    assert one_card.seconds(10**8, 64) == pytest.approx(2 * 63 / 64 * 4e8 / 50e9)
    assert arithmetic.Network(width=2).seconds(10**8, 8) == usual.seconds(10**8, 8) / 2


def test_a_step_by_hand(arithmetic, monkeypatch):
    """512 images: four micro-batches on one GPU, one of 8 images on each of 64."""
    asked = []

    def micro_batch(name, images):
        asked.append(images)
        return arithmetic.Pass(0.003, 0.002, 0.001), 0 if images == 128 else 10**9

    monkeypatch.setattr(arithmetic, "micro_batch", micro_batch)
    one = arithmetic.step("model", 512, 1, arithmetic.Network())
    many = arithmetic.step("model", 512, 64, arithmetic.Network())
    assert asked == [128, 8]
    assert one.rate() == pytest.approx(512 / (4 * 0.006))
    assert one.limit() == "bytes"
    exchange = arithmetic.Network().seconds(10**9, 64)
    update = 32 * 10**9 / arithmetic.MEMORY
    assert many.rate() == pytest.approx(512 / (0.006 + update + exchange - 0.004))
    assert many.limit() == "network"


def test_a_table_of_a_recipe(arithmetic, monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "RECIPES", {"pretrain_mae_vit_tiny": 1})
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "--gpus", "8", "64"])
    arithmetic.main()
    printed = capsys.readouterr().out
    assert printed.count("| pretrain_mae_vit_tiny | 128 | ") == 2
    assert "| pretrain_mae_vit_tiny | 64 | 8 | 0.0% |" in printed


def test_all_recipes_exist(arithmetic):
    assert all((ROOT / "recipes" / f"{name}.args").is_file() for name in arithmetic.RECIPES)
