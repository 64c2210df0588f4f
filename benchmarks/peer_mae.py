"""The peers of our MAE: the papers' formulation on plain torch and timm, and transformers' ViTMAE.

The official formulation embeds every patch, gathers the visible ones, restores the order of all
tokens for the decoder, predicts all patches and masks the loss. Both peers use our weights. Neither
has a `predict_ratio`; for models that do, `OfficialMAE` drops patches that are not predicted once
the tokens are in order.
"""

from typing import TYPE_CHECKING

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT
from models_masked import take_tokens

if TYPE_CHECKING:
    from transformers import ViTMAEForPreTraining


class OfficialMAE(nn.Module):
    """Our model's layers, run the way the papers' code runs them."""

    def __init__(self, model: MaskedAutoencoderViT, fused_attention: bool) -> None:
        """Share `model`'s layers; attention uses torch's fused kernel or runs step by step."""
        super().__init__()
        self.model = model
        for block in model.modules():
            if isinstance(block, Block):
                block.attn.__class__ = Attention  # timm's own
                block.attn.fused_attn = fused_attention

    def forward(self, imgs: Tensor, noise: Tensor) -> Tensor:
        """(N, 3, H, W), (N, L) -> the loss of `MaskedAutoencoder.forward`."""
        model = self.model
        n, length = noise.shape
        keep = int(length * (1 - model.mask_ratio) + 1e-6)
        shuffled = noise.argsort(dim=1, stable=True)
        restore = shuffled.argsort(dim=1)
        mask = (restore >= keep).to(imgs.dtype)

        x = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
        x = take_tokens(x, shuffled[:, :keep])
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(n, -1, -1), x], dim=1)
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))

        masked = model.mask_token.expand(n, length - keep, -1)
        tokens = torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1)
        x = torch.cat([x[:, :1], take_tokens(tokens, restore)], dim=1) + model.decoder_pos_embed
        target = model.patchify(imgs)
        if model.predict_ratio < 1:
            predicted = max(1, int((length - keep) * model.predict_ratio + 1e-6))
            seen = shuffled[:, : keep + predicted].sort(dim=1).values
            x = torch.cat([x[:, :1], take_tokens(x[:, 1:], seen)], dim=1)
            target, mask = take_tokens(target, seen), mask.gather(1, seen)
        for block in model.decoder_blocks:
            x = block(x)
        pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]

        if model.norm_pix_loss:
            target = model.normalise_patches(target)[0]
        errors = (pred - target).square().mean(dim=-1)
        return (errors * mask).sum() / mask.sum()


class TransformersMAE(nn.Module):
    """transformers' ViTMAE with a copy of our weights."""

    def __init__(self, model: MaskedAutoencoderViT, attention: str = "sdpa") -> None:
        """`attention` is "sdpa" or "eager"."""
        super().__init__()
        self.model = to_transformers(model, attention)

    def forward(self, imgs: Tensor, noise: Tensor) -> Tensor:
        """(N, 3, H, W), (N, L) -> loss."""
        return self.model(imgs, noise=noise).loss


def to_transformers(model: MaskedAutoencoderViT, attention: str) -> "ViTMAEForPreTraining":
    """Build a ViTMAE with our model's sizes and weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining  # which need not be installed

    blocks, decoder = model.blocks, model.decoder_blocks
    dim, width = model.norm.weight.numel(), model.decoder_norm.weight.numel()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=dim,
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads,
            intermediate_size=4 * dim,
            layer_norm_eps=1e-6,
            image_size=model.input_size,
            patch_size=model.patch_size,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=len(decoder),
            decoder_num_attention_heads=decoder[0].attn.num_heads,
            decoder_intermediate_size=4 * width,
            mask_ratio=model.mask_ratio,
            norm_pix_loss=model.norm_pix_loss,
            attn_implementation=attention,
        )
    )
    theirs.load_state_dict(renamed(model.state_dict(), theirs.state_dict()))
    # It has no dropout, so training mode would compute the same.
    return theirs.to(model.norm.weight.device).eval()


RENAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
    "vit.encoder.layer": "blocks",
    "vit.layers": "blocks",
    "decoder.decoder_layers": "decoder_blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def our_name(name: str) -> str:
    """transformers' parameter name -> ours."""
    for theirs, ours in RENAMES.items():
        name = name.replace(theirs, ours)
    return name


def renamed(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under transformers' names, with query, key and value split."""
    result = {}
    for name in wanted:
        ours = our_name(name)
        for k, part in enumerate(("query", "key", "value")):
            for spelling in (f"attention.attention.{part}", f"attention.{part[0]}_proj"):
                if spelling in ours:
                    stacked = state[ours.replace(spelling, "attn.qkv")]
                    result[name] = stacked.chunk(3)[k]
        if name not in result:
            result[name] = state[ours]
    return result
