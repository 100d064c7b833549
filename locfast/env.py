"""`python -m locfast.env`: what is installed, what was built, and which backend each op would take. Paste it whole."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import locfast
from locfast.cli import command

REQUIRED = ("torch", "torchvision", "triton", "timm", "safetensors", "numpy", "pillow", "tyro", "rich")
OPTIONAL = (
    "tensorboard",
    "wandb",
    "webdataset",
    "open_clip_torch",
    "transformers",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "flash-attn",
    "xformers",
    "apex",
)


def environment() -> dict[str, dict[str, str]]:
    """Sections of the report: versions, optional packages, GPUs, build, and the backend of every op by device."""
    import torch

    sections = {
        "versions": {
            "locfast": f"{locfast.__version__} ({_commit() or 'not a git checkout'})",
            "python": f"{platform.python_version()} on {platform.platform()}",
            **{name: _version(name) for name in REQUIRED},
            "CUDA of torch": str(torch.version.cuda or "none (CPU build)"),
        },
        "optional": {name: _version(name) for name in OPTIONAL},
        "GPUs": _gpus(),
        "build": _build(),
        "kernels on cpu, fp32": _kernels("cpu", torch.float32),
    }
    if torch.cuda.is_available():
        sections["kernels on cuda, bf16"] = _kernels("cuda", torch.bfloat16)
    return sections


@command
def main() -> None:
    argparse.ArgumentParser(prog="python -m locfast.env", description=__doc__).parse_args()
    for title, rows in environment().items():
        print(f"{title}:")
        if title == "optional":
            there = {name: version for name, version in rows.items() if version != "not installed"}
            absent = [name for name in rows if name not in there]
            rows = there | ({"not installed": ", ".join(absent)} if absent else {})
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """The commit of the checkout that is running, with "-dirty" for changed files; None outside a checkout."""
    root = Path(locfast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"none": "torch sees no CUDA device"}
    gpus = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        gpus[f"cuda:{index}"] = f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
    return gpus


def _build() -> dict[str, str]:
    """What locfast/_build.json says of the compiled ops, and whether they load in this torch."""
    from locfast.kernels import _backend

    failure = _backend.library_failure()
    loads = {"loads": "yes" if failure is None else f"no: {failure}"}
    path = _backend.package_file("_build.json")
    if path is None:
        return {"compiled ops": "none (running from sources that were not installed)"} | loads
    build = json.loads(path.read_text())
    if not build["native"]:
        return {"compiled ops": f"none: {build['reason']}"} | loads
    return {
        "compiled ops": f"CUDA {build['cuda']}, against torch {build['torch']}",
        "architectures": build["architectures"].replace(";", " "),
        "commit": build["commit"] or "unknown",
    } | loads


def _kernels(device: str, dtype: object) -> dict[str, str]:
    from locfast.kernels import _backend

    return _backend.describe(device, dtype)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
