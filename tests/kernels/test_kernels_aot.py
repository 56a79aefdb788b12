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

from moe_kernels import configs
from moe_kernels._triton import HAVE_TRITON, INTERPRETED
from moe_kernels.tiles import TileSchedule

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
}


def _rows(dtype: torch.dtype, cols: int) -> torch.Tensor:
    return torch.empty(4096, cols, dtype=dtype)


def _offsets() -> torch.Tensor:
    return torch.empty(65, dtype=torch.int32)


def _tiles(block: int) -> TileSchedule:
    return TileSchedule(torch.empty(512, 3, dtype=torch.int32), torch.empty(1, dtype=torch.int32), block)


def _product(dtype: torch.dtype, block: int, n_in: int = 1024, transposed: bool = False) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        w = torch.empty((64, n_in, 2048) if transposed else (64, 2048, n_in), dtype=dtype)
        return module.product(_rows(dtype, n_in), w, _tiles(block), transposed)

    return launch


def _swiglu(dtype: torch.dtype, block: int, width: int = 1024, weighting: str = "after") -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        order, weight = torch.empty(4096, dtype=torch.int32), torch.empty(512, 8)
        gate_up = torch.empty(64, 1536, width, dtype=dtype)
        return module.swiglu_product(_rows(dtype, width)[:512], gate_up, order, weight, _tiles(block), weighting)

    return launch


def _swiglu_backward(
    dtype: torch.dtype, block: int, hidden: int = 768, weighting: str = "after"
) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        order, weight = torch.empty(4096, dtype=torch.int32), torch.empty(512, 8)
        dy, down, h = _rows(dtype, 1024)[:512], torch.empty(64, 1024, hidden, dtype=dtype), _rows(dtype, 2 * hidden)
        return module.swiglu_backward_product(dy, down, order, weight, h, _tiles(block), weighting, False)

    return launch


def _wgrad(dtype: torch.dtype, block: int, n_in: int = 1024, gather: str = "") -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        dy, x, order = _rows(dtype, 2048), _rows(dtype, n_in), torch.empty(4096, dtype=torch.int32)
        return module.wgrad(dy, x, _offsets(), torch.float32, block, order, 8, gather)

    return launch


def _route(experts: int, top_k: int, *case: Any) -> Callable[[Any], Any]:
    def launch(module: Any) -> Any:
        return module._forward_triton(torch.empty(1024, experts), torch.empty(experts), None, top_k, *case, True, 2.5)

    return launch


def _route_chosen(module: Any) -> Any:
    chosen = torch.zeros(1024, 8, dtype=torch.int64)
    return module._forward_triton(torch.empty(1024, 256), None, chosen, 8, "sigmoid", "noaux_tc", 8, 4, True, 2.5)


def _route_backward(module: Any) -> Any:
    scores, index = torch.empty(1024, 256), torch.empty(1024, 8, dtype=torch.int64)
    return module._backward_triton(torch.empty(1024, 8), scores, scores, index, "sigmoid", True, 2.5)


def _sort(module: Any) -> Any:
    return module._sort_triton(torch.zeros(1024, 8, dtype=torch.int64), 256, None)


def _combine(module: Any) -> Any:
    return module._sum_triton(_rows(torch.bfloat16, 2048), torch.empty(4096, dtype=torch.int32), 8)


