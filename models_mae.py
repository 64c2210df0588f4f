"""Vision Transformers: the masked autoencoder (MAE) and the classifier.

Masked Autoencoders Are Scalable Vision Learners (He et al. 2022). State-dict names are those of
the official release, so weights load in both directions without renaming. Blocks are timm's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbones.vit import ViTSize
from models_masked import LayerNorm, MaskedAutoencoder, run_block, take_patches
from util.positions import sincos_position_embedding

CACHED_SCORES = 1_500_000  # attention scores computed at a time on a CPU, so that they stay cached


class PatchEmbed(nn.Module):
    """A p×p convolution of stride p, stored as `proj` and applied to the given patches only."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, V, p, p, C) -> (N, V, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.flatten(2), weight, self.proj.bias)


class MaskedAutoencoderViT(MaskedAutoencoder):
    """A ViT encodes the visible patches; a lighter one predicts the masked ones (section 3)."""

    compiled = (Block,)

    def __init__(
        self,
        size: ViTSize,
        input_size: int = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        predict_ratio: float = 1.0,
    ) -> None:
        super().__init__(input_size, patch_size or size.patch, in_chans, mask_ratio, norm_pix_loss)
        if decoder_depth < 1:
            raise ValueError(f"decoder depth {decoder_depth}: MAE needs at least one decoder block")
        if not 0 < predict_ratio <= 1:
            raise ValueError(f"predict_ratio {predict_ratio}: must be above 0 and at most 1")
        if decoder_embed_dim % decoder_num_heads or decoder_embed_dim % 4:
            raise ValueError(
                f"decoder width {decoder_embed_dim} must be divisible by its "
                f"{decoder_num_heads} heads and by 4"
            )
        self.predict_ratio = predict_ratio
        dim, width = size.dim, decoder_embed_dim

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = sincos_parameter(dim, self.grid)
        self.blocks = transformer(dim, size.depth, size.heads)
        self.norm = LayerNorm(dim)

        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = sincos_parameter(width, self.grid)
        self.decoder_blocks = transformer(width, decoder_depth, decoder_num_heads)
        self.decoder_norm = LayerNorm(width)
        self.decoder_pred = nn.Linear(width, self.patch_size**2 * in_chans)
        # These replace the position embeddings at resolutions other than the full one.
        self.register_buffer("scaled_pos", None, persistent=False)
        self.register_buffer("scaled_decoder_pos", None, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.cls_token.shape[2], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_resolution(self, size: int) -> None:
        """See MaskedAutoencoder. Positions scale too: a place in the face keeps its embedding."""
        super().set_resolution(size)
        full = self.full_size // self.patch_size
        embeddings = {"scaled_pos": self.pos_embed, "scaled_decoder_pos": self.decoder_pos_embed}
        for name, embed in embeddings.items():
            scaled = sincos_position_embedding(embed.shape[2], self.grid, full).to(embed)
            setattr(self, name, None if self.grid == full else scaled)

    def forward_encoder(self, imgs: Tensor, visible: Tensor) -> Tensor:
        """(N, C, H, W), visible patches (N, V) -> (N, 1 + V, D), class token first."""
        n, pos = len(imgs), self.pos_embed if self.scaled_pos is None else self.scaled_pos
        x = self.patch_embed(take_patches(imgs, visible, self.patch_size))
        x = x + pos[0, 1:][visible]
        cls = (self.cls_token + pos[:, :1]).expand(n, -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = run_block(self.grad_checkpointing, block, x)
        return self.norm(x)

    def own_options(self) -> dict[str, object]:
        """See MaskedAutoencoder."""
        heads = int(self.decoder_blocks[0].attn.num_heads)
        return {"patch_size": self.patch_size, "decoder_num_heads": heads}

    def kernels(self, device: torch.device, dtype: torch.dtype) -> str:
        """See MaskedAutoencoder."""
        fused = fused_attention_is_faster(device, dtype)
        return "fused attention kernel" if fused else "attention in separate steps"

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D): the mean of all patch tokens, with nothing masked."""
        everything = torch.arange(self.num_patches, device=imgs.device).expand(len(imgs), -1)
        return self.forward_encoder(imgs, everything)[:, 1:].mean(dim=1)

    def forward_decoder(self, latent: Tensor, ids: Tensor, start: int) -> Tensor:
        """(N, 1 + V, D), patch indices (N, M) -> (N, M - start, p*p*C), see MaskedAutoencoder.

        Tokens stay in shuffled order: attention does not depend on it, and those to predict are
        the last ones.
        """
        x = self.decoder_embed(latent)
        n, visible, width = x.shape[0], x.shape[1] - 1, x.shape[2]
        masked = self.mask_token.to(x.dtype).expand(n, ids.shape[1] - visible, width)
        scaled = self.scaled_decoder_pos
        pos = self.decoder_pos_embed if scaled is None else scaled
        pos = torch.cat([pos[:, :1].expand(n, -1, -1), pos[0, 1:][ids]], dim=1)
        x = torch.cat([x, masked], dim=1) + pos
        for block in self.decoder_blocks[:-1]:
            x = run_block(self.grad_checkpointing, block, x)
        x = run_block(self.grad_checkpointing, block_tail, self.decoder_blocks[-1], x, 1 + start)
        return self.decoder_pred(self.decoder_norm(x))


class Attention(TimmAttention):
    """timm's self-attention, using whichever kernel is faster on the device."""

    def forward(self, x: Tensor, start: int = 0, **no_mask: object) -> Tensor:
        """All tokens (N, T, D) -> the outputs of tokens `start:`, (N, T - start, D)."""
        weight, bias, d = self.qkv.weight, self.qkv.bias, x.shape[2]
        if start:  # skip the queries of the other tokens: their outputs are not needed
            q = F.linear(x[:, start:], weight[:d], bias[:d])
            k, v = F.linear(x, weight[d:], bias[d:]).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries (N, H, S, d), keys and values (N, H, T, d) -> (N, H, S, d).

    Uses torch's fused kernel, or separate steps on as many images at a time as fit in the cache.
    """
    if fused_attention_is_faster(q.device, q.dtype):
        return F.scaled_dot_product_attention(q, k, v)
    n = max(1, CACHED_SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    parts = zip(q.split(n), k.split(n), v.split(n), strict=True)
    return torch.cat([(q * q.shape[3] ** -0.5 @ k.mT).softmax(-1) @ v for q, k, v in parts])


def fused_attention_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """False only in half precision on a CPU, where the fused backward pass is slow."""
    return device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16)


def block_tail(block: Block, x: Tensor, start: int) -> Tensor:
    """A transformer block's output for tokens `start:` only. (N, T, D) -> (N, T - start, D)."""
    x = x[:, start:] + block.attn(block.norm1(x), start)
    return x + block.mlp(block.norm2(x))


class ViTClassifier(VisionTransformer):
    """timm's ViT with MAE's choice of pooling: the mean of the patch tokens, or the class token."""

    compiled = (Block,)
    explained_by = "attention rollout"

    def __init__(
        self,
        size: ViTSize,
        num_classes: int,
        input_size: int = 224,
        patch_size: int | None = None,
        in_chans: int = 3,
        drop_path: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(
            img_size=input_size,
            patch_size=patch_size or size.patch,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=size.dim,
            depth=size.depth,
            num_heads=size.heads,
            drop_path_rate=drop_path,
            norm_layer=LayerNorm,
            attn_layer=Attention,
        )
        self.pos_embed.data.copy_(
            sincos_position_embedding(size.dim, self.patch_embed.grid_size[0])
        )

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D), pooled and normalised."""
        return self.forward_head(super().forward_features(imgs), pre_logits=True)

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.forward_features(imgs))

    def own_options(self) -> dict[str, object]:
        """Fine-tuning options specific to this family that are needed to rebuild the model."""
        patch, _ = self.patch_embed.patch_size
        return {"patch_size": patch, "cls_token": self.global_pool == "token"}

    def layer_numbers(self, grouped: bool = False) -> Callable[[str], int]:
        """See `vit_layers`."""
        return vit_layers(len(self.blocks))


def vit_layers(depth: int) -> Callable[[str], int]:
    """Maps a parameter's name to its layer number, for layer-wise learning-rate decay.

    The embeddings are layer 0, block b is layer b + 1, everything after the blocks depth + 1.
    """

    def layer(name: str) -> int:
        first, *rest = name.split(".")
        if first in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest[0]) + 1 if first == "blocks" else depth + 1

    return layer


def transformer(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """`depth` pre-norm blocks with an MLP ratio of 4."""
    return nn.ModuleList(
        Block(dim, heads, 4, qkv_bias=True, norm_layer=LayerNorm, attn_layer=Attention)
        for _ in range(depth)
    )


def sincos_parameter(dim: int, grid: int) -> nn.Parameter:
    """A fixed position embedding, part of the state dict as in the official release."""
    return nn.Parameter(sincos_position_embedding(dim, grid), requires_grad=False)
