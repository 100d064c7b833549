"""Frozen linear layers in fp8: weights quantised once, by output channel, activations at every call, by token."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locfast.errors import UserError
from locfast.kernels import _backend
from locfast.kernels.quantize_rows import quantize_rows

if TYPE_CHECKING:
    from locfast.models.backbone import Backbone

MULTIPLE = 16
"""What PyTorch's scaled product wants both sides of a weight to be a multiple of."""

log = logging.getLogger(__name__)


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear whose product runs in e4m3. x [..., K] -> [..., N], in autocast's dtype or x's own.

    Weight and bias stay what they are, state dicts too. The quantised copy follows the weight through `to` and
    `load_state_dict`; nothing else may change the weight.
    """

    codes: Tensor
    """[N, K] uint8, the bits of e4m3: not every collective library sends fp8 tensors, and `to` rounds no integers."""
    scale: Tensor
    """[N, 1] fp32."""
    fast_accum: bool
    """Whether the tensor cores keep their sums (about 14 bits on sm_90) instead of adding them up in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same product with another bias [N]: BEiT puts one together from its parts."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows, row_scale = quantize_rows(x)
        codes = self.codes.view(torch.float8_e4m3fn)
        return fp8_linear(rows, row_scale, codes, self.scale, bias, dtype, self.fast_accum)

    @torch.no_grad()
    def quantise(self) -> None:
        """Make the quantised copy from the weight."""
        codes, scale = quantize_rows(self.weight.detach().float(), backend="reference")
        self.register_buffer("codes", codes.view(torch.uint8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        super()._apply(fn, recurse)
        self.quantise()  # the same bits on every device, and fp32 scales whatever `fn` made of them
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.quantise()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, e4m3"


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = True,
) -> Tensor:
    """(x * x_scale) (weight * weight_scale)^T + bias, of e4m3 operands.

    x [..., K], x_scale [..., 1] fp32, weight [N, K], weight_scale [N, 1] fp32 -> [..., N] in `dtype`. A GPU multiplies
    the codes and rounds the result to bf16, bias included; a CPU multiplies the dequantised operands in fp32. The bias
    is rounded to the result's dtype first.
    """
    if x.device.type != "cuda":
        return dequantised_linear(x, x_scale, weight, weight_scale, bias, dtype)
    out = torch._scaled_mm(
        x.flatten(0, -2),
        weight.t(),
        scale_a=x_scale.flatten(0, -2),
        scale_b=weight_scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only one that PyTorch has for scales of rows on every GPU with fp8
        use_fast_accum=fast_accum,
    )
    return out.unflatten(0, x.shape[:-1]).to(dtype)


def dequantised_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `fp8_linear` means: the dequantised operands' product in fp32, rounded once."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype).float()
        return F.linear(x.float() * x_scale, weight.float() * weight_scale, bias).to(dtype)


def quantise_blocks(backbone: Backbone, stop: int | None = None, fast_accum: bool = True) -> Backbone:
    """Turn the linear layers of attention and MLP in the frozen blocks 1 .. stop (None: all) into Fp8Linear, in place.

    Layers with a side that is no multiple of 16 stay as they are, and a line says so. Patch embedding, norms, the
    products of attention and everything behind the blocks are not touched. Raises UserError for blocks that only timm
    can run: some of them take the weights past their layers.
    """
    if not backbone.knows_blocks:
        kind = type(backbone.blocks[0]).__name__
        raise UserError(
            f"an fp8 teacher was asked for, but the blocks of {backbone.name} ({kind}) run only as timm wrote them. "
            "Type --maskembed.teacher-precision same."
        )
    left = []
    for block in list(backbone.blocks)[:stop]:
        for name, layer in block.named_modules():
            if type(layer) is not nn.Linear:
                continue
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                left.append(f"{name} [{layer.out_features}, {layer.in_features}]")
                continue
            # The class changes and the object stays, as in set_softcap.
            layer.__class__ = Fp8Linear
            assert isinstance(layer, Fp8Linear)
            layer.fast_accum = fast_accum
            layer.quantise()
    if left:
        log.warning(
            "%s: %d linear layers stay as they are: fp8 needs sides that are multiples of %d, and %s has not",
            backbone.name,
            len(left),
            MULTIPLE,
            left[0],
        )
    return backbone


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError where fp8 layers cannot run on `device`, BackendError where `quantize_rows` cannot."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _backend.FP8_SINCE:
        raise UserError(
            f"an fp8 teacher was asked for, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{found[0]}.{found[1]}, and fp8 products need 8.9 or newer (Ada, Hopper). "
            "Type --maskembed.teacher-precision same."
        )
    _backend.check("quantize_rows", device, dtype)