# name -> (file, kernel, launch)
CASES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "tiles": ("tiles", "tile_schedule_kernel", lambda module: module.schedule_tiles(_offsets(), 4096, 128)),
    "product-128": ("gemm_triton", "product_kernel", _product(torch.bfloat16, 128)),
    "product-64": ("gemm_triton", "product_kernel", _product(torch.bfloat16, 64)),
    "product-16": ("gemm_triton", "product_kernel", _product(torch.bfloat16, 16)),
    "product-dgrad": ("gemm_triton", "product_kernel", _product(torch.bfloat16, 128, transposed=True)),
    "product-odd": ("gemm_triton", "product_kernel", _product(torch.bfloat16, 128, 1001)),
    "product-fp32": ("gemm_triton", "product_kernel", _product(torch.float32, 64)),
    "swiglu-128": ("mlp_triton", "swiglu_kernel", _swiglu(torch.bfloat16, 128)),
    "swiglu-64": ("mlp_triton", "swiglu_kernel", _swiglu(torch.bfloat16, 64)),
    "swiglu-16": ("mlp_triton", "swiglu_kernel", _swiglu(torch.bfloat16, 16)),
    "swiglu-before": ("mlp_triton", "swiglu_kernel", _swiglu(torch.bfloat16, 128, weighting="before")),
    "swiglu-odd": ("mlp_triton", "swiglu_kernel", _swiglu(torch.bfloat16, 128, 1001)),
    "swiglu-fp32": ("mlp_triton", "swiglu_kernel", _swiglu(torch.float32, 64)),
    "swiglu-backward-128": ("mlp_triton", "swiglu_backward_kernel", _swiglu_backward(torch.bfloat16, 128)),
    "swiglu-backward-64": ("mlp_triton", "swiglu_backward_kernel", _swiglu_backward(torch.bfloat16, 64)),
    "swiglu-backward-16": ("mlp_triton", "swiglu_backward_kernel", _swiglu_backward(torch.bfloat16, 16)),
    "swiglu-backward-before": (
        "mlp_triton",
        "swiglu_backward_kernel",
        _swiglu_backward(torch.bfloat16, 128, weighting="before"),
    ),
    "swiglu-backward-odd": ("mlp_triton", "swiglu_backward_kernel", _swiglu_backward(torch.bfloat16, 128, 701)),
    "swiglu-backward-fp32": ("mlp_triton", "swiglu_backward_kernel", _swiglu_backward(torch.float32, 64)),
    "wgrad-128": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 128)),
    "wgrad-dy-128": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 128, gather="dy")),
    "wgrad-x-128": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 128, gather="x")),
    "wgrad-x-64": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 64, gather="x")),
    "wgrad-x-16": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 16, gather="x")),
    "wgrad-odd": ("gemm_triton", "wgrad_kernel", _wgrad(torch.bfloat16, 128, 1001, gather="dy")),
    "wgrad-fp32": ("gemm_triton", "wgrad_kernel", _wgrad(torch.float32, 64, gather="x")),
    "route-greedy": ("routing_forward", "topk_route_kernel", _route(128, 8, "softmax", "greedy", 1, 1)),
    "route-noaux-tc": ("routing_forward", "topk_route_kernel", _route(256, 8, "sigmoid", "noaux_tc", 8, 4)),
    "route-chosen": ("routing_forward", "topk_route_kernel", _route_chosen),
    "route-backward": ("routing_backward", "topk_route_backward_kernel", _route_backward),
    "histogram": ("dispatch", "expert_histogram_kernel", _sort),
    "scatter": ("dispatch", "scatter_rows_kernel", _sort),
    "combine": ("combine", "sum_slots_kernel", _combine),
}
PRODUCTS = ("product", "swiglu", "wgrad")
SPECIALIZED = ("product-128", "product-dgrad")  # on sm_90, whose compiler ignores the wish where it cannot


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


def _record(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """(kernel, value of each parameter, options) of the launch of a case, as configured for the architecture."""
    monkeypatch.setattr(configs, "capability_of", lambda device: divmod(arch, 10))
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
    kernel, values, options = _record(name, arch, monkeypatch)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
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
    if arch == 90 and name.startswith(PRODUCTS) and not name.endswith(("fp32", "-16")):
        assert "HGMMA" in _tool("cuobjdump", "-sass", str(cubin))
    if arch == 90 and name in SPECIALIZED:
        assert "ttg.warp_specialize" in compiled.asm["ttgir"]
    print(f"{name} sm_{arch}: {found[1]} registers, {compiled.metadata.shared} B shared")
