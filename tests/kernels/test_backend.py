"""Which backend runs, what is refused, and when the self-check runs."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_kernels
from moe_kernels import KernelError, resolve
from moe_kernels import backend as backend_module


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


def pretend_checks(
    monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype, **runs: Callable[[torch.device, torch.dtype], None]
) -> None:
    tolerance = dict.fromkeys(dtypes or [torch.float32], 0.0)
    checks = {
        op: SimpleNamespace(op=op, run=run, tolerance=tolerance, runs_on=lambda device: True)
        for op, run in runs.items()
    }
    monkeypatch.setattr(backend_module, "_checks", checks)


def test_self_check_runs_once_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per device, triton and torch; a failure is not remembered as a pass, and never becomes torch silently."""
    pretend_gpu(monkeypatch, (9, 0))
    calls: list[Any] = []
    pretend_checks(monkeypatch, expert_mlp=lambda *asked: calls.append(asked))
    assert resolve(None, "cuda:0", "expert_mlp") == resolve("triton", "cuda:0", "expert_mlp") == "triton"
    assert calls == [(torch.device("cuda:0"), torch.float32)]

    def fails(device: Any, dtype: Any) -> None:
        raise KernelError("expert_mlp dx is off")

    pretend_gpu(monkeypatch, (9, 0))
    pretend_checks(monkeypatch, expert_mlp=fails)
    for _ in range(2):
        with pytest.raises(KernelError, match="dx is off"):
            resolve(None, "cuda:0", "expert_mlp")


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of an op resolves; from the second on that is a look-up. `cuda` alone may be another each time."""
    pretend_gpu(monkeypatch, (9, 0))
    pretend_checks(monkeypatch, expert_mlp=lambda *asked: None)
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    here = (torch.device("cuda", 1), "expert_mlp", torch.float32)
    assert [resolve(None, *here) for _ in range(3)] == ["triton"] * 3
    assert asked == [torch.device("cuda:1")]
    for _ in range(2):
        asked.clear()
        assert resolve(None, "cuda") == "triton"
        assert asked


def test_only_what_is_used_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op, in the dtype of its first use: who trains in bf16 does not wait for fp32 or fp16; torch runs none."""
    pretend_gpu(monkeypatch, (9, 0))
    calls: list[Any] = []
    both = (torch.float32, torch.bfloat16)
    pretend_checks(
        monkeypatch, *both, a=lambda device, dtype: calls.append("a"), b=lambda device, dtype: calls.append(dtype)
    )
    resolve("torch", "cuda", "b", torch.float32)
    assert calls == []
    for _ in range(2):
        resolve(None, "cuda", "b", torch.bfloat16)
    assert calls == [torch.bfloat16]
    resolve(None, "cuda", "b", torch.float32)
    assert calls == [torch.bfloat16, torch.float32]
    for _ in range(2):
        resolve(None, "cuda")
    assert calls == [torch.bfloat16, torch.float32, "a", "a"]


def test_a_dtype_without_a_check_gets_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody checks does not run unchecked: the log says so, and asking for it is an error."""
    pretend_gpu(monkeypatch, (9, 0))
    pretend_checks(monkeypatch, torch.float32, torch.bfloat16, expert_mlp=lambda *asked: None)
    assert resolve(None, "cuda:0", "expert_mlp", torch.float64) == "torch"
    assert "expert_mlp in torch.float64 has no self-check" in caplog.text
    with pytest.raises(KernelError, match=r"cast to one of torch\.float32, torch\.bfloat16$"):
        resolve("triton", "cuda:0", "expert_mlp", torch.float64)
    assert resolve(None, "cuda:0", "expert_mlp", torch.bfloat16) == "triton"


def test_threads_wait_for_one_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to use triton before the check has passed, and it runs once for all."""
    pretend_gpu(monkeypatch, (9, 0))
    started, release, calls = threading.Event(), threading.Event(), []

    def slow(device: Any, dtype: Any) -> None:
        calls.append(device)
        started.set()
        assert release.wait(30)

    pretend_checks(monkeypatch, expert_mlp=slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(resolve, None, "cuda:0", "expert_mlp")
        assert started.wait(30)
        second = pool.submit(resolve, None, "cuda:0", "expert_mlp")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.1)
        release.set()
        assert first.result(30) == second.result(30) == "triton"
    assert len(calls) == 1


def test_ops_say_what_is_to_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each resolves by the name that its file registered, in the dtype that it will compute in."""
    asked: list[Any] = []

    def record(backend: str | None, device: torch.device, op: str, dtype: torch.dtype | None = None) -> str:
        assert op in {check.op for check in backend_module.registered_checks()}
        asked.append((op, dtype))
        return "torch"

    for file in ("dispatch", "gemm", "mlp", "routing"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "resolve", record)
    logits, x, gate_up, down = torch.randn(4, 6), torch.randn(4, 8), torch.randn(6, 8, 8), torch.randn(6, 8, 4)
    route = moe_kernels.topk_route(logits.half(), top_k=2)
    rows = moe_kernels.sort_by_expert(route.topk_index_TK, 6)
    moe_kernels.grouped_gemm(x[rows.token_R], gate_up, rows.offsets_E1)
    with torch.autocast("cpu", torch.bfloat16):
        for fp8 in (False, True):
            moe_kernels.expert_mlp(x, gate_up, down, route.topk_index_TK, route.topk_weight_TK, fp8=fp8)
    assert asked == [
        ("topk_route", torch.float16),
        ("sort_by_expert", None),
        ("grouped_gemm", torch.float32),
        ("expert_mlp", torch.bfloat16),
        ("expert_mlp in fp8", torch.bfloat16),
    ]


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
