"""The frozen teacher's pass over masked views: chunks, memory that does not suffice, CUDA graphs."""

import logging

import pytest
import torch
from model_families import images, small

from locfast.errors import UserError
from locfast.models import teacher
from locfast.models.teacher import TeacherPass

KINDS = ("clip", "siglip", "dinov2_reg", "eva02", "beit", "rope_mixed")
PRECISION = {"rope_mixed": (torch.float32, 2e-5)}
"""Of a comparison: fp64, but for a table that some versions of timm make in fp32 alone."""


def masks(backbone, samples: int = 5, views: int = 3) -> torch.Tensor:
    return torch.rand(samples, views, backbone.num_patches, generator=torch.Generator().manual_seed(3)) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_no_feature(kind):
    dtype, close = PRECISION.get(kind, (torch.float64, 1e-12))
    backbone = small(kind).to(dtype)
    x, visible = images(backbone, 5).to(dtype), masks(backbone)
    whole = TeacherPass(backbone, 2, "sdpa")(x, visible)
    for chunk in (1, 2, 5, 9):
        torch.testing.assert_close(
            TeacherPass(backbone, 2, "sdpa", chunk=chunk)(x, visible), whole, rtol=close, atol=close
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_first_block_done_once_an_image_equals_every_view_done_for_itself(kind, stop):
    dtype, close = PRECISION.get(kind, (torch.float64, 1e-10))
    backbone = small(kind).to(dtype)
    x, visible = images(backbone, 3).to(dtype), masks(backbone, 3)
    found = TeacherPass(backbone, stop, "sdpa")(x, visible)
    side = backbone.grid[0]
    pixels = visible.unflatten(2, (side, side)).repeat_interleave(backbone.patch_size[0], 2)
    pixels = pixels.repeat_interleave(backbone.patch_size[1], 3)
    for view in range(3):
        tokens = backbone.add_prefix_and_position(backbone.embed_patches(x * pixels[:, None, :, :, :][:, :, view]))
        alone = backbone.final_norm(backbone.run_blocks(tokens, stop=stop))
        torch.testing.assert_close(found[:, view], alone, rtol=close, atol=close)


def test_what_is_hidden_cannot_leak_even_as_nan():
    backbone = small("clip")
    x, visible = images(backbone, 1), masks(backbone, 1)
    visible[:, :, 0] = False
    x[..., : backbone.patch_size[0], : backbone.patch_size[1]] = torch.nan
    assert torch.isfinite(TeacherPass(backbone, 2, "sdpa")(x, visible)).all()


def test_a_chunk_that_does_not_fit_is_halved_once_and_for_all(monkeypatch, caplog):
    backbone = small("clip")
    x, visible = images(backbone, 5), masks(backbone)
    run, sizes = backbone._run_views, []

    def with_little_memory(shown, *rest):
        sizes.append(len(shown))
        if len(shown) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(shown, *rest)

    monkeypatch.setattr(backbone, "_run_views", with_little_memory)
    run_all = TeacherPass(backbone, 2, "sdpa")
    with caplog.at_level(logging.WARNING):
        first, second = run_all(x, visible), run_all(x, visible)
    assert sizes == [5, 3, 2, 2, 1, 2, 2, 1]
    assert [record.args for record in caplog.records] == [(5, 3), (3, 2)]
    assert torch.equal(first, second)


def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    backbone = small("clip")

    def without_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backbone, "_run_views", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        TeacherPass(backbone, 2, "sdpa")(images(backbone, 2), masks(backbone, 2))


def test_a_graph_needs_a_gpu():
    with pytest.raises(UserError, match="CUDA graph of the teacher was asked for, but the run is on cpu"):
        TeacherPass(small("clip"), 2, "sdpa", graph=True).check(torch.device("cpu"))


class Recorded:
    """Stands for a captured graph where there is no GPU."""

    def __init__(self, run, images, visible):
        self.run, self.shape = run, images.shape

    def fits(self, images, visible) -> bool:
        return images.shape == self.shape

    def __call__(self, images, visible):
        return self.run(images, visible)


def test_a_graph_is_captured_in_the_first_training_step_and_not_before(monkeypatch):
    captured = []
    monkeypatch.setattr(teacher, "CapturedPass", lambda *args: captured.append(args[1].shape) or Recorded(*args))
    backbone = small("clip")
    run = TeacherPass(backbone, 2, "sdpa", graph=True)
    with torch.no_grad():  # as the target scale and held-out losses are computed
        run(images(backbone, 2), masks(backbone, 2))
    assert captured == []
    first = run(images(backbone, 5), masks(backbone))
    assert len(captured) == 1 and captured[0][0] == 5
    assert torch.equal(run(images(backbone, 5), masks(backbone)), first) and not first.requires_grad
    run(images(backbone, 3), masks(backbone, 3))
    assert len(captured) == 1


def test_a_graph_that_does_not_fit_is_given_up(monkeypatch, caplog):
    def without_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher, "CapturedPass", without_memory)
    backbone = small("clip")
    run = TeacherPass(backbone, 2, "sdpa", graph=True)
    with caplog.at_level(logging.WARNING):
        first, second = (run(images(backbone, 5), masks(backbone)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(caplog.records) == 1 and "does not fit" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_graph_gives_the_same_bits(kind):
    backbone = small(kind).cuda()
    plain, graphed = (TeacherPass(backbone, 2, "sdpa", graph=graph) for graph in (False, True))
    for seed in (1, 2):  # the second replays what the first captured
        x, visible = images(backbone, 5, seed).cuda(), masks(backbone).roll(seed, 0).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(graphed(x, visible), plain(x, visible))
    other, seen = images(backbone, 3).cuda(), masks(backbone, 3).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(graphed(other, seen), plain(other, seen))
