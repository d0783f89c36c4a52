"""Compile Triton kernels for GPUs that are not here, and read what came out: registers, stack, machine code.

In a test: `compiled("fewstep.kernels.guided_update.triton_kernel")`. It runs this file in another process, since one
that interprets kernels (TRITON_INTERPRET=1) cannot compile them. By hand:

    python tests/ahead_of_time.py fewstep.kernels.guided_update.triton_kernel 90 100
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.kernels.configuration import ARCHITECTURES

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}       # bytes per block
MOST_IN_TURN = 96
LOADS_128 = re.compile(r"LDG\.E(?:\.\w+)*\.128|LDGSTS(?:\.\w+)*\.128|UTMALDG|UBLKCP")


@dataclass(frozen=True)
class Usage:
    """One configuration compiled for one architecture; `spills` counts instructions that touch local memory."""

    name: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int
    hgmma: int
    loads_128: int
    wants_wgmma: bool
    wants_vector_loads: bool

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        limit = SHARED_LIMIT[self.arch]
        found = {
            f"{self.stack} bytes of stack, {self.spills} spills": self.stack or self.spills,
            f"{self.shared} bytes of shared memory, limit {limit}": self.shared > limit,
            "no wgmma": self.arch == 90 and self.wants_wgmma and not self.hgmma,
            "no 128-bit loads": self.wants_vector_loads and not self.loads_128,
        }
        return [f"{self.name} on sm_{self.arch}: {fault}" for fault, is_there in found.items() if is_there]


def compiled(module: str, architectures: tuple[int, ...] = ARCHITECTURES, rotate: bool = False) -> list[Usage]:
    """Compile every configuration that the module lists, in a process of its own. A failure raises with its output.

    With `rotate` each one is compiled for one of its architectures, all of them taking turns, not for every one; and of
    more than `MOST_IN_TURN` configurations every second, third, ... is.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module, *map(str, architectures), *["rotate"] * rotate]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [Usage(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def _compile(configuration: Any, arch: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, signature = configuration.kernel.arg_names, configuration.signature
    kinds = {**signature, **dict.fromkeys(configuration.constants, "constexpr")}
    divisible = [name for name in signature if signature[name].startswith("*") or name in configuration.divisible]
    source = ASTSource(
        fn=configuration.kernel, signature={name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if configuration.maxnreg is not None:
        options["maxnreg"] = configuration.maxnreg
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    resources, sass = _disassembled(kernel.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    return Usage(
        configuration.name, arch, registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", sass)), kernel.metadata.shared,
        sass.count("HGMMA"), len(LOADS_128.findall(sass)), configuration.wgmma, configuration.vector_loads,
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and machine code, by tools in Triton's wheel (cuobjdump's LOCAL does not show spills)."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[tools / "cuobjdump", "-res-usage", file.name], [tools / "nvdisasm", "-c", file.name]]
        resources, sass = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return resources, sass


def _compile_share(module: str, architectures: list[int], rotate: bool, share: int, shares: int) -> list[Usage]:
    work, configurations = [], list(importlib.import_module(module).configurations())
    if rotate:
        configurations = configurations[:: -(-len(configurations) // MOST_IN_TURN)]
    for i, configuration in enumerate(configurations):
        targets = [arch for arch in architectures if arch in configuration.architectures]
        work += [(configuration, arch) for arch in ([targets[i % len(targets)]] if rotate else targets)]
    return [_compile(configuration, arch) for configuration, arch in work[share::shares]]


def main(module: str, *options: str) -> None:
    """Print one JSON line per configuration and architecture."""
    shares = min(os.cpu_count() or 1, 8)
    targets = [int(option) for option in options if option != "rotate"]
    with ProcessPoolExecutor(shares) as pool:
        running = [
            pool.submit(_compile_share, module, targets, "rotate" in options, share, shares) for share in range(shares)
        ]
        for usage in (usage for done in running for usage in done.result()):
            print(json.dumps(asdict(usage)))


if __name__ == "__main__":
    main(*sys.argv[1:])
