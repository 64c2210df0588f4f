"""Learning rate and weight decay of every parameter, by the published rules."""

import copy
import math

import pytest
import torch
from torch import nn

from engine_finetune import freeze_backbone, layer_rates
from models_registry import create_classifier, normalise_head_input
from util.errors import BadInput
from util.optim import adamw, create_optimizer, parameter_groups, set_rates
from util.schedule import lr_at, step_lr_at


def build(name, **options):
    """A classifier on the meta device: only names and shapes matter."""
    with torch.device("meta"):
        return create_classifier(name, 7, **options)


def published_vit(blocks):
    """MAE's rule as a table: start of a name -> layer; all other names are in layer `after`."""
    table = dict.fromkeys(("cls_token", "pos_embed", "patch_embed."), 0)
    table |= {f"blocks.{b}.": b + 1 for b in range(blocks)}
    return table, blocks + 1


def published_single(depths):
    """ConvNeXt V2's rule `single`: every block is a layer; a downsampling is in the next one."""
    table, blocks = {}, 0
    for stage, depth in enumerate(depths):
        table[f"downsample_layers.{stage}."] = blocks + 1
        for b in range(depth):
            blocks += 1
            table[f"stages.{stage}.{b}."] = blocks
    return table, blocks + 1


def published_group():
    """ConvNeXt V2's rule `group`, for Base and Large."""
    table = {f"downsample_layers.{k}.": layer for k, layer in enumerate((0, 2, 3, 12))}
    table |= {"stages.0.": 1, "stages.1.": 2, "stages.3.": 12}
    long_stage = (*(3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7), *(8, 8, 8, 9, 9, 9))
    for b, layer in enumerate((*long_stage, *(10, 10, 10, 11, 11, 11))):
        table[f"stages.2.{b}."] = layer
    return table, 13


def published_resnet(depths):
    """Our own rule: the stem, then block by block, then the head."""
    table, layer = {"conv1.": 0, "bn1.": 0}, 0
    for stage, depth in enumerate(depths, 1):
        for b in range(depth):
            layer += 1
            table[f"layer{stage}.{b}."] = layer
    return table, layer + 1


RULES = {
    ("vit_tiny_patch16", "single"): published_vit(12),
    ("vit_base_patch16", "single"): published_vit(12),
    ("vit_huge_patch14", "single"): published_vit(32),
    ("convnextv2_atto", "single"): published_single((2, 2, 6, 2)),
    ("resnet18", "single"): published_resnet((2, 2, 2, 2)),
    ("convnextv2_base", "single"): published_single((3, 3, 27, 3)),
    ("convnextv2_base", "group"): published_group(),
}


@pytest.mark.parametrize(("name", "kind"), RULES)
def test_every_parameter_has_the_published_learning_rate_of_its_layer(name, kind):
    model, decay = build(name), 0.65
    table, after = RULES[name, kind]
    rates = layer_rates(model, decay, kind == "group")
    owner = {}  # parameter -> rate of its group; each is in exactly one
    for group in parameter_groups(model, 0.05, rates):
        for p in group["params"]:
            assert p not in owner
            owner[p] = group["lr_scale"]
    assert len(owner) == len(list(model.parameters()))
    for parameter, p in model.named_parameters():
        layers = [layer for start, layer in table.items() if parameter.startswith(start)] or [after]
        assert len(layers) == 1
        assert owner[p] == pytest.approx(decay ** (after - layers[0]), rel=1e-12), parameter


HAND_CHECKED = [  # model, rule, parameter, number of layers before the last
    ("vit_base_patch16", "single", "pos_embed", 13),
    ("vit_base_patch16", "single", "blocks.0.norm1.weight", 12),
    ("vit_base_patch16", "single", "blocks.11.mlp.fc2.bias", 1),
    ("vit_base_patch16", "single", "fc_norm.weight", 0),
    ("vit_base_patch16", "single", "head.weight", 0),
    ("convnextv2_atto", "single", "downsample_layers.0.0.weight", 12),
    ("convnextv2_atto", "single", "stages.0.0.dwconv.weight", 12),
    ("convnextv2_atto", "single", "downsample_layers.3.1.weight", 2),
    ("convnextv2_atto", "single", "stages.3.1.grn.gamma", 1),
    ("convnextv2_atto", "single", "norm.bias", 0),
    ("convnextv2_base", "group", "downsample_layers.0.0.weight", 13),
    ("convnextv2_base", "group", "stages.0.2.norm.weight", 12),
    ("convnextv2_base", "group", "downsample_layers.2.0.weight", 10),
    ("convnextv2_base", "group", "stages.2.26.pwconv1.weight", 2),
    ("convnextv2_base", "group", "downsample_layers.3.1.bias", 1),
    ("convnextv2_base", "group", "head.bias", 0),
]


@pytest.mark.parametrize(("name", "kind", "parameter", "before"), HAND_CHECKED)
def test_known_parameters_are_in_the_layers_of_the_papers_code(name, kind, parameter, before):
    model = build(name)
    assert parameter in dict(model.named_parameters())
    assert layer_rates(model, 0.5, kind == "group")(parameter) == 0.5**before


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convnextv2_atto", "resnet18"])
def test_weight_decay_is_for_matrices_and_filters_only(name):
    model = build(name)
    weights = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    groups = parameter_groups(model, 0.05, layer_rates(model, 0.65, False))
    for group in groups:
        assert {p in weights for p in group["params"]} == {group["weight_decay"] == 0.05}
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}


