"""The wheel as a user gets it: built by pip, unpacked, and run away from the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE_OPS = """
import sys
folder, backends = sys.argv[1], sys.argv[2:]
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, folder)
import torch, locfast
assert locfast.__file__.startswith(folder), locfast.__file__
from locfast.kernels import _backend
from locfast.kernels.mask_embeddings import mask_embeddings
x, position = torch.randn(2, 5, 24), torch.randn(6, 24)
visible = torch.rand(2, 3, 5) < 0.5
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    truth = mask_embeddings(x.to(dtype), visible, position, backend="reference")
    for backend in backends:
        assert torch.equal(mask_embeddings(x.to(dtype), visible, position, backend=backend), truth), (backend, dtype)
from locfast import env
env.environment()
print(torch.__version__, _backend.library_failure())
"""


def build_wheel(source: Path, into: Path, environment: dict[str, str]) -> tuple[Path, str]:
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-build-isolation", "--no-deps", "--verbose"]
    command += ["--wheel-dir", str(into / "dist"), f"--config-settings=build-dir={into / 'build'}"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=into)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (wheel,) = (into / "dist").glob("*.whl")
    return wheel, result.stdout + result.stderr


def use(folder: Path, *backends: str, python: str = sys.executable) -> str:
    environment = os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("LOCFAST_KERNELS", None)
    command = [python, "-c", USE_OPS, str(folder), *backends]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tools_path(*extra: str) -> str:
    """PATH with cmake and ninja of this interpreter's environment in front."""
    return os.pathsep.join([*extra, str(Path(sys.executable).parent), os.environ["PATH"]])


def without_nvcc() -> dict[str, str]:
    folders = [f for f in tools_path().split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    hidden = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    return hidden | {"PATH": os.pathsep.join(folders)}


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> tuple[Path, str]:
    return build_wheel(ROOT, tmp_path_factory.mktemp("pure"), without_nvcc())


@pytest.fixture(scope="module")
def full_wheel(tmp_path_factory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on the PATH")
    return build_wheel(ROOT, tmp_path_factory.mktemp("full"), os.environ | {"PATH": tools_path()})[0]


def test_without_a_cuda_compiler_the_build_says_so_and_the_wheel_works(pure_wheel, tmp_path):
    wheel, output = pure_wheel
    assert "WITHOUT CUDA ops: no CUDA compiler (nvcc) found" in output
    with zipfile.ZipFile(wheel) as archive:
        assert "locfast/_C.so" not in archive.namelist()
        build = json.loads(archive.read("locfast/_build.json"))
        archive.extractall(tmp_path / "wheel")
    assert build["native"] is False
    assert "was not built" in use(tmp_path / "wheel", "auto", "tiled")


def test_wheel_holds_the_kernels_inside_the_package_and_nothing_beside_it(pure_wheel):
    with zipfile.ZipFile(pure_wheel[0]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"locfast", "locfast-0.1.0.dist-info"}
    packed = {name.removeprefix("locfast/kernels/") for name in names if name.startswith("locfast/kernels/")}
    assert packed == {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert len(names) == len(set(names))


def test_wheel_holds_every_file_of_the_package(pure_wheel):
    with zipfile.ZipFile(pure_wheel[0]) as archive:
        names = set(archive.namelist())
    built = {"locfast/_C.so", "locfast/_build.json"}
    sources = {path for path in (ROOT / "locfast").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in sources} - built <= names


def test_torch_has_a_floor_and_no_ceiling(pure_wheel):
    with zipfile.ZipFile(pure_wheel[0]) as archive:
        metadata = Parser().parsestr(archive.read("locfast-0.1.0.dist-info/METADATA").decode())
    (torch,) = (line for line in metadata.get_all("Requires-Dist", []) if re.match(r"torch\W", line))
    assert torch == "torch>=2.10"
    assert metadata["Requires-Python"] == ">=3.11"


def test_source_archive_runs_where_it_is_unpacked(tmp_path):
    pytest.importorskip("scikit_build_core")
    program = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "csrc")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    use(tmp_path / "locfast-0.1.0", "auto")


@pytest.mark.slow
def test_one_wheel_with_compiled_ops_for_every_python_and_torch(full_wheel, tmp_path):
    """Set LOCFAST_OTHER_PYTHONS (separated by colons) to interpreters with other torch versions to try those too."""
    assert full_wheel.name == "locfast-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(full_wheel) as archive:
        build = json.loads(archive.read("locfast/_build.json"))
        archive.extractall(tmp_path / "wheel")
    assert build["native"] is True
    assert build["architectures"] == "80-real;90"
    assert build["cuda"]
    assert build["torch"]
    others = os.environ.get("LOCFAST_OTHER_PYTHONS", "")
    for python in [sys.executable, *filter(None, others.split(os.pathsep))]:
        assert use(tmp_path / "wheel", "auto", "cuda", python=python).strip().endswith("None")


@pytest.mark.slow
def test_library_needs_no_cuda_runtime_and_only_the_stable_abi(full_wheel, tmp_path):
    with zipfile.ZipFile(full_wheel) as archive:
        library = archive.extract("locfast/_C.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if "cuda" in name or "c10" in name]
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert " w aoti_torch_get_current_cuda_stream" in symbols
    # Mangled names of ATen and c10 would tie the library to one release of torch.
    assert not [line for line in symbols.splitlines() if " U " in line and ("_ZN2at" in line or "_ZN3c10" in line)]
