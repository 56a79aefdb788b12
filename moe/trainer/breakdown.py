"""Where a step's time goes: data, attention, router, experts, feed_forward, head, optimizer, communication, other.

One step in some is stamped at the boundaries of its modules: in the forward pass as they are entered and left, in the
backward pass as the gradient of a module's output begins to flow back and as its input's is done. Between two stamps
the time is the component's that was entered last. Stamps are events on a GPU's stream, read once the step is over:
nothing waits for the device, and what a GPU idles between kernels counts to the component it idles in.

The head works out its gradients in the forward pass, so it hardly shows in the backward. Where the model is compiled
its inside cannot be stamped and is all `other`. Communication is what the backward pass waits for at its end and the
trainer's own sums; what overlaps with the backward costs nothing.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moe.layers import Experts, FeedForward, GroupedQueryAttention, MultiHeadLatentAttention, Router
from moe.model import Transformer

__all__ = ["Breakdown", "component_modules", "with_gradient"]

_COMPONENTS: dict[type[nn.Module], str] = {
    MultiHeadLatentAttention: "attention",
    GroupedQueryAttention: "attention",
    Router: "router",
    Experts: "experts",
    FeedForward: "feed_forward",
}


class Breakdown:
    """Splits the steps it is asked to; at all other times `switch` does nothing.

    Args:
        model: the model itself, not wrapped; `inside=False` does not look into it (it is compiled).
        ranks: processes that train together.
    """

    def __init__(self, model: Transformer, device: torch.device, *, ranks: int, inside: bool) -> None:
        self._cuda = device.type == "cuda"
        self._parts = component_modules(model) if inside else []
        # the first layer's weight, whose gradient is the last to be ready
        self._last_gradient = model.embed_tokens.weight if ranks > 1 else None
        self._stamps: list[tuple[str, Any]] = []
        self._active = False

    @contextmanager
    def measured(self, wanted: bool) -> Iterator[None]:
        """Around one step; split when `wanted`."""
        if not wanted:
            yield
            return
        handles = [handle for name, module in self._parts for handle in self._watch(name, module)]
        if self._last_gradient is not None:
            handles.append(
                self._last_gradient.register_post_accumulate_grad_hook(lambda _: self.switch("communication"))
            )
        self._stamps, self._active = [], True
        try:
            yield
            self.switch("end")
        finally:
            self._active = False
            for handle in handles:
                handle.remove()

    def switch(self, component: str) -> None:
        """From here on the time is this component's."""
        if self._active:
            self._stamps.append((component, self._now()))

    def seconds(self) -> dict[str, float]:
        """Component to seconds in the step measured last, once; waits for that step to end on the device."""
        stamps, self._stamps = self._stamps, []
        totals: dict[str, float] = {}
        if stamps and self._cuda:
            stamps[-1][1].synchronize()
        for (component, start), (_, end) in pairwise(stamps):
            totals[component] = totals.get(component, 0.0) + self._between(start, end)
        return totals

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        def enter(_: nn.Module, inputs: Any) -> None:
            for tensor in with_gradient(inputs):
                tensor.register_hook(lambda _: self.switch("other"))
            self.switch(name)

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            self.switch("other")
            for tensor in with_gradient(output):
                tensor.register_hook(lambda _: self.switch(name))

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._cuda else end - start


def component_modules(model: Transformer) -> list[tuple[str, nn.Module]]:
    """(component, module) of all modules that a component consists of."""
    found = [(name, module) for module in model.modules() for kind, name in _COMPONENTS.items() if type(module) is kind]
    return [*found, ("head", model.lm_head)]


def with_gradient(value: Any) -> Iterator[Tensor]:
    """Tensors a gradient will reach, in a tensor, a sequence or a dataclass of them."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from with_gradient(part)
    elif dataclasses.is_dataclass(value):
        yield from with_gradient([getattr(value, field.name) for field in dataclasses.fields(value)])
