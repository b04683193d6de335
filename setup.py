"""Builds one extension module per instruction set from the same sources; the pure metadata is in pyproject.toml."""
import copy
import os
import platform
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").glob("*.c"))
HEADERS = sorted(str(p) for p in Path("csrc").glob("*.h"))
FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra"]
LEVELS = {"_cpu": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS = {"_cpu": ["-march=x86-64"], "_cpu_v3": ["-march=x86-64-v3"],
              "_cpu_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
if os.environ.get("MIL_WERROR") == "1":
    FLAGS.append("-Werror")
if os.environ.get("MIL_SANITIZE") == "1":
    FLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
LINK = ["-fsanitize=address,undefined"] if os.environ.get("MIL_SANITIZE") == "1" else []


def extension(name, flags):
    return Extension(f"mambainllama.{name}", SOURCES, depends=HEADERS, include_dirs=[numpy.get_include(), "csrc"],
                     define_macros=[("MIL_MODULE", name)], extra_compile_args=FLAGS + flags,
                     extra_link_args=LINK, libraries=["m", "dl", "pthread"])


class Build(build_ext):
    """Each extension compiles into its own build_temp, several at a time: setuptools would share object paths among them."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext):
        one = copy.copy(self)
        one.build_temp = os.path.join(self.build_temp, ext.name)
        build_ext.build_extension(one, ext)


setup(ext_modules=[extension(*level) for level in LEVELS.items()], cmdclass={"build_ext": Build})
