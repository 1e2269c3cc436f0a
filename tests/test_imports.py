"""Imports point one way: pure, torch, target, composition, edges."""

from __future__ import annotations

import ast
from pathlib import Path

import lookahead_decoding

LAYERS = [
    {
        "config",
        "tree",
        "window",
        "pool",
        "suffix",
        "shared",
        "sources",
        "grow",
        "lookahead",
        "division",
        "torchrun",
        "budget",
        "stats",
    },
    {
        "attention",
        "fused",
        "kernels",
        "native.library",
        "native.program",
        "native.recipes",
        "small_kernels",
        "graphs",
        "packed",
        "sampler",
        "files",
        "profile",
        "shared_file",
        "following",
        "watch",
        "ranks",
    },
    {
        "cache",
        "evaluate",
        "memory",
        "rope",
        "trees",
        "rows",
        "probe",
        "target",
        "sharded",
        "tensor_parallel",
        "native.steps",
    },
    {"decoding", "hf", "text", "exactness"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDER = Path(lookahead_decoding.__file__).parent


def imports(path: Path) -> set[str]:
    """Modules that a file imports; our own by their names with a leading dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        inside = f"{path.parent.name}." if path.parent != FOLDER and getattr(node, "level", 0) == 1 else ""
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f".{inside}{node.module}" if node.level else str(node.module).partition(".")[0])
    return found


def test_every_module_has_its_layer() -> None:
    native = {f"native.{p.stem}" for p in (FOLDER / "native").glob("[!_]*.py")}
    assert {p.stem for p in FOLDER.glob("[!_]*.py")} | native == set(LEVEL)


def test_no_module_imports_from_a_later_layer() -> None:
    for name, level in LEVEL.items():
        ours = {m[1:] for m in imports(FOLDER / f"{name.replace('.', '/')}.py") if m.startswith(".")}
        ours = {m for m in ours if m != "None" and not m.startswith("bench.")}
        assert all(LEVEL[other] <= level for other in ours), (name, ours)


def test_the_pure_part_needs_the_standard_library_alone() -> None:
    for name in LAYERS[0]:
        assert not imports(FOLDER / f"{name}.py") & {"torch", "transformers", "numpy"}


def test_transformers_internals_stay_in_the_target_and_its_cache() -> None:
    for name in ("attention", "sampler", "decoding"):
        assert "transformers" not in imports(FOLDER / f"{name}.py")
