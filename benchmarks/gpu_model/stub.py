"""Tell a CPU build of PyTorch that there is a GPU, for fake tensors only.

It changes the whole process, so it belongs into one of its own. A build of PyTorch for GPUs needs
no stub, but a GPU, because its device calls are real.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("stub.cpp")


def missing_compiler() -> str:
    """Say what the stub cannot be built without; empty if nothing is missing."""
    return "" if shutil.which(_compiler()) else f"no C++ compiler ({_compiler()})"


def register_gpu() -> None:
    """Build the stub if it is not built yet, load it and then PyTorch. Call it before that.

    Raises:
        RuntimeError: PyTorch is loaded already, or the stub cannot be built.
    """
    if "torch" in sys.modules:
        raise RuntimeError("register_gpu() must come before PyTorch is imported")
    package = _torch_folder()
    if _version(package).partition("+")[2].startswith("cu"):
        return
    stub = ctypes.CDLL(str(_built(package)))
    import torch  # noqa: F401

    stub.register_gpu()


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _version(package: Path) -> str:
    # Read without importing it.
    found: dict[str, str] = {}
    exec((package / "version.py").read_text(encoding="utf-8"), found)
    return found["__version__"]


def _built(package: Path) -> Path:
    parts = [str(package), _version(package), _SOURCE.read_text(encoding="utf-8")]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretended-gpu-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    if problem := missing_compiler():
        raise RuntimeError(problem)
    include, lib = package / "include", package / "lib"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / library.name
        command = [_compiler(), "-O1", "-w", "-std=c++20", "-shared", "-fPIC", str(_SOURCE)]
        command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}"]
        command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}", "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the stub does not compile: {result.stderr[-2000:]}")
        built.replace(library)  # Two processes may build it at once; each file is whole.
    return library
