"""Compiles the native kernels while the package is installed (pyproject.toml names `BuildNative`).

Each `level_*.cc` is the same code for another instruction set; the library chooses one when it is started. If there is
no compiler, or it fails, setuptools goes on without them, because the extension is optional.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxlib
from setuptools import Extension
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
PORTABLE = {"level_portable": ["-O1"]}  # runs where nothing else does; compiled in a third of the time
LEVELS = {
    "x86_64": {
        "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "level_avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512vnni"],
    },
    "aarch64": {"level_dotprod": ["-march=armv8.2-a+dotprod"]},
}
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


class BuildNative(build_ext):
    """`build_ext` with flags of their own for some files, and XLA's headers, which come with jaxlib."""

    def build_extension(self, ext: Extension) -> None:
        machine = MACHINES.get(platform.machine(), platform.machine())
        flags = PORTABLE | LEVELS.get(machine, {})
        others = {name for levels in LEVELS.values() for name in levels} - set(flags)
        headers = str(Path(jaxlib.__file__).with_name("include"))

        def compiled(source: str) -> list[str]:
            extra = [*FLAGS, *flags.get(Path(source).stem, [])]
            return self.compiler.compile([source], self.build_temp, include_dirs=[headers], extra_postargs=extra)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = sum(pool.map(compiled, (s for s in ext.sources if Path(s).stem not in others)), [])
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")
