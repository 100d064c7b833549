"""The 19 backbones of Locality Alignment, table 5, by timm name, and small models of each kind, with lively weights."""

from dataclasses import dataclass

import torch

from locfast.models.backbone import Backbone, load_backbone


@dataclass(frozen=True)
class Family:
    """A backbone's name and its shapes as published: prefix tokens, grid side, width, heads, normalisation, MLP."""

    name: str
    prefix: int
    side: int
    width: int
    heads: int
    eps: float = 1e-6
    mlp: str = "mlp"
    act: str = "GELU"
    image_size: int | None = None
    final_norm: bool = True


FAMILIES = {
    "in1k_t16": Family("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 1, 14, 192, 3),
    "in1k_s16": Family("vit_small_patch16_224.augreg_in21k_ft_in1k", 1, 14, 384, 6),
    "in1k_b16": Family("vit_base_patch16_224.augreg_in21k_ft_in1k", 1, 14, 768, 12),
    "in1k_l16": Family("vit_large_patch16_224.augreg_in21k_ft_in1k", 1, 14, 1024, 16),
    "mocov3_b16": Family("vit_base_patch16_224.mocov3", 1, 14, 768, 12),
    "clip_b16": Family("vit_base_patch16_clip_quickgelu_224.openai", 1, 14, 768, 12, 1e-5, act="QuickGELU"),
    "clip_l14": Family("vit_large_patch14_clip_quickgelu_224.openai", 1, 16, 1024, 16, 1e-5, act="QuickGELU"),
    "clip_l14_336": Family("vit_large_patch14_clip_quickgelu_336.openai", 1, 24, 1024, 16, 1e-5, act="QuickGELU"),
    "siglip_b16": Family("vit_base_patch16_siglip_224.webli", 0, 14, 768, 12),
    "siglip_so400m_224": Family("vit_so400m_patch14_siglip_224.webli", 0, 16, 1152, 16),
    "siglip_so400m_384": Family("vit_so400m_patch14_siglip_384.webli", 0, 27, 1152, 16),
    "openclip_b16": Family("vit_base_patch16_clip_224.laion2b", 1, 14, 768, 12, 1e-5),
    "eva02_b16": Family("eva02_base_patch16_clip_224.merged2b", 1, 14, 768, 12, mlp="swiglu", act="SiLU"),
    "dfn_b16": Family("vit_base_patch16_clip_224.dfn2b", 1, 14, 768, 12, 1e-5),
    "mae_b16": Family("vit_base_patch16_224.mae", 1, 14, 768, 12),
    "beit_b16": Family("beit_base_patch16_224.in22k_ft_in22k_in1k", 1, 14, 768, 12, final_norm=False),
    "beitv2_b16": Family("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 1, 14, 768, 12, final_norm=False),
    "dino_b16": Family("vit_base_patch16_224.dino", 1, 14, 768, 12),
    "dinov2_reg_b14": Family("vit_base_patch14_reg4_dinov2.lvd142m", 5, 16, 768, 12, image_size=224),
}

SMALL = {
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", {"img_size": 64, "embed_dim": 64, "num_heads": 4}),
    "siglip": ("vit_base_patch16_siglip_224.webli", {"img_size": 64, "embed_dim": 64, "num_heads": 4}),
    "dinov2_reg": ("vit_base_patch14_reg4_dinov2.lvd142m", {"img_size": 56, "embed_dim": 64, "num_heads": 4}),
    "eva02": ("eva02_base_patch16_clip_224.merged2b", {"img_size": 64, "embed_dim": 64, "num_heads": 4}),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {"img_size": 64, "embed_dim": 64, "num_heads": 4}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64, "embed_dim": 64, "num_heads": 4}),
}
"""The same kinds of model at width 64 on a grid of 4 x 4."""


def small(kind: str, depth: int = 3, seed: int = 0) -> Backbone:
    """One of SMALL, with lively weights, in eval mode."""
    name, args = SMALL[kind]
    return enliven(load_backbone(name, pretrained=False, seed=seed, depth=depth, **args))


@torch.no_grad()
def enliven(backbone: Backbone) -> Backbone:
    """Weights as training leaves them: LayerScale near one, biases, norms and relative positions away from their start.

    Fresh weights would let most mistakes pass: BEiT starts with a zero position bias, DINOv2 with LayerScale 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gamma" in name:
            parameter.copy_(0.5 + 0.1 * noise)
        elif parameter.ndim < 2 or "relative_position" in name:
            parameter.add_(0.3 * noise)
        elif "qkv" in name or "q_proj" in name or "k_proj" in name:
            parameter.mul_(3.0)
    return backbone.eval()


def images(backbone: Backbone, count: int = 2, seed: int = 1) -> torch.Tensor:
    """Noise in place of normalised images [count, 3, H, W]."""
    return torch.randn(count, 3, *backbone.image_size, generator=torch.Generator().manual_seed(seed))
