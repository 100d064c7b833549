"""The training methods, each one nn.Module behind the face of `base.Method`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from locfast.errors import UserError, suggest

if TYPE_CHECKING:
    from locfast.methods.base import Method

METHODS = {"maskembed": ("locfast.methods.maskembed", "MaskEmbed")}


def create_method(
    name: str,
    config: Any,
    *,
    model: str,
    pretrained: bool = True,
    image_size: int | None = None,
    seed: int = 0,
) -> Method:
    """The method called `name` around the backbone `model`.

    Raises:
        UserError: no such method, or the method cannot use the model.
    """
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'{suggest(name, METHODS)} Known: {', '.join(METHODS)}")
    module, class_name = METHODS[name]
    method: Method = getattr(importlib.import_module(module), class_name)(
        config, model=model, pretrained=pretrained, image_size=image_size, seed=seed
    )
    return method
