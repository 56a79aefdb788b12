"""Three packages from three folders, recipes among them as files to copy; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["moe", "moe.*"]),
        *find_packages("kernels", include=["moe_kernels*"]),
        "moe.recipes",
    ],
    package_dir={"moe": "moe", "moe_kernels": "kernels/moe_kernels", "moe.recipes": "recipes"},
)
