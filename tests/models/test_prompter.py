"""CLOC's prompter: what is shared between prompts changes no number, and a box is told to a fraction of a pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from locfast.models.prompter import BoxHead, CornerCode, CrossPrompter, Prompter, RoiPooler

B, N, C, E, M = 3, 12, 16, 8, 4
KINDS = {"self": Prompter, "cross": CrossPrompter}


def lively(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = KINDS[kind](C, E)
    with torch.no_grad():
        for parameter in made.parameters():  # far from zeros and ones, so that nothing hides
            parameter += 0.3 * torch.randn_like(parameter)
    return made.to(dtype)


def given(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens, boxes and phrases."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, N, C, dtype=torch.float64, generator=generator)
    corners = torch.rand(B, M, 2, 2, dtype=torch.float64, generator=generator).sort(2).values
    return tokens, corners.flatten(2), torch.randn(B, M, E, dtype=torch.float64, generator=generator)


def plainly(made: Any, image: Tensor, prompt: Tensor, whole: bool) -> Tensor:
    """One image [N, C] and one prompt [K, C], as the paper says it: a pre-norm block over all tokens, mean, projection.

    whole: all tokens pass through the block; else the prompt's alone do, and attend to all.
    """
    tokens = torch.cat([prompt, image])
    taken = tokens if whole else prompt
    query, _, _ = made.qkv(made.norm1(taken)).chunk(3, -1)
    _, key, value = made.qkv(made.norm1(tokens)).chunk(3, -1)
    attended = taken + made.proj((query @ key.T / math.sqrt(C)).softmax(-1) @ value)
    out = attended + made.fc2(F.gelu(made.fc1(made.norm2(attended))))
    return made.project(out.mean(0))


def code_plainly(made: CornerCode, box: Tensor) -> Tensor:
    """[4] -> [2, C]: by corner, for x and then y, sines and cosines."""
    corners = []
    for corner in range(2):
        numbers = [
            wave(box[2 * corner + axis] * rate)
            for axis in range(2)
            for wave in (torch.sin, torch.cos)
            for rate in made.rates.double()
        ]
        corners.append(torch.stack(numbers) + made.kind[corner])
    return torch.stack(corners)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_attention_gives_what_each_prompt_gives_by_itself_and_every_gradient(kind):
    made = lively(kind)
    tokens, boxes, phrases = (x.requires_grad_() for x in given())
    asked = made.ask(tokens)
    ours, theirs = [], []
    for m in range(M):
        ours += [made.boxes(asked, boxes[:, m]), made.phrases(asked, phrases[:, m])]
        for prompts in (
            [code_plainly(made.corners, box) for box in boxes[:, m]],
            [made.phrase(phrase)[None] for phrase in phrases[:, m]],
        ):
            both = zip(tokens, prompts, strict=True)
            theirs.append(torch.stack([plainly(made, image, prompt, kind == "self") for image, prompt in both]))
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = [tokens, boxes, phrases, *made.parameters()]
    found, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * other.abs().max().item())


@pytest.mark.parametrize("kind", [*KINDS, "roi"])
def test_some_of_the_images_are_asked_by_number(kind):
    made = RoiPooler(C, E, (3, 4), size=3).double() if kind == "roi" else lively(kind)
    tokens, boxes, _ = given()
    rows = torch.tensor([2, 0])
    asked = made.ask(tokens)
    found = made.boxes(asked, boxes[rows, 1], rows)
    torch.testing.assert_close(found, made.boxes(asked, boxes[:, 1])[rows], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made(tokens, boxes)[:, 1], made.boxes(asked, boxes[:, 1]))


def test_large_logits_of_image_and_prompt_overflow_nothing():
    made = lively("self", torch.float32)
    with torch.no_grad():
        made.qkv.weight.mul_(300)
    tokens, boxes, _ = (x.float() for x in given())
    found = made(tokens, boxes)
    codes = [[made.corners(box) for box in row] for row in boxes]
    theirs = torch.stack(
        [
            torch.stack([plainly(made, image, code, True) for code in row])
            for image, row in zip(tokens, codes, strict=True)
        ]
    )
    queries, keys, _ = made._qkv(tokens)
    logits = queries @ keys.mT
    assert logits.abs().max() > 1e3  # exp alone would be infinite
    assert found.isfinite().all()
    # fp32 logits of 1e4 are known to 1e-3, which is what a softmax makes of them
    torch.testing.assert_close(found, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def test_corners_a_quarter_of_a_pixel_apart_have_different_codes_and_corners_have_kinds():
    code = CornerCode(768)
    with torch.no_grad():
        code.kind.zero_()
    box = torch.tensor([0.25, 0.25, 0.5, 0.75])
    moved = code(box + 0.25 / 336) - code(box)
    assert moved.abs().amax(-1).min() > 0.2  # 64 cycles: a pixel of 336 is 1.2 radians
    near, far = ((code(torch.tensor([0.0, 0.0, d, d]))[1] - code(torch.zeros(4))[1]).norm() for d in (0.01, 0.4))
    assert near < far
    same = torch.tensor([0.3, 0.6, 0.3, 0.6])
    assert torch.equal(*code(same)) and not torch.equal(*CornerCode(768)(same))
    with pytest.raises(ValueError, match="divisible by 4"):
        CornerCode(10)


def test_roi_pooling_is_torchvisions_on_the_grid_of_patches():
    made = RoiPooler(C, E, (3, 4), size=5).double()
    tokens, boxes, _ = given()
    maps = tokens.mT.unflatten(-1, (3, 4))
    for m in range(M):
        scaled = boxes[:, m] * torch.tensor([4, 3, 4, 3], dtype=torch.float64)
        found = roi_align(maps, [row[None] for row in scaled], 5, aligned=True).mean((-2, -1))
        torch.testing.assert_close(made(tokens, boxes)[:, m], made.project(made.norm(found)), rtol=1e-10, atol=1e-12)
    # tokens that hold their own centre: the mean over a box is the box's centre, to what 5 x 5 samples leave
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    place = torch.stack([x + 0.5, y + 0.5], -1).flatten(0, 1)[None].expand(1, N, 2).double()
    box = torch.tensor([[0.2, 0.3, 0.7, 0.8]], dtype=torch.float64)
    plain = RoiPooler(2, 2, (3, 4), size=5).double()
    plain.norm, plain.project = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    torch.testing.assert_close(plain.boxes(plain.ask(place), box), torch.tensor([[0.45 * 4, 0.55 * 3]]).double())


def test_what_a_prompter_stores_does_not_grow_by_the_mlp_of_every_prompt():
    """Activations are recomputed: between forward and backward a prompt keeps its tokens and its result."""
    made = Prompter(64, 16)
    tokens, boxes = torch.randn(2, 100, 64, requires_grad=True), torch.rand(2, 8, 4)
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.data_ptr()] = tensor.numel()
        return tensor

    asked = made.ask(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = [made.boxes(asked, boxes[:, m]) for m in range(8)]
    weights = {p.data_ptr() for p in made.parameters()} | {t.data_ptr() for t in asked if t is not None}
    own = sum(size for place, size in stored.items() if place not in weights)
    assert own < 8 * 2 * 100 * 64  # the MLP alone would keep four times that
    torch.autograd.grad(torch.stack(outs).sum(), tokens)


def test_a_box_head_gives_four_numbers():
    head = BoxHead(E).double()
    x = torch.randn(5, E, dtype=torch.float64)
    expected = F.gelu(x @ head.fc1.weight.T + head.fc1.bias) @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(head(x), expected)
