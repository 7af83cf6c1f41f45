"""Fetches the peers for a machine without network: python -m benchmarks.peers.fetch FOLDER [--cutlass] [--python 3.12]

FOLDER/*.whl     TRL, Liger, cut-cross-entropy, quack and what they need beside torch, triton and transformers (4 MB), for Linux on x86-64
FOLDER/files/    single files of verl, Unsloth-zoo and flash-attn, which do not install beside ours (ACPO_PEER_FILES)
--cutlass        nvidia-cutlass-dsl as well (100 MB): without it quack, and Liger's head on Hopper, are absent

Needs pip, and torch in this environment for flash-attn, whose source package runs its setup when it is fetched.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from . import FILES

WHEELS = (
    "trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "quack-kernels==0.6.5", "datasets==5.2.0", "multiprocess==0.70.19",
    "dill==0.4.1",
)  # fmt: skip
CUTLASS = (
    "nvidia-cutlass-dsl==4.8.1", "nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1", "nvidia-cutlass-dsl-libs-cu13==4.8.1",
    "apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5",
)  # fmt: skip
SOURCES = {"verl": "verl==0.9.1", "unsloth_zoo": "unsloth-zoo==2026.10.9", "flash-attn": "flash-attn==2.8.3"}


def pip_download(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *arguments], check=True, env=environment)


def member(archive: Path, path: str) -> bytes:
    """The file that ends in `path`, from a wheel or a source package."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(path)
    with tarfile.open(archive) as tar:
        name = next(n for n in tar.getnames() if n.endswith("/" + path))
        return io.BufferedReader(tar.extractfile(name)).read()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.fetch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cutlass", action="store_true", help="nvidia-cutlass-dsl as well, 100 MB")
    parser.add_argument("--python", default="3.12", help="version of the machine that they are for")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_24", "_2_17", "2014")]
    pip_download(
        options.folder, "--only-binary=:all:", "--implementation=cp", f"--python-version={options.python}", *platforms, *WHEELS,
        *(CUTLASS if options.cutlass else ()),
    )  # fmt: skip
    failed = []
    for name, requirement in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                pip_download(Path(folder), *(("--no-binary=:all:", "--no-build-isolation") if name == "flash-attn" else ()), requirement)
            except subprocess.CalledProcessError:
                failed.append(requirement)
                continue
            (archive,) = Path(folder).iterdir()
            target = options.folder / "files" / FILES[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(member(archive, FILES[name]))
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{options.folder}: {size / 2**20:.1f} MiB" + "".join(f"; not fetched: {requirement}" for requirement in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
