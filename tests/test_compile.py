"""Compiled blocks: the number of compilations, and stochastic depth."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from models_registry import SharedDropPath, compile_blocks, create_classifier, uncompiled


@pytest.mark.parametrize(
    ("name", "kinds"),
    # Blocks of one width are compiled once, but the very first separately: it has no drop path.
    [("vit_tiny_patch16", 2), ("convnextv2_atto", 5)],
)
def test_equal_blocks_are_compiled_once_whatever_their_drop_path(name, kinds, monkeypatch):
    counter, method = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: method(m, backend=counter, **how))
    torch._dynamo.reset()
    model = create_classifier(name, 7, input_size=64, drop_path=0.3)
    names = list(model.state_dict())
    compile_blocks(model)
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert counter.frame_count == kinds
    assert list(model.state_dict()) == names


def test_measuring_between_epochs_compiles_nothing(monkeypatch):
    """Neither the last, smaller batch nor evaluation mode nor an image size not seen before."""
    counter, method = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **how: method(m, backend=counter, **how))
    torch._dynamo.reset()
    model = create_classifier("convnextv2_atto", 7, input_size=64)
    before = model.eval()(torch.ones(3, 3, 64, 64))
    compile_blocks(model.train())
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    compiled = counter.frame_count
    with uncompiled(), torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(3, 3, 64, 64)), before)
        model(torch.rand(2, 3, 96, 96))
    assert counter.frame_count == compiled > 0
    model.train()(torch.rand(2, 3, 64, 64)).sum().backward()  # still the compiled code
    assert counter.frame_count == compiled


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = SharedDropPath(0.25, torch.device("cpu")), torch.ones(4000, 2, 3)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop(x.bfloat16()).dtype == torch.bfloat16
    assert drop.eval()(x) is x
