"""What two and four real ranks of the region losses send and keep is what the plan for 64 of them works out."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from _region_cost import Setting, backward_calls, forward_calls, kept, plain_ways, wire
from _region_rank import counted
from region_bytes import differences, settings
from torch.nn import functional as F

from tests.kernels.live_bytes import LiveBytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters of sockets")


@pytest.fixture(scope="module", params=[(2, 96, 48), (4, 56, 20)], ids=["2 ranks", "4 ranks"])
def found(request):
    """Settings, and what every rank counted at each. 56 regions are no whole number of words of the filter."""
    asked = settings(*request.param)
    return list(zip(asked, counted(asked), strict=True))


def test_calls_bytes_on_sockets_and_memory_are_those_worked_out(found):
    assert len(found) == 20
    for at, of_ranks in found:
        assert not differences(at, of_ranks)


def test_a_count_that_is_off_by_one_message_or_number_is_told(found):
    at, of_ranks = found[0]
    assert at.exchange == "ring"
    one_more = replace(at, rows=at.rows + 1)
    assert any("calls" in told for told in differences(one_more, of_ranks))
    assert any("kept" in told for told in differences(one_more, of_ranks))
    assert any("holds" in told for told in differences(one_more, of_ranks))
    for way, by in (("sent", -at.texts), ("received", at.gradients)):
        other = copy.deepcopy(of_ranks)
        other[0]["backward"][way] += by
        assert any(f"{way} beyond" in told for told in differences(at, other))


def test_what_options_spare_is_not_sent():
    at = Setting(64, 2048, 768)
    frozen, sigmoid = replace(at, trains_texts=False), replace(at, form="sigmoid")
    assert wire(backward_calls(at), 64) - wire(backward_calls(frozen), 64) == 64 * 2048 * 768 * 4
    assert wire(forward_calls(at), 64) - wire(forward_calls(sigmoid), 64) == 2 * 2 * 63 * 2048 * 8
    assert kept(at)["filter"] == 64 * 2048**2 / 8
    assert "filter" not in kept(replace(at, keeps_filter=False))


def test_stored_logits_need_at_least_what_is_said_of_them():
    """One process plays a rank that has gathered all embeddings: live bytes of an eager loss, all tensors counted."""
    at = Setting(8, 64, 8, dtype="float32")
    regions, texts = torch.randn(2, 512, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    x, y = (F.normalize(x, dim=-1).requires_grad_() for x in (regions, texts))
    own, labels = slice(0, at.rows), torch.arange(at.rows)
    whole, rows, _, blocks = plain_ways(at)
    embeddings = 2 * 512 * 8 * 4

    def most_bytes(ways, filters: bool) -> int:
        with LiveBytes() as watch:
            similar = (y[ways[0][0]] @ y.T > 0.9).detach() if filters else None
            losses = []
            for chosen, (a, b) in zip([way[0] for way in ways], [way[1] for way in ways], strict=True):
                logits = 20 * a[chosen] @ b.T
                if similar is not None:
                    logits = logits.masked_fill(similar, -torch.inf)
                losses.append((logits.logsumexp(1)[: at.rows] - logits[labels, labels]).sum())
            torch.autograd.grad(sum(losses), (x, y))
        return watch.most

    of_rows = most_bytes([(own, (x, y)), (own, (y, x))], True)
    assert rows.stored - embeddings <= of_rows <= 4 * rows.stored
    of_all = most_bytes([(slice(None), (x, y))], True)
    assert whole.stored - embeddings <= of_all <= 4 * whole.stored
    assert blocks.stored < rows.stored < whole.stored
