"""One face for timm's Vision Transformers, with the forward pass split where the methods need it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locfast.errors import UserError
from locfast.models.attention import is_known_block, relative_position_bias, rotary_table, run_block
from locfast.models.create import create_timm_model

FAMILIES: dict[str, type[nn.Module]] = {
    "vit": vision_transformer.VisionTransformer,
    "eva": eva.Eva,
    "beit": beit.Beit,
}
"""timm's model classes that a Backbone can wrap: classifiers, CLIP, SigLIP, MAE, DINO, ...; EVA-02; BEiT."""


def load_backbone(
    name: str, pretrained: bool = True, *, seed: int = 0, image_size: int | None = None, **model_args: Any
) -> Backbone:
    """A backbone by name; without `pretrained`, with weights drawn from `seed` alone.

    name: a timm model name with or without its tag, `hf-hub:org/name`, a local timm folder, `arch@checkpoint-file`,
    or `demo`. image_size: pixels of a side, where not the model's own (position embeddings are resampled by timm).
    model_args: further arguments of the timm model (depth=2). Raises UserError for names, files and networks that
    do not lead to a model.
    """
    model = create_timm_model(name, pretrained, seed=seed, image_size=image_size, **model_args)
    return Backbone(model, name)


class Backbone(nn.Module):
    """A timm Vision Transformer without its head. Its state-dict keys are timm's, under `model.`.

    B images, V views, P prefix tokens, N patches, T = P + N tokens, C width. Features keep the dtype that autocast
    gives them. Weights behind the final norm (attention pooling, fc_norm) take no part in features: they are frozen.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.name = name
        self.family = _family(model, name)
        embed = model.patch_embed
        _check_patch_embed(embed, name)
        blocks = list(model.blocks)
        attn, mlp = blocks[0].attn, blocks[0].mlp
        self.num_prefix_tokens: int = model.num_prefix_tokens
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self.image_size: tuple[int, int] = tuple(embed.img_size)
        self.grid: tuple[int, int] = tuple(embed.grid_size)
        self.num_patches: int = embed.num_patches
        if self.num_patches < 1:
            raise UserError(
                f"--model {name}: an image of {self.image_size} px has no whole patch of {self.patch_size} px. "
                "Type a larger --image-size."
            )
        self.embed_dim: int = model.embed_dim
        self.num_heads: int = attn.num_heads
        self.depth = len(blocks)
        self.norm_eps: float = blocks[0].norm1.eps
        self.qkv_bias = (attn.q_proj if attn.qkv is None else attn.qkv).bias is not None or (
            getattr(attn, "q_bias", None) is not None
        )
        self.mlp_kind = "mlp" if isinstance(mlp, Mlp) else "swiglu"
        self.act_layer: Any = partial(copy.deepcopy, mlp.act)
        self.supports_softcap = all(is_known_block(block) for block in blocks)
        config = model.pretrained_cfg
        self.mean: tuple[float, float, float] = tuple(config["mean"])
        self.std: tuple[float, float, float] = tuple(config["std"])
        self.crop_pct: float = config["crop_pct"]
        self.interpolation: str = config["interpolation"]
        self.freeze_unused()

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm stands behind the last block; models that average patches before it (BEiT) have none."""
        return not isinstance(self.model.norm, nn.Identity)

    @property
    def num_tokens(self) -> int:
        """T = P + N."""
        return self.num_prefix_tokens + self.num_patches

    def freeze_unused(self) -> None:
        """Freeze what stands behind the final norm: no gradient reaches it, and an export holds it as it came."""
        for name in ("attn_pool", "fc_norm", "head"):
            part = getattr(self.model, name, None)
            if isinstance(part, nn.Module):
                part.requires_grad_(False)

    def embed_patches(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W], normalised, of the model's size -> one embedding a patch [B, N, C]."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"{self.name} takes images of {self.image_size}, got {tuple(images.shape[-2:])}")
        patches = self.model.patch_embed(images)
        return patches.flatten(1, 2) if patches.ndim == 4 else patches  # NHWC where timm allows dynamic sizes

    def empty_patch(self) -> Tensor:
        """The embedding [C] of a patch of zeros, i.e. of the data's mean colour: the bias of the patch embedding."""
        embed = self.model.patch_embed
        zero = embed.proj.weight.new_zeros(self.embed_dim)
        return embed.norm(zero if embed.proj.bias is None else embed.proj.bias)

    def select_visible(self, patches: Tensor, visible: Tensor) -> Tensor:
        """patches [B, N, C], visible [B, V, N] bool -> [B, V, N, C], hidden places holding the empty patch.

        Selected, not multiplied: what is hidden cannot leak, not even a NaN. Equal to masking the pixels of the
        normalised image, since embeddings are per patch.
        """
        return torch.where(visible[..., None], patches[:, None], self.empty_patch().to(patches.dtype))

    def add_prefix_and_position(self, patches: Tensor) -> Tensor:
        """Prefix tokens, position embeddings, and CLIP's norm before the blocks: [..., N, C] -> [..., T, C]."""
        lead = patches.shape[:-2]
        x = patches.reshape(-1, *patches.shape[-2:])
        model = self.model
        if self.family == "beit":
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
        else:
            if getattr(model, "dynamic_img_size", False):
                x = x.unflatten(1, self.grid)
            placed = model._pos_embed(x)  # timm's own rule for CLS, registers, and which of them have a position
            x = model.norm_pre(placed[0] if isinstance(placed, tuple) else placed)
        return x.reshape(*lead, *x.shape[-2:])

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        softcap: float | None = None,
        kept: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Blocks start .. stop - 1 (stop None: to the last): x [B, T, C] -> [B, T, C].

        softcap: bound on the attention logits, by tanh. kept [B, K]: which patches x holds, x being [B, P + K, C]
        then; relative and rotary positions follow them. checkpointing: recompute activations in the backward pass.
        """
        if softcap is not None and not self.supports_softcap:
            raise UserError(
                f"a soft cap of {softcap} was asked for, but the blocks of {self.name} "
                f"({type(self.model.blocks[0]).__name__}, {type(self.model.blocks[0].attn).__name__}) run only as timm "
                "wrote them. Use no soft cap with this model (--maskembed.softcap None)."
            )
        rope = rotary_table(self.model, kept)
        shared, tokens = None, None
        if self.family == "beit":
            shared = self.model.rel_pos_bias() if self.model.rel_pos_bias is not None else None
            tokens = None if kept is None else self._token_indices(kept)
        for index, block in list(enumerate(self.model.blocks))[start:stop]:
            block_rope = rope[index] if rope is not None and getattr(self.model, "rope_mixed", False) else rope
            bias = relative_position_bias(block.attn, shared, tokens) if self.family == "beit" else None
            run = partial(run_block if self.supports_softcap else _run_foreign_block, block)
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, x, softcap, block_rope, bias, use_reentrant=False)
            else:
                x = run(x, softcap, block_rope, bias)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm behind the last block; nothing where the model has none there (BEiT and BEiTv2)."""
        return self.model.norm(x)

    def forward_features(self, images: Tensor, softcap: float | None = None, checkpointing: bool = False) -> Tensor:
        """images [B, 3, H, W] -> [B, T, C]; with softcap None what timm's forward_features gives."""
        x = self.add_prefix_and_position(self.embed_patches(images))
        return self.final_norm(self.run_blocks(x, softcap=softcap, checkpointing=checkpointing))

    forward = forward_features

    def masked_features(
        self, images: Tensor, visible: Tensor, stop: int | None = None, apply_norm: bool = True
    ) -> Tensor:
        """Features of every masked view, patch embedding done once an image.

        images [B, 3, H, W], visible [B, V, N] bool -> [B, V, T, C]: blocks 1 .. stop (None: all but the last), then
        the final norm. Equals running the model on images whose hidden pixels are the dataset mean.
        """
        x = self.add_prefix_and_position(self.select_visible(self.embed_patches(images), visible))
        x = self.run_blocks(x.flatten(0, 1), stop=self.depth - 1 if stop is None else stop)
        x = self.final_norm(x) if apply_norm else x
        return x.unflatten(0, visible.shape[:2])

    def _token_indices(self, kept: Tensor) -> Tensor:
        """Patch indices [B, K] -> token indices [B, P + K], the prefix included."""
        prefix = torch.arange(self.num_prefix_tokens, device=kept.device).expand(len(kept), -1)
        return torch.cat([prefix, kept + self.num_prefix_tokens], dim=1)