def test_frozen_parameters_are_in_no_group():
    model = build("vit_tiny_patch16")
    normalise_head_input(model)
    freeze_backbone(model)
    groups = parameter_groups(model, 0.0)
    assert [p.shape for group in groups for p in group["params"]] == [(7, 192), (7,)]


class Tiny(nn.Module):
    """Two layers, each with a weight, a bias and its own learning rate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def groups(self, weight_decay=0.1):
        return parameter_groups(self, weight_decay, lambda n: 0.5 if n.startswith("first") else 1.0)


def rates_of(optimizer):
    return {(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups}


def test_learning_rates_are_scaled_by_layer_and_weight_decay_is_set_by_group():
    optimizer = create_optimizer("adamw", Tiny().groups(), 1.0, 0.9)
    set_rates(optimizer, 0.2)
    assert rates_of(optimizer) == {(0.1, 0.1, 1), (0.1, 0.0, 1), (0.2, 0.1, 1), (0.2, 0.0, 1)}
    set_rates(optimizer, 0.4, weight_decay=0.03)
    assert rates_of(optimizer) == {(0.2, 0.03, 1), (0.2, 0.0, 1), (0.4, 0.03, 1), (0.4, 0.0, 1)}


def test_a_weight_decay_that_starts_at_0_can_rise():
    optimizer = create_optimizer("adamw", Tiny().groups(0.0), 1.0, 0.9)
    for decay in (0.0, 0.07):
        set_rates(optimizer, 1.0, weight_decay=decay)
    assert rates_of(optimizer) == {(0.5, 0.07, 1), (0.5, 0.0, 1), (1.0, 0.07, 1), (1.0, 0.0, 1)}


def one_step(model, optimizer, k):
    """A step on the k-th batch of data."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    model.second(model.first(x)).square().sum().backward()
    optimizer.step()


def lars_by_hand(parameters, buffers, shares, lr, momentum=0.9, trust=0.001):
    """MAE, appendix A.1: SGD with layer-wise adaptation; vectors use the plain gradient."""
    for p, share in zip(parameters, shares, strict=True):
        update = p.grad.clone()
        if p.ndim > 1:
            w, g = math.sqrt((p**2).sum()), math.sqrt((update**2).sum())
            update *= trust * w / g if w > 0 and g > 0 else 1.0
        buffers[p] = momentum * buffers.get(p, torch.zeros_like(p)) + update
        p.data -= lr * share * buffers[p]


def test_lars_adapts_matrices_even_without_weight_decay_but_not_biases():
    model = Tiny()
    theirs, buffers = copy.deepcopy(model), {}
    optimizer = create_optimizer("lars", model.groups(0.0), 0.0, momentum=0.9)
    set_rates(optimizer, 0.3)
    for k in range(3):
        one_step(model, optimizer, k)
        theirs.zero_grad()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(k))
        theirs.second(theirs.first(x)).square().sum().backward()
        with torch.no_grad():
            lars_by_hand(list(theirs.parameters()), buffers, (0.5, 0.5, 1, 1), lr=0.3)
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)


REFERENCES = {
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.8, 0.95)),
    "adam": lambda g: torch.optim.Adam(g, lr=0.01, betas=(0.8, 0.95)),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.7),
    "sgd": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.7, nesterov=True),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_optimizers_by_name_equal_torchs_with_the_given_options(name):
    ours, theirs = Tiny(), Tiny()
    options = {"betas": (0.8, 0.95)} if name.startswith("adam") else {}
    pairs = (
        (ours, create_optimizer(name, ours.groups(), 0.01, 0.7, **options)),
        (theirs, REFERENCES[name](theirs.groups())),
    )
    for model, optimizer in pairs:
        for k in range(3):
            one_step(model, optimizer, k)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(BadInput, match=r"--opt nonsense: .*not found"):
        create_optimizer("nonsense", Tiny().groups(), 0.1, 0.9)


def test_parameter_groups_are_restored_from_a_checkpoint():
    model = Tiny()
    optimizer = adamw(model.groups(), 0.1)
    again = adamw(model.groups(), 0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_rates(again, 1.0, 0.2)
    assert rates_of(again) == {(0.5, 0.2, 1), (0.5, 0.0, 1), (1.0, 0.2, 1), (1.0, 0.0, 1)}


def test_weight_decay_follows_half_a_cosine():
    decay = [lr_at(epoch, 0.05, 0.2, 0, 10) for epoch in (0, 2.5, 5, 10)]
    expected = [0.05, 0.2 - 0.15 * (1 + math.sqrt(0.5)) / 2, 0.125, 0.2]
    assert decay == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0), (1, 0.5), (2, 1), (34.9, 1), (35, 0.1), (64.9, 0.1), (65, 0.01), (95.5, 0.001)],
)
def test_the_step_schedule_warms_up_and_falls_at_the_given_epochs(epoch, rate):
    assert step_lr_at(epoch, 1.0, 2, (35, 65, 95), 0.1) == pytest.approx(rate)
