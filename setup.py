"""The optional C part of the package, see docs/data.md. The rest is in pyproject.toml."""

from setuptools import Extension, setup

JPEG = Extension(
    "dist_looksam.data._jpeg",
    ["dist_looksam/data/jpeg.c", "dist_looksam/data/gil.c"],
    libraries=["jpeg"],
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wno-psabi"],
    optional=True,  # pip goes on without a compiler or the headers of libjpeg-turbo
)
setup(ext_modules=[JPEG])
