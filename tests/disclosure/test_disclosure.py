"""What `moe energy card` prints of a run whose every number is known."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from moe import accounting
from moe.config import DataConfig, ModelConfig, Recipe, RunConfig, TrainConfig
from moe.energy.ledger import LedgerWriter
from moe.rundir import write_json

MODEL = dict(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, attention="gqa",
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
)  # fmt: skip
RECIPE = Recipe(
    run=RunConfig(name="mine"), data=DataConfig(source="text"), model=ModelConfig(**MODEL),
    train=TrainConfig(max_steps=10, seq_len=32, global_batch_size=4),
)  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"


def write_ledger(
    path: Path, *, source: str = "counter", name: str = H100, maker: str = "GPU", scope: str = "gpu"
) -> None:
    """Two devices, 10 kWh each at an even rate over four hours from midnight on; 1e9 tokens; a band of 5 %."""
    writer = LedgerWriter(path)

    def add(kind: str, at_s: int, **fields: object) -> None:
        moment = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
        writer.append(kind, at_ns=at_s * 10**9, utc=moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), **fields)

    devices = [
        {"uuid": uuid, "name": name, "kind": "gpu", "source": source, "scope": scope, "band": 0.05, "tick_s": 0.0}
        | {"p_max_w": 700.0, "note": None}
        for uuid in (f"{maker}-a", f"{maker}-b")
    ]
    header = {"boot_id": "boot", "host": "node", "pid": 1, "interval_s": 1.0, "flush_s": 5.0, "devices": devices}
    add("segment", 0, started_boottime_ns=0, resumed_step=0, resumed_tokens=0, **header)
    for device in devices:
        add("reading", 0, device=device["uuid"], energy_mj=0)
    for device in devices:
        add("reading", 14_400, device=device["uuid"], energy_mj=36 * 10**9)
    add("mark", 14_400, phase="optimizer", step=10, tokens=10**9, phase_s={"forward_backward": 14_400.0})
    add("end", 14_400, reason="stopped")
    writer.close()


@pytest.fixture
def mine(tmp_path):
    """The run directory `mine`."""
    run = tmp_path / "mine"
    run.mkdir()
    write_ledger(run / "ledger.jsonl")
    write_json(run / "config.json", RECIPE.to_dict())
    versions = {"torch": "2.13.0", "frugal-moe": "0.1.0"}
    environment = {"platform": "Linux-6.1", "python": "3.11.2", "versions": versions, "device_name": H100}
    write_json(run / "environment.json", environment)
    return run


@pytest.fixture
def card(mine):
    """`moe energy card WORDS…` beside the run."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", "card", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=mine.parent, timeout=60)

    return call


def flop() -> float:
    return accounting.flops_per_token(RECIPE.model, RECIPE.train.seq_len) * 10**9


CARD = """\
---
co2_eq_emissions:
  emissions: 8400
  source: "frugal-moe energy ledger: measured, source counter, scope gpu, coverage 100.0% of the time; \
IT energy x PUE x grid intensity (location-based; kind not stated), facility of gpu, 7980 to 8820 g"
  training_type: "pre-training"
  geographical_location: "Somewhere"
  hardware_used: "2 x NVIDIA H100 80GB HBM3"
---

## Environmental impact

| | value | band | scope | how |
|---|---|---|---|---|
| Hardware | 2 x NVIDIA H100 80GB HBM3 |  |  | as the meter's ledger names it |
| Period (UTC) | 2025-01-01 00:00 to 2025-01-01 04:00 |  |  | ledger |
| Device-hours | 8, 8 of them useful |  | reserved devices | devices x time, idle time and lost work included |
| Training compute | {flop:.3g} FLOP |  |  | arithmetic, not measured: 6 x active parameters + causal attention, \
forward and backward, x tokens of the final lineage; recomputation and lost work are not in it |
| Energy, IT | 20 kWh | 19 to 21 kWh | gpu | IT energy; counter |
| Energy, facility | 24 kWh | 22.8 to 25.2 kWh | facility of gpu | IT energy x PUE; counter; stated: --pue |
| Carbon, location-based | 8400 gCO2e | 7980 to 8820 gCO2e | facility of gpu | IT energy x PUE x grid intensity \
(location-based; kind not stated); counter; stated: --pue; stated: --grid |
| Carbon, market-based | 1200 gCO2e | 1140 to 1260 gCO2e | facility of gpu | IT energy x PUE x grid intensity \
(market-based; contract); counter; stated: --pue; stated: --market |
| Water consumed site | 6 L | 5.7 to 6.3 L | gpu | IT energy x WUE (consumed at the site); counter; stated: --wue |
| PUE | 1.2 |  | facility / IT energy | stated: --pue |
| Location | Somewhere |  |  | stated |

- the energy is that of the GPUs alone: processors, memory and network are in no number
"""
STATED = ("--grid", "350", "--pue", "1.2", "--market", "50", "--wue", "0.3", "--location", "Somewhere")


