"""The attention kernel compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "ptx" / "kernel.json"


def table() -> list[dict[str, object]]:
    return json.loads(TABLE.read_text())["variants"]


def said_by(code: str, architecture: int) -> list[dict[str, object]]:
    """What a program prints in JSON, which must not run in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(architecture)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    return json.loads(said.splitlines()[-1])


def test_no_variant_spills_where_it_reads_the_committed_keys() -> None:
    assert {row["architecture"] for row in table()} == {80, 86, 90, 100}
    assert [row for row in table() if row["spills"]] == []


def test_shared_memory_is_what_the_tilings_say() -> None:
    kernels = pytest.importorskip("lookahead_decoding.model.kernels", reason="needs triton")
    for dtype, tilings in (("bf16", kernels.HALF), ("fp32", kernels.SINGLE)):
        for size, choices in tilings.items():
            for tiling in choices:
                found = [
                    row["shared"]
                    for row in table()
                    if (row["dtype"], row["size"], row["rows"]) == (dtype, size, tiling.rows)
                ]
                assert len(found) == 4
                assert max(found) == tiling.shared


@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
def test_the_small_kernels_compile_without_spills(architecture: int) -> None:
    pytest.importorskip("triton")
    code = "import sys, json; from benchmarks import ptx; a = int(sys.argv[1]); " + (
        "print(json.dumps([ptx.small(a, dtype) for dtype in ('bf16', 'fp32')]))"
    )
    for registers in said_by(code, architecture):
        assert registers.keys() == {"_norm", "_rotate", "_gate"}
        assert all(0 < used <= 128 for used in registers.values()), registers


@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
def test_the_kernel_compiles_as_the_table_says(architecture: int) -> None:
    """Heads of 128; of other sizes the file alone tells, since each variant takes seconds.

    Another version of Triton allocates other registers, so there the table says nothing.
    """
    triton = pytest.importorskip("triton")
    if triton.__version__ != json.loads(TABLE.read_text())["triton"]:
        pytest.skip(f"the table is of another Triton than {triton.__version__}")
    wanted = [row for row in table() if row["architecture"] == architecture and row["size"] == 128]
    code = "import sys, json, dataclasses; from benchmarks import ptx; " + (
        "print(json.dumps([dataclasses.asdict(ptx.compiled(*v)) for v in ptx.variants()"
        " if v[0] == int(sys.argv[1]) and v[2] == 128]))"
    )
    assert said_by(code, architecture) == wanted
