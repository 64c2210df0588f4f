"""Vision Transformers and MAE: sizes, options, and names in other libraries.

Sizes: MAE (He et al. 2022, table 1 and appendix), DeiT (Touvron et al. 2021) for tiny and small.
"""

from argparse import Namespace
from typing import Any, NamedTuple

from backbones.family import Family
from util.errors import BadInput
from util.states import State, root


class ViTSize(NamedTuple):
    dim: int
    depth: int
    heads: int
    patch: int  # side length in pixels

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage; a ViT has a single stage."""
        return (self.depth,)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.dim

    @property
    def features(self) -> int:
        """The length of an image's feature vector."""
        return self.dim


VIT = {
    "tiny": ViTSize(192, 12, 3, 16),
    "small": ViTSize(384, 12, 6, 16),
    "base": ViTSize(768, 12, 12, 16),
    "large": ViTSize(1024, 24, 16, 16),
    "huge": ViTSize(1280, 32, 16, 14),
}


SIZES = {f"vit_{name}_patch{size.patch}": size for name, size in VIT.items()}
PRETRAIN_DEFAULTS = {
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
    "blr": 1e-3,
    "epochs": 400,
    "decoder_depth": 8,
    "decoder_num_heads": 16,
}
FINETUNE_DEFAULTS = {
    "epochs": 50,
    "warmup_epochs": 5,
    "blr": 1e-3,
    "layer_decay": 0.75,
    "drop_path": 0.1,
}


class ViTFamily(Family):
    """A single stage of tokens with position embeddings, so images have one fixed size."""

    title, masked_title = "ViT", "MAE"
    module, classifier, autoencoder = "models_mae", "ViTClassifier", "MaskedAutoencoderViT"
    sizes = SIZES
    masked_prefix = "mae_"

    pretrain_options = ("patch_size", "decoder_num_heads", "predict_ratio")
    finetune_options = ("patch_size", "cls_token", "freeze_pos_embed")
    pretrain_defaults = PRETRAIN_DEFAULTS
    finetune_defaults = FINETUNE_DEFAULTS
    fixed_input = free_patch = True

    stem, stages = "patch_embed.proj.weight", ("blocks",)
    roots = frozenset({"patch_embed", "cls_token", "pos_embed", "blocks"})
    decoder_blocks = "decoder_blocks"
    new_norm = "fc_norm"

    timm_ends = ("patch_embed.proj", "head")
    timm_features = True  # and its graph does not contain the selection of visible patches
    transformers = "vit"

    def patch_step(self, name: str, patch_size: int | None, masked: bool) -> int:
        """See Family: the side length of a patch."""
        return patch_size or self.sizes[self.classifier_name(name)].patch

    def check_pretraining(self, options: Namespace) -> None:
        """See Family."""
        width, heads = options.decoder_embed_dim, options.decoder_num_heads
        if width % heads or width % 4:
            raise BadInput(
                f"--decoder_embed_dim {width}: must be divisible by --decoder_num_heads {heads} "
                "and 4"
            )

    def classifier_options(self, options: Namespace) -> dict[str, object]:
        """See Family."""
        pool = "token" if options.cls_token else "avg"
        return {"patch_size": options.patch_size, "global_pool": pool}

    def translate(self, state: State) -> tuple[State, str] | None:
        """See Family: our names are the official ones, which timm uses as well."""
        if not any(root(name) == "patch_embed" for name in state):
            return None
        return state, self.layout(state)

    def options_of_classifier(self, weights: State, patch: int) -> dict[str, Any]:
        """See Family."""
        pool = "avg" if "fc_norm.weight" in weights else "token"
        return {"patch_size": patch, "global_pool": pool}

    def masked_patch(self, weights: State, patch: int, given: object) -> int:
        """See Family: every patch is a token, so masked patches have the same size."""
        return patch

    def timm_name(self, name: str) -> str:
        """See Family."""
        return f"{self.classifier_name(name)}_224"

    def timm_arguments(self, model: Any, input_size: int) -> dict[str, Any]:
        """See Family. An autoencoder's encoder pools the patch tokens."""
        return {
            "img_size": input_size,
            "patch_size": model.own_options()["patch_size"],
            "global_pool": getattr(model, "global_pool", "avg"),
            "fc_norm": "fc_norm.weight" in model.state_dict(),
        }

    def to_timm(self, state: State) -> State:
        """See Family."""
        return state
