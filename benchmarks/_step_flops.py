"""FLOPs of one MaskEmbed step, part by part, from the networks' own shapes; a multiply-add is two.

Matrix products alone, as FlopCounterMode counts them: norms, activations and the soft cap are left out. A backward pass
is twice its forward (nothing recomputed), but for the patch embedding, which needs no gradient to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Way = Literal["baseline", "locfast"]
"""baseline: every view through everything, as the public code does. locfast: the same mathematics, with what is equal
in all views computed once: the teacher's patch embedding, and QKV of the first block of teacher and decoder, which is
needed for the N visible patches of an image, and once a forward pass for the N hidden ones and the P prefix tokens."""


@dataclass(frozen=True)
class Block:
    """A transformer block: weights of its linear layers, i.e. multiply-adds a token, and the width of its heads."""

    qkv: int
    other: int
    """Attention's output projection, and the MLP."""
    heads_width: int
    """H x D, which need not be the model's width."""

    @staticmethod
    def of(block: Any) -> Block:
        """The shapes of timm's `block`."""
        qkv = weights(block.attn) - (out := weights(block.attn.proj))
        return Block(qkv, out + weights(block.mlp), block.attn.proj.in_features)

    @property
    def linear(self) -> int:
        return self.qkv + self.other

    def attention(self, tokens: int) -> int:
        """Multiply-adds of query times key and of weights times value, over one sequence."""
        return 2 * tokens * tokens * self.heads_width


@dataclass(frozen=True)
class Shape:
    """What decides the FLOPs of a step."""

    patches: int
    patch_size: int
    prefix: int
    embedding: int
    """Weights of the patch embedding."""
    block: Block
    depth: int
    teacher_depth: int
    head: int
    """Weights of the linear head, or heads, behind the encoder."""
    decoder_block: Block
    decoder_depth: int
    output: int
    """Weights of the decoder's last layer."""
    views: int

    @staticmethod
    def of(method: Any) -> Shape:
        """The shapes of a MaskEmbed, be it on the meta device. Raises ValueError for decoders without blocks."""
        config, encoder, decoder = method.config, method.encoder, method.decoder
        if config.decoder != "transformer":
            raise ValueError(f"the {config.decoder} decoder has no blocks to count")
        return Shape(
            patches=encoder.num_patches,
            patch_size=encoder.patch_size[0],
            prefix=encoder.num_prefix_tokens,
            embedding=encoder.model.patch_embed.proj.weight.numel(),
            block=Block.of(encoder.blocks[0]),
            depth=encoder.depth,
            teacher_depth=method.teacher.depth - (config.target == "penultimate"),
            head=weights(method.head),
            decoder_block=Block.of(decoder.blocks[0]),
            decoder_depth=len(decoder.blocks),
            output=weights(decoder.output),
            views=1 + config.complement + config.all_visible,
        )

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches


def weights(module: nn.Module) -> int:
    """Elements of the weight matrices of all linear layers within `module`."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def step_flops(shape: Shape, batch: int, way: Way) -> dict[str, int]:
    """FLOPs by part of one forward and backward pass over `batch` images."""
    encoder = batch * forward_flops(shape)
    embedding = 2 * batch * shape.patches * shape.embedding
    head = 2 * batch * shape.tokens * shape.head
    decoder = _views(shape, shape.decoder_block, shape.decoder_depth, batch, way)
    decoder += 2 * batch * shape.views * shape.tokens * shape.output
    return {
        "teacher embedding": embedding * (shape.views if way == "baseline" else 1),
        "teacher": _views(shape, shape.block, shape.teacher_depth, batch, way),
        "encoder forward": encoder,
        "encoder backward": 2 * encoder - embedding,
        "head forward": head,
        "head backward": 2 * head,
        "decoder forward": decoder,
        "decoder backward": 2 * decoder,
    }


def teacher_linear_flops(shape: Shape, batch: int, way: Way) -> int:
    """What of "teacher" are linear layers: all but attention's two products."""
    attention = 2 * batch * shape.views * shape.teacher_depth * shape.block.attention(shape.tokens)
    return _views(shape, shape.block, shape.teacher_depth, batch, way) - attention


def forward_flops(shape: Shape, patches: int | None = None) -> int:
    """Of the plain backbone over one image, patch embedding included; `patches`: of a crop, or of those kept."""
    patches = shape.patches if patches is None else patches
    tokens = shape.prefix + patches
    blocks = shape.depth * (tokens * shape.block.linear + shape.block.attention(tokens))
    return 2 * (patches * shape.embedding + blocks)


def _views(shape: Shape, block: Block, depth: int, batch: int, way: Way) -> int:
    """`depth` blocks over every view of every image."""
    sequences = batch * shape.views
    total = depth * sequences * (shape.tokens * block.linear + block.attention(shape.tokens))
    if way == "locfast":
        once = batch * shape.patches + shape.tokens
        total -= (sequences * shape.tokens - once) * block.qkv
    return 2 * total
