"""Build the training text of `pocket`: download, clean, split, tokenize.

Reads CPython's standard library and the pinned packages of `packages.txt`, and writes into a folder:

    tokenizer/            a byte-level BPE tokenizer of 4,096 pieces
    modules.npy           whole modules, each followed by the end-of-text token  (tokens,) uint16
    functions.npy         documented functions on their own, likewise             (tokens,) uint16
    held_out.json         the text of the modules kept out of training
    sources.json          per package: version, licence, modules, bytes

Run `python training/prepare.py --out build/pocket` (network for PyPI; about ten minutes on two cores).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 1024
HELD_OUT_SHARE = 0.01
PACKAGE_CAP = 9_000_000  # bytes of text that one package may give
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|_vendor|vendor|_vendored|externals|locale|locales|encodings|pydoc_data|typeshed|third_party|"
    r"site-packages|dist-packages|idle_test|migrations|node_modules|__pycache__)(/|$)"
    r"|(^|/)(test_[^/]*|conftest|setup|[^/]*_pb2)\.py$"
)


def packages() -> list[tuple[str, str, str]]:
    """(name, version, licence) of every line in packages.txt."""
    lines = Path(__file__).with_name("packages.txt").read_text().splitlines()
    found = [re.fullmatch(r"(\S+)==(\S+)\s+# (.+)", line) for line in lines if line and not line.startswith("#")]
    return [(m[1], m[2], m[3]) for m in found if m]


def download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, version, _ in packages():
        stem = name.lower().replace("-", "_")
        if any(p.name.lower().replace("-", "_").startswith(f"{stem}_{version}") for p in folder.iterdir()):
            continue
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        wheel = subprocess.run([*command, "--only-binary=:all:", f"{name}=={version}"], capture_output=True)
        if wheel.returncode:
            subprocess.run([*command, "--no-build-isolation", f"{name}=={version}"], check=True)


def python_files(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """(package, path, source) of every Python module that is not a test, a copy or a table."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if not SKIPPED.search(name):
            yield "CPython", name, path.read_bytes()
    for archive in sorted(folder.iterdir()):
        package = re.split(r"-\d", archive.name)[0]
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in sorted(wheel.namelist()):
                    if name.endswith(".py") and not SKIPPED.search(name):
                        yield package, name, wheel.read(name)
        else:
            with tarfile.open(archive) as sdist:
                for member in sorted(sdist.getmembers(), key=lambda m: m.name):
                    name = member.name.partition("/")[2]
                    if name.endswith(".py") and not SKIPPED.search(name) and (file := sdist.extractfile(member)):
                        yield package, name, file.read()


def clean(source: bytes) -> str | None:
    """The module's text without its licence header, or None where it is not prose-like Python."""
    try:
        text = source.decode("utf-8").replace("\r\n", "\n").expandtabs(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None
    header = re.match(r"(?:#[^\n]*\n|\s*\n)+", text)
    if header and re.search(r"(?i)copyright|licen[sc]e", header[0]):
        text = text[header.end() :]
    text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ ]+\n", "\n", text)).strip() + "\n"
    lines = text.splitlines()
    if not 300 <= len(text) <= 300_000 or max(map(len, lines)) > 400 or len(text) / len(lines) > 90:
        return None
    if sum(ord(c) > 126 for c in text) > 0.01 * len(text):
        return None
    words = re.findall(r"\w+|[^\w\s]", text)
    grams = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    if not grams or len(set(grams)) < 0.7 * len(grams):
        return None  # a table, or code written by a program
    return text


def functions(text: str) -> list[str]:
    """Top-level documented functions of a module, each as a text of its own."""
    lines = text.splitlines(keepends=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = ast.parse(text).body
    found = []
    for node in nodes:
        documented = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        if documented and 6 <= (node.end_lineno or 0) - node.lineno <= 60:
            found.append("".join(lines[node.lineno - 1 : node.end_lineno]).rstrip() + "\n")
    return found


def held_out(package: str, name: str) -> bool:
    digest = hashlib.sha256(f"{package}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A newline apart from the indentation after it, so that a prompt may end with it.
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT, padding_side="left"
    )
    fast.save_pretrained(out)
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    parts = []
    for start in range(0, len(texts), 500):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 500]):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    download(out / "packages")
    files = list(python_files(out / "packages"))
    with Pool() as pool:
        cleaned = pool.map(clean, [source for _, _, source in files], chunksize=64)
    training: dict[str, list[str]] = defaultdict(list)
    kept_out: list[dict[str, str]] = []
    seen: set[bytes] = set()
    for (package, name, _), text in zip(files, cleaned, strict=True):
        if text is None:
            continue
        digest = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if held_out(package, name):
            kept_out.append({"package": package, "module": name, "text": text})
        elif sum(map(len, training[package])) < PACKAGE_CAP:
            training[package].append(text)
    rng = np.random.default_rng(0)
    texts = [text for group in training.values() for text in group]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    single = sorted({f for text in texts for f in functions(text)})
    single = [single[i] for i in rng.permutation(len(single))]
    tokenizer = train_tokenizer(texts[:: max(1, sum(map(len, texts)) // 30_000_000)], out / "tokenizer")
    for name, part in (("modules", texts), ("functions", single)):
        ids = encode(tokenizer, part)
        np.save(out / f"{name}.npy", ids)
        print(f"{name}: {len(part)} texts, {sum(len(t.encode()) for t in part):,} bytes, {len(ids):,} tokens")
    (out / "held_out.json").write_text(json.dumps(kept_out))
    print(f"held out: {len(kept_out)} modules, {sum(len(m['text']) for m in kept_out):,} bytes")
    licences = {name.lower().replace("-", "_"): (version, licence) for name, version, licence in packages()}
    licences["cpython"] = (sys.version.split()[0], "PSF-2.0")
    sources = []
    for package, group in sorted(training.items()):
        version, licence = licences[package.lower().replace("-", "_")]
        size = sum(map(len, group))
        sources.append(
            {"package": package, "version": version, "licence": licence, "modules": len(group), "bytes": size}
        )
    (out / "sources.json").write_text(json.dumps(sources, indent=1))


if __name__ == "__main__":
    main()
