"""Codes of places on image tokens: an option of prompters, which their weights remember."""

import pytest
import torch

from locfast.models.prompter import CornerCode, CrossPrompter, Prompter

KINDS = pytest.mark.parametrize("kind", [Prompter, CrossPrompter])
GRID = (2, 3)


def made(kind, grid):
    torch.manual_seed(0)
    return kind(16, 8, frequencies=(0.25, 2.0), grid=grid)


def test_a_patch_has_the_code_of_a_corner_at_its_centre() -> None:
    code = CornerCode(16, (0.25, 2.0))
    centres = torch.tensor([[x, y] for y in (0.25, 0.75) for x in (1 / 6, 0.5, 5 / 6)])
    at_corners = code(torch.cat([centres, centres], -1)) - code.kind
    torch.testing.assert_close(code.places(GRID), at_corners[:, 0])
    torch.testing.assert_close(code.places(GRID), at_corners[:, 1])


@KINDS
def test_places_are_added_to_the_tokens_and_nothing_else_changes(kind) -> None:
    plain, placed = made(kind, None), made(kind, GRID)
    tokens, box, phrase = torch.randn(2, 6, 16), torch.tensor([[0.1, 0.2, 0.6, 0.9]] * 2), torch.randn(2, 8)
    there = tokens + placed.corners.places(GRID)
    for name, prompt in (("boxes", box), ("phrases", phrase)):
        expected = getattr(plain, name)(plain.ask(there), prompt)
        torch.testing.assert_close(getattr(placed, name)(placed.ask(tokens), prompt), expected)
        assert not torch.allclose(getattr(plain, name)(plain.ask(tokens), prompt), expected)


@KINDS
def test_weights_do_not_load_into_a_prompter_that_leaves_places_out(kind) -> None:
    plain, placed = made(kind, None), made(kind, GRID)
    assert set(placed.state_dict()) - set(plain.state_dict()) == {"places"}
    with pytest.raises(RuntimeError, match="places"):
        plain.load_state_dict(placed.state_dict())
    with pytest.raises(RuntimeError, match="places"):
        placed.load_state_dict(plain.state_dict())


def test_without_an_order_of_tokens_only_places_tell_left_from_right() -> None:
    tokens, left = torch.randn(1, 6, 16).double(), torch.tensor([[[0.0, 0.0, 0.3, 0.3]]]).double()
    for grid, same in ((None, True), (GRID, False)):
        prompter = made(Prompter, grid).double()
        assert torch.allclose(prompter(tokens, left), prompter(tokens.flip(1), left)) == same