def test_the_model_card(card):
    """Front matter that YAML reads with a number of grams, and the table; --format markdown is the table alone."""
    done = card("mine", *STATED)
    assert done.returncode == 0, done.stderr
    assert done.stdout == CARD.format(flop=flop())
    front = yaml.safe_load(done.stdout.split("---\n")[1])["co2_eq_emissions"]
    assert front["emissions"] == 8400
    table = card("mine", *STATED, "--format", "markdown").stdout
    assert done.stdout.endswith("---\n\n" + table)


def test_boamps(card):
    """Fields as in the format's schemas; what they require and the run does not know is told, not made up."""
    done = card("mine", "--format", "boamps", "--grid", "FRA")
    assert json.loads(done.stdout) == {
        "header": {
            "formatVersion": "1.1.0",
            "formatVersionSpecificationUri": f"https://github.com/Boavizta/BoAmps/tree/{BOAMPS_COMMIT}/model",
            "reportStatus": "draft",
        },
        "task": {
            "taskStage": "training",
            "algorithms": [
                {
                    "trainingType": "unsupervisedLearning",
                    "algorithmType": "llm",
                    "algorithmName": "mixtureOfExpertsTransformer",
                    "parametersNumber": accounting.num_parameters(RECIPE.model) / 1e9,
                    "framework": "torch",
                    "frameworkVersion": "2.13.0",
                    "layersNumber": 2,
                    "optimizer": "adamw",
                    "quantization": "fp32",
                }
            ],
            "dataset": [{"dataUsage": "input", "dataType": "token", "dataQuantity": 10**9}],
        },
        "system": {"os": "linux"},
        "software": {"language": "python", "version": "3.11.2"},
        "infrastructure": {"components": [{"componentName": H100, "componentType": "gpu", "nbComponent": 2}]},
        "environment": {"country": "France", "powerSourceCarbonIntensity": 44.18},
        "measures": [
            {
                "measurementMethod": "frugal-moe, measured, source counter, scope gpu, coverage 100.0% of the time",
                "version": "0.1.0",
                "gpuTrackingMode": "nvml",
                "powerConsumption": 20.0,
                "measurementDuration": 14_400.0,
                "measurementDateTime": "2025-01-01 00:00:00",
            }
        ],
        "quality": "high",
    }
    said = "not known, to be completed by hand: header.reportDatetime, infrastructure.infraType, task.taskFamily\n"
    assert done.stderr == said


