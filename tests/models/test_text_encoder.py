"""A text tower that is trained: padding behind the end of a text is not computed where it reaches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from locfast.errors import UserError
from locfast.models import compiled
from locfast.models.open_clip_model import load_open_clip
from locfast.models.text_encoder import STEP, TextEncoder
from tests.eval.tiny_clip import CONFIGS

pytest.importorskip("open_clip")

TEXTS = ["a dog", "! a kite, over an old tower in the rain!!", "", "one two three"]


def tower(folder: Path, kind: str) -> TextEncoder:
    file = folder / f"text-{kind}.json"
    file.write_text(json.dumps(CONFIGS[kind]))
    model, tokenizer = load_open_clip(str(file), "none", flags=("--text", "--weights"))
    return TextEncoder(model.double(), tokenizer)


@pytest.mark.parametrize("kind", ["clip", "eva"], ids=["open_clip's CLIP", "a text tower of its own"])
def test_a_text_cut_to_its_length_has_the_embedding_and_the_gradients_of_the_whole_context(tmp_path, kind):
    text = tower(tmp_path, kind)
    whole, cut = text.tokenizer(TEXTS), text.tokenize(TEXTS)
    assert cut.shape == (4, 2 * STEP) and whole.shape == (4, 77)
    assert text.tokenize(["a dog"]).shape == (1, STEP)
    ours, theirs = text(cut), text.model.encode_text(whole)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    used = [p for name, p in text.named_parameters() if p.requires_grad]
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (torch.autograd.grad((x * weights).sum(), used) for x in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * other.abs().max().item())


def test_every_weight_of_coca_that_is_trained_takes_part_in_a_text(tmp_path):
    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    small = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16, **pool}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {**small, "embed_cls": True, "output_tokens": True}}
    file = tmp_path / "coca-small.json"
    file.write_text(json.dumps({**config, "multimodal_cfg": {**small, "attn_pooler_heads": 2}, "custom_text": True}))
    model, tokenizer = load_open_clip(str(file), "none", flags=("--text", "--weights"))
    text = TextEncoder(model, tokenizer)
    text(text.tokenize(TEXTS)).sum().backward()
    assert not [name for name, p in text.named_parameters() if p.requires_grad and p.grad is None]


def test_a_text_longer_than_the_context_keeps_its_end_token(tmp_path):
    text = tower(tmp_path, "clip")
    tokens = text.tokenize(["word " * 200])
    assert tokens.shape == (1, 77) and tokens[0, -1] == tokens.max()


def test_a_tower_that_reads_all_of_its_context_gets_all_of_it(tmp_path):
    text = tower(tmp_path, "clip")
    text.model.text_pool_type = "last"
    again = TextEncoder(text.model, text.tokenizer)
    assert not again.cuts and again.tokenize(["a dog"]).shape == (1, 77)


def test_compiled_blocks_take_any_number_of_texts_and_are_not_compiled_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    text = tower(tmp_path, "clip")
    text.enable_compile()
    with torch.no_grad():
        for count in range(2, 14):
            text(text.tokenize([f"phrase {number} {'long ' * (count % 5)}" for number in range(count)]))
    torch._dynamo.reset()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no JSON"),
        ("[]", "embed_dim is missing"),
        (json.dumps({"embed_dim": 8, "vision_cfg": {}}), "text_cfg is missing"),
    ],
)
def test_a_config_that_is_none_is_told_by_its_flag(tmp_path, content, told):
    file = tmp_path / "none.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"--text .*none.json: .*{told}"):
        load_open_clip(str(file), "none", flags=("--text", "--weights"))


def test_a_tower_that_knows_fewer_tokens_than_its_tokenizer_is_refused(tmp_path):
    few = {**CONFIGS["clip"], "text_cfg": {**CONFIGS["clip"]["text_cfg"], "vocab_size": 100}}
    file = tmp_path / "few.json"
    file.write_text(json.dumps(few))
    with pytest.raises(UserError, match="knows 100 tokens.*vocab_size"):
        TextEncoder(*load_open_clip(str(file), "none", flags=("--text", "--weights")))
