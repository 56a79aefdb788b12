"""What a configuration costs, by arithmetic: parameters and operations; nothing is allocated, no torch."""

from moe.accounting.counts import flops_per_token, num_parameters, parameters, twin_residual

__all__ = ["flops_per_token", "num_parameters", "parameters", "twin_residual"]
