"""Captions by transformers' real BLIP and GIT classes, at tiny random sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from locfast.vesl.captioner import Captioner

CPU = torch.device("cpu")


def images() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8) for i in range(3)]


@pytest.mark.parametrize("name", ["blip", "git"])
def test_captions_are_what_transformers_own_call_gives(models, name: str) -> None:
    import transformers as hf

    captioner = Captioner(str(models / name), CPU, "fp32", max_new_tokens=6)
    said = captioner.captions(captioner.prepare(images()))
    kind = {"blip": hf.BlipForConditionalGeneration, "git": hf.GitForCausalLM}[name]
    processor = hf.AutoProcessor.from_pretrained(models / name)
    pixels = processor(images=images(), return_tensors="pt")["pixel_values"]
    tokens = kind.from_pretrained(models / name).eval().generate(pixel_values=pixels, max_new_tokens=6, do_sample=False)
    assert said == processor.batch_decode(tokens, skip_special_tokens=True) and any(said) and len(set(said)) > 1


@pytest.mark.parametrize("name", ["blip", "git"])
def test_a_prompt_leads_and_is_taken_off_unless_it_is_to_stay(models, name: str) -> None:
    bare, kept = (
        Captioner(str(models / name), CPU, "fp32", prompt="a red", keep_prompt=keep, max_new_tokens=6)
        for keep in (False, True)
    )
    without, with_it = bare.captions(bare.prepare(images())), kept.captions(kept.prepare(images()))
    assert all(text.startswith("a red") for text in with_it)
    assert without == [text.removeprefix("a red").strip() for text in with_it]
    free = Captioner(str(models / name), CPU, "fp32", max_new_tokens=6)
    assert without != free.captions(free.prepare(images()))


def test_the_same_batch_gets_the_same_captions(models) -> None:
    captioner = Captioner(str(models / "git"), CPU, "fp32", max_new_tokens=6)
    assert captioner.captions(captioner.prepare(images())) == captioner.captions(captioner.prepare(images()))


def test_bf16_runs(models) -> None:
    captioner = Captioner(str(models / "git"), CPU, "bf16", max_new_tokens=3, num_beams=2)
    assert any(captioner.captions(captioner.prepare(images())))
