"""Builds the C++ extension ``acpo_kernels._C`` with CMake; everything else about the package is in pyproject.toml.

``ACPO_NO_EXT=1`` installs without it: every operation then runs on the PyTorch reference, and the segmenter is missing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


def compiler() -> str:
    """The C++20 compiler that CMake will use; without one, a single line that names what to install."""
    name = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    wanted = "install g++ >= 11 or clang++ >= 14 (Debian, Ubuntu: apt-get install g++), or set ACPO_NO_EXT=1 to install the PyTorch reference alone"
    if name is None:
        sys.exit(f"acpo needs a C++20 compiler and found none: {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <span>\n#include <bit>\nint main() { return std::span<int>().size() + std::popcount(0u); }\n")
        try:
            subprocess.run([*name.split(), "-std=c++20", str(probe), "-o", str(Path(folder, "probe"))], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            sys.exit(f"acpo needs a C++20 compiler and {name!r} does not compile C++20: {wanted}")
    return name


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement: only the build needs it

        compiler()
        if shutil.which("cmake") is None:
            sys.exit("acpo needs CMake >= 3.18 and found none: pip install cmake, or drop --no-build-isolation")
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(HERE), "-B", str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # A build folder that was kept names the ninja of its own build environment, which is gone: pip makes a new one each time.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


without_extension = os.environ.get("ACPO_NO_EXT", "0") not in ("", "0")
setup(
    ext_modules=[] if without_extension else [Extension("acpo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
