"""From an image's tokens and a box or a phrase to an embedding of what is meant: CLOC's prompter, and its baseline.

A prompter is a one-layer, one-head pre-norm transformer over [prompt tokens | image tokens] (CLOC, section 3.3 and
appendix A.1). B images, N patches, C width; M prompts an image, of K tokens each (two corners of a box, or one
phrase); E joint width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = (0.5, 64.0)
"""Cycles across the frame of the slowest and the fastest wave of a corner's code; 64 tell pixels of 224 apart."""


class Asked(NamedTuple):
    """What a prompter knows of images before it hears of any prompt: the same for all prompts of an image."""

    tokens: Tensor  # [B, N, C]
    keys: Tensor | None = None  # [B, N, C]
    values: Tensor | None = None  # [B, N, C]
    queries: Tensor | None = None  # [B, N, C], scaled
    weight: Tensor | None = None  # [B, N] fp32 at least: log of the sum of exp over the image's own keys
    attended: Tensor | None = None  # [B, N, C]: what image tokens take from one another, projected, without the bias

    def of(self, rows: Tensor | None) -> Asked:
        """Some of the images, by number [B']; None: all of them."""
        if rows is None:
            return self
        tokens, *others = (None if tensor is None else tensor.index_select(0, rows) for tensor in self)
        assert tokens is not None
        return Asked(tokens, *others)


