"""The compiled part of the package, which is left out where there is no compiler for it."""

from setuptools import Extension, setup

# OpenMP's functions are found at run time in the library that torch has loaded: a second one would have threads of its
# own, and both would spin. So the compiler is told of OpenMP and the linker is not.
STEP = Extension(
    "lookahead_decoding.native._step",
    [f"src/lookahead_decoding/native/{name}.c" for name in ("step", "avx512_bf16", "avx512", "avx2")],
    depends=[f"src/lookahead_decoding/native/{name}.h" for name in ("step", "operations", "vector512", "vector256")],
    extra_compile_args=["-O3", "-ffp-contract=off", "-fopenmp"],
    optional=True,
)

setup(ext_modules=[STEP])
