"""One face for timm's Vision Transformers, with the forward pass split where the methods need it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from locfast.errors import UserError
from locfast.kernels.select_views import select_views
from locfast.models.attention import relative_position_bias, rotary_table, timm_class
from locfast.models.blocks import Placed, Views, for_product, is_known_block, run_blocks
from locfast.models.create import create_timm_model
from locfast.models.uncapped_attention import Implementation, find_flash_attn
from locfast.models.wrappable import check_image_size, check_patch_embed, family_of, interpolation_of


def load_backbone(
    name: str, pretrained: bool = True, *, seed: int = 0, image_size: int | None = None, **model_args: Any
) -> Backbone:
    """A backbone by name; without `pretrained`, with weights drawn from `seed` alone.

    name: a timm model name with or without its tag, `hf-hub:org/name`, a local timm folder, `arch@checkpoint-file`,
    or `demo`. image_size: pixels of a side, where not the model's own (position embeddings are resampled by timm).
    It must be a multiple of the patch or the model's own. model_args: further arguments of the timm model (depth=2).
    Raises UserError for names, files, sizes and networks that do not lead to a model.
    """
    model = create_timm_model(name, pretrained, seed=seed, image_size=image_size, **model_args)
    backbone = Backbone(model, name)
    if image_size is not None:
        check_image_size(backbone, image_size)
    return backbone


class Backbone(nn.Module):
    """A timm Vision Transformer without its head. Its state-dict keys are timm's, under `model.`.

    B images, V views, P prefix tokens, N patches, T = P + N tokens, C width. Features keep the dtype that autocast
    gives them. Weights behind the final norm (attention pooling, fc_norm) take no part in features: they are frozen.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model: Any = model
        self.name = name
        self.family = family_of(model, name)
        embed = model.patch_embed
        check_patch_embed(embed, name)
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
        self.supports_softcap = all(timm_class(block.attn) is not None for block in blocks)
        self.knows_blocks = all(is_known_block(block) for block in blocks)
        config = model.pretrained_cfg
        self.mean: tuple[float, float, float] = tuple(config["mean"])
        self.std: tuple[float, float, float] = tuple(config["std"])
        self.crop_pct: float = config["crop_pct"]
        self.interpolation: str = interpolation_of(config["interpolation"], name)
        self.freeze_unused()

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm stands behind the last block; models that average patches before it (BEiT) have none."""
        return not isinstance(self.model.norm, nn.Identity)

    @property
    def blocks(self) -> nn.Sequential:
        """timm's blocks."""
        return self.model.blocks

    @property
    def softcap(self) -> float | None:
        """The cap that `set_softcap` gave the attention logits, or None."""
        return getattr(self.blocks[0].attn, "softcap", None)

    @property
    def head_dim(self) -> int:
        """D, which need not be the width over the number of heads."""
        attn: Any = self.blocks[0].attn
        return attn.proj.in_features // self.num_heads

    @property
    def has_position_bias(self) -> bool:
        """Whether the attention logits have an additive bias (BEiT's relative positions)."""
        attn: Any = self.blocks[0].attn
        shared = getattr(self.model, "rel_pos_bias", None)
        return shared is not None or getattr(attn, "relative_position_bias_table", None) is not None

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

    def embed_patches(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W], normalised, of the model's size -> one embedding a patch [B, N, C].

        kept [B, K] int64: of these patches alone, [B, K, C]; the pixels of others are not even read.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"{self.name} takes images of {self.image_size}, got {tuple(images.shape[-2:])}")
        embed = self.model.patch_embed
        (rows, columns), (height, width) = self.grid, self.patch_size
        pixels = images[..., : rows * height, : columns * width].unflatten(3, (columns, width))
        pixels = pixels.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, 3, h, w]
        # A convolution whose kernel is its stride is a product of patches and weights. cuDNN also turns the images'
        # layout around: with that it took 2.4 of the 81 ms of a compiled ViT-B/16 step (an H200, 128 images).
        if kept is None:
            pixels = for_product(pixels).contiguous().flatten(3).flatten(1, 2)
        else:
            row = torch.arange(len(kept), device=kept.device)[:, None]
            pixels = for_product(pixels[row, kept // columns, kept % columns]).flatten(2)
        return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))

    def empty_patch(self) -> Tensor:
        """The embedding [C] of a patch of zeros, i.e. of the data's mean colour: the bias of the patch embedding."""
        embed = self.model.patch_embed
        zero = embed.proj.weight.new_zeros(self.embed_dim)
        return embed.norm(zero if embed.proj.bias is None else embed.proj.bias)

    def add_prefix_and_position(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        """Prefix tokens, position embeddings, and CLIP's norm before the blocks: [..., N, C] -> [..., T, C].

        kept [B, K]: which patches these are, patches being [B, K, C] then -> [B, P + K, C].
        """
        if kept is None:
            lead = patches.shape[:-2]
            x = self._norm_pre(self._place(patches.reshape(-1, *patches.shape[-2:])))
            return x.reshape(*lead, *x.shape[-2:])
        # timm adds positions, so what it makes of empty patches is all of them, and the prefix
        empty = self._place(patches.new_zeros(1, self.num_patches, self.embed_dim))
        prefix, position = empty.split([self.num_prefix_tokens, self.num_patches], dim=1)
        # embedding() and not indexing: its backward adds up the rows of a position in a fixed order, and sorts less
        x = torch.cat([prefix.expand(len(kept), -1, -1), patches + F.embedding(kept, position[0])], dim=1)
        return self._norm_pre(x)

    def _place(self, x: Tensor) -> Tensor:
        """Prefix tokens and position embeddings: x [B, N, C] -> [B, T, C]."""
        model = self.model
        if self.family == "beit":
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
        else:
            if getattr(model, "dynamic_img_size", False):
                x = x.unflatten(1, self.grid)
            placed = model._pos_embed(x)  # timm's own rule for CLS, registers, and which of them have a position
            x = placed[0] if isinstance(placed, tuple) else placed
        return x

    def _norm_pre(self, x: Tensor) -> Tensor:
        return x if self.family == "beit" else self.model.norm_pre(x)

    def run_blocks(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        softcap: float | None = None,
        kept: Tensor | None = None,
        checkpointing: bool = False,
        uncapped: Implementation = "sdpa",
    ) -> Tensor:
        """Blocks start .. stop - 1 (stop None: to the last): x [B, T, C] -> [B, T, C].

        softcap: bound on the attention logits, by tanh; None: that of `set_softcap`, if any. kept [B, K]: which patches
        x holds, x being [B, P + K, C] then; relative and rotary positions follow them. checkpointing: recompute
        activations in the backward pass. uncapped: what computes attention without a cap.
        """
        self._check_blocks(softcap, uncapped)
        checkpointing = checkpointing and torch.is_grad_enabled()
        placed = list(self.placed_blocks(kept, start, stop))
        if self.knows_blocks:
            return run_blocks(placed, x, softcap, uncapped, checkpointing=checkpointing)
        for block, rope, _ in placed:
            run = partial(_run_foreign_block, block, rope=rope)
            x = checkpoint(run, x, use_reentrant=False) if checkpointing else run(x)
        return x

    def placed_blocks(self, kept: Tensor | None, start: int, stop: int | None) -> Iterator[Placed]:
        """Blocks start .. stop - 1, each with its rotary table and its position bias, where the model has those.

        kept as in `run_blocks`.
        """
        rope = rotary_table(self.model, kept)
        shared, tokens = None, None
        if self.family == "beit":
            shared = self.model.rel_pos_bias() if self.model.rel_pos_bias is not None else None
            tokens = None if kept is None else self._token_indices(kept)
        for index, block in list(enumerate(self.blocks))[start:stop]:
            own = rope[index] if rope is not None and getattr(self.model, "rope_mixed", False) else rope
            bias = relative_position_bias(block.attn, shared, tokens) if self.family == "beit" else None
            yield Placed(block, own, bias)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm behind the last block; nothing where the model has none there (BEiT and BEiTv2)."""
        return self.model.norm(x)

    def forward_features(
        self,
        images: Tensor,
        softcap: float | None = None,
        checkpointing: bool = False,
        uncapped: Implementation = "sdpa",
        kept: Tensor | None = None,
    ) -> Tensor:
        """images [B, 3, H, W] -> [B, T, C], what timm's forward_features gives; the rest as in `run_blocks`.

        kept [B, K] int64, patch indices in any order: the other patches are dropped before the first block, so that no
        token attends to them and none of their FLOPs are spent -> [B, P + K, C]. UTA, section 2.2; MAE.
        """
        patches = self.embed_patches(images, kept)
        return self.encode(patches, kept, softcap=softcap, checkpointing=checkpointing, uncapped=uncapped)

    def encode(self, patches: Tensor, kept: Tensor | None = None, **how: Any) -> Tensor:
        """Patch embeddings [B, N or K, C], of which some may be [MASK] tokens -> tokens behind the final norm.

        kept and how: as in `run_blocks`.
        """
        x = self.add_prefix_and_position(patches, kept)
        return self.final_norm(self.run_blocks(x, kept=kept, **how))

    forward = forward_features

    def masked_features(
        self,
        images: Tensor,
        visible: Tensor,
        stop: int | None = None,
        apply_norm: bool = True,
        uncapped: Implementation = "sdpa",
        chunk: int | None = None,
    ) -> Tensor:
        """Features of every masked view; nothing but the views' tokens is made more than once an image.

        images [B, 3, H, W], visible [B, V, N] bool -> [B, V, T, C]: blocks 1 .. stop (None: all but the last), then
        the final norm. Equals running the model on images whose hidden pixels are the dataset mean: embeddings are per
        patch, so a hidden one is that of a patch of zeros. It is selected, so what is hidden cannot leak, not even a
        NaN. chunk: how many images pass through the blocks at a time, to save memory (None: all).
        """
        stop = self.depth - 1 if stop is None else stop
        shown, hidden = self.view_rows(images)
        parts = []
        for some, seen in zip(shown.split(chunk or len(shown)), visible.split(chunk or len(shown)), strict=True):
            x = self._run_views(some, hidden, seen, stop, uncapped)
            parts.append(self.final_norm(x) if apply_norm else x)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, visible.shape[:2])

    def view_rows(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that `select_views` puts masked views of images [B, 3, H, W] together from, before the blocks.

        [B, N, C], of visible patches, and [T, C], of prefixes and hidden patches.
        """
        patches = self.embed_patches(images)
        empty = self.empty_patch().to(patches.dtype).expand(1, self.num_patches, -1)
        shown, hidden = self.add_prefix_and_position(patches), self.add_prefix_and_position(empty)
        return shown[:, self.num_prefix_tokens :], hidden[0]

    def _run_views(self, shown: Tensor, hidden: Tensor, visible: Tensor, stop: int, uncapped: Implementation) -> Tensor:
        """shown [B, N, C], hidden [T, C], visible [B, V, N] -> [B * V, T, C] behind block number `stop`."""
        x = select_views(shown, hidden, visible).flatten(0, 1)
        if not self.knows_blocks:
            return self.run_blocks(x, stop=stop, uncapped=uncapped)
        self._check_blocks(None, uncapped)
        placed = list(self.placed_blocks(None, 0, stop))
        return run_blocks(placed, x, None, uncapped, views=Views(shown, hidden, visible))

    def check_uncapped(self, uncapped: Implementation, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UserError where attention without a cap cannot be computed so on `device` in `dtype`."""
        self._check_blocks(None, uncapped)
        if uncapped == "flash-attn":
            find_flash_attn(device, dtype, self.head_dim, self.has_position_bias)

    def _check_blocks(self, softcap: float | None, uncapped: Implementation) -> None:
        """Blocks that only timm can run take no attention from a caller."""
        if self.knows_blocks or (softcap in (None, self.softcap) and uncapped == "sdpa"):
            return
        asked, instead = "flash-attn", "Type --maskembed.uncapped-attention sdpa."
        if softcap is not None:
            asked = f"a soft cap of {softcap}"
            instead = f"set_softcap(backbone, {softcap}) gives it to their attention, where locfast knows that."
        block: Any = self.blocks[0]
        kinds = f"{type(block).__name__}, {type(block.attn).__name__}"
        raise UserError(
            f"{asked} was asked for, but the blocks of {self.name} ({kinds}) run only as timm wrote them. {instead}"
        )

    def _token_indices(self, kept: Tensor) -> Tensor:
        """Patch indices [B, K] -> token indices [B, P + K], the prefix included."""
        prefix = torch.arange(self.num_prefix_tokens, device=kept.device).expand(len(kept), -1)
        return torch.cat([prefix, kept + self.num_prefix_tokens], dim=1)


def _run_foreign_block(block: nn.Module, x: Tensor, rope: Tensor | None) -> Tensor:
    """A block that only timm knows how to run (post-norm, differential attention, ...)."""
    return block(x) if rope is None else block(x, rope=rope)
