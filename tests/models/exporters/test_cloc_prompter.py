"""A prompter travels: what the written file computes is what was trained, where locfast cannot be imported too."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from locfast.data.crop import plan
from locfast.data.decode.resize import place, resize
from locfast.data.geometry import carry
from locfast.data.spec import Geometry, View
from locfast.errors import UserError
from locfast.models import prompter as prompter_code
from locfast.models.prompter import BoxHead, CrossPrompter, Prompter, RoiPooler
from locfast.models.prompter_file import Frame, load_box_head, load_prompter, save_prompter, standalone_text
from tests.models.exporters.small import one_thread, student

__all__ = ["one_thread"]

WIDTH, JOINT, GRID = 64, 24, (4, 4)
FRAME = Frame((64, 64), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "bicubic", True)
KINDS = ("self", "cross", "placed", "roi")


def prompter(kind: str, **more: Any) -> Any:
    """Its weights stirred, so that biases and norms count."""
    torch.manual_seed(0)
    makers: dict[str, Any] = {"self": Prompter, "cross": CrossPrompter, "placed": partial(Prompter, grid=GRID)}
    made: Any = RoiPooler(WIDTH, JOINT, GRID, size=5) if kind == "roi" else makers[kind](WIDTH, JOINT, **more)
    return stirred(made)


def stirred(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return module.eval()


def written(folder: Path, made: Any, head: BoxHead | None = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    backbone = student("clip_quickgelu")
    assert (backbone.grid, backbone.embed_dim) == (GRID, WIDTH)
    return save_prompter(folder, made, head, backbone=backbone, frame=FRAME, region_scale=14.5)


def case(images: int = 2, prompts: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Patch tokens, boxes and phrases."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(images, prompts, 2, 2, generator=generator).sort(2).values.flatten(2)
    tokens = torch.randn(images, GRID[0] * GRID[1], WIDTH, generator=generator)
    return tokens, boxes, torch.randn(images, prompts, JOINT, generator=generator)


@pytest.fixture
def travelled(tmp_path: Path) -> Iterator[Any]:
    """A function from a prompter to what the file beside it loads."""

    def load(made: Any, head: BoxHead | None = None) -> Any:
        written(tmp_path, made, head)
        return module_of(tmp_path).load(tmp_path)

    yield load
    sys.modules.pop("travelled_prompter", None)


def module_of(folder: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location("travelled_prompter", folder / "cloc_prompter.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["travelled_prompter"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_regions_are_bit_for_bit_those_of_the_trained_prompter(kind: str, travelled: Any) -> None:
    made, (tokens, boxes, _) = prompter(kind), case()
    loaded = travelled(made)
    expected = made(tokens, boxes)
    assert type(loaded.prompter).__module__ == "travelled_prompter"  # the written code, and not locfast's
    assert torch.equal(loaded(tokens, boxes), expected) and torch.equal(loaded.regions(tokens, boxes), expected)
    assert torch.equal(made.project(loaded.region_tokens(tokens, boxes)), expected)
    assert loaded.region_tokens(tokens, boxes).shape == (2, 3, WIDTH)
    with_prefix = torch.cat([torch.full((2, 1, WIDTH), 9.0), tokens], 1)
    assert torch.equal(loaded(with_prefix, boxes), expected)


@pytest.mark.parametrize("kind", ["self", "cross", "placed"])
@torch.no_grad()
def test_phrases_find_the_boxes_that_the_trained_head_finds(kind: str, travelled: Any) -> None:
    made, (tokens, _, phrases) = prompter(kind), case()
    head = stirred(BoxHead(JOINT))
    asked = made.ask(tokens)
    expected = torch.stack([head(made.phrases(asked, phrase)) for phrase in phrases.unbind(1)], 1)
    torch.testing.assert_close(travelled(made, head).grounded(tokens, phrases), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_sizes_and_waves_other_than_the_defaults_travel_too(travelled: Any, tmp_path: Path) -> None:
    made, (tokens, boxes, _) = prompter("self", mlp_ratio=2.3, frequencies=(1.0, 9.0), eps=1e-5), case()
    assert torch.equal(travelled(made)(tokens, boxes), made(tokens, boxes))
    config = json.loads((tmp_path / "prompter.json").read_text())
    assert config["box_frequencies"] == [1.0, 9.0] and config["norm_eps"] == 1e-5
    assert int(config["mlp_ratio"] * WIDTH) == made.fc1.out_features == 147
    assert (config["kind"], config["joint"], config["region_scale"], config["padded"]) == ("self", JOINT, 14.5, True)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_locfast_reads_it_back_as_its_own_module(kind: str, tmp_path: Path) -> None:
    made, head = prompter(kind), stirred(BoxHead(JOINT))
    written(tmp_path, made, None if kind == "roi" else head)
    again, (tokens, boxes, _) = load_prompter(tmp_path), case()
    assert type(again) is type(made) and not again.training
    assert torch.equal(again(tokens, boxes), made(tokens, boxes))
    found = load_box_head(tmp_path)
    assert (found is None) == (kind == "roi")
    assert found is None or all(torch.equal(a, b) for a, b in zip(found.parameters(), head.parameters(), strict=True))


def test_a_folder_without_a_prompter_gives_none_and_half_of_one_is_told(tmp_path: Path) -> None:
    assert load_prompter(tmp_path) is None and load_box_head(tmp_path) is None
    written(tmp_path, prompter("self"))
    (tmp_path / "prompter.safetensors").unlink()
    with pytest.raises(UserError, match=r"has prompter\.json and no prompter\.safetensors"):
        load_prompter(tmp_path)


def test_the_file_holds_the_code_that_trained_and_neither_locfast_nor_pickle() -> None:
    text = standalone_text()
    code = Path(prompter_code.__file__).read_text(encoding="utf-8").partition("import annotations\n")[2]
    assert code in text
    imports = [line.strip() for line in text.splitlines() if line.strip().startswith(("import ", "from "))]
    assert not [line for line in imports if "locfast" in line or "pickle" in line or "safetensors" in line]


@torch.no_grad()
def test_it_runs_where_neither_locfast_nor_safetensors_can_be_imported(tmp_path: Path) -> None:
    made, (tokens, boxes, phrases) = prompter("self"), case()
    head = stirred(BoxHead(JOINT))
    written(tmp_path / "out", made, head)
    asked = made.ask(tokens)
    grounded = torch.stack([head(made.phrases(asked, phrase)) for phrase in phrases.unbind(1)], 1)
    inputs = {"tokens": tokens, "boxes": boxes, "phrases": phrases, "regions": made(tokens, boxes), "found": grounded}
    save_file(inputs, tmp_path / "case.safetensors")
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("locfast", "safetensors", "timm", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from pathlib import Path
from cloc_prompter import load, read_safetensors
case = read_safetensors(Path("case.safetensors"))
prompter = load({str(tmp_path / "out")!r})
print(float((prompter.regions(case["tokens"], case["boxes"]) - case["regions"]).abs().max()))
print(float((prompter.grounded(case["tokens"], case["phrases"]) - case["found"]).abs().max()))
"""
    path = f"{tmp_path / 'out'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    assert all(float(line) <= 1e-6 for line in told.stdout.split())


