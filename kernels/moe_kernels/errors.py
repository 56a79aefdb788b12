"""The one error this package raises on purpose."""

__all__ = ["KernelError"]


class KernelError(RuntimeError):
    """A kernel cannot run as asked, or computes wrong values here; the message names what, the value and the mend."""
