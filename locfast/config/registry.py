"""Which methods there are, and which dataclass holds a method's own fields. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

from locfast.config.base import MethodConfig, TrainConfig
from locfast.errors import UserError, suggest

METHODS: dict[str, tuple[str, str]] = {
    "clip": ("locfast.config.clip:ClipConfig", "locfast.methods.clip:Clip"),
    "cloc": ("locfast.config.cloc:ClocConfig", "locfast.methods.cloc:Cloc"),
    "lut": ("locfast.config.lut:LUTConfig", "locfast.methods.lut:LUT"),
    "maskembed": ("locfast.config.maskembed:MaskEmbedConfig", "locfast.methods.maskembed:MaskEmbed"),
    "uta": ("locfast.config.uta:UTAConfig", "locfast.methods.uta:UTA"),
}
"""Method name -> where its config class and its own class are, as module:name."""


def find_class(place: str) -> type:
    """The class at `module:name`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def method_config_class(name: str) -> type[MethodConfig]:
    """The config dataclass of method `name`; UserError with the nearest name when there is none."""
    if name not in METHODS:
        raise UserError(f"--method {name}: no such method{suggest(name, METHODS) or '.'} Known: {', '.join(METHODS)}.")
    return find_class(METHODS[name][0])


@functools.cache
def run_config_class(name: str) -> type[TrainConfig]:
    """TrainConfig and one more field, named like the method, that holds the method's own fields."""
    method_config = method_config_class(name)
    section = (name, method_config, dataclasses.field(default_factory=method_config))
    return dataclasses.make_dataclass(
        "RunConfig",
        [section],
        bases=(TrainConfig,),
        namespace={"__doc__": TrainConfig.__doc__},
        frozen=True,
        kw_only=True,
    )


def make_config(method: str = "maskembed", **fields: Any) -> TrainConfig:
    """A run's config from Python: `make_config("maskembed", model="...", maskembed=MaskEmbedConfig(softcap=None))`."""
    return run_config_class(method)(method=method, **fields)


def method_config(config: TrainConfig) -> MethodConfig:
    """The method's own fields inside a run's config."""
    return getattr(config, config.method)
