"""Compile every kernel for a GPU that need not be there, and say what each takes of it.

    python scripts/compile_kernels.py [--arch 90] [--width 18944] [--page-kib 448]

The kernels are launched as an engine launches them, for one decode step and one prefill step of
each dtype, except that a launch compiles and does not run. Needs Triton, whose wheel brings the
assembler; prints machine instructions, those of them that load from global memory, registers, bytes
spilled (local memory) and shared memory of each.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.store import unit_view
from pacellm_vllm.ops.kernels.bank import DeviceBanks
from pacellm_vllm.ops.kernels.batch import numbers_of, piece_rows, tables_of
from pacellm_vllm.ops.kernels.step import advance_batch
from pacellm_vllm.ops.kernels.top_k import TALLY

DTYPES = ("bfloat16", "float16", "float32")


class AbsentDevice:
    """What Triton asks of a driver in order to compile, and no more."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(arch: int) -> dict[tuple[str, str], Any]:
    """From here on a launch compiles for sm_``arch``; returns kernels by name and signature."""
    driver.set_active(AbsentDevice(arch))
    compiled: dict[tuple[str, str], Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.fn.__name__, kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    return compiled


def launch_all(dtype: torch.dtype, bank_dtype: torch.dtype, settings: Any, args: Any) -> None:
    """One decode and one prefill step, the latter as under tensor parallelism."""
    rules = PaceConfig.from_sources(settings).rules()
    layout = BankLayout.plan(rules, args.width, bank_dtype, args.page_kib * 1024)
    pool = torch.empty(layout.num_pages + 1, 2, args.page_kib * 1024, dtype=torch.uint8)
    cells = unit_view(pool[:, :1, None], layout, bank_dtype).flatten(1)
    starts = (layout.slots_start, layout.sums_start, layout.staged_start)
    banks = DeviceBanks(cells, cells.view(torch.int32), args.width, *starts)
    table = torch.zeros(1, layout.num_pages + 3, dtype=torch.int32)
    tally = torch.zeros(1, TALLY.value, dtype=torch.int64)
    for tokens, reduce in ((1, None), (rules.segment_size, lambda buffer: buffer)):
        begin, pages = np.zeros(1), np.array([layout.num_pages])
        position = np.array([rules.segment_size])
        rows = piece_rows(begin, tokens, position, begin, pages, numbers_of([rules]))
        tables = tables_of(rows, rules.segment_size)
        now = tables.on(*map(torch.from_numpy, (tables.pieces, tables.tiles)), table)
        a = torch.empty(tokens, args.width, dtype=dtype)
        advance_batch(a, torch.empty_like(a), banks, [now], rules, tally, reduce)


def resources(kernel: Any) -> dict[str, int]:
    """Instructions and global loads, registers and bytes of local memory a thread, bytes of shared
    memory a program.
    """
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def say(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        text = say("cuobjdump", "--dump-resource-usage")
        listing = say("nvdisasm", "--print-code")
    found = dict(
        part.split(":") for part in text.split() if part.count(":") == 1 and part[-1] != ":"
    )
    # An address, perhaps a predicate, and the operation, which ends at its first dot.
    names = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z]\w+)", listing)
    return {
        "instructions": sum(name not in ("NOP", "BRA") for name in names),
        "loads": names.count("LDG"),
        "registers": int(found["REG"]),
        "local": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": kernel.metadata.shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="90 is Hopper, compiled as sm_90a")
    parser.add_argument("--width", type=int, default=18944)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--page-kib", type=int, default=448)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--presets", default="gentle,official,paper")
    args = parser.parse_args()
    compiled = compile_instead_of_launching(args.arch)
    print(f"triton {triton.__version__}, sm_{args.arch}, D = {args.width}, M = {args.slots}\n")
    columns = "kernel", "dtype", "preset", "warps", "instructions", "loads", "registers"
    print("| " + " | ".join((*columns, "local", "shared")) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.dtypes.split(","):
        for preset in args.presets.split(","):
            compiled.clear()
            dtype = getattr(torch, name)
            settings = {"preset": preset, "bank_size": args.slots}
            launch_all(dtype, dtype, settings, args)
            for (kernel, _), found in compiled.items():
                use = resources(found)
                print(
                    f"| {kernel} | {name} | {preset} | {found.metadata.num_warps} | "
                    f"{use['instructions']} | {use['loads']} | {use['registers']} | "
                    f"{use['local']} B | {use['shared']} B |"
                )


if __name__ == "__main__":
    main()
