"""What a configuration costs, by arithmetic: parameters, operations and bytes; nothing is allocated, no torch."""

from moe.accounting.counts import flops_per_token, num_parameters, parameters, twin_residual
from moe.accounting.footprint import cache_bytes_per_token, memory

__all__ = ["cache_bytes_per_token", "flops_per_token", "memory", "num_parameters", "parameters", "twin_residual"]
