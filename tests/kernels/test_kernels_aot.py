"""Every kernel, as its launcher launches it, compiled for GPUs that are not there: it fits, and uses the right unit.

The launchers run on CPU tensors with the kernel replaced by a recorder; what they would launch is then specialised as
Triton does at run time (dtype of pointers, divisibility by 16, arguments equal to 1) and compiled.
"""

import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("compiling needs triton, outside its interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.aot

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def _rows(dtype: torch.dtype, cols: int) -> torch.Tensor:
    return torch.empty(4096, cols, dtype=dtype)


def _offsets() -> torch.Tensor:
    return torch.empty(65, dtype=torch.int32)


def _gemm(dtype: torch.dtype, transposed: bool) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        w = torch.empty(64, 2048, 1024, dtype=dtype)
        return module._launch_gemm(_rows(dtype, 2048 if transposed else 1024), w, _offsets(), transposed)

    return launch


def _wgrad(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda module: module._launch_wgrad(_rows(dtype, 2048), _rows(dtype, 1024), _offsets(), torch.float32)


def _route(experts: int, *rule: Any, chosen: bool = False, statistics: bool = False) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        logits, bias, counted = torch.empty(1024, experts), torch.empty(experts), torch.ones(1024, dtype=torch.bool)
        index = torch.zeros(1024, rule[0], dtype=torch.int64)
        given = (logits, bias, index if chosen else None, counted if statistics else None)
        wanted = module.Wanted(statistics and rule[3] == 1, 4 if statistics else 0)
        return module._forward_triton(*given, module.Rule(*rule, True, 2.5), wanted)

    return launch


def _route_backward(experts: int) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        scores, index = torch.empty(1024, experts), torch.empty(1024, 8, dtype=torch.int64)
        grads = torch.empty(1024, 8), scores, torch.empty(4, experts)
        return module._backward_triton(*grads, scores, index, torch.ones(1024, dtype=torch.bool), "sigmoid", True, 2.5)

    return launch


def _sort(experts: int) -> Callable[[Any], Any]:
    return lambda module: module._sort_triton(torch.zeros(1024, 8, dtype=torch.int64), experts, None)


def _swiglu(module: Any) -> Any:
    return module._forward_triton(_rows(torch.bfloat16, 1536), torch.empty(4096))


def _swiglu_backward(module: Any) -> Any:
    return module._backward_triton(_rows(torch.bfloat16, 768), _rows(torch.bfloat16, 1536), torch.empty(4096))


def _combine(module: Any) -> Any:
    return module._sum_triton(_rows(torch.bfloat16, 2048), torch.empty(4096, dtype=torch.int32), 8)


# name -> (file, kernel, launch)
CASES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "gemm-bf16": ("gemm", "grouped_gemm_kernel", _gemm(torch.bfloat16, False)),
    "gemm-dgrad-bf16": ("gemm", "grouped_gemm_kernel", _gemm(torch.bfloat16, True)),
    "gemm-fp32": ("gemm", "grouped_gemm_kernel", _gemm(torch.float32, False)),
    "wgrad-bf16": ("gemm", "grouped_wgrad_kernel", _wgrad(torch.bfloat16)),
    "wgrad-fp32": ("gemm", "grouped_wgrad_kernel", _wgrad(torch.float32)),
    "route-greedy": ("routing_forward", "topk_route_kernel", _route(128, 8, "softmax", "greedy", 1, 1)),
    "route-noaux-tc": ("routing_forward", "topk_route_kernel", _route(256, 8, "sigmoid", "noaux_tc", 8, 4)),
    "route-chosen": ("routing_forward", "topk_route_kernel", _route(256, 8, "sigmoid", "noaux_tc", 8, 4, chosen=True)),
    "route-statistics": (
        "routing_forward",
        "topk_route_kernel",
        _route(256, 8, "sigmoid", "noaux_tc", 1, 1, statistics=True),
    ),
    "route-groups-statistics": (
        "routing_forward",
        "topk_route_kernel",
        _route(256, 8, "sigmoid", "noaux_tc", 8, 4, statistics=True),
    ),
    "route-512": (
        "routing_forward",
        "topk_route_kernel",
        _route(512, 10, "softmax", "noaux_tc", 1, 1, statistics=True),
    ),
    "route-backward": ("routing_backward", "topk_route_backward_kernel", _route_backward(256)),
    "route-backward-512": ("routing_backward", "topk_route_backward_kernel", _route_backward(512)),
    "histogram": ("dispatch", "expert_histogram_kernel", _sort(512)),
    "scan": ("dispatch", "scan_histogram_kernel", _sort(512)),
    "scatter": ("dispatch", "scatter_rows_kernel", _sort(512)),
    "swiglu": ("swiglu", "swiglu_kernel", _swiglu),
    "swiglu-backward": ("swiglu", "swiglu_backward_kernel", _swiglu_backward),
    "combine": ("combine", "sum_slots_kernel", _combine),
}
TENSOR_CORE_CASES = ("gemm-bf16", "gemm-dgrad-bf16", "wgrad-bf16")


class _Recorder:
    """Takes a kernel's place and keeps the arguments of the launch."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(side > 0 for side in grid)

        def launch(*args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

        return launch


def _record(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """(kernel, value of each parameter, options) of the launch of a case."""
    file, kernel_name, launch = CASES[name]
    module = importlib.import_module(f"moe_kernels.{file}")
    kernel, recorder = getattr(module, kernel_name), _Recorder()
    for other in (n for n in vars(module) if n.endswith("_kernel")):
        monkeypatch.setattr(module, other, recorder if other == kernel_name else _Recorder())
    launch(module)
    names = [p.name for p in kernel.params]
    values = dict(zip(names, recorder.args, strict=False))
    options = {k: v for k, v in recorder.kwargs.items() if k in ("num_warps", "num_stages")}
    values.update({k: v for k, v in recorder.kwargs.items() if k not in options})
    assert list(values) == names
    return kernel, values, options


def _compile(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel, values, options = _record(name, monkeypatch)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name], divisible = "i32", value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name: str, *args: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("arch", sorted(SHARED_MEMORY), ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("name", CASES)
def test_kernel_compiles_and_fits(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spilled registers, shared memory within the device, and wgmma for bf16 products on sm_90."""
    compiled = _compile(name, arch, monkeypatch)
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    assert int(found[2]) == 0, f"{name} spills on sm_{arch}: {usage}"
    if arch == 90 and name in TENSOR_CORE_CASES:
        assert "HGMMA" in _tool("cuobjdump", "-sass", str(cubin))
    print(f"{name} sm_{arch}: {found[1]} registers, {compiled.metadata.shared} B shared")
