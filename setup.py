"""Builds one extension module per instruction set, and per GPU precision, from the same sources; the pure metadata is in pyproject.toml.

MIL_CUDA       auto (default): `_cuda` and `_cuda32` are built where nvcc and cuBLASLt are found; 1: or the build fails; 0: never;
               emulate: with the C++ compiler, to run on the CPU (tests/emulator), for tests without a GPU
MIL_CUDA_ARCHS what to compile for (default "80 90a 100 120"; a GPU newer than the last runs its PTX)
MIL_WERROR=1   warnings are errors      MIL_SANITIZE=1   AddressSanitizer and UBSan
"""
import copy
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOST = [f"csrc/{name}.c" for name in ("decode", "dlpack", "mixer", "model", "module", "params", "pymodel", "transfer")]  # linked with either set of ops
CPU = sorted(str(p) for p in Path("csrc").glob("*.c"))
GPU = sorted(str(p) for p in Path("cuda").glob("*.cu"))
HEADERS = sorted(str(p) for folder in ("csrc", "cuda") for p in Path(folder).glob("*.*h"))
FLAGS = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra"]
LEVELS = {"_cpu": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS = {"_cpu": ["-march=x86-64"], "_cpu_v3": ["-march=x86-64-v3"],
              "_cpu_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
PRECISIONS = {"_cuda": [("MIL_GPU", "1"), ("MIL_BF16", "1")], "_cuda32": [("MIL_GPU", "1")]}
LINK = []
POOL = ThreadPoolExecutor(os.cpu_count())  # of the GPU modules' compilers
if os.environ.get("MIL_WERROR") == "1":
    FLAGS.append("-Werror")
if os.environ.get("MIL_SANITIZE") == "1":
    FLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    LINK += ["-fsanitize=address,undefined"]


def wheels(*patterns):
    """Folders of the environment's NVIDIA wheels (nvidia/cu13/…) that hold a file of that name; pip builds us outside
    of the environment that it installs to."""
    places = dict.fromkeys([*sys.path, sysconfig.get_path("purelib")])
    roots = [Path(p) / "nvidia" for p in places if (Path(p) / "nvidia").is_dir()]
    return [found.parent for pattern in patterns for root in roots for found in sorted(root.glob(f"**/{pattern}"))]


class Toolkit:
    """nvcc, and where headers and libraries are: CUDA_HOME, nvcc's own toolkit, then the NVIDIA wheels of the environment."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME")
        self.nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        self.nvcc = self.nvcc or next((str(p / "nvcc") for p in wheels("bin/nvcc")), None)
        roots = [Path(home)] if home else []
        roots += [Path(self.nvcc).resolve().parent.parent] if self.nvcc else []
        roots.append(Path("/usr/local/cuda"))
        include = [r / "include" for r in roots] + wheels("include/cublasLt.h", "include/cuda_runtime.h")
        self.include = [p for p in dict.fromkeys(include) if p.is_dir()]
        folders = [p for r in roots for p in (r / "lib64", r / "lib") if p.is_dir()]
        folders += wheels("libcublasLt.so*", "libcudart_static.a")
        self.cudart = next((p / "libcudart_static.a" for p in folders if (p / "libcudart_static.a").exists()), None)
        self.cublas = next((found for p in folders for found in sorted(p.glob("libcublasLt.so*"))), None)

        def header(name):
            return any((p / name).exists() or (p / "cccl" / name).exists() for p in self.include)
        parts = {"nvidia-cuda-nvcc": self.nvcc, "nvidia-cuda-runtime": self.cudart, "nvidia-cuda-cccl": header("nv/target"),
                 "nvidia-cublas": self.cublas and header("cublasLt.h")}
        lacking = ", ".join(name for name, found in parts.items() if not found)
        self.missing = lacking and f"the CUDA Toolkit (CUDA_HOME, or nvcc on PATH), or the wheels {lacking}"

    def command(self, source, target, macros):
        archs = os.environ.get("MIL_CUDA_ARCHS", "80 90a 100 120").split()
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        if not archs[-1].endswith("a"):
            code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        strict = ["-Werror", "all-warnings"] if os.environ.get("MIL_WERROR") == "1" else []
        return [self.nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *strict, *code,
                *macros, *(f"-I{p}" for p in ["csrc", "cuda", *self.include]), "-c", source, "-o", target]


class Emulator:
    """The kernels as C++ with tests/emulator in CUDA's place."""

    missing = cudart = cublas = None

    def command(self, source, target, macros):
        sanitize = [f for f in FLAGS if f.startswith("-f") and "sanitize" in f or f == "-g"]
        return [os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++17", "-O2", "-g1", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-Wall",
                "-Wno-unknown-pragmas", "-Wno-unused-function", *sanitize, *macros, "-Itests/emulator", "-Icsrc", "-Icuda", "-c", source, "-o", target]


def gpu_tools():
    mode = os.environ.get("MIL_CUDA", "auto")
    if mode not in ("auto", "0", "1", "emulate"):
        sys.exit(f"MIL_CUDA is {mode!r}, expected auto, 0, 1 or emulate")
    if mode == "0":
        return None
    tools = Emulator() if mode == "emulate" else Toolkit()
    if tools.missing and mode == "1":
        sys.exit(f"MIL_CUDA=1, but this is missing: {tools.missing}")
    if tools.missing:
        print(f"mambainllama: built without CUDA, missing: {tools.missing}")
    return None if tools.missing else tools


TOOLS = gpu_tools()


def extension(name, sources, flags, macros=()):
    return Extension(f"mambainllama.{name}", sources, depends=HEADERS, include_dirs=[numpy.get_include(), "csrc"],
                     define_macros=[("MIL_MODULE", name), *macros], extra_compile_args=FLAGS + flags,
                     extra_link_args=list(LINK), libraries=["m", "dl", "pthread"])


class Build(build_ext):
    """Each extension compiles into its own build_temp, several at a time: setuptools would share object paths among them."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext):
        one = copy.copy(self)
        one.build_temp = os.path.join(self.build_temp, ext.name)
        short = ext.name.rsplit(".", 1)[1]
        if short in PRECISIONS:
            ext.extra_objects = self.gpu_objects(one.build_temp, PRECISIONS[short])
            ext.depends = ext.depends + GPU
            if TOOLS.cublas:
                ext.extra_objects += [str(TOOLS.cudart), str(TOOLS.cublas)]
                ext.libraries = ext.libraries + ["rt"]
                rpath = "$ORIGIN/../nvidia/cu13/lib"  # where the wheel nvidia-cublas puts it beside us
                ext.extra_link_args += [f"-Wl,-rpath,{rpath}:{TOOLS.cublas.parent}"]
            ext.libraries = ext.libraries + ["stdc++"]
        build_ext.build_extension(one, ext)

    def gpu_objects(self, folder, macros):
        """Compiles what is older than its source or any header, several files at a time."""
        emulated = isinstance(TOOLS, Emulator)
        sources = [s for s in GPU if not (emulated and s == "cuda/blas.cu")]
        sources += sorted(str(p) for p in Path("tests/emulator").glob("*.cc")) if emulated else []
        headers = HEADERS + [str(p) for p in Path("tests/emulator").glob("*.*h") if emulated]
        newest = max(os.path.getmtime(p) for p in headers + ["setup.py"])
        flags = ["-DMIL_CUDA=1", *(f"-D{name}={value}" for name, value in macros)]

        def build(source):
            target = os.path.join(folder, source + ".o")
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not os.path.exists(target) or os.path.getmtime(target) < max(newest, os.path.getmtime(source)):
                subprocess.run(TOOLS.command(source, target, flags), check=True)
            return target

        return list(POOL.map(build, sources))


MODULES = [extension(name, CPU, flags) for name, flags in LEVELS.items()]
if TOOLS:
    MODULES += [extension(name, HOST, [], macros) for name, macros in PRECISIONS.items()]
setup(ext_modules=MODULES, cmdclass={"build_ext": Build})