@pytest.mark.parametrize("dtype, off", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_give_the_same_to_their_rounding_and_train(
    kind: str, dtype: torch.dtype, off: float, travelled: Any
) -> None:
    """`off`: four times the rounding of one product, which is 2**-9 in bf16 and 2**-12 in fp16."""
    made, (tokens, boxes, _) = prompter(kind), case()
    loaded = travelled(made).to(dtype)
    with torch.no_grad():
        expected = made(tokens, boxes)
    found = loaded(tokens.to(dtype), boxes)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < off * expected.norm()
    found.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.project.parameters())
    if kind != "roi":
        assert loaded.prompter.corners.rates.dtype == torch.float32
        assert loaded.prompter.qkv.weight.grad.abs().max() > 0


def test_what_does_not_fit_is_refused(travelled: Any) -> None:
    loaded, (tokens, boxes, phrases) = travelled(prompter("self")), case()
    with pytest.raises(ValueError, match="boxes are torch.bfloat16, which cannot tell two pixels apart"):
        loaded(tokens, boxes.bfloat16())
    with pytest.raises(ValueError, match=r"trained on 16 patch tokens of width 64 \(4 x 4\), with 1 prefix"):
        loaded(tokens[:, :9], boxes)
    with pytest.raises(ValueError, match="without grounding"):
        loaded.grounded(tokens, phrases)


def test_weights_of_another_prompter_are_refused(travelled: Any, tmp_path: Path) -> None:
    travelled(prompter("self"))
    config = json.loads((tmp_path / "prompter.json").read_text())
    (tmp_path / "prompter.json").write_text(json.dumps({**config, "kind": "roi"}))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module_of(tmp_path).load(tmp_path)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (64, 64), (200, 31), (1, 300), (301, 300)])
