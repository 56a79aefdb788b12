"""Two import packages from two folders; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe", "moe.*"]), *find_packages("kernels", include=["moe_kernels*"])],
    package_dir={"moe": "moe", "moe_kernels": "kernels/moe_kernels"},
)
