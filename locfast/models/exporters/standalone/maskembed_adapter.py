"""The vision-language adapter of a locality-aligned backbone, in plain PyTorch; locfast wrote it and is not needed.

    adapter = load_adapter(FOLDER, llm_width=4096)  # FOLDER holds adapter.json and adapter.safetensors
    embeddings = adapter(features)                  # [B, tokens, C] -> [B, tokens, llm_width]

`maskembed`: the decoder that MaskEmbed trained. The encoder's head, prefix positions set to zero, the decoder's
positions, blocks and norm, then a new linear layer to the language model, which starts at zero (Locality Alignment,
section 5). `truncated`: the backbone's own last blocks and norm, then the same new layer (appendix D). `mlp`: two new
linear layers with a GELU between, as LLaVA has (appendix D).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which OpenAI's CLIP was trained with; nn.GELU differs from it by up to 0.02."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class Attention(nn.Module):
    """Self-attention, its logits bounded to +-softcap where a cap is given. x [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, softcap: float | None) -> None:
        super().__init__()
        self.heads, self.softcap = heads, softcap
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=bias)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.softcap is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            # Logits in fp32: in bf16 those near a cap of 30 would lie 0.125 apart.
            with torch.autocast(q.device.type, enabled=False):
                logits = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
            out = (self.softcap * torch.tanh(logits / self.softcap)).softmax(dim=-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), act, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1_g(x)) * self.fc1_x(x))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block. x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, act = config["width"], ACTIVATIONS[config["act"]]()
        kind = {"mlp": Mlp, "swiglu": SwiGLU}[config["mlp"]]
        self.norm1 = nn.LayerNorm(width, eps=config["norm_eps"])
        self.attn = Attention(width, config["num_heads"], config["head_dim"], config["qkv_bias"], config["softcap"])
        self.ls1 = LayerScale(width) if config["layer_scale"] else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config["norm_eps"])
        self.mlp = kind(width, config["mlp_hidden"], act)
        self.ls2 = LayerScale(width) if config["layer_scale"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionLanguageAdapter(nn.Module):
    """features [B, tokens, C] -> [B, tokens, llm_width]; see this file's head. config: what adapter.json holds."""

    def __init__(self, config: dict[str, Any], llm_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        width, llm_width = config["width"], llm_width or config["llm_width"]
        if config["kind"] == "mlp":
            self.output: nn.Module = nn.Sequential(
                nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
            )
            return
        if config["kind"] == "maskembed":
            self.input = nn.Linear(width, width) if config["head"] == "linear" else Mlp(width, width, nn.GELU())
            self.position = nn.Parameter(torch.zeros(config["num_tokens"], width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width, eps=config["final_norm_eps"])
        self.output = nn.Linear(width, llm_width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def tokens(self, features: Tensor) -> Tensor:
        """What the output layer gets: [B, tokens, C] -> [B, tokens, C]."""
        expected = (self.config["num_tokens"], self.config["width"])
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"the adapter takes features [B, {expected[0]}, {expected[1]}], got {list(features.shape)}. They are "
                "those of the backbone that was exported with it, as aligned.json says"
            )
        x = features
        if self.config["kind"] == "mlp":
            return x
        if self.config["kind"] == "maskembed":
            # Prefix tokens were hidden from the decoder in training, so nothing of them enters but their positions.
            prefix = self.config["num_prefix_tokens"]
            patches = self.input(x[:, prefix:])
            x = F.pad(patches, (0, 0, prefix, 0)) + self.position.to(patches.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(self.tokens(features))


def load_adapter(folder: str | Path, llm_width: int | None = None) -> VisionLanguageAdapter:
    """The adapter in `folder`. llm_width: the language model's width, where not the one that it was exported for; the
    layers of that width are then made anew."""
    config = json.loads(Path(folder, "adapter.json").read_text(encoding="utf-8"))
    state = load_file(Path(folder, "adapter.safetensors"))
    adapter = VisionLanguageAdapter(config, llm_width)
    if llm_width not in (None, config["llm_width"]):
        new = {key: value for key, value in adapter.state_dict().items() if key.startswith("output.")}
        state = {**{key: value for key, value in state.items() if not key.startswith("output.")}, **new}
    adapter.load_state_dict(state, strict=True)
    return adapter
