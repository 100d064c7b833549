"""From the name of a model to a timm model without its head, weights loaded or drawn from a seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import locfast
from locfast.errors import UserError, suggest
from locfast.models.checkpoint_file import find_weights, load_checkpoint_file

log = logging.getLogger(__name__)

DEMO_TEACHER = Path(locfast.__file__).parent / "demo" / "teacher"
"""The small ViT that locfast brings, in timm's local-dir form."""

MOCO_V3 = {
    "vit_base_patch16_224.mocov3": "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar",
}
"""MoCo v3's own file (CC BY-NC 4.0), which timm has no tag for; a copy on disk is vit_base_patch16_224@FILE."""

EVA02_GIANT = "eva02_giant_patch14_224"
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    EVA02_GIANT: (
        "eva02_large_patch14_224",
        {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 4096 / 1408 + 1e-9},
    ),
}
"""Architectures that timm has in other sizes only: name -> timm's name and its arguments. EVA-02's blocks at the size
of EVA-01's giant are UTA's g/14 (the 1e-9 keeps 4096 from being rounded down)."""

WRAPPED_MODULES = ("vision_transformer", "eva", "beit", "deit")
"""timm's files whose models are plain Vision Transformers; others are refused before anything is downloaded."""


def create_timm_model(
    name: str, pretrained: bool, *, seed: int = 0, image_size: int | None = None, **model_args: Any
) -> Any:
    """The timm model called `name`, without a head; see `load_backbone`. The global RNG is left as it was.

    num_classes among `model_args`: None keeps the head that the model has, with its weights.
    Its `_model_args` record what, beside the architecture's name, builds it again.
    """
    if image_size is not None:
        if image_size < 1:
            raise UserError(f"--model {name}: an image size of {image_size} px was asked for. Type a positive one.")
        model_args["img_size"] = image_size
    with seeded(seed):
        if name == "demo":
            return _from_folder(name, DEMO_TEACHER, pretrained, model_args)
        if name.startswith(("hf-hub:", "hf_hub:")):
            return _from_timm(name, pretrained, model_args)
        folder = Path(name.removeprefix("local-dir:")).expanduser()
        if folder.is_dir() or name.startswith("local-dir:"):
            return _from_folder(name, folder, pretrained, model_args)
        architecture, at, file = name.partition("@")
        if at:
            return _from_file(name, architecture, Path(file).expanduser(), pretrained, model_args)
        if name in SIZES:
            return _from_size(name, pretrained, model_args)
        if name in MOCO_V3:
            return _moco_v3(name, pretrained, model_args)
        _check_registered(name)
        return _from_timm(name, pretrained, model_args)


def _from_timm(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """A model of timm's registry or of the Hugging Face hub."""
    try:
        model = _build(name, pretrained, model_args)
    except TypeError as error:
        raise UserError(
            f"--model {name} with {model_args}: timm does not take these arguments ({error}). Leave them out."
        ) from error
    except RuntimeError as error:  # a name that has no weights; a hub config that timm cannot build
        raise UserError(
            f"--model {name}: timm {timm.__version__} cannot make it ({_first_line(error)}). Choose another tag "
            f"of it (timm.list_pretrained('{name.partition('.')[0]}*')), or start from random weights with "
            "--no-pretrained."
        ) from error
    except Exception as error:  # the hub has errors of many kinds: OSError, its HTTP client's, ValueError for names
        raise UserError(
            f"--model {name}: its files could not be fetched ({type(error).__name__}: {_first_line(error)}). Either "
            "there is no network, or the hub has no such model. Check the name at huggingface.co; without a network "
            "type a folder (config.json and model.safetensors), ARCHITECTURE@FILE for a checkpoint file, "
            "--model demo, or --no-pretrained."
        ) from error
    _warn_of_activation(name, model)
    return model


def _from_folder(name: str, folder: Path, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """A model that timm (or `locfast.export`) saved: config.json beside a weights file."""
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"--model {name}: {folder} {'has no config.json' if folder.is_dir() else 'does not exist'}. A local model "
            "is a folder with timm's config.json and model.safetensors, as `python -m locfast.export RUN --to timm` "
            "writes it. For a bare checkpoint type ARCHITECTURE@FILE, for example vit_base_patch16_224@w.safetensors."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        architecture, saved_args = content["architecture"], content.get("model_args", {})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--model {name}: {config} is not a timm model config ({type(error).__name__}: {error}): a JSON object "
            "with the key 'architecture' is needed. Save the model anew with timm or with locfast.export."
        ) from error
    _check_registered(architecture)
    try:
        saved_args = {key: value for key, value in saved_args.items() if key != "num_classes"}  # whoever asks says it
        model = _build(f"local-dir:{folder}", False, {**saved_args, **model_args})
    # a config of another library or of hand, with keys that timm has not
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--model {name}: timm {timm.__version__} cannot build what {config} describes ({_first_line(error)}). "
            "Save the model anew with timm or with locfast.export."
        ) from error
    if pretrained:
        load_checkpoint_file(model, find_weights(folder), name)
    return model


