"""The meter of a training process: one reader per node, on its first rank; the other ranks only keep step."""

import sys

from moe.config import EnergyConfig, Recipe
from moe.energy import EnergyMeter, Source
from moe.energy.sources import EstimateSource
from moe.errors import SensorError
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.rundir import RunDir
from moe.trainer.environment import device_uuid
from moe.trainer.start import Start

__all__ = ["Cost", "TrainingMeter"]


def _started_meter(recipe: Recipe, run: RunDir, gpu_uuids: list[str], start: Start) -> EnergyMeter:
    """A meter on the sensors there are. GPUs that cannot be read are estimated: training must not wait for them."""

    def make(sources: list[Source] | None) -> EnergyMeter:
        meter = EnergyMeter(
            ledger=run.ledger(ranks.node()),
            devices=gpu_uuids or None,
            declared_power_w=recipe.energy.declared_power_w,
            interval_s=recipe.energy.interval_s,
            resumed_step=start.step,
            resumed_tokens=start.tokens,
            sources=sources,
        )
        meter.start()
        return meter

    try:
        return make(None)
    except SensorError as error:
        print(f"energy is estimated from rated power: {error}", file=sys.stderr, flush=True)
        return make([EstimateSource(gpu_uuids=gpu_uuids, note=str(error))])


class Cost:
    """What the run cost so far, all nodes and earlier segments included."""

    def __init__(self, energy_j: float, device_hours: float, power_w: float) -> None:
        self.kwh = energy_j / 3.6e6
        self.device_hours = device_hours
        self.power_w = power_w

    def reaches_budget(self, recipe: Recipe) -> bool:
        """Whether one of the recipe's budgets is used up."""
        train = recipe.train
        budgets = (
            (train.max_kwh, self.kwh),
            (train.max_device_hours, self.device_hours),
            (train.max_cost, recipe.energy.cost(self.device_hours, self.kwh)),
        )
        return any(limit is not None and used >= limit for limit, used in budgets)

    def row(self, prices: EnergyConfig) -> dict[str, float]:
        """The columns of a metrics row."""
        row = {"train/device_hours": self.device_hours, "energy/total_kwh": self.kwh}
        if not prices.has_no_price:
            row["efficiency/cost"] = prices.cost(self.device_hours, self.kwh)
        return row


class TrainingMeter:
    """Owns an EnergyMeter on the first rank of each node and nothing elsewhere; all calls are valid on every rank."""

    def __init__(self, recipe: Recipe, run: RunDir, engine: Engine, start: Start) -> None:
        here = f"{ranks.node()} {device_uuid(engine.device)}"
        everyone = ranks.gather_texts(here, engine.device)
        self._engine = engine
        self.device_uuids = [text.split(" ", 1)[1] for text in everyone if not text.endswith(" ")]
        self._meter: EnergyMeter | None = None
        if ranks.local_rank() == 0:
            mine = [text.split(" ", 1)[1] for text in everyone if text.split(" ", 1)[0] == str(ranks.node())]
            self._meter = _started_meter(recipe, run, [uuid for uuid in mine if uuid], start)
        self.segment = self._meter.segment if self._meter else 0

    def phase(self, name: str) -> None:
        """The process now does this: data, forward_backward, optimizer, evaluation, checkpoint or idle."""
        if self._meter:
            self._meter.phase(name)

    def progress(self, step: int, tokens: int) -> None:
        """Optimizer steps and tokens of the lineage done so far."""
        if self._meter:
            self._meter.progress(step=step, tokens=tokens)

    def flush(self, step: int, tokens: int) -> dict[str, int]:
        """Cut a mark at exactly this step and put the ledger on the disk; its position goes into the checkpoint."""
        if not self._meter:
            return {}
        position = self._meter.flush(step=step, tokens=tokens)
        return {"segment": position["segment"], "seq": position["seq"]}

    def cost(self) -> Cost:
        """Summed over nodes; every rank must call it."""
        snapshot = self._meter.snapshot() if self._meter else None
        mine = [snapshot.energy_j or 0.0, snapshot.device_hours, snapshot.power_w or 0.0] if snapshot else [0.0] * 3
        return Cost(*ranks.sum_numbers(mine, self._engine.device))

    def stop(self) -> None:
        """Write the last reading and close the ledger."""
        if self._meter:
            self._meter.stop()
