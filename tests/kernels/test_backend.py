"""Which backend runs, what is refused, and that the self-check catches a wrong kernel."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_kernels
from moe_kernels import KernelError, configs, resolve, tiles
from moe_kernels import backend as backend_module
from moe_kernels.selfcheck import check_kernels


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_sorted_and_exist() -> None:
    """`__all__` is complete, and no name is hidden by the file it lives in."""
    assert moe_kernels.__all__ == sorted(moe_kernels.__all__) == dir(moe_kernels)
    for name in moe_kernels.__all__:
        assert getattr(moe_kernels, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moe_kernels.nothing  # noqa: B018


def test_import_is_lazy() -> None:
    """Importing the package imports neither torch nor triton."""
    assert run("import sys, moe_kernels; print({'torch', 'triton'} & set(sys.modules))") == "set()"


def test_explicit_choice_wins_and_none_follows_the_device() -> None:
    """torch on CPU by default; unknown names are refused."""
    assert resolve("torch", "cpu") == "torch"
    assert resolve("torch", "cuda") == "torch"
    assert resolve(None, "cpu") == "torch"
    assert resolve(None, torch.device("meta")) == "torch"
    with pytest.raises(KernelError, match="backend='cutlass' is unknown"):
        resolve("cutlass", "cpu")


def test_triton_on_cpu_is_refused_not_replaced() -> None:
    """Asking for what cannot run is an error that names the way out."""
    with pytest.raises(KernelError, match="pass backend='torch'"):
        resolve("triton", "cpu")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(backend_module, "_passed", set())
    monkeypatch.setattr(backend_module, "_resolved", {})
    monkeypatch.setattr(backend_module, "_said", set())


def test_old_gpus_get_torch_by_default_and_refuse_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Below compute capability 8.0 the default is torch, and the log says why, once."""
    pretend_gpu(monkeypatch, (7, 5))
    assert resolve(None, "cuda") == resolve(None, "cuda") == "torch"
    assert [r.getMessage().count("capability 7.5 is below") for r in caplog.records] == [1]
    with pytest.raises(KernelError, match=r"compute capability 7\.5 is below 8\.0"):
        resolve("triton", "cuda")


def pretend_checks(monkeypatch: pytest.MonkeyPatch, **runs: Callable[[torch.device], None]) -> None:
    checks = {op: SimpleNamespace(op=op, run=run) for op, run in runs.items()}
    monkeypatch.setattr(backend_module, "_checks", checks)


def test_self_check_runs_once_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per device, triton and torch; a failure is not remembered as a pass, and never becomes torch silently."""
    pretend_gpu(monkeypatch, (9, 0))
    calls: list[Any] = []
    pretend_checks(monkeypatch, expert_mlp=calls.append)
    assert resolve(None, "cuda:0") == resolve("triton", "cuda:0") == "triton"
    assert calls == [torch.device("cuda:0")]

    def fails(device: Any) -> None:
        raise KernelError("expert_mlp dx is off")

    pretend_gpu(monkeypatch, (9, 0))
    pretend_checks(monkeypatch, expert_mlp=fails)
    for _ in range(2):
        with pytest.raises(KernelError, match="dx is off"):
            resolve(None, "cuda:0")


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of an op resolves; from the second on that is a look-up. `cuda` alone may be another each time."""
    pretend_gpu(monkeypatch, (9, 0))
    pretend_checks(monkeypatch)
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    assert [resolve(None, torch.device("cuda", 1)) for _ in range(3)] == ["triton"] * 3
    assert asked == [torch.device("cuda:1")]
    assert resolve(None, "cuda") == resolve(None, "cuda") == "triton"
    assert len(asked) == 3


