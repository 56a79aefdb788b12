"""Kernels of the mixture-of-experts layer: routing, sorting rows by expert, grouped matrix products, the expert MLP.

Every op has a `torch` backend (the reference, and the fast path on CPU) and a `triton` backend, and knows nothing of
models. Importing the package imports nothing; a name loads its file when first used.
"""

from importlib import import_module
from typing import Any

# public name -> file it lives in; never one of the same name: importing a file binds it on the package, where it would
# hide the function
_EXPORTS = {
    "Dispatch": "dispatch",
    "KernelError": "errors",
    "RouteResult": "routing",
    "RouteStatistics": "routing",
    "expert_mlp": "mlp",
    "grouped_gemm": "gemm",
    "resolve": "backend",
    "sort_by_expert": "dispatch",
    "topk_route": "routing",
    "topk_route_with_statistics": "routing",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'moe_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
