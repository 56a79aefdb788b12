"""Triton, or a stand-in that lets every kernel file be imported where Triton does not exist.

Kernel files say `from ._triton import tl, triton`. With the stand-in, `@triton.jit` makes an object that raises
 `KernelError` when launched, so nothing fails before someone asks for the Triton backend.
"""

from typing import Any

from .errors import KernelError

__all__ = ["HAVE_TRITON", "INTERPRETED", "VERSION", "tl", "triton"]

HAVE_TRITON = True
INTERPRETED = False
VERSION = ""
try:
    import triton
    import triton.language as tl

    VERSION = triton.__version__
    # Triton reads TRITON_INTERPRET when a function is decorated; so do we, once, to agree with it.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    HAVE_TRITON = False

    class _MissingKernel:
        """What `@triton.jit` returns without Triton: a name that cannot be launched."""

        def __init__(self, fn: Any) -> None:
            self.__name__ = fn.__name__
            self.__doc__ = fn.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise KernelError(
                f"kernel {self.__name__} needs triton, which is not installed: pip install 'triton>=3.6', "
                "or pass backend='torch'"
            )

        def __getitem__(self, grid: Any) -> Any:
            return self.__call__

    class _MissingTriton:
        """The few names kernel files use at import time."""

        @staticmethod
        def jit(fn: Any = None, **options: Any) -> Any:
            return _MissingKernel(fn) if fn is not None else _MissingKernel

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

    class _MissingLanguage:
        """Stands for `triton.language`: only annotations such as `tl.constexpr` are read at import time."""

        constexpr = object()

    triton: Any = _MissingTriton()  # type: ignore[no-redef]
    tl: Any = _MissingLanguage()  # type: ignore[no-redef]