class CornerCode(nn.Module):
    """Sinusoidal codes of a box's two corners, each with a learned part that tells which corner it is."""

    rates: Tensor

    def __init__(self, width: int, frequencies: tuple[float, float] = FREQUENCIES) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"a corner's code needs a width divisible by 4, got {width}")
        self.frequencies = frequencies
        low, high = (math.log(f) for f in frequencies)
        rates = 2 * math.pi * torch.linspace(low, high, width // 4, dtype=torch.float64).exp()
        self.register_buffer("rates", rates.float(), persistent=False)
        self.kind = nn.Parameter(torch.randn(2, width) * 0.02)

    def forward(self, boxes: Tensor) -> Tensor:
        """boxes [..., 4] in [0, 1] of the frame: left, top, right, bottom  ->  [..., 2, C]."""
        corners = boxes.unflatten(-1, (2, 2))
        angle = corners[..., None] * self.rates.to(corners.dtype)
        return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2) + self.kind

    def places(self, grid: tuple[int, int]) -> Tensor:
        """The same codes of the centres of a grid's patches, without what tells corners apart: [N, C]."""
        height, width = grid
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        angle = (torch.stack([x / width, y / height], -1).view(-1, 2, 1) * self.rates.cpu()).to(self.rates.device)
        return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class _OneBlock(nn.Module):
    """The weights of a pre-norm block with one head, its prompts' codes and its projection; what it runs them on is for
    those below to say."""

    takes_phrases = True
    places: Tensor | None  # [N, C]

    def __init__(
        self,
        width: int,
        joint: int,
        *,
        mlp_ratio: float = 4.0,
        frequencies: tuple[float, float] = FREQUENCIES,
        grid: tuple[int, int] | None = None,
        eps: float = 1e-6,
    ) -> None:
        """grid: add the code of a patch's centre to its token; None: the tower's tokens are taken as they are."""
        super().__init__()
        self.width, self.joint = width, joint
        self.corners = CornerCode(width, frequencies)
        # kept with the weights, so that they do not load into a prompter that would leave places out
        self.register_buffer("places", None if grid is None else self.corners.places(grid))
        self.phrase = nn.Linear(joint, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(mlp_ratio * width))
        self.fc2 = nn.Linear(int(mlp_ratio * width), width)
        self.project = nn.Linear(width, joint)

    def ask(self, tokens: Tensor) -> Asked:
        """Image tokens [B, N, C] -> what all their prompts share; recomputed in the backward pass."""
        if self.places is not None:
            tokens = tokens + self.places.to(tokens.dtype)
        return Asked(tokens, *_recomputed(self._image, tokens))

    def boxes(self, asked: Asked, boxes: Tensor, rows: Tensor | None = None) -> Tensor:
        """A box [4] in [0, 1] of the frame for every image, or for those that rows [B'] numbers: [B', 4] -> [B', E].

        Not normalised; all of it is recomputed in the backward pass.
        """
        return _recomputed(self._prompt, asked, self.corners(boxes), rows)

    def phrases(self, asked: Asked, phrases: Tensor, rows: Tensor | None = None) -> Tensor:
        """A phrase's embedding in the joint space in the place of a box: [B', E] -> [B', E]."""
        return _recomputed(self._prompt, asked, self.phrase(phrases)[:, None], rows)

    def forward(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """Image tokens [B, N, C] and boxes [B, M, 4] -> region embeddings [B, M, E], not normalised."""
        asked = self.ask(tokens)
        return torch.stack([self.boxes(asked, one) for one in boxes.unbind(1)], 1)

    def _image(self, tokens: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _prompt(self, asked: Asked, prompt: Tensor, rows: Tensor | None) -> Tensor:
        """Prompt tokens [B', K, C], one prompt for each of the images that rows numbers -> [B', E]."""
        raise NotImplementedError

    def _qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, scaled, keys and values."""
        queries, keys, values = self.qkv(self.norm1(tokens)).chunk(3, -1)
        return queries * self.width**-0.5, keys, values

    def _attend(self, asked: Asked, prompt: Tensor, own: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Prompt tokens behind their attention: one softmax over the prompt's keys and the image's."""
        queries, keys, values = own
        assert asked.keys is not None and asked.values is not None
        logits = wide(torch.cat([queries @ keys.mT, queries @ asked.keys.mT], -1))
        mine, theirs = logits.softmax(-1).to(values.dtype).split([keys.shape[1], asked.keys.shape[1]], -1)
        return prompt + self.proj(mine @ values + theirs @ asked.values)

    def _pool(self, tokens: Tensor) -> Tensor:
        """MLP, mean over tokens and projection [B, K, C] -> [B, E]; the MLP's second layer runs on the mean."""
        hidden = F.gelu(self.fc1(self.norm2(tokens)))
        hidden, tokens = (x.mean(1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (hidden, tokens))
        return self.project(tokens + self.fc2(hidden))


class Prompter(_OneBlock):
    """Full self-attention over prompt and image tokens, and the mean over all of them.

    Image tokens attend to one another once an image; what a prompt adds to their softmax is merged in by the logarithm
    of its sum, which is exact, as it is to put the linear output projection before that merge. Each prompt then runs
    the first half of the MLP on all tokens.
    """

    def _image(self, tokens: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values = self._qkv(tokens)
        logits = wide(queries @ keys.mT)
        weight = logits.logsumexp(-1)
        shares = (logits - weight[..., None]).exp().to(values.dtype)
        return keys, values, queries, weight, F.linear(shares @ values, self.proj.weight)

    def _prompt(self, asked: Asked, prompt: Tensor, rows: Tensor | None) -> Tensor:
        asked, own = asked.of(rows), self._qkv(prompt)
        keys, values = own[1], F.linear(own[2], self.proj.weight)
        assert asked.queries is not None and asked.weight is not None and asked.attended is not None
        logits = wide(asked.queries @ keys.mT)
        weight = torch.logaddexp(asked.weight, logits.logsumexp(-1))[..., None]
        kept, added = (asked.weight[..., None] - weight).exp(), (logits - weight).exp().to(values.dtype)
        image = asked.tokens + (kept * asked.attended + added @ values + self.proj.bias)
        return self._pool(torch.cat([self._attend(asked, prompt, own), image], 1))


class CrossPrompter(_OneBlock):
    """The cheap option: prompt tokens alone pass through the block, and the mean is over them."""

    def _image(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self._qkv(tokens)[1:]

    def _prompt(self, asked: Asked, prompt: Tensor, rows: Tensor | None) -> Tensor:
        return self._pool(self._attend(asked.of(rows), prompt, self._qkv(prompt)))


class RoiPooler(nn.Module):
    """The baseline in the prompter's place: RoI-align on the grid of patch tokens, mean, projection (table 2)."""

    takes_phrases = False

    def __init__(self, width: int, joint: int, grid: tuple[int, int], *, size: int = 7, eps: float = 1e-6) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        self.norm = nn.LayerNorm(width, eps=eps)
        self.project = nn.Linear(width, joint)

    def ask(self, tokens: Tensor) -> Asked:
        """Patch tokens [B, N, C]."""
        return Asked(tokens)

    def boxes(self, asked: Asked, boxes: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `Prompter.boxes`."""
        return self.project(self.norm(roi_means(asked.tokens, self.grid, boxes, rows, self.size)))

    def forward(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """Patch tokens [B, N, C] and boxes [B, M, 4] -> region embeddings [B, M, E], not normalised."""
        asked = self.ask(tokens)
        return torch.stack([self.boxes(asked, one) for one in boxes.unbind(1)], 1)


def roi_means(tokens: Tensor, grid: tuple[int, int], boxes: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """Mean of RoI-align (size x size samples) on patch tokens [B, N, C] that lie on a grid, boxes and rows as above."""
    from torchvision.ops import roi_align

    height, width = grid
    maps = wide(tokens).mT.unflatten(-1, grid)
    sides = boxes.to(maps.dtype)
    place = torch.stack([sides[:, 0::2] * width, sides[:, 1::2] * height], -1).flatten(1)
    which = torch.arange(len(place), device=place.device) if rows is None else rows
    with torch.autocast(maps.device.type, enabled=False):
        found = roi_align(maps, torch.cat([which[:, None].to(maps.dtype), place], 1), size, aligned=True)
    return found.mean((-2, -1))


class BoxHead(nn.Module):
    """From a phrase's grounded embedding to its box: two layers with a GELU (CLOC, equation 3)."""

    def __init__(self, joint: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(joint, joint), nn.Linear(joint, 4)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[..., E] -> [..., 4] in [0, 1] of the frame, unbounded: left, top, right, bottom."""
        return self.fc2(F.gelu(self.fc1(embeddings)))


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function`, its activations thrown away until the backward pass wants them."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
