"""The build backend: scikit-build-core, which also asks for torch where there is a CUDA compiler to use its headers.

An isolated build on a machine without nvcc then downloads no torch; one with nvcc gives the wheel with compiled ops.
With --no-build-isolation the torch that is installed serves.
"""

import os
import shutil

from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.build import get_requires_for_build_editable as _requires_editable
from scikit_build_core.build import get_requires_for_build_wheel as _requires_wheel


def _torch() -> list[str]:
    return ["torch>=2.10"] if os.environ.get("CUDACXX") or shutil.which("nvcc") else []


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*_requires_editable(config_settings), *_torch()]


__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
