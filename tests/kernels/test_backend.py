"""Which backend runs, what is refused, and that the self-check catches a wrong kernel."""

import subprocess
import sys
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
    monkeypatch.setattr(backend_module, "_checked", set())
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


def test_self_check_runs_once_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per device, triton and torch; a failure is not remembered as a pass, and never becomes torch silently."""
    from moe_kernels import selfcheck

    pretend_gpu(monkeypatch, (9, 0))
    calls: list[Any] = []
    monkeypatch.setattr(selfcheck, "check_kernels", calls.append)
    assert resolve(None, "cuda:0") == resolve("triton", "cuda:0") == "triton"
    assert calls == [torch.device("cuda:0")]

    def fails(device: Any) -> None:
        raise KernelError("expert_mlp dx is off")

    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(selfcheck, "check_kernels", fails)
    for _ in range(2):
        with pytest.raises(KernelError, match="dx is off"):
            resolve(None, "cuda:0")


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
from moe_kernels.gemm import grouped_gemm_kernel
for attempt in (lambda: mk.resolve("triton", "cpu"), lambda: grouped_gemm_kernel[(1,)](1, BE=2)):
    try:
        attempt()
    except mk.KernelError as error:
        print(error)
"""


def test_everything_but_triton_works_without_triton() -> None:
    """Imports, torch paths and a clear refusal where Triton does not exist."""
    assert run(WITHOUT_TRITON).count("pip install 'triton>=3.6'") == 2


@pytest.mark.interpreter
def test_self_check_passes_here() -> None:
    """The kernels agree with torch in the interpreter, and it may be asked for on CPU tensors."""
    from moe_kernels.selfcheck import check_kernels

    assert resolve("triton", "cpu") == "triton"
    assert resolve(None, "cpu") == "torch"
    check_kernels("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("file", "function", "wrong"),
    [
        ("gemm", "_launch_wgrad", "expert_mlp dgate_up"),
        ("swiglu", "_backward_triton", "expert_mlp dx"),
        ("combine", "_sum_triton", "expert_mlp y"),
        ("routing_backward", "_backward_triton", "topk_route d_logits"),
    ],
)
def test_self_check_catches_a_kernel_one_percent_off(
    monkeypatch: pytest.MonkeyPatch, file: str, function: str, wrong: str
) -> None:
    """A gradient that is wrong by a percent would go unnoticed in a loss curve."""
    from importlib import import_module

    from moe_kernels.selfcheck import check_kernels

    module = import_module(f"moe_kernels.{file}")
    right = getattr(module, function)

    def off(*args: Any) -> Any:
        out = right(*args)
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setattr(module, function, off)
    with pytest.raises(KernelError, match=wrong):
        check_kernels("cpu")


@pytest.mark.gpu
def test_self_check_passes_on_this_gpu() -> None:
    """What a first use on this device runs."""
    assert resolve(None, "cuda") == "triton"