def test_an_op_loaded_later_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has passed is not run again, what came since is; the torch backend runs none."""
    pretend_gpu(monkeypatch, (9, 0))
    calls: list[str] = []
    pretend_checks(monkeypatch, early=lambda device: calls.append("early"))
    resolve(None, "cuda")
    backend_module.register_check(SimpleNamespace(op="late", run=lambda device: calls.append("late")))  # type: ignore[arg-type]
    resolve("torch", "cuda")
    assert calls == ["early"]
    resolve(None, "cuda")
    resolve(None, "cuda")
    assert calls == ["early", "late"]


def test_threads_wait_for_one_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to use triton before the check has passed, and it runs once for all."""
    pretend_gpu(monkeypatch, (9, 0))
    started, release, calls = threading.Event(), threading.Event(), []

    def slow(device: Any) -> None:
        calls.append(device)
        started.set()
        assert release.wait(30)

    pretend_checks(monkeypatch, expert_mlp=slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(resolve, None, "cuda:0")
        assert started.wait(30)
        second = pool.submit(resolve, None, "cuda:0")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.1)
        release.set()
        assert first.result(30) == second.result(30) == "triton"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("op", "checked"),
    [
        ("topk_route", "topk_route"),
        ("sort_by_expert", "sort_by_expert"),
        ("grouped_gemm", "grouped_gemm"),
        ("expert_mlp", "expert_mlp grouped_gemm sort_by_expert"),
    ],
)
def test_using_an_op_checks_it_and_what_it_is_built_of(op: str, checked: str) -> None:
    """An op cannot be had without its own check and those of its parts."""
    names = "sorted(check.op for check in moe_kernels.backend.registered_checks())"
    assert run(f"import moe_kernels; moe_kernels.{op}; print(*{names})") == checked


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import moe_kernels as mk
for name in mk.__all__:
    getattr(mk, name)
route = mk.topk_route(torch.randn(4, 6), top_k=2)
x, gate_up, down = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, 8), torch.randn(6, 8, 4)
mk.expert_mlp(x, gate_up, down, route.topk_index_TK, route.topk_weight_TK).sum().backward()
assert x.grad is not None
from moe_kernels.grouped_kernels import product_kernel
for attempt in (lambda: mk.resolve("triton", "cpu"), lambda: product_kernel[(1,)](1, BM=2)):
    try:
        attempt()
    except mk.KernelError as error:
        print(error)