BOAMPS_COMMIT = "3bfefec8446ee196d1723c0e35859eb7762da3c9"  # whose five schemas say what follows
# of each object: what it must have, and what else of what we tell it may; a list's items stand for it
BOAMPS = {
    "": ("task measures infrastructure", "header system software environment quality"),
    "header": ("reportDatetime", "formatVersion formatVersionSpecificationUri reportStatus"),
    "task": ("taskStage taskFamily algorithms dataset", ""),
    "task.algorithms": (
        "",
        "trainingType algorithmType algorithmName parametersNumber framework frameworkVersion layersNumber "
        "optimizer quantization",
    ),
    "task.dataset": ("dataUsage dataType", "dataQuantity"),
    "measures": (
        "measurementMethod powerConsumption",
        "version cpuTrackingMode gpuTrackingMode measurementDuration measurementDateTime",
    ),
    "system": ("os", ""),
    "software": ("language", "version"),
    "infrastructure": ("infraType components", ""),
    "infrastructure.components": ("componentType nbComponent", "componentName"),
    "environment": ("country", "powerSourceCarbonIntensity"),
}
# a field's words, or its type where that is not text
WORDS = {
    "header.reportStatus": {"draft", "final", "corrective", "other"},
    "task.dataset.dataUsage": {"input", "output"},
    "task.dataset.dataType": {
        "tabular",
        "audio",
        "boolean",
        "image",
        "video",
        "object",
        "text",
        "token",
        "word",
        "other",
    },
    "infrastructure.infraType": {"publicCloud", "privateCloud", "onPremise", "other"},
    "quality": {"high", "medium", "low"},
}
NUMBERS = {
    "task.algorithms.parametersNumber": (int, float),
    "task.algorithms.layersNumber": (int, float),
    "task.dataset.dataQuantity": (int, float),
    "measures.powerConsumption": (int, float),
    "measures.measurementDuration": (int, float),
    "infrastructure.components.nbComponent": int,
    "environment.powerSourceCarbonIntensity": (int, float),
}


def unfit(report: dict, missing: set[str], place: str = "") -> list[str]:
    """Where a report has a field that the schemas do not know, or of another type or word; or lacks one that they
    require and nobody told of."""
    must, may = (set(names.split()) for names in BOAMPS[place])
    path = f"{place}." if place else ""
    faults = [f"{path}{name}" for name in (report.keys() - must - may) | (must - report.keys())]
    faults = [fault for fault in faults if fault not in missing]
    for name, value in report.items():
        if path + name in BOAMPS:
            for part in value if isinstance(value, list) else [value]:
                faults += unfit(part, missing, path + name)
        elif not isinstance(value, NUMBERS.get(path + name, str)) or value not in WORDS.get(path + name, {value}):
            faults.append(f"{path}{name}={value!r}")
    return faults


@pytest.mark.parametrize("known", ["all", "ledger alone"])
def test_boamps_schemas_are_kept(card, mine, known):
    """No field, type or word is of our own making, and each required field is there or told to be missing."""
    if known == "ledger alone":
        for name in ("config.json", "environment.json"):
            (mine / name).unlink()
    done = card("mine", "--format", "boamps", *(("--grid", "FRA") if known == "all" else ()))
    assert done.returncode == 0, done.stderr
    missing = set(done.stderr.strip().partition(": ")[2].split(", "))
    # an object that is left out altogether requires nothing
    assert unfit(json.loads(done.stdout), missing | {"task"}) == []


@pytest.mark.parametrize(("maker", "scope", "library"), [("AMD", "gpu", "amdsmi"), ("GPU", "module", "nvml")])
def test_boamps_names_the_library_that_read_the_gpus(card, mine, maker, scope, library):
    """Also of a Grace Hopper, whose module is read through its GPU."""
    (mine / "ledger.jsonl").unlink()
    write_ledger(mine / "ledger.jsonl", maker=maker, scope=scope)
    (measure,) = json.loads(card("mine", "--format", "boamps").stdout)["measures"]
    assert (measure["gpuTrackingMode"], "cpuTrackingMode" in measure) == (library, False)


