"""The compiled part of the package, which is left out where there is no compiler for it."""

from setuptools import Extension, setup

# OpenMP's functions are found at run time in the library that torch has loaded: a second one would have threads of its
# own, and both would spin. So the compiler is told of OpenMP and the linker is not.
STEP = Extension(
    "lookahead_decoding.native._step",
    ["src/lookahead_decoding/native/step.c"],
    extra_compile_args=["-O3", "-fopenmp"],
    optional=True,
)

setup(ext_modules=[STEP])
