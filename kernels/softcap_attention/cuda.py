"""softcap_attention through locfast/_C.so."""

import torch


def probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this op cannot run here."""
    return "it has no such kernel yet"
