"""The energy of training steps by component of the model, shared out by time: no sensor sees a component.

The step's phases count together. Phases are those of the host program, which on a GPU runs ahead of the device, while a
step is split by the device's own clock; what a phase boundary cuts off one phase belongs to the same steps anyway.
"""

from collections.abc import Mapping

from moe.energy.phases import STEP_PHASES
from moe.energy.timeline import apportion
from moe.energy.totals import PhaseTotal

__all__ = ["share_steps"]


def share_steps(phases: Mapping[str, PhaseTotal], seconds: Mapping[str, float]) -> dict[str, int]:
    """Millijoules by component: those of all phases of steps, to the last one, in proportion to `seconds`.

    Empty when no component took a nanosecond.

    >>> share_steps({"data": PhaseTotal(10, 0.1), "optimizer": PhaseTotal(91, 0.9)}, {"experts": 3.0, "head": 1.0})
    {'experts': 76, 'head': 25}
    """
    energy_mj = sum(phase.energy_mj for name, phase in phases.items() if name in STEP_PHASES)
    spent_ns = {name: round(spent_s * 1e9) for name, spent_s in seconds.items()}
    return apportion(energy_mj, spent_ns) if any(spent_ns.values()) else {}
