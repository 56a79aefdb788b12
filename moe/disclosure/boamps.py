"""BoAmps: Boavizta's JSON format for the energy of one computing task.

Fields, their types and their words are those of the five schemas in `model/` of Boavizta/BoAmps at commit 3bfefec
(April 2026), whose release notes call the format 1.1.0. What they require and nobody stated is left out and told: the
report is a draft, to be completed by hand.
"""

from typing import Any

from moe.disclosure.facts import Facts
from moe.energy.sources.base import is_measured

__all__ = ["boamps"]

_VERSION, _COMMIT = "1.1.0", "3bfefec8446ee196d1723c0e35859eb7762da3c9"
_TIME = "%Y-%m-%d %H:%M:%S"
_GRADES = (("high", 10), ("medium", 25), ("low", 50))  # of quality: errors of at most so many percent


def boamps(facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """The report, and the required fields that are missing from it."""
    first, _ = facts.span
    platform, python = facts.environment.get("platform"), facts.environment.get("python")
    report: dict[str, Any] = {
        "header": {
            "formatVersion": _VERSION,
            "formatVersionSpecificationUri": f"https://github.com/Boavizta/BoAmps/tree/{_COMMIT}/model",
            "reportStatus": "draft",
        },
        "task": _task(facts),
        "system": {"os": platform and str(platform).partition("-")[0].lower()},
        "software": {"language": python and "python", "version": python},
        "infrastructure": {
            "components": [
                {"componentName": name, "componentType": kind, "nbComponent": count}
                for (kind, name), count in facts.hardware.items()
            ]
        },
        "environment": _environment(facts),
    }
    missing = ["header.reportDatetime", "task.taskFamily", "infrastructure.infraType"]
    missing += [] if facts.recipe else ["task.taskStage", "task.algorithms", "task.dataset"]
    missing += [] if facts.location else ["environment.country"]
    missing += [] if facts.hardware else ["infrastructure.components"]
    if facts.energy is None:
        missing.append("measures")
    else:
        total = facts.fold.total
        band = 100 * total.band_j / total.energy_j if total.energy_j else None
        report["measures"] = [
            {
                "measurementMethod": f"frugal-moe, {facts.how}",
                "version": (facts.environment.get("versions") or {}).get("frugal-moe"),
                "cpuTrackingMode": _tracking(facts, "cpu"),
                "gpuTrackingMode": _tracking(facts, "gpu"),
                "powerConsumption": facts.energy.amount.value,
                "measurementDuration": facts.held_s,
                "measurementDateTime": first.strftime(_TIME),
            }
        ]
        report["quality"] = next((word for word, most in _GRADES if band is not None and band <= most), None)
    return _told(report), sorted(missing)


def _task(facts: Facts) -> dict[str, Any]:
    if facts.recipe is None or facts.parameters is None:
        return {}
    recipe, versions = facts.recipe, facts.environment.get("versions") or {}
    return {
        "taskStage": "training",
        "algorithms": [
            {
                "trainingType": "unsupervisedLearning",
                "algorithmType": "llm",
                "algorithmName": "mixtureOfExpertsTransformer" if recipe.model.is_moe else "transformer",
                "parametersNumber": facts.parameters[0] / 1e9,
                "framework": "torch",
                "frameworkVersion": versions.get("torch"),
                "layersNumber": recipe.model.num_hidden_layers,
                "optimizer": recipe.optim.name,
                "quantization": recipe.train.precision,
            }
        ],
        "dataset": [{"dataUsage": "input", "dataType": "token", "dataQuantity": facts.fold.tokens}],
    }


def _environment(facts: Facts) -> dict[str, Any]:
    grid = facts.footprint.factors.get("grid_carbon")
    stated = grid is not None and grid.amount.value is not None
    return {
        "country": facts.location,
        "powerSourceCarbonIntensity": grid.amount.value if grid is not None and stated else None,
    }


def _tracking(facts: Facts, kind: str) -> str | None:
    """How processors or GPUs were read, in the format's own words; None when none was. A module is read as a GPU."""
    devices = [device for device in facts.fold.devices if (device.scope == "node") == (kind == "cpu")]
    if not devices:
        return None
    if not all(is_measured(device.source) for device in devices):
        return "constant"
    if kind == "gpu":
        return "+".join(sorted({"amdsmi" if device.uuid.startswith("AMD-") else "nvml" for device in devices}))
    return "+".join(sorted({device.source for device in devices}))


def _told(value: Any) -> Any:
    """Without what is None or empty."""
    if isinstance(value, dict):
        told = {name: _told(part) for name, part in value.items()}
        return {name: part for name, part in told.items() if part not in (None, {}, [])}
    return [_told(part) for part in value] if isinstance(value, list) else value
