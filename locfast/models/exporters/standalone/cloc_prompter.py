"""The region prompter that CLOC trained, in plain PyTorch; locfast wrote it and is not needed.

    prompter = load(FOLDER)                              # FOLDER holds prompter.json and prompter.safetensors
    pixels, place = pad_image(image, prompter.config)    # [3, H, W], as the tower was trained on
    boxes = place(torch.tensor([[40.0, 12, 96, 80]]))    # pixels of the image -> [0, 1] of the padded frame
    z = prompter(tokens, boxes[None])                    # [1, N, C] and [1, M, 4] -> [1, M, E]

`tokens` are the tower's patch tokens, last block, behind the final norm; boxes are left, top, right, bottom. `regions`,
which a call runs, gives the paper's z in the joint space of images and texts (CLOC, sections 3.3 and 5.3); normalise
it, and compare it with text embeddings. `region_tokens` gives what stands before the projection, at the tower's width.
torchvision is needed for the RoI-align baseline alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locfast.models.prompter import BoxHead, CrossPrompter, Prompter, RoiPooler, wide  # an export has their code


class WideNorm(nn.LayerNorm):
    """In fp32, whatever the weights are: CPUs refuse an fp32 input with weights of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


class ClocPrompter(nn.Module):
    """A prompter and, where one was trained, its box head. config: what prompter.json holds.

    B images, N patches, C the tower's width, M prompts an image, E the joint width. Tokens with the tower's prefix
    tokens in front are taken too, and the prefix is left out. Weights may be fp32 or half precision; the waves of a
    box's code stay in fp32, and boxes must be: 64 cycles across the frame are lost on the 8 bits of bf16.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        prompter: Any = build_prompter(config)
        self.prompter = prompter
        self.box_head = BoxHead(config["joint"]) if config["box_head"] else None
        self.project = self.prompter.project
        self.prompter.project = nn.Identity()
        for module in self.prompter.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = WideNorm

    def forward(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """`regions`."""
        return self.regions(tokens, boxes)

    def regions(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """Tokens [B, N, C] and boxes [B, M, 4] in [0, 1] of the frame -> embeddings [B, M, E], not normalised."""
        with self._precision():
            return self.project(self.region_tokens(tokens, boxes))

    def region_tokens(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        """The same before the projection: [B, M, C]."""
        if boxes.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"boxes are {boxes.dtype}, which cannot tell two pixels apart: give them in float32")
        with self._precision():
            return self.prompter(self._patches(tokens), boxes)

    def grounded(self, tokens: Tensor, phrases: Tensor) -> Tensor:
        """Tokens [B, N, C] and phrases' text embeddings [B, M, E], not normalised -> boxes [B, M, 4].

        In [0, 1] of the frame, unbounded. Raises ValueError where the run trained no grounding.
        """
        if self.box_head is None:
            raise ValueError("this prompter was trained without grounding: it finds no box for a phrase")
        with self._precision():
            asked = self.prompter.ask(self._patches(tokens))
            found = [self.prompter.phrases(asked, phrase.to(self._dtype)) for phrase in phrases.unbind(1)]
            return self.box_head(self.project(torch.stack(found, 1)))

    def _patches(self, tokens: Tensor) -> Tensor:
        height, width = self.config["grid"]
        patches, prefix = height * width, self.config["num_prefix_tokens"]
        if tokens.shape[1] not in (patches, prefix + patches) or tokens.shape[2] != self.config["width"]:
            raise ValueError(
                f"tokens {list(tokens.shape)}: this prompter was trained on {patches} patch tokens of width "
                f"{self.config['width']} ({height} x {width}), with {prefix} prefix tokens in front or none"
            )
        return tokens[:, -patches:].to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    def _precision(self) -> Any:
        """Autocast where the weights themselves are half precision; norms, softmax and means are then in fp32."""
        half = self._dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.project.weight.device.type, dtype=self._dtype) if half else nullcontext()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClocPrompter:
        corners = getattr(self.prompter, "corners", None)
        rates = None if corners is None else corners.rates
        super()._apply(fn, recurse)
        if corners is not None and rates is not None:
            corners.rates = rates.to(corners.rates.device)
        return self


class RegionSampler(nn.Module):
    """The prompter where Ferret has its visual sampler, with the same call; any kind of reference becomes a box.

    output_dim: the language model's width, which a new linear layer leads to. projected: it reads z, as the paper has
    it; else `region_tokens`. padded: images are padded as in training; else squashed to the frame, as Ferret does.
    """

    def __init__(self, folder: str | Path, output_dim: int, *, projected: bool = True, padded: bool = False) -> None:
        super().__init__()
        self.prompter = load(folder)
        self.prompter.box_head = None
        self.projected, self.padded = projected, padded
        unused = [getattr(self.prompter.prompter, "phrase", None), None if projected else self.prompter.project]
        for part in unused:  # a trainer that shards gradients waits for all that may have some
            if part is not None:
                part.requires_grad_(False)
        self.output = nn.Linear(self.prompter.config["joint" if projected else "width"], output_dim)

    def forward(
        self,
        feature_map: Tensor,
        region_masks: list[list[Tensor]],
        original_dtype: torch.dtype | None = None,
        return_dtype: torch.dtype | None = None,
    ) -> list[Tensor | None]:
        """Tokens [B, N, C] and each image's masks [w, h] (x first) -> each image's [M, output_dim], None without masks.

        A mask has the image's own size, or where images are squashed any size.
        """
        found: list[Tensor | None] = []
        for tokens, masks in zip(feature_map, region_masks, strict=True):
            if not len(masks):
                found.append(None)
                continue
            width, height = masks[0].shape
            boxes = mask_boxes(torch.stack([mask.T for mask in masks]))
            if self.padded:
                boxes = pad_boxes(boxes, (height, width), self.prompter.config)
            else:
                boxes = boxes / boxes.new_tensor([width, height, width, height])
            read = self.prompter.regions if self.projected else self.prompter.region_tokens
            regions = read(tokens[None], boxes[None])[0]
            found.append(self.output(regions.to(self.output.weight.dtype)).to(return_dtype or tokens.dtype))
        return found


def build_prompter(config: dict[str, Any]) -> Prompter | CrossPrompter | RoiPooler:
    """An untrained prompter of the kind and sizes that prompter.json says."""
    width, joint = config["width"], config["joint"]
    if config["kind"] == "roi":
        return RoiPooler(width, joint, tuple(config["grid"]), size=config["roi_size"], eps=config["norm_eps"])
    kinds: dict[str, type[Prompter] | type[CrossPrompter]] = {"self": Prompter, "cross": CrossPrompter}
    shape: dict[str, Any] = {"mlp_ratio": config["mlp_ratio"], "frequencies": tuple(config["box_frequencies"])}
    shape["grid"] = tuple(config["grid"]) if config["add_places"] else None
    return kinds[config["kind"]](width, joint, **shape, eps=config["norm_eps"])


def load(folder: str | Path) -> ClocPrompter:
    """The prompter of an export, in evaluation mode, fp32, on the CPU. Raises RuntimeError for weights of others."""
    module = ClocPrompter(json.loads(Path(folder, "prompter.json").read_text(encoding="utf-8")))
    state = read_safetensors(Path(folder, "prompter.safetensors"))
    last = "prompter.project."  # which here stands beside the prompter
    module.load_state_dict({key.replace(last, "project."): tensor for key, tensor in state.items()})
    return module.eval()


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The fp32 tensors of a safetensors file by name: a length, a JSON header, and bytes that nothing executes."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{file}: {name} is {entry['dtype']}, and a prompter's weights are written as F32")
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(data, dtype=torch.float32, count=(last - first) // 4, offset=start + first)
        found[name] = flat.reshape(entry["shape"]).clone()
    return found


def pad_image(image: Any, config: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """An image resized by its long side, in the middle of a frame of the mean colour, and what places boxes in it.

    image: a PIL image, or RGB levels [3, h, w] uint8. Gives pixels [3, H, W] fp32, normalised for the tower, and a
    function as `pad_boxes` for boxes of this image.
    """
    if not isinstance(image, Tensor):
        rgb = image.convert("RGB")
        image = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
        image = image.permute(2, 0, 1)
    size = (image.shape[1], image.shape[2])
    left, top, right, bottom = _inside(size, config["image_size"])
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    resized = F.interpolate(image[None], (bottom - top, right - left), mode=mode, antialias=True)[0]
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    frame = (255 * mean).round().clamp(0, 255).expand(3, *config["image_size"]).clone()
    frame[:, top:bottom, left:right] = resized.float()
    return (frame / 255 - mean) / std, lambda boxes: pad_boxes(boxes, size, config)


def pad_boxes(boxes: Tensor, size: tuple[int, int], config: dict[str, Any]) -> Tensor:
    """Boxes [..., 4] in pixels of an image of `size` (height, width) -> in [0, 1] of the padded frame, fp32."""
    left, top, right, bottom = _inside(size, config["image_size"])
    height, width = config["image_size"]
    scale = torch.tensor([(right - left) / size[1], (bottom - top) / size[0]] * 2, dtype=torch.float64)
    start = torch.tensor([left, top] * 2, dtype=torch.float64)
    frame = torch.tensor([width, height] * 2, dtype=torch.float64)
    scale, start, frame = (part.to(boxes.device) for part in (scale, start, frame))
    return ((boxes.double() * scale + start) / frame).float()


def mask_boxes(masks: Tensor) -> Tensor:
    """The boxes around masks [M, h, w], true or above zero inside: [M, 4] fp32, in pixels, ends exclusive.

    So points (a few pixels), strokes and free forms become boxes. Raises ValueError for a mask without a pixel.
    """
    edges = []
    for mask in masks > 0:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if not len(rows):
            raise ValueError("a mask without a pixel has no box")
        edges.append(torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]))
    return torch.stack(edges).float()


def _inside(size: tuple[int, int], frame: list[int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the resized image in the frame: whole pixels, the short side rounded down."""
    (height, width), (high, wide_) = size, frame
    if height * wide_ > width * high:
        new = high, max(1, width * high // height)
    else:
        new = max(1, height * wide_ // width), wide_
    top, left = (high - new[0]) // 2, (wide_ - new[1]) // 2
    return left, top, left + new[1], top + new[0]
