"""Folder mapping: `kernels/` is imported as siglip2_kernels and `bench/` as siglip2_bench.

Nothing installed may be called `kernels`: that name is a package of Hugging Face's which
transformers imports.
"""

from setuptools import find_packages, setup


def mapped(folder: str, name: str) -> list[str]:
    return [name] + [f"{name}.{p}" for p in find_packages(folder)]


setup(
    packages=find_packages(include=["siglip2", "siglip2.*"])
    + mapped("kernels", "siglip2_kernels")
    + mapped("bench", "siglip2_bench"),
    package_dir={"siglip2_kernels": "kernels", "siglip2_bench": "bench"},
)