def _from_file(name: str, architecture: str, file: Path, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """A checkpoint file loaded into a named architecture."""
    _check_registered(architecture)
    if not file.is_file():
        raise UserError(
            f"--model {name}: the checkpoint file {file} does not exist{' (it is a folder)' if file.is_dir() else ''}. "
            f"Type {architecture}@ and the path of a .safetensors, .pth or .pth.tar file."
        )
    model = _build(architecture, False, model_args)
    if pretrained:
        if "." not in architecture:  # without a tag, timm's default one, of which these weights are none
            model.pretrained_cfg.update(tag=None, hf_hub_id=None, license=None)
        if load_checkpoint_file(model, file, name) == "mocov3":
            _call_it_moco_v3(model)
    return model


def _from_size(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """One of SIZES, which nobody has published weights of in timm's form."""
    if pretrained:
        raise UserError(f"--model {name}: there are no pretrained weights of it. Start from random ones.")
    architecture, size = SIZES[name]
    model = _build(architecture, False, {**size, **model_args})
    model.pretrained_cfg.update(tag=None, hf_hub_id=None)
    return model


def _moco_v3(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """MoCo v3 from its authors' server, kept in torch's cache."""
    model = _build(name.partition(".")[0], False, model_args)
    _call_it_moco_v3(model)
    if pretrained:
        file = Path(torch.hub.get_dir(), "checkpoints", f"mocov3-{Path(MOCO_V3[name]).name}")
        try:
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(MOCO_V3[name], str(file))
        except OSError as error:
            raise UserError(
                f"--model {name}: {MOCO_V3[name]} could not be fetched ({_first_line(error)}): there is no network, or "
                "the file has moved. Fetch it elsewhere and type vit_base_patch16_224@vit-b-300ep.pth.tar."
            ) from error
        load_checkpoint_file(model, file, name)
    return model


def _build(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """timm's create_model without a head; notes in `_model_args` what built it where timm is too old to do so."""
    args = {"num_classes": 0, **model_args}
    if args["num_classes"] is None:
        del args["num_classes"]
    model: Any = timm.create_model(name, pretrained=pretrained, **args)
    if not hasattr(model, "_model_args"):
        model._model_args = args
    return model


def _call_it_moco_v3(model: Any) -> None:
    """MoCo v3's licence, and the mean and deviation it saw: ImageNet's, where timm's plain ViTs have 0.5 for both."""
    model.pretrained_cfg.update(
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, crop_pct=0.875, tag=None, hf_hub_id=None
    )
    model.pretrained_cfg["license"] = "cc-by-nc-4.0"


def _check_registered(name: str) -> None:
    """Raise UserError unless timm knows architecture and tag, and the architecture is one that locfast can wrap."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*timm.list_models(), *timm.list_pretrained(), *MOCO_V3, *SIZES, "demo"]
        hint = suggest(name, known)
        path = " If it is a folder or a file, it does not exist; hub models are written hf-hub:org/name." * (
            "/" in name
        )
        raise UserError(
            f"unknown model '{name}': timm {timm.__version__} has no such architecture{hint or '.'}{path} `python -c "
            "'import timm; print(timm.list_models(\"vit*\"))'` lists names; --model demo needs no download."
        )
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [model for model in timm.list_pretrained() if model.partition(".")[0] == architecture]
        raise UserError(
            f"unknown pretrained tag '{tag}' of {architecture}{suggest(name, tags)} timm {timm.__version__} has "
            f"{', '.join(tags) or 'no weights for it'}."
        ) from None
    module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    if module in timm.list_modules() and module not in WRAPPED_MODULES:
        raise UserError(
            f"--model {name} comes from timm's {module}, whose models are not plain Vision Transformers. locfast needs "
            "one token a patch through all blocks: a vit_*, deit_*, eva02_* or beit_* model, for example "
            "vit_base_patch16_224."
        )


def _warn_of_activation(name: str, model: Any) -> None:
    """timm loads some QuickGELU weights into a GELU model of the same name; say which name has the right one."""
    notes = " ".join(model.pretrained_cfg.get("notes") or ())
    better = name.replace("_clip_", "_clip_quickgelu_")
    if "QuickGELU" in notes and "quickgelu" not in name and better in timm.list_pretrained():
        log.warning("%s was trained with QuickGELU, but this name runs it with GELU; you may want %s", name, better)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator inside, and put it back; CUDA's generators are not touched at all."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
