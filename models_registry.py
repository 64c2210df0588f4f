"""Creates models by name, and compiles their blocks."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from timm.layers import DropPath
from torch import nn

from backbones import family_of, model_names, size_of
from models_masked import MaskedAutoencoder


def list_models(kind: str = "pretrain") -> list[str]:
    """Names for `create_pretrain_model` (kind "pretrain") or `create_classifier` ("classifier")."""
    return model_names(masked={"pretrain": True, "classifier": False}[kind])


def create_pretrain_model(name: str, input_size: int = 224, **options: object) -> MaskedAutoencoder:
    """A masked autoencoder: `mae_vit_{tiny…large}_patch16`, `mae_vit_huge_patch14`, `convnextv2_*`,
    `resnet{18,34,50}`.

    Options: in_chans, mask_ratio, norm_pix_loss, decoder_embed_dim, decoder_depth; for ViT and
    ResNet also patch_size, for ViT decoder_num_heads and predict_ratio. Raises BadInput for an
    unknown name, ValueError for incompatible sizes.
    """
    network = family_of(name, masked=True).network(masked=True)
    return network(size_of(name), input_size=input_size, **options)


def create_classifier(
    name: str, num_classes: int, input_size: int = 224, **options: object
) -> nn.Module:
    """A classifier: `vit_*` (or, equally, `mae_vit_*`), `convnextv2_*` or `resnet{18,34,50}`.

    Options: in_chans, drop_path; for ViT patch_size and global_pool ("avg" or "token"); for
    ConvNeXt V2 head_init_scale. ConvNeXt V2 takes images whose sides are multiples of 32 pixels,
    ResNet images of any size; both ignore `input_size`. Raises BadInput for an unknown name.
    """
    family = family_of(name)
    if family.fixed_input:
        options["input_size"] = input_size
    return family.network(masked=False)(size_of(name), num_classes, **options)


def normalise_head_input(model: nn.Module) -> None:
    """Put a parameter-free batch norm before the head, for MAE's linear probe (appendix A.1)."""
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=1e-6)
    model.head = nn.Sequential(norm, model.head)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block with torch.compile, which fuses what lies between its matrix products.

    Blocks of the same shape share one compilation, so this takes seconds; compiling the whole model
    takes minutes and makes it no faster. Parameter names do not change. The model must already be
    on its device. The attribute `compiled` of its class lists the classes of its blocks.
    """
    torch._dynamo.config.recompile_limit = 64  # block widths × batch sizes × resolutions
    # It would split each block to send gradients earlier; after each block is early enough.
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, model.compiled):
            device = next(module.parameters()).device
            for name, child in module.named_children():
                if isinstance(child, DropPath):
                    setattr(module, name, SharedDropPath(child.drop_prob, device))
            module.compile(dynamic=False)


def uncompiled() -> AbstractContextManager:
    """A context in which compiled blocks run as they are.

    For what has other sizes than training, or runs on one rank while the others wait: it would be
    compiled anew. Does nothing if nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:  # it takes seconds to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class SharedDropPath(nn.Module):
    """timm's DropPath with its rate in a tensor.

    A plain number would be compiled in as a constant, so blocks could not share a compilation.
    """

    def __init__(self, rate: float, device: torch.device) -> None:
        super().__init__()
        # Not a buffer, because DDP broadcasts buffers in every step.
        self.keep = torch.tensor(1 - rate, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, …) -> same: randomly zeroes whole images and rescales the others."""
        if not self.training:
            return x
        shape = (len(x), *[1] * (x.ndim - 1))
        return x * (torch.rand(shape, device=x.device) < self.keep) / self.keep
