"""The native step's code for ARM processors, compiled by a cross-compiler and run by an emulator."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lookahead_decoding
from lookahead_decoding.model.native import steps as native_steps
from lookahead_decoding.model.native.library import why_no_library
from lookahead_decoding.model.native.steps import Native, NativeSteps, native_of
from test_exactness import prompt_of
from test_native import family

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
HERE, SOURCES = Path(__file__).parent, Path(lookahead_decoding.__file__).parent / "model" / "native"
pytestmark = [
    pytest.mark.skipif(bool(why_no_library()), reason=why_no_library()),
    pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no aarch64-linux-gnu-gcc, or no qemu-aarch64"),
]


class Emulated:
    """In place of the library: a step goes to an emulator in a file, with all memory that it touches, and back.

    Args:
        command: what runs `replay.c`.
        kind: of the ARM processor's code, 1 with NEON, 2 with products of bfloat16.
        native: the program with its memory.
    """

    def __init__(self, command: list[str], kind: int, native: Native, cache: Any, path: Path) -> None:
        self.command, self.kind, self.native, self.cache, self.path = command, kind, native, cache, path

    def lookahead_step(self, program: Any, step: Any, _: int) -> None:
        pieces = list(self._pieces(program._obj, step._obj))
        with self.path.open("wb") as file:
            file.write(struct.pack("=Qii", len(pieces), len(self.cache.layers), len(self.native._angles)))
            for address, size in pieces:
                file.write(struct.pack("=QQ", address, size) + ctypes.string_at(address, size))
        subprocess.run([*self.command, str(self.path), str(self.kind)], check=True)
        with self.path.open("rb") as file:
            file.seek(16)
            for number, (address, size) in enumerate(pieces):
                file.seek(16, 1)
                found = file.read(size)
                if number > 1 and address in self.written:
                    ctypes.memmove(address, found, size)

    def _pieces(self, program: Any, step: Any) -> Iterator[tuple[int, int]]:
        """Address and size of all that is read or written, the program and the step first."""
        native, cache = self.native, self.cache
        spans = len(cache.all_slots)
        yield ctypes.addressof(program), ctypes.sizeof(program)
        yield ctypes.addressof(step), ctypes.sizeof(step)
        yield ctypes.addressof(program.ops.contents), program.count * ctypes.sizeof(program.ops.contents)
        starts = (ctypes.c_int32 * (step.rows + 1)).from_address(step.start)
        sizes = {"ids": 8 * step.rows, "start": 4 * (step.rows + 1), "path": 4 * starts[step.rows]}
        sizes |= dict.fromkeys(("angle", "prefix", "sequence"), 4 * step.rows)
        sizes |= {"keep": 4 * step.kept, "keys": 8 * len(cache.layers), "values": 8 * len(cache.layers)}
        sizes |= {"origin": 4 * spans * step.sequences, "by_sequence": 8 * spans, "by_head": 8 * spans}
        sizes |= {name: 8 * len(native._angles) for name in ("cosines", "sines")}
        sizes |= {"logits": 4 * step.kept * program.vocabulary, "found": 4 * step.kept * (1 + step.best)}
        sizes |= {"next": 8 * 8 * program.count}
        yield from ((getattr(step, name), size) for name, size in sizes.items() if size)
        tensors = [native._residual, native._heads, native._attended, native._inner, native._normed, native._scores]
        buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
        tensors += [native._partials, *native.made._held, *(t for pair in native._angles for t in pair), *buffers]
        yield from ((tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.nbytes)
        self.written = {step.logits, step.found, *(buffer.data_ptr() for buffer in buffers)}


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("arm")
    files = [*(str(SOURCES / f"{name}.c") for name in ("step", "neon", "neon_bf16")), str(HERE / "replay.c")]
    flags = ["-O3", "-ffp-contract=off", "-fopenmp", "-static", "-Wall", "-Werror", f"-I{SOURCES}"]
    subprocess.run([str(COMPILER), *flags, *files, "-lm", "-o", str(folder / "replay")], check=True)
    return [str(EMULATOR), "-cpu", "max", str(folder / "replay")]


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere"])
def test_an_arm_processor_computes_the_same(
    name: str, dtype: torch.dtype, kind: int, replay: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, length = family(name, dtype), 19
    rows = prompt_of(length)[0].tolist()
    native = native_of(model)
    steps = NativeSteps(native, model, 80, 1, "sdpa", 40)
    wanted, best = (found.clone() for found in steps._run(list(steps._rows_in(rows, 0)), range(length)))
    emulated = Emulated(replay, kind, native, steps.cache, tmp_path / "step")
    for layer in steps.cache.layers:
        layer.keys.zero_(), layer.values.zero_()
    monkeypatch.setattr(native_steps, "library", lambda: emulated)
    together, found = (found.clone() for found in steps._run(list(steps._rows_in(rows, 0)), range(length)))
    bound = {torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (together - wanted).norm() <= bound * wanted.norm()
    if dtype == torch.float32:
        assert found.tolist() == best.tolist()
    for row in (0, 7, length - 1):  # alone, as among others
        alone = steps._run([list(steps._rows_in(rows, 0))[row]], [0])[0]
        assert torch.equal(alone[0], together[row])