@pytest.mark.parametrize("frame", [(64, 64), (48, 96)])
def test_pixels_and_boxes_are_padded_as_the_data_layer_pads_them(
    size: tuple[int, int], frame: tuple[int, int], travelled: Any, tmp_path: Path
) -> None:
    travelled(prompter("self"))
    module = sys.modules["travelled_prompter"]
    config = {**json.loads((tmp_path / "prompter.json").read_text()), "image_size": list(frame)}
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    view = View(frame, FRAME.mean, FRAME.std, crop="pad")
    how = plan(view, size, (0.9, 0.0))
    expected = torch.from_numpy(place(resize(levels, how), how)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(part)[:, None, None] for part in (FRAME.mean, FRAME.std))
    pixels, in_frame = module.pad_image(Image.fromarray(levels), config)
    levels_off = ((pixels * std + mean - expected) * 255).abs()
    # the data layer resizes images that shrink a lot with PIL, whose rounding differs by a level
    assert levels_off.max() < 1.01 and levels_off.mean() < 0.2
    again, _ = module.pad_image(torch.from_numpy(levels).permute(2, 0, 1), config)
    assert torch.equal(pixels, again)
    boxes = torch.tensor([[0, 0, size[1], size[0]], [0.2 * size[1], 0.5 * size[0], 0.7 * size[1], size[0]]])
    rows, flip = torch.zeros(2, dtype=torch.int64), torch.tensor([False])
    geometry = Geometry(torch.tensor([how.box]), torch.tensor([how.inside]).float(), flip, torch.tensor([size]), frame)
    carried, _ = carry(geometry, rows, boxes.double())
    torch.testing.assert_close(
        in_frame(boxes), (carried / torch.tensor([frame[1], frame[0]] * 2)).float(), rtol=0, atol=1e-6
    )


def test_a_mask_becomes_the_box_around_it(travelled: Any) -> None:
    travelled(prompter("self"))
    module = sys.modules["travelled_prompter"]
    masks = torch.zeros(3, 20, 30)
    masks[0, 4, 7] = 1  # a point
    masks[1, 2:5, 10:20] = 1
    masks[2, 0, 0] = masks[2, 19, 29] = 1  # a free form, far apart
    assert module.mask_boxes(masks).tolist() == [[7, 4, 8, 5], [10, 2, 20, 5], [0, 0, 30, 20]]
    with pytest.raises(ValueError, match="without a pixel"):
        module.mask_boxes(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("projected", [True, False])
@torch.no_grad()
def test_the_sampler_for_ferret_reads_the_boxes_around_its_masks(
    projected: bool, travelled: Any, tmp_path: Path
) -> None:
    """Ferret's masks have x first; an image without any gives None."""
    loaded, (tokens, _, _) = travelled(prompter("self")), case()
    module = sys.modules["travelled_prompter"]
    sampler = module.RegionSampler(tmp_path, 40, projected=projected)
    masks = torch.zeros(2, 100, 50)  # of an image 100 px wide and 50 px high
    masks[0, 10:20, 5:25] = 1
    masks[1, 99, 0] = 1
    nothing, found = sampler(tokens, [[], list(masks)], original_dtype=torch.float32, return_dtype=torch.float32)
    read = loaded.regions if projected else loaded.region_tokens
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.5], [0.99, 0.0, 1.0, 0.02]]])
    assert nothing is None and found.shape == (2, 40)
    torch.testing.assert_close(found, sampler.output(read(tokens[1:], boxes)[0]), rtol=1e-5, atol=1e-5)
    padded = module.RegionSampler(tmp_path, 40, projected=projected, padded=True)
    padded.output.load_state_dict(sampler.output.state_dict())
    framed = module.pad_boxes(boxes * torch.tensor([100.0, 50, 100, 50]), (50, 100), loaded.config)
    assert framed[0, 0, 1] == pytest.approx(0.25 + 0.05)  # a quarter of the frame lies above the image
    (found,) = padded(tokens[1:], [list(masks)])
    torch.testing.assert_close(found, sampler.output(read(tokens[1:], framed)[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_trains_with_a_language_model_and_its_weights_come_back(
    dtype: torch.dtype, travelled: Any, tmp_path: Path
) -> None:
    travelled(prompter("self"), stirred(BoxHead(JOINT)))
    module = sys.modules["travelled_prompter"]
    sampler = module.RegionSampler(tmp_path, 40).to(dtype)
    mask = torch.zeros(30, 20)
    mask[3:9, 4:12] = 1
    (found,) = sampler(case()[0][:1].to(dtype), [[mask]])
    found.float().square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in sampler.parameters())
    assert [name for name, parameter in sampler.named_parameters() if not parameter.requires_grad] == [
        "prompter.prompter.phrase.weight",
        "prompter.prompter.phrase.bias",
    ]
    again = module.RegionSampler(tmp_path, 40).to(dtype)
    again.load_state_dict(sampler.state_dict())
    (once_more,) = again(case()[0][:1].to(dtype), [[mask]])
    assert torch.equal(once_more, found)


def test_a_prompter_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    made = prompter("self")
    made.project.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(RuntimeError, match="the exported prompter does not compute what was trained"):
        written(tmp_path, made)
