"""Compiling kernels for GPUs that are not there, and reading what came out: `triton.compile` needs no driver, and the triton wheel
carries cuobjdump."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass
class Compiled:
    ptx: str
    registers: int
    stack: int
    shared: int
    local: int
    dynamic: int  # shared memory asked for at launch; `shared` is what the code holds itself
    cubin: bytes
    ttir: str

    def loops(self) -> list[str]:
        """The bodies of the loops: from a label to the branch back to it."""
        found = []
        for label in re.finditer(r"^(\$L__BB\d+_\d+):", self.ptx, re.MULTILINE):
            back = re.search(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", self.ptx[label.end() :])
            if back:
                found.append(self.ptx[label.end() : label.end() + back.end()])
        return found

    def machine_loops(self) -> list[list[str]]:
        """The same in machine instructions: what a warp issues for one turn."""
        lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", cuobjdump("-sass", self.cubin))]
        found = []
        for address, instruction in lines:
            branch = re.match(r"(?:@!?U?P\d+ )?BRA\S* (?:!?U?P\d+, )?(?:`\(.*\)|0x([0-9a-f]+))", instruction)
            if branch and branch[1] and int(branch[1], 16) < address:
                found.append([text for at, text in lines if int(branch[1], 16) <= at <= address])
        return found

    def offsets(self, pointer: str) -> set[str]:
        """The types of the numbers that are added to a pointer of the signature, before it is spread over a tile or not: i32, i64."""
        found, spread = set(), ""  # a name is used again in another branch: the last definition counts
        for line in self.ttir.splitlines():
            if splat := re.search(r"(%\S+) = tt\.splat (%\w+)\b", line):
                spread = splat[1] if splat[2] == f"%{pointer}" else "" if splat[1] == spread else spread
            added = re.search(r"tt\.addptr (%\S+), %\S+ : \S+?(?:<[^,]*>)?, (?:tensor<(?:\d+x)+)?(i\d+)", line)
            if added and added[1] in (f"%{pointer}", spread):
                found.add(added[2])
        return found

    @staticmethod
    def accesses(ptx: str, kind: str) -> list[int]:
        """The widths in bits of the global loads (kind "ld") or stores ("st"), in order."""
        pattern = rf"\b{kind}\.global(?:\.[a-z_:0-9]+?)*?(?:\.v(\d))?\.[busf](\d+)\b"
        return [int(m[1] or 1) * int(m[2]) for m in re.finditer(pattern, ptx)]


def compile_kernel(
    kernel, types: dict[str, str], constants: dict, divisible: set[str], architecture: int, num_warps: int, num_stages: int = 3
) -> Compiled:
    """types: the run-time arguments; constants: the rest; divisible: the arguments that are multiples of 16 at launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), set(names) ^ (set(types) | set(constants))
    hinted = {p.name for p in kernel.params if p.do_not_specialize}
    assert not hinted & divisible, "the launcher would not give these hints"
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return measured(triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options))


def cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def measured(compiled) -> Compiled:
    """What a compiled kernel takes of a multiprocessor."""
    usage = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    numbers = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED", "LOCAL")}
    static = (numbers[key] for key in ("REG", "STACK", "SHARED", "LOCAL"))
    return Compiled(compiled.asm["ptx"], *static, compiled.metadata.shared, compiled.asm["cubin"], compiled.asm["ttir"])


class Driver:
    """As much of a GPU driver as a launch asks for before it compiles."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


class Launches:
    """What was launched: name and compiled kernel, in order; and how often each kernel was compiled."""

    def __init__(self, architecture: int, kernels):
        self.architecture, self.kernels, self.log = architecture, kernels, []

    def compiled(self) -> list[int]:
        return [len(kernel.device_caches[self.architecture][0]) for kernel in self.kernels]


def launched(monkeypatch, architecture: int, *kernels, compiling: bool = True) -> Launches:
    """Launches of these kernels compile (or not even that), with what the launcher passes and hints, and stop there."""
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", Driver(architecture))
    launches = Launches(architecture, kernels)
    for kernel in kernels:

        def run(*args, kernel=kernel, inner=kernel.run, **options):
            launches.log.append((kernel.__name__, inner(*args, **{**options, "warmup": True}) if compiling else None))

        monkeypatch.setattr(kernel, "run", run)
    return launches
