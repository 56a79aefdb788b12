"""How wrong it is to share a step's joules out by time: every component alone for ten seconds, against its share.

A whole training step is looped within a meter's window, some of its steps split as the trainer splits them; then every
component alone, over the inputs and gradients it had in a step, in all layers. Time alone says nothing of power: where
matrix products draw more than a top-k, the share by time is off, and this says by how much.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_check_metered_runs import DRY_SIZE, SIZE
from gpu_check_part import ROOT, Part, main
from torch import Tensor, nn

EACH_S, DRY_S = 10.0, 0.1
SPLIT_EVERY = 10
SHAPE, DRY_SHAPE = (16, 1024), (2, 32)


@dataclass
class Call:
    """One call of a module in a step: what went in, and the gradients of what came out, by their place."""

    module: nn.Module
    inputs: list[Any]
    words: dict[str, Any]
    gradients: dict[int, Tensor] = field(default_factory=dict)


class Training:
    """Steps of a model on one random batch."""

    def __init__(self, dry: bool) -> None:
        from moe import Balancer, Transformer
        from moe.config import OptimConfig
        from moe.optim import build_optimizer
        from moe.trainer.breakdown import Breakdown

        sys.path.insert(0, str(ROOT / "recipes"))
        from quickstart_moe import RECIPE

        self.device = torch.device("cpu" if dry else "cuda")
        torch.manual_seed(0)
        with self.device:
            self.model = Transformer(RECIPE.model.replace(**(DRY_SIZE if dry else SIZE))).train()
            self.ids = torch.randint(self.model.config.vocab_size, DRY_SHAPE if dry else SHAPE)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-5))
        self.balancer = Balancer(self.model, method="sign")
        self.breakdown = Breakdown(self.model, self.device, ranks=1, inside=True)
        self.number = self.split = 0
        self.step_s: dict[str, float] = {}

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.device.type == "cpu" else torch.autocast("cuda", torch.bfloat16)

    def step(self) -> None:
        """A whole step; one in some is split into components, whose times add up in `step_s`."""
        wanted = self.number % SPLIT_EVERY == 0
        with self.breakdown.measured(wanted):
            self.breakdown.switch("other")
            self.backward()
            self.breakdown.switch("optimizer")
            self.update()
            self.breakdown.switch("other")
            self.balancer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        self.split += wanted
        for name, spent_s in self.breakdown.seconds().items():
            self.step_s[name] = self.step_s.get(name, 0.0) + spent_s

    def backward(self) -> None:
        with self.autocast():
            loss = self.model(self.ids, labels=self.ids).loss
        loss.backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def run(part: Part) -> None:
    """The step, the components, and how far the two tellings lie apart."""
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    from kernel_energy import joules_per_call

    seconds = DRY_S if part.dry else EACH_S
    training = Training(part.dry)
    calls = captured(training)
    with part.section("whole step"):
        part.put("step", joules_per_call(training.step, seconds)._asdict())
    works: dict[str, Callable[[], None]] = {name: partial(alone, training, own) for name, own in calls.items()}
    training.backward()  # gradients for the optimizer
    works["optimizer"] = training.update
    for name, work in works.items():
        with part.section(name):
            if part.seconds_left < 1.5 * seconds:
                raise TimeoutError(f"{part.seconds_left:.0f} s are left")
            part.put("alone", {**part.data.get("alone", {}), name: joules_per_call(work, seconds)._asdict()})
    with part.section("attribution"):
        compare(part, {name: spent_s / training.split for name, spent_s in training.step_s.items()})


def captured(training: Training) -> dict[str, list[Call]]:
    """Component to its modules' calls in one step."""
    from moe.trainer.breakdown import component_modules, with_gradient

    calls: dict[str, list[Call]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, words: dict[str, Any], output: Any) -> None:
            call = Call(module, list(map(_leaf, inputs)), words)
            calls.setdefault(name, []).append(call)
            for place, tensor in enumerate(with_gradient(output)):
                tensor.register_hook(partial(_keep, call, place))

        return hook

    handles = [
        module.register_forward_hook(remember(name), with_kwargs=True)
        for name, module in component_modules(training.model)
    ]
    training.backward()
    training.balancer.step()
    training.optimizer.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return calls


def _keep(call: Call, place: int, gradient: Tensor | None) -> None:
    if gradient is not None:  # what nobody used has none
        call.gradients[place] = gradient.detach()


def _leaf(value: Any) -> Any:
    """An input cut off from what made it; a gradient reaches it where one did."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def alone(training: Training, calls: list[Call]) -> None:
    """Forward and backward of one component in all layers."""
    from moe.layers import Router
    from moe.trainer.breakdown import with_gradient

    for call in calls:
        with training.autocast():
            outputs = list(with_gradient(call.module(*call.inputs, **call.words)))
        torch.autograd.backward([outputs[place] for place in call.gradients], list(call.gradients.values()))
        if isinstance(call.module, Router):
            call.module.forget()
        call.module.zero_grad(set_to_none=True)
        for value in call.inputs:
            if isinstance(value, Tensor):
                value.grad = None


def compare(part: Part, step_s: dict[str, float]) -> None:
    """By component: seconds in a split step, joules by its share of the time, joules alone, and their difference."""
    step_j, whole_s = part.data["step"]["joules"], sum(step_s.values())
    found: dict[str, dict[str, float]] = {}
    for name, measured in part.data["alone"].items():
        by_time_j = step_j * step_s[name] / whole_s
        found[name] = {
            "step_s": step_s[name],
            "by_time_j": by_time_j,
            "alone_j": measured["joules"],
            "alone_s": measured["seconds"] / measured["calls"],
            "error_percent": 100 * (by_time_j / measured["joules"] - 1),
        }
        part.say(f"{name} {by_time_j:.3g} J by time, {measured['joules']:.3g} J alone")
    part.put("components", found)
    alone_j = sum(component["alone_j"] for component in found.values())
    other_j = step_j * step_s["other"] / whole_s
    part.put("step_j", {"whole": step_j, "components_alone": alone_j, "other_by_time": other_j})
    part.say(f"whole step {step_j:.3g} J, components alone {alone_j:.3g} J")


if __name__ == "__main__":
    main(run)
