"""`python -m moe.cli …`, the same as the `moe` console script."""

from moe.cli import main

main()
