"""pip install . → CMake. Everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, PATH, the usual place, then the pip package nvidia-cuda-nvcc.

    That package is whole from CUDA 13 on, with nvidia-cuda-cccl beside it; CUDA 12's has an assembler only.
    """
    candidates = [os.environ.get("CUDACXX", "")]
    candidates += [os.path.join(os.environ[v], "bin", "nvcc") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    # purelib: pip hides the environment's own packages from an isolated build's sys.path.
    places = [*filter(None, sys.path), sysconfig.get_path("purelib")]
    candidates += [str(p) for d in places for p in sorted(Path(d).glob("nvidia/*/bin/nvcc"), reverse=True)]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if os.environ.get("IGPT_CUDA", "1") != "0" else None
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DIGPT_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DIGPT_CUDA_ARCHS={os.environ.get('IGPT_CUDA_ARCHS', '').replace(',', ';')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure += os.environ.get("IGPT_CMAKE_ARGS", "").split()
        print(f"igpt_fast: CUDA backend {'with ' + nvcc if nvcc else 'skipped: nvcc not found'}", file=sys.stderr)
        # A build environment leaves its cmake behind in the cache when it goes: start afresh then.
        if subprocess.run(configure).returncode != 0:
            shutil.rmtree(work)
            subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work), "--target", "_C"], check=True)


setup(ext_modules=[Extension("igpt_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
