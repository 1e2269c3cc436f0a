"""Imports point one way: from a folder to itself and to those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lookahead_decoding

LAYERS = ("config", "draft", "price", "saved", "verify", "model", "ranks", "engine", "hf", "bench", "cli")
FOLDER = Path(lookahead_decoding.__file__).parent
FOREIGN = {"torch", "transformers", "numpy"}


def modules(layer: str) -> list[Path]:
    alone = FOLDER / f"{layer}.py"
    return [alone] if alone.exists() else sorted((FOLDER / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """What a file imports: packages of others, and our own layers with a leading dot."""
    inside = path.relative_to(FOLDER).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = (*inside[: len(inside) - node.level + 1], *(node.module or "").split("."))
            names = [part for part in base if part] or [alias.name for alias in node.names]
            yield f".{names[0]}"
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


def test_every_module_is_in_a_layer() -> None:
    alone = {path.stem for path in FOLDER.glob("[!_]*.py")}
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert alone | folders == set(LAYERS)


def test_no_module_imports_from_a_later_layer() -> None:
    for level, layer in enumerate(LAYERS):
        for path in modules(layer):
            ours = {name[1:] for name in imports(path) if name.startswith(".")} - {"__version__", "pocket_path"}
            assert ours <= set(LAYERS[: level + 1]), (path, ours)


def test_the_pure_layers_need_the_standard_library_alone() -> None:
    for layer in ("config", "draft", "price"):
        assert not any(set(imports(path)) & FOREIGN for path in modules(layer))


def test_transformers_stays_in_the_model_and_the_edges() -> None:
    for path in (*modules("verify"), *modules("engine"), FOLDER / "model" / "attention.py"):
        assert "transformers" not in imports(path)