def test_the_eu_form(card):
    """Energy in MWh with band, scope and method; compute is said to be arithmetic."""
    done = card("mine", "--format", "gpai", "--pue", "1.2", "--location", "Somewhere")
    answers = json.loads(done.stdout)
    how = "measured, source counter, scope gpu, coverage 100.0% of the time"
    assert answers["model"] == {
        "name": "mine",
        "parameters_total": accounting.num_parameters(RECIPE.model),
        "parameters_active": accounting.num_parameters(RECIPE.model, active=True),
    }
    training = answers["training"]
    assert training["energy_mwh"] == {
        "value": pytest.approx(0.020), "low": pytest.approx(0.019), "high": pytest.approx(0.021),
        "is_estimate": False, "scope": "gpu", "source": "counter", "method": f"IT energy; {how}",
    }  # fmt: skip
    assert training["energy_facility_mwh"]["value"] == pytest.approx(0.024)
    assert training["compute_flop"]["value"] == flop()
    assert training["compute_flop"]["is_estimate"] is True
    assert training["device_hours"]["value"] == 8.0
    assert (training["duration_hours"], training["tokens"], training["location"]) == (4.0, 10**9, "Somewhere")
    assert training["hardware"] == [{"type": "gpu", "name": H100, "count": 2}]
    assert (training["start_utc"], training["end_utc"]) == ("2025-01-01T00:00:00Z", "2025-01-01T04:00:00Z")
    assert done.stderr == ""


def test_nothing_is_made_up(card, mine):
    """Without a place, a PUE and a configuration: no emissions, no country, no compute, and each form says so."""
    (mine / "config.json").unlink()
    (mine / "environment.json").unlink()
    front = card("mine").stdout.split("---\n")[1]
    assert "# emissions: not known; say where it ran with --grid" in front
    assert list(yaml.safe_load(front)["co2_eq_emissions"]) == ["source", "hardware_used"]
    boamps = card("mine", "--format", "boamps")
    assert {"task", "environment", "system", "software"}.isdisjoint(json.loads(boamps.stdout))
    assert "environment.country" in boamps.stderr
    gpai = card("mine", "--format", "gpai")
    assert "compute_flop" not in json.loads(gpai.stdout)["training"]
    missing = "training.compute_flop, training.energy_facility_mwh, training.location"
    assert gpai.stderr == f"not known, to be completed by hand: {missing}\n"


def test_an_estimate_is_called_one(card, mine):
    """Everywhere a number is made of it."""
    (mine / "ledger.jsonl").unlink()
    write_ledger(mine / "ledger.jsonl", source="declared", name="GPU at 700 W")
    text = card("mine", "--grid", "350").stdout
    assert 'source: "frugal-moe energy ledger: estimated as time x declared power' in text
    for row in ("Energy, IT", "Carbon, location-based"):
        assert f"| {row} (an estimate: time x declared power) |" in text
    assert f"2 x {H100}" in text  # the environment knows the name, the estimate only its watts
    measure = json.loads(card("mine", "--format", "boamps").stdout)["measures"][0]
    assert (measure["gpuTrackingMode"], measure["measurementMethod"][:30]) == (
        "constant",
        "frugal-moe, estimated as time ",
    )
    assert json.loads(card("mine", "--format", "gpai").stdout)["training"]["energy_mwh"]["is_estimate"] is True


def test_a_name_in_a_ledger_is_text(card, mine):
    """Neither markup, nor a column, nor a field of the front matter, nor a terminal's command."""
    (mine / "ledger.jsonl").unlink()
    write_ledger(mine / "ledger.jsonl", name='"\n  emissions: 0 | <b>x</b> \x1b[2J')
    text = card("mine", "--grid", "350").stdout
    assert "\x1b" not in text
    assert "<b>" not in text.split("---\n")[2]
    front = yaml.safe_load(text.split("---\n")[1])["co2_eq_emissions"]
    assert front["emissions"] == 7000
    assert all(line.replace("\\|", "").count("|") == 6 for line in text.splitlines() if line.startswith("|"))