"""


def test_everything_but_triton_works_without_triton() -> None:
    """Imports, torch paths and a clear refusal where Triton does not exist."""
    assert run(WITHOUT_TRITON).count("pip install 'triton>=3.6'") == 2


@pytest.mark.interpreter
def test_self_check_covers_every_family_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes in the interpreter, with all of the table for 16 bits: each family is another program to the compiler,
    and any of them may be the one that training uses. Some expert has more rows than one tile."""
    assert resolve("triton", "cpu") == "triton"
    assert resolve(None, "cpu") == "torch"
    seen, several = set(), set()
    make_config, make_tiles = configs.config_for, tiles.schedule_tiles

    def config_for(kernel: str, dtype: torch.dtype, device: torch.device, block: int, aligned: bool) -> Any:
        seen.add((kernel, block, aligned))
        return make_config(kernel, dtype, device, block, aligned)

    def schedule_tiles(offsets: torch.Tensor, n_rows: int, block: int) -> Any:
        if int(offsets.diff().max()) > block:
            several.add(block)
        return make_tiles(offsets, n_rows, block)

    for file in ("gemm_triton", "mlp_triton"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "config_for", config_for)
    for file in ("gemm", "mlp_triton"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "schedule_tiles", schedule_tiles)
    check_kernels("cpu")
    kernels = ("product", "swiglu", "swiglu_backward", "wgrad", "wgrad_gathered")
    assert seen == set(product(kernels, (16, 64, 128), (True, False)))
    assert several == {16, 64, 128}


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tiles only: what is asked does not depend on them, and the interpreter is slow."""
    for file in ("gemm", "mlp"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "families", lambda dtype: [(16, True)])


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_self_check_minds_no_mode_of_the_caller(default: torch.dtype) -> None:
    """The first use may come in inference, under autocast, where new tensors go elsewhere or are of another dtype."""
    torch.set_default_dtype(default)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            check_kernels("cpu")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
def test_self_check_is_no_part_of_a_recomputed_layer() -> None:
    """The first use may come in a checkpointed layer: its backward makes the layer again, not the check's numbers."""
    calls = 0

    def layer(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            check_kernels("cpu")
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert calls == 2
    assert torch.equal(x.grad, torch.ones(2).cos())


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
def test_self_check_resolves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving waits for the check, so a check that resolved would wait for ever."""

    def refuse(*args: Any) -> str:
        raise AssertionError("resolved")

    for file in ("dispatch", "gemm", "mlp", "routing"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "resolve", refuse)
    check_kernels("cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize(
    ("op", "file", "function", "wrong"),
    [
        ("grouped_gemm", "gemm_triton", "product", "y"),
        ("grouped_gemm", "gemm_triton", "wgrad", "dw"),
        ("expert_mlp", "mlp_triton", "swiglu_product", "y"),
        ("expert_mlp", "mlp_triton", "product", "y"),
        ("expert_mlp", "mlp_triton", "swiglu_backward_product", "dx"),
        ("expert_mlp", "mlp_triton", "wgrad", "dgate_up"),
        ("expert_mlp", "combine", "_sum_triton", "y"),
        ("topk_route", "routing_forward", "_forward_triton", "weight"),
        ("topk_route", "routing_backward", "_backward_triton", "d_logits"),
    ],
)
def test_self_check_catches_a_kernel_one_percent_off(
    monkeypatch: pytest.MonkeyPatch, op: str, file: str, function: str, wrong: str
) -> None:
    """A gradient that is wrong by a percent would go unnoticed in a loss curve."""
    module = import_module(f"moe_kernels.{file}")
    right = getattr(module, function)

    def off(*args: Any) -> Any:
        out = right(*args)
        if isinstance(out, tuple):
            return tuple(part * 1.01 if part.is_floating_point() else part for part in out)
        return out * 1.01

    monkeypatch.setattr(module, function, off)
    with pytest.raises(KernelError, match=f"{op} {wrong} "):
        backend_module._checks[op].run(torch.device("cpu"))


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_family")
@pytest.mark.parametrize("position", [0, 1, 2], ids=["order", "place", "offsets"])
def test_self_check_catches_one_row_out_of_place(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    """Sorting has no one percent: a single wrong index is one too many."""
    from moe_kernels import dispatch

    right = dispatch._sort_triton

    def off(*args: Any) -> Any:
        out = right(*args)
        out[position][3] += 1
        return out

    monkeypatch.setattr(dispatch, "_sort_triton", off)
    with pytest.raises(KernelError, match="sort_by_expert"):
        check_kernels("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("position", "wrong"), [(4, "load"), (5, "margins"), (6, "preferred"), (7, "shares")], ids=lambda x: str(x)
)
def test_self_check_catches_a_wrong_statistic(monkeypatch: pytest.MonkeyPatch, position: int, wrong: str) -> None:
    """One count too many, or a share that is a percent off."""
    from moe_kernels import routing_forward

    right = routing_forward._forward_triton

    def off(*args: Any) -> Any:
        out = list(right(*args))
        if out[position].numel():
            out[position].view(-1)[3] += 0.05 * out[position].max() if wrong == "shares" else 1
        return tuple(out)

    monkeypatch.setattr(routing_forward, "_forward_triton", off)
    with pytest.raises(KernelError, match=f"topk_route {wrong} "):
        backend_module._checks["topk_route"].run(torch.device("cpu"))


@pytest.mark.parametrize("nudge", [-1e-6, 1e-6])  # ten times what rounding does; equal scores stay equal
def test_margins_of_the_self_check_lie_inside_their_bins(monkeypatch: pytest.MonkeyPatch, nudge: float) -> None:
    """Devices differ in the last bits of a score; no count of the check may hang on one."""
    from moe_kernels import routing_forward
    from moe_kernels.agreement import Side

    here = Side("torch", torch.device("cpu"), torch.float32, torch.float32)
    want = backend_module._checks["topk_route"].probe(here)["margins (margins)"]
    right = routing_forward.margin_histogram
    monkeypatch.setattr(
        routing_forward,
        "margin_histogram",
        lambda selection, *rest: right(selection + nudge * torch.sin(1e4 * selection), *rest),
    )
    assert torch.equal(backend_module._checks["topk_route"].probe(here)["margins (margins)"], want)


@pytest.mark.gpu
def test_self_check_passes_on_this_gpu() -> None:
    """What a first use on this device runs."""
    assert len(backend_module.registered_checks()) == 4
    assert resolve(None, "cuda") == "triton"
