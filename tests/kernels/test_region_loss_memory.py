"""The region losses store nothing of size R x R but one bit a pair."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from locfast.kernels.region_contrastive_loss import ops, tiled, tiles

from .live_bytes import LiveBytes
from .region_loss_checks import FORMS, FUSED, GRAD, run, usable

WIDTH = 4


def most_bytes(rows: int, form: str, keeps_filter: bool) -> int:
    """Of a forward and a backward on a CPU, inputs left out. A mode sees no further than a registered op's door."""
    regions, texts = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(0)).unbind(0)
    scale, bias = torch.tensor(10.0), None if form == "contrastive" else torch.tensor(-3.0)
    valid, threshold = torch.ones(rows, dtype=torch.bool), 0.9
    with LiveBytes() as watch:
        arguments = (valid, threshold, torch.float32, "", "auto", keeps_filter, "tiled")
        saved = ops._forward(regions, texts, scale, bias, *arguments)[1:]
        needs = [True, True, True, bias is not None]
        ops._backward(torch.tensor(1.0), regions, texts, scale, bias, *saved, threshold, needs, "", "auto", "tiled")
    return watch.most


def allowed_bytes(rows: int, width: int, panel: int) -> int:
    """Eight rows of fp32 a region (units, gradients and results of both sides, two on the way), its facts, a panel."""
    return rows * (8 * 4 * width + 256) + 16 * panel


@pytest.mark.parametrize("form", FORMS)
def test_tiled_memory_is_some_rows_a_panel_and_a_bit_a_pair(form, monkeypatch):
    panel = 1 << 15
    monkeypatch.setitem(tiled.MAX_PANEL, "cpu", panel)
    fresh = {rows: most_bytes(rows, form, keeps_filter=False) for rows in (512, 2048)}
    assert all(fresh[rows] <= allowed_bytes(rows, WIDTH, panel) for rows in fresh)
    bits = 2048**2 / 8
    assert allowed_bytes(2048, WIDTH, panel) < 3 * bits  # or half a byte for every pair might hide there
    assert most_bytes(2048, form, keeps_filter=True) <= fresh[2048] + 1.1 * bits  # held once: no second copy


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", FUSED)
def test_a_gpu_s_memory_is_some_rows_and_a_bit_a_pair(backend, form, monkeypatch):
    device, panel, width = torch.device("cuda"), 1 << 22, 64  # 16 bytes each, of tiled's; of weights 2 in all
    usable(backend, device)
    monkeypatch.setitem(tiled.MAX_PANEL, "cuda", panel)
    monkeypatch.setitem(tiles.PANEL, "rows", 256)
    scale = torch.tensor(10.0, device=device)
    for rows in (256, 8192, 16384):  # the first makes cuBLAS's workspace, which stays
        regions, texts = torch.randn(2, rows, width, device=device, dtype=torch.bfloat16).unbind(0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run((regions, texts, scale), form, backend)
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        if rows > 256:
            assert (
                used
                <= allowed_bytes(rows, width, panel if backend == "tiled" else 256 * rows // 8) + rows**2 // 8 + 2**20
            )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED)
def test_offsets_beyond_32_bits_are_right(backend):
    """2^32 pairs and some more. The last hundred captions are those of the first: pairs at either end of memory."""
    device, width, rows, scale = torch.device("cuda"), 64, 65536 + 37, torch.tensor(10.0, device="cuda")
    usable(backend, device)
    generator = torch.Generator("cuda").manual_seed(0)
    regions, texts = torch.randn(2, rows, width, device=device, generator=generator).unbind(0)
    texts[-100:] = texts[:100]
    loss, grad, *_ = run((regions, texts, scale), "contrastive", backend)
    r, t = (F.normalize(x, dim=-1) for x in (regions, texts))

    def logits(chosen: Tensor) -> Tensor:
        own = torch.arange(rows, device=device)[chosen]
        twins = torch.where(own < 100, own + rows - 100, torch.where(own >= rows - 100, own - rows + 100, own))
        result = 10 * r[chosen] @ t.T
        other = twins != own
        result[other.nonzero()[:, 0], twins[other]] = -torch.inf
        return result

    by_row, by_column = [], torch.full((rows,), -torch.inf, device=device)
    for chosen in torch.arange(rows, device=device).split(4096):
        part = logits(chosen)
        by_row.append(part.logsumexp(1))
        by_column = torch.logaddexp(by_column, part.logsumexp(0))
    by_row = torch.cat(by_row)
    wanted = ((by_row + by_column).double() / 2 - 10 * (r * t).sum(-1)).mean()
    torch.testing.assert_close(
        loss.double(), wanted, rtol=1e-6, atol=0
    )  # fp32 sums of 65573 terms, and their logarithm
    chosen = torch.tensor([0, 1, 32768, 65535, 65536, rows - 1], device=device)
    part = logits(chosen)
    weights = (part - by_row[chosen, None]).exp() + (part - by_column).exp()
    weights[torch.arange(6, device=device), chosen] -= 2
    along = GRAD * 10 / (2 * rows) * weights @ t
    wanted = (along - r[chosen] * (along * r[chosen]).sum(-1, keepdim=True)) / regions[chosen].norm(
        dim=-1, keepdim=True
    )
    torch.testing.assert_close(grad[chosen], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
