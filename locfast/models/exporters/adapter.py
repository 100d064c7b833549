"""Vision-language adapters of a run: MaskEmbed's decoder, the backbone's last two blocks, or a new MLP.

Locality Alignment, section 5 and appendix D. The module itself is standalone/maskembed_adapter.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from timm.layers import SwiGLU
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.models.attention import timm_class
from locfast.models.backbone import Backbone
from locfast.models.blocks import is_known_block
from locfast.models.create import seeded
from locfast.models.decoder import TransformerDecoder
from locfast.models.exporters.folder import Features, check_same, copy_standalone, standalone
from locfast.models.exporters.hf_keys import activation_name

AdapterKind = Literal["maskembed", "truncated", "mlp"]
KINDS: tuple[AdapterKind, ...] = ("maskembed", "truncated", "mlp")
BLOCKS = 2
"""How many of its last blocks a truncated backbone gives away (appendix D)."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and which features of the backbone it takes. module: a VisionLanguageAdapter."""

    kind: AdapterKind
    module: Any
    features: Features
    expected: Any
    """features [B, T, C] -> what the module's `tokens` must give for them."""


def make_adapter(
    kind: AdapterKind | None, artifacts: dict[str, Any], softcap: float | None, llm_width: int, target: str
) -> Adapter:
    """The adapter of a run whose method gave `artifacts`. kind None: its decoder's.

    Raises UserError where the run has no decoder and one is needed, and where the blocks are of a kind that a plain
    adapter cannot hold.
    """
    backbone = artifacts["backbone"]
    if kind in (None, "maskembed"):
        return _maskembed(backbone, artifacts, llm_width, target)
    return _mlp(backbone, llm_width) if kind == "mlp" else _truncated(backbone, softcap, llm_width, target)


def write_adapter(folder: Path, adapter: Adapter, given: Tensor) -> None:
    """adapter.safetensors, adapter.json and maskembed_adapter.py, once they are seen to give what the run's modules do.

    given [B, T, C]: features of the backbone.
    """
    state = {key: value.detach().float().cpu().contiguous() for key, value in adapter.module.state_dict().items()}
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt"})
    text = json.dumps(adapter.module.config, indent=2)
    (folder / "adapter.json").write_text(text + "\n", encoding="utf-8")
    copy_standalone(folder, "maskembed_adapter")
    loaded = standalone("maskembed_adapter").load_adapter(folder).eval()
    with torch.no_grad():
        check_same("the adapter", loaded.tokens(given), adapter.expected(given))


def _maskembed(backbone: Backbone, artifacts: dict[str, Any], llm_width: int, target: str) -> Adapter:
    decoder, head = artifacts.get("decoder"), artifacts.get("head")
    if not isinstance(decoder, TransformerDecoder):
        found = "no decoder" if decoder is None else f"a {type(decoder).__name__}, which has no weights"
        raise UserError(
            f"--to {target}: the adapter is MaskEmbed's transformer decoder, and this run has {found}. Type --adapter "
            "truncated (the backbone's last two blocks) or --adapter mlp (new layers)."
        )
    mlp_head = isinstance(head, nn.Sequential)
    config = {
        "kind": "maskembed",
        **_block_config(decoder.blocks[0], target),
        **_sizes(backbone, len(decoder.blocks), llm_width, prefix=True),
        "head": "mlp" if mlp_head else "linear",
        "softcap": None,  # training never capped the decoder
        "final_norm_eps": decoder.norm.eps,
    }
    names = {"0": "fc1", "2": "fc2"}
    head_state = {
        f"input.{names[key.partition('.')[0]]}.{key.partition('.')[2]}" if mlp_head else f"input.{key}": value
        for key, value in head.state_dict().items()  # type: ignore[union-attr]
    }
    own = {key: value for key, value in decoder.state_dict().items() if not key.startswith("output.")}
    return Adapter(
        "maskembed",
        _module(config, {**own, **head_state}, target),
        Features(backbone.depth),
        lambda features: _decoded(head, decoder, features, backbone.num_prefix_tokens),
    )


