"""Dropping patches before the first block: the full model whose tokens attend to the kept ones alone."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.model_families import SMALL, small

BATCH, KEPT = 3, 7
KINDS = [*SMALL]


def timm_restricted(backbone, images: torch.Tensor, kept: torch.Tensor, monkeypatch) -> torch.Tensor:
    """timm's own forward over all tokens, every attention masked to prefix and kept patches: [B, T, C]."""
    prefix = backbone.num_prefix_tokens
    seen = torch.zeros(len(kept), backbone.num_tokens, dtype=torch.bool)
    seen[:, :prefix] = True
    seen.scatter_(1, kept + prefix, True)
    keys = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None, None]
    attention = F.scaled_dot_product_attention

    def masked(q, k, v, attn_mask=None, **options):
        return attention(q, k, v, attn_mask=keys if attn_mask is None else attn_mask + keys, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        return backbone.model.forward_features(images)


def some_kept(backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    picked = [torch.randperm(backbone.num_patches, generator=generator)[:KEPT] for _ in range(BATCH)]
    return torch.stack(picked).sort(1).values


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_tokens_equals_the_full_model_restricted_to_them_forward_and_gradient(kind: str, monkeypatch) -> None:
    backbone = small(kind)
    images = torch.randn(BATCH, 3, *backbone.image_size, generator=torch.Generator().manual_seed(2))
    kept, prefix = some_kept(backbone), backbone.num_prefix_tokens
    tokens = torch.cat([torch.arange(prefix).expand(BATCH, -1), kept + prefix], 1)
    full = timm_restricted(backbone, images, kept, monkeypatch)
    expected = full.gather(1, tokens[..., None].expand(-1, -1, full.shape[-1]))
    got = backbone.forward_features(images, kept=kept)
    # fp32 sums in other orders, over 3 blocks
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)

    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    named = [(n, p) for n, p in backbone.model.named_parameters() if p.requires_grad]
    ours = torch.autograd.grad((got * weight).sum(), [p for _, p in named], allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), [p for _, p in named], allow_unused=True)
    compared = 0
    for (name, _), one, other in zip(named, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one - other).norm() <= 2e-5 * other.norm() + 1e-6, name
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_not_read(kind: str) -> None:
    backbone = small(kind)
    images = torch.randn(BATCH, 3, *backbone.image_size, generator=torch.Generator().manual_seed(2))
    kept = some_kept(backbone)
    clean = backbone.forward_features(images, kept=kept)
    (rows, columns), (height, width) = backbone.grid, backbone.patch_size
    spoilt = images.clone()
    for sample in range(BATCH):
        for patch in set(range(backbone.num_patches)) - set(kept[sample].tolist()):
            row, column = divmod(patch, columns)
            spoilt[sample, :, row * height : (row + 1) * height, column * width : (column + 1) * width] = float("nan")
    assert rows * columns == backbone.num_patches
    assert torch.equal(backbone.forward_features(spoilt, kept=kept), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_every_patch_is_the_full_model(kind: str) -> None:
    backbone = small(kind)
    images = torch.randn(BATCH, 3, *backbone.image_size, generator=torch.Generator().manual_seed(2))
    everything = torch.arange(backbone.num_patches).expand(BATCH, -1)
    torch.testing.assert_close(
        backbone.forward_features(images, kept=everything), backbone.forward_features(images), rtol=1e-5, atol=1e-5
    )


def test_a_mask_token_can_stand_for_a_patch() -> None:
    """`encode` takes embeddings of any origin: those of SimMIM's hidden patches, or the empty patch."""
    backbone = small("clip")
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(2))
    visible = torch.rand(2, backbone.num_patches, generator=torch.Generator().manual_seed(4)) < 0.5
    patches = torch.where(visible[..., None], backbone.embed_patches(images), backbone.empty_patch())
    masked = backbone.masked_features(images, visible[:, None], stop=backbone.depth)[:, 0]
    torch.testing.assert_close(backbone.encode(patches), masked, rtol=1e-5, atol=1e-5)
