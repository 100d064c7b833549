"""Configs of open_clip models small enough for tests, and what makes a timm CLIP tower of the same size."""

from typing import Any

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CLIP = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": CLIP, "text_cfg": TEXT},
    "sigmoid": {  # as SigLIP: attention pooling, no projection, a bias behind the scale
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": TEXT,
    },
    "eva": {  # CLS and the trunk's own head
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224},
        "text_cfg": TEXT,
    },
    "average": {"embed_dim": 24, "vision_cfg": {**CLIP, "pool_type": "avg"}, "text_cfg": TEXT},
}
TINY: dict[str, int] = {"depth": 2, "embed_dim": 64, "num_heads": 2}