@torch.no_grad()
def _decoded(head: Any, decoder: TransformerDecoder, features: Tensor, prefix: int) -> Tensor:
    """features [B, T, C] -> what the run's own decoder makes of them behind its norm, every patch visible [B, T, C]."""
    kept: list[Tensor] = []
    handle = decoder.norm.register_forward_hook(lambda module, args, output: kept.append(output))
    device = decoder.position.device
    try:
        patches = head(features.to(device))[:, prefix:]
        decoder(patches, torch.ones(len(patches), 1, patches.shape[1], dtype=torch.bool, device=device))
    finally:
        handle.remove()
    return kept[0].float().cpu()


def _truncated(backbone: Backbone, softcap: float | None, llm_width: int, target: str) -> Adapter:
    kept = backbone.depth - BLOCKS
    every: list[Any] = list(backbone.blocks)
    plain = all(is_known_block(block) and timm_class(block.attn) is Attention for block in every)
    if not plain or kept < 1:
        why = (
            f"it has {backbone.depth} blocks" if kept < 1 else "they are no plain ViT blocks (RoPE, relative positions)"
        )
        raise UserError(
            f"--to {target} --adapter truncated: the last {BLOCKS} blocks of {backbone.name} cannot leave it: {why}. "
            "Type --adapter maskembed or --adapter mlp."
        )
    blocks = every[kept:]
    config = {
        "kind": "truncated",
        **_block_config(blocks[0], target),
        **_sizes(backbone, BLOCKS, llm_width, prefix=True),
        "softcap": softcap,
        "final_norm_eps": getattr(backbone.model.norm, "eps", backbone.norm_eps),
    }
    state = {
        f"blocks.{index}.{key}": value
        for index, block in enumerate(blocks)
        for key, value in block.state_dict().items()
    }
    state |= {f"norm.{key}": value for key, value in backbone.model.norm.state_dict().items()}

    @torch.no_grad()
    def expected(features: Tensor) -> Tensor:
        x = features.to(next(backbone.parameters()).device)
        return backbone.final_norm(backbone.run_blocks(x, start=kept, softcap=softcap)).float().cpu()

    return Adapter("truncated", _module(config, state, target), Features(kept, norm=False), expected)


def _mlp(backbone: Backbone, llm_width: int) -> Adapter:
    config = {"kind": "mlp", **_sizes(backbone, 0, llm_width, prefix=False)}
    with seeded(0):
        module = standalone("maskembed_adapter").VisionLanguageAdapter(config)
    return Adapter("mlp", module, Features(backbone.depth, prefix=False), lambda features: features)


def _sizes(backbone: Backbone, depth: int, llm_width: int, *, prefix: bool) -> dict[str, Any]:
    return {
        "width": backbone.embed_dim,
        "num_prefix_tokens": backbone.num_prefix_tokens if prefix else 0,
        "num_tokens": backbone.num_tokens if prefix else backbone.num_patches,
        "depth": depth,
        "llm_width": llm_width,
    }


def _block_config(block: Any, target: str) -> dict[str, Any]:
    """What builds a block such as timm's `block` in the standalone file."""
    swiglu = isinstance(block.mlp, SwiGLU)
    act = activation_name(block.mlp.act, target)
    return {
        "num_heads": block.attn.num_heads,
        "head_dim": block.attn.proj.in_features // block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "mlp": "swiglu" if swiglu else "mlp",
        "mlp_hidden": (block.mlp.fc1_g if swiglu else block.mlp.fc1).out_features,
        "act": {"gelu_pytorch_tanh": "gelu_tanh"}.get(act, act),
        "layer_scale": hasattr(block.ls1, "gamma"),
        "norm_eps": block.norm1.eps,
    }


def _module(config: dict[str, Any], state: dict[str, Tensor], target: str) -> Any:
    """The standalone module with the weights of `state` and a new output layer, zero."""
    module = standalone("maskembed_adapter").VisionLanguageAdapter(config)
    own = {key: value.shape for key, value in module.state_dict().items() if not key.startswith("output.")}
    if own != {key: value.shape for key, value in state.items()}:
        differ = sorted(key for key in {*own, *state} if key not in own or key not in state)
        raise UserError(
            f"--to {target} --adapter {config['kind']}: blocks with {', '.join(differ[:2]) or 'other shapes'} are of a "
            "kind that the adapter does not hold. Type --adapter maskembed or --adapter mlp."
        )
    module.load_state_dict({key: value.detach().cpu() for key, value in state.items()}, strict=False)
    return module.eval()
