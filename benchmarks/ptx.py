"""The attention kernel compiled for cards that are not here: registers, spills, shared memory, instructions.

    python -m benchmarks.ptx --out benchmarks/results/ptx/kernel.json

Triton compiles for a card by its number and needs no card for it, and it brings the tools that take the result apart.
A test compiles anew and holds the file against what it finds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lookahead_decoding.model.kernels import ARCHITECTURES, HALF, SINGLE, STAGES, Tiling, _part

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"query": "", "key": "", "value": "", "rows": "i32", "out": "fp32", "lse": "fp32"}
STRIDES = "q_batch q_head q_row k_batch k_head k_slot v_batch v_head v_slot".split()


@dataclass(frozen=True)
class Compiled:
    """One variant of the kernel.

    Attributes:
        architecture: compute capability times ten.
        dtype: of queries, keys and values, as Triton names it.
        size: of a head.
        rows, keys, warps: its tiling.
        registers: of a thread.
        shared: bytes of a program.
        instructions_per_64_keys: of a warp, in the loop over committed keys.
        spills: instructions in that loop that move registers to memory and back.
    """

    architecture: int
    dtype: str
    size: int
    rows: int
    keys: int
    warps: int
    registers: int
    shared: int
    instructions_per_64_keys: int
    spills: int


def variants() -> Iterator[tuple[int, str, int, Tiling]]:
    """Architecture, dtype, head size and tiling of everything that `tiling_for` can choose."""
    for architecture in ARCHITECTURES:
        for dtype, table in (("bf16", HALF), ("fp32", SINGLE)):
            for size, tilings in table.items():
                for tiling in tilings:
                    yield architecture, dtype, size, tiling


def small(architecture: int, dtype: str) -> dict[str, int]:
    """Registers of a thread of each small kernel, in a layer of Llama-3-8B: by name."""
    from lookahead_decoding.model.small_kernels import _gate, _norm, _rotate

    sizes: dict[Any, dict[str, Any]] = {
        _norm: {"SHIFT": 0.0, "SIZE_P": 4096},
        _rotate: {"HALF": 64, "HALF_P": 64},
        _gate: {"BLOCK": 1024},
    }
    found = {}
    for kernel, constants in sizes.items():
        names = kernel.arg_names
        pointers = {"x", "weight", "out", "cosines", "sines", "gate", "up"}
        types = {name: f"*{dtype}" if name in pointers else "fp32" if name == "eps" else "i32" for name in names}
        signature = types | dict.fromkeys(constants, "constexpr")
        places = {(names.index(name),): value for name, value in constants.items()}
        made = triton.compile(
            ASTSource(kernel, signature, constexprs=places),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": 4},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            used = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", file.name))
        assert used is not None
        found[kernel.__name__] = int(used.group(1)) if used.group(2) == "0" else -1
    return found


def compiled(architecture: int, dtype: str, size: int, tiling: Tiling) -> Compiled:
    """Compile one variant, and look at its machine code."""
    constants: dict[str, Any] = {"HAS_CAP": False, "SIZE": size, "V_SIZE": size, "SIZE_P": size, "V_SIZE_P": size}
    constants |= {"TILE": tiling.rows, "KEYS": tiling.keys, "PRECISE": dtype == "fp32"}
    names = _part.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS or name in STRIDES}
    places = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(_part, signature, constexprs=places, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tiling.warps, "num_stages": STAGES},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = _run("cuobjdump", "-res-usage", file.name)
        loop = _committed(_run("nvdisasm", "-c", file.name))
    found = re.search(r"REG:(\d+)", used)
    return Compiled(
        architecture, dtype, size, tiling.rows, tiling.keys, tiling.warps,
        registers=int(found.group(1)) if found else 0,
        shared=made.metadata.shared,
        instructions_per_64_keys=len(loop) * 64 // tiling.keys,
        spills=sum("STL" in line or "LDL" in line for line in loop),
    )  # fmt: skip


def _type(name: str, dtype: str) -> str:
    if name in POINTERS:
        return f"*{POINTERS[name] or dtype}"
    return "fp32" if name in ("scale", "softcap") else "i32"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _committed(code: str) -> list[str]:
    """Instructions of the loop over committed keys: of the three loops with products, the one in the middle."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1))
            back = re.search(r"BRA.*?(\.L\w+)", found.group(1))
            if back and back.group(1) in labels:
                loops.append((labels[back.group(1)], len(instructions)))
    products = re.compile("MMA|FFMA")
    bodies = [instructions[start:end] for start, end in loops]
    return [body for body in bodies if any(products.search(line) for line in body)][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for variant in variants():
        rows.append(asdict(compiled(*variant)))
        print(rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    args.out.write_text(f'{{"triton": "{triton.__version__}", "variants": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
