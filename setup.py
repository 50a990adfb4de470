"""The optional C part (docs/data.md), and what the wheel has from beside the package.

launch/, parts of cluster/ and train.py are then in dist_looksam/shipped/; `dist_looksam.project`
reads them there, and in a checkout where they are. Everything else about the package is in
pyproject.toml.
"""

from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

JPEG = Extension(
    "dist_looksam.data._jpeg",
    ["dist_looksam/data/jpeg.c", "dist_looksam/data/gil.c"],
    libraries=["jpeg"],
    extra_compile_args=["-O3", "-ffp-contract=off", "-Wno-psabi"],
    optional=True,  # pip goes on without a compiler or the headers of libjpeg-turbo
)
SHIPPED = (
    *("train.py", "launch/*.sh", "launch/slurm.sbatch"),
    *("launch/recipes/*.yaml", "launch/recipes/README.md", "launch/sweeps/*.yaml"),
    *("cluster/hostfile.example", "cluster/sites/*.sh"),
)
LEFT_OUT = ("launch/demo.sh",)  # it sets up a checkout


class BuildWithShipped(build_py):
    """The package's modules and data, and the files of SHIPPED. An editable install needs none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [target for _, target in self._shipped()]

    def get_source_files(self) -> list[str]:
        """So that the sdist, from which wheels are built, has them."""
        return super().get_source_files() + [source for source, _ in self._shipped()]

    def _shipped(self) -> Iterator[tuple[str, str]]:
        """(path here, path in the build) of every file."""
        for pattern in SHIPPED:
            for path in sorted(Path().glob(pattern)):
                if path.as_posix() not in LEFT_OUT:
                    yield str(path), str(Path(self.build_lib, "dist_looksam", "shipped", path))


setup(ext_modules=[JPEG], cmdclass={"build_py": BuildWithShipped})
