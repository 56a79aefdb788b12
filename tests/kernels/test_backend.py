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


def pretend_checks(
    monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype, **runs: Callable[[torch.device, torch.dtype], None]
) -> None:
    tolerance = dict.fromkeys(dtypes or [torch.float32], 0.0)
    checks = {op: SimpleNamespace(op=op, run=run, tolerance=tolerance, capability=(0, 0)) for op, run in runs.items()}
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
        moe_kernels.expert_mlp(x, gate_up, down, route.topk_index_TK, route.topk_weight_TK)
    assert asked == [
        ("topk_route", torch.float16),
        ("sort_by_expert", None),
        ("grouped_gemm", torch.float32),
        ("expert_mlp", torch.bfloat16),
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


def only_family(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """One kind of tiles and small products: the interpreter is slow."""
    for file in ("gemm", "mlp"):
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "families", lambda dtype: [(block, False)])
        monkeypatch.setattr(import_module(f"moe_kernels.{file}"), "widths", lambda block, aligned: (33, 35))


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest tiles only: what is asked does not depend on them."""
    only_family(monkeypatch, 16)


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
        backend_module._checks[op].run(torch.device("cpu"), torch.float32)


FP32, FP16 = torch.float32, torch.float16


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of surplus rows, which nobody wrote
@pytest.mark.parametrize(
    ("op", "dtype", "block", "file", "function", "concerned", "wrong"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in (
            ("fp16", "expert_mlp", FP16, 16, "mlp_triton", "product", lambda x, *_: True, "y .* in float16"),
            ("fp16-gemm", "grouped_gemm", FP16, 16, "gemm_triton", "wgrad", lambda *_: True, "dw .* in float16"),
            ("fp16-logits", "topk_route", FP16, 16, "routing_forward", "_forward_triton", lambda *_: True, "weight "),
            (
                "transposed", "grouped_gemm", FP32, 16, "gemm_triton", "product",
                lambda x, w, *_: not w.is_contiguous(), "y .* transposed weights",
            ),
            (
                "transposed-gate-up", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_product",
                lambda x, gate_up, *_: not gate_up.is_contiguous(), "y .* weighting before",
            ),
            (
                "transposed-down", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_backward_product",
                lambda dy, down, *_: not down.is_contiguous(), "dx .* weighting before",
            ),
            (
                "weighting-none", "expert_mlp", FP32, 64, "mlp_triton", "swiglu_product",
                lambda *args: args[5] == "none", "y .* weighting none",
            ),
            (
                "weighting-before", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_backward_product",
                lambda *args: args[6] == "before", "dx .* weighting before",
            ),
            (
                "without-gradients", "expert_mlp", FP32, 16, "mlp_triton", "swiglu_product",
                lambda *args: not args[6], "y without gradients",
            ),
            (
                "fp32-masters", "expert_mlp", FP16, 16, "mlp_triton", "wgrad",
                lambda *args: args[3] == FP32, "dgate_up .* in float32",
            ),
        )
    ],
)  # fmt: skip
def test_self_check_catches_what_only_some_calls_launch(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    dtype: torch.dtype,
    block: int,
    file: str,
    function: str,
    concerned: Callable[..., bool],
    wrong: str,
) -> None:
    """Each is a kernel of its own to the compiler; that one alone computes a percent too much, and is refused in one
    sentence."""
    only_family(monkeypatch, block)
    module = import_module(f"moe_kernels.{file}")
    right = getattr(module, function)

    def off(*args: Any) -> Any:
        out = right(*args)
        if not concerned(*args):
            return out
        parts = out if isinstance(out, tuple) else (out,)
        more = tuple(part * 1.01 if part.is_floating_point() else part for part in parts)
        return more if isinstance(out, tuple) else more[0]

    check = backend_module._checks[op]
    monkeypatch.setattr(module, function, off)
    with pytest.raises(KernelError, match=f"^{op} {wrong}") as caught:
        check.run(torch.device("cpu"), dtype)
    assert str(caught.value).endswith("pass backend='torch' or install another triton")
    assert "\n" not in str(caught.value)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of surplus rows, which nobody wrote
@pytest.mark.parametrize("op", ["expert_mlp", "grouped_gemm", "topk_route"])
@pytest.mark.usefixtures("one_family")
def test_self_check_passes_in_fp16(op: str) -> None:
    """Its bound has room for the rounding to 11 bits, and for no percent."""
    backend_module._checks[op].run(torch.device("cpu"), FP16)


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
        backend_module._checks["topk_route"].run(torch.device("cpu"), torch.float32)


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
