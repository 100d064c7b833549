"""The training methods, each one nn.Module behind the face of `base.Method`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from locfast.config.registry import METHODS, find_class, method_config_class

if TYPE_CHECKING:
    from locfast.methods.base import Method


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
    method_config_class(name)  # refuses unknown names
    method: Method = find_class(METHODS[name][1])(
        config, model=model, pretrained=pretrained, image_size=image_size, seed=seed
    )
    return method
