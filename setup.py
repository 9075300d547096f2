"""Folder mapping: `kernels/` is imported as siglip2_kernels and `bench/` as siglip2_bench.

Nothing installed may be called `kernels`: that name is a package of Hugging Face's which
transformers imports.
"""

import os
from glob import glob

from setuptools import Extension, find_packages, setup


def mapped(folder: str, name: str) -> list[str]:
    return [name] + [f"{name}.{p}" for p in find_packages(folder)]


def host_extensions() -> list[Extension]:
    """csrc/host, or nothing where pybind11 is missing: numpy serves then, as without a compiler."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ModuleNotFoundError:
        return []
    flags = ["-O3", "-pthread"] if os.name == "posix" else []
    extension = Pybind11Extension(
        "siglip2._host",
        sorted(glob("csrc/host/*.cpp")),
        depends=glob("csrc/host/*.h"),
        cxx_std=17,
        extra_compile_args=flags,
        optional=True,
    )
    return [extension]


setup(
    packages=find_packages(include=["siglip2", "siglip2.*"])
    + mapped("kernels", "siglip2_kernels")
    + mapped("bench", "siglip2_bench"),
    package_dir={"siglip2_kernels": "kernels", "siglip2_bench": "bench"},
    ext_modules=host_extensions(),
)