def _run_foreign_block(
    block: nn.Module, x: Tensor, softcap: float | None, rope: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A block that only timm knows how to run (post-norm, parallel, ...), without cap."""
    return block(x) if rope is None else block(x, rope=rope)


def _family(model: nn.Module, name: str) -> str:
    sequential = all(hasattr(block, "attn") and hasattr(block, "mlp") for block in getattr(model, "blocks", ()))
    for family, kind in FAMILIES.items():
        if isinstance(model, kind) and sequential:
            return family
    blocks = "" if sequential else " with parallel branches in its blocks"
    raise UserError(
        f"--model {name} is a {type(model).__name__}{blocks}. locfast needs one token a patch through blocks of one "
        f"attention and one MLP, which timm's {', '.join(kind.__name__ for kind in FAMILIES.values())} have. Choose "
        "one of those, for example vit_base_patch16_224 or vit_large_patch14_clip_quickgelu_336.openai."
    )


def _check_patch_embed(embed: Any, name: str) -> None:
    conv: Any = getattr(embed, "proj", None)
    plain = isinstance(embed, PatchEmbed) and isinstance(conv, nn.Conv2d)
    if not (plain and conv.kernel_size == conv.stride and conv.padding == (0, 0) and not embed.dynamic_img_pad):
        raise UserError(
            f"--model {name} has the stem {type(embed).__name__}, whose patches overlap or pass through other layers. "
            "A hidden patch must not be seen by its neighbours, so locfast needs one convolution with kernel = stride. "
            "Choose a model with a plain patch embedding, for example vit_base_patch16_224."
        )
