"""The compiled part of the package, which is left out where there is no compiler, or LOOKAHEAD_PURE is set."""

import os
import sys

from setuptools import Extension, setup

# OpenMP's functions are found at run time in the library that torch has loaded: a second one would have threads of its
# own, and both would spin. So the compiler is told of OpenMP and the linker is not.
SOURCES = ("step", "avx512_bf16", "avx512", "avx2", "neon", "neon_bf16")  # each for processors of its own
HEADERS = ("step", "operations", "attention", "vector512", "vector256", "vector128", "some")
APPLE = sys.platform == "darwin"  # whose compiler takes OpenMP's pragmas by another name

STEP = Extension(
    "lookahead_decoding.model.native._step",
    [f"src/lookahead_decoding/model/native/{name}.c" for name in SOURCES],
    depends=[f"src/lookahead_decoding/model/native/{name}.h" for name in HEADERS],
    extra_compile_args=["-O3", "-ffp-contract=off", *(["-Xpreprocessor"] if APPLE else []), "-fopenmp"],
    optional=True,
)

setup(ext_modules=[] if os.environ.get("LOOKAHEAD_PURE") else [STEP])
