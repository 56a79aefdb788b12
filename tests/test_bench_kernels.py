"""The kernels' benchmark at tiny size: it checks before it times, and prints the agreed keys."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"
KEYS = {"bench", "case", "ours", "peer", "peer_name", "unit", "ratio", "floor_fraction", "hardware", "config"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_kernels")


@pytest.fixture
def case(bench: ModuleType) -> dict[str, object]:
    return {"tiny": bench.Case(32, 16, 8, 4, 2, torch.float32)}


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prints_every_part(bench: ModuleType, case: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Products in TFLOP/s for both routings, pieces in GB/s once; a ratio above 1 is ours being faster."""
    bench.main(["--device", "cpu", "--rounds", "2"], case)
    lines = lines_of(capsys)
    parts = {line["case"]: line["unit"] for line in lines}
    products = [
        f"tiny/{routing}/{part}/{phase}"
        for routing in ("balanced", "skewed")
        for part in ("experts", "layer")
        for phase in ("forward", "forward+backward")
    ]
    pieces = ["router/forward", "router/backward", "sort/forward", "combine/forward"]
    assert {name: unit for name, unit in parts.items() if unit == "TFLOP/s"} == dict.fromkeys(products, "TFLOP/s")
    assert [name for name, unit in parts.items() if unit == "GB/s"] == [f"tiny/skewed/{piece}" for piece in pieces]
    for line in lines:
        assert set(line) == KEYS
        assert line["floor_fraction"] > 0
        assert line["config"]["experts"] == 4
    routers = {line["peer_name"] for line in lines if "/router/" in line["case"]}
    assert routers == {"torch softmax, topk"}
    experts = next(line for line in lines if line["case"] == "tiny/balanced/experts/forward")
    assert experts["config"]["flops"] == 6 * 32 * 2 * 16 * 8
    assert experts["ours"] == pytest.approx(
        experts["config"]["flops"] / experts["config"]["median_ms"]["ours"] / 1e9, rel=1e-2
    )
    loads = {line["case"].split("/")[1]: line["config"]["max_load_over_mean"] for line in lines}
    assert loads["skewed"] > loads["balanced"] >= 1


def test_master_weights_are_multiplied_under_autocast(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """fp32 weights beside bf16 activations: y is bf16, gradients of weights are fp32, and lines say which they are."""
    case = bench.Case(32, 16, 8, 4, 2, torch.bfloat16, masters=True)
    one = bench.Bench("tiny", case, "balanced", "cpu", 1)
    one.check()
    mine = one.contenders[one.mine]
    y = mine.forward()
    assert y.dtype == torch.bfloat16
    kept = [t.dtype for t in torch.autograd.grad(y, mine.leaves, one.inputs.dy)]
    assert kept == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    one.experts()
    lines = lines_of(capsys)
    assert "torch grouped_mm" in {line["peer_name"] for line in lines}
    assert all(line["config"]["masters"] for line in lines)


def test_alternatives_are_other_configurations_of_ours(
    bench: ModuleType, case: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is launched within its own table, is checked and timed against ours; the table is as before afterwards."""
    from moe_kernels.configs import config_for

    def table() -> list:
        kernels = ("product", "swiglu", "swiglu_backward", "wgrad", "wgrad_gathered")
        return [config_for(kernel, torch.bfloat16, torch.device("cpu"), 128, True) for kernel in kernels]

    one = bench.Bench("tiny", case["tiny"], "balanced", "cpu", 1, against_ourselves=True)
    names = {name.rpartition(", ")[2]: contender for name, contender in one.contenders.items()}
    assert set(names) == {one.mine, "plain", "pointers"}
    before = table()
    assert before[0].specialize
    with names["plain"].within():
        assert not table()[0].specialize
        assert table()[1:] == before[1:]
    with names["pointers"].within():
        assert not any(config.tma for config in table())
    assert table() == before
    one.check()
    one.experts()
    lines = lines_of(capsys)
    assert {line["peer_name"] for line in lines} == set(one.contenders) - {one.mine}
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--alternatives"], case)


def test_energy_mode_counts_joules(bench: ModuleType, case: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contender runs inside a meter's window; the number carries its source."""
    bench.main(["--device", "cpu", "--routing", "balanced", "--energy", "0.2"], case)
    lines = lines_of(capsys)
    assert lines
    for line in lines:
        assert line["case"] == "tiny/balanced/experts/energy"
        assert line["ours"] > 0
        assert line["config"]["ours_energy"]["calls"] > 1
        assert line["config"]["ours_energy"]["source"]


def test_times_nothing_when_ours_is_wrong(bench: ModuleType, case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong result of ours stops the run."""
    right = bench.results
    calls = iter([right, lambda contender, dy: [t * 1.01 for t in right(contender, dy)]])  # the reference, then ours
    monkeypatch.setattr(bench, "results", lambda contender, dy: next(calls)(contender, dy))
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.main(["--device", "cpu", "--rounds", "1"], case)


@pytest.mark.parametrize("whose", ["moe_kernels torch", "torch grouped_mm"], ids=["ours", "a peer's"])
def test_a_nan_gradient_is_wrong(
    bench: ModuleType, case: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """One NaN among right numbers: ours stops the run, a peer is left out of it."""
    one = bench.Bench("tiny", case["tiny"], "balanced", "cpu", 1)
    right, spoiled = bench.results, one.contenders[whose]

    def results(contender: object, dy: torch.Tensor) -> list[torch.Tensor]:
        found = right(contender, dy)
        if contender is spoiled:
            found[2].view(-1)[5] = torch.nan  # of the gradient of gate_up
        return found

    monkeypatch.setattr(bench, "results", results)
    if whose == one.mine:
        with pytest.raises(SystemExit, match="is off by nan"):
            one.check()
    else:
        one.check()
        assert whose not in one.contenders
        assert f"{whose} is off by nan" in capsys.readouterr().err


def test_a_lost_row_is_seen(bench: ModuleType) -> None:
    """One row of a thousand that nobody wrote is more than the bound, though its share of the norm is not."""
    want = torch.randn(10_000, 16)
    got = want.clone()
    got[77] = 0
    assert (want - got).norm() / want.norm() < bench.BOUND[torch.bfloat16]
    assert bench.relative_error(want, got) > bench.BOUND[torch.bfloat16]


def test_a_wrong_peer_is_left_out(
    bench: ModuleType, case: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the others are timed."""
    peers = importlib.import_module("kernel_peers")
    right = peers.grouped_mm_experts
    monkeypatch.setattr(peers, "grouped_mm_experts", lambda *inputs: right(*inputs) * 1.01)
    bench.main(["--device", "cpu", "--rounds", "1", "--routing", "balanced"], case)
    printed = capsys.readouterr()
    assert "torch grouped_mm is off by" in printed.err
    experts = [line for line in map(json.loads, printed.out.splitlines()) if "/experts/" in line["case"]]
    assert experts
    assert all(line["peer_name"].startswith("transformers") for line in experts)
