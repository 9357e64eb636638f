"""Builds native.cpp once, 4 to 8 s with g++, and loads it.

The library lies in NPU_SIM_CACHE, or else in the temporary folder; its name has the hash of what it was made from.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")


def load() -> ctypes.CDLL:
    """The library. Raises ImportError, saying what is missing, where it cannot be built."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("NPU_SIM_CACHE") or Path(tempfile.gettempdir()) / f"npu_sim-{os.getuid()}")
    built = folder / f"native-{key}.so"
    if not built.exists():
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise ImportError("the stand-in for torch_npu is built with g++, and there is none: apt-get install g++")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        root, part = Path(torch.__file__).parent, built.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include",
             f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", str(SOURCE), "-o", str(part),
             f"-L{root}/lib", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"the stand-in for torch_npu does not compile with torch {torch.__version__}: {done.stderr[:2000]}")
        part.replace(built)    # whole or absent, whoever else is building
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
