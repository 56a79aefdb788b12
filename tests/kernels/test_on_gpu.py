"""What only a GPU can show: no synchronisation, CUDA graphs, inductor, a second device, programs with several tiles."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from moe_kernels import expert_mlp, topk_route
from moe_kernels.configs import config_for, n_programs, row_block

pytestmark = pytest.mark.gpu

EXPERTS, TOP_K, WIDTH, HIDDEN = 64, 4, 1024, 1024
NAMES = ("y", "dlogits", "dx", "dgate_up", "ddown")


def leaves(tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """logits, x, gate_up and down."""

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(shape, device=device) / fan_in**0.5

    inputs = [
        normal(tokens, WIDTH),
        normal(EXPERTS, 2 * HIDDEN, WIDTH, fan_in=WIDTH),
        normal(EXPERTS, WIDTH, HIDDEN, fan_in=HIDDEN),
    ]
    return [t.requires_grad_() for t in (normal(tokens, EXPERTS), *(t.to(dtype) for t in inputs))]


def layer(logits: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, backend: str = "triton") -> Tensor:
    """Routing and experts."""
    route = topk_route(logits, top_k=TOP_K, score_func="softmax", backend=backend)
    index, weight, counts = route.topk_index_TK, route.topk_weight_TK, route.tokens_per_expert_E
    return expert_mlp(x, gate_up, down, index, weight, tokens_per_expert=counts, backend=backend)


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of all inputs."""
    y = run(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_close(want: list[Tensor], got: list[Tensor], bound: float = 1e-2) -> None:
    """Each expert's rows or weights by the norm of the difference over the norm of all, so that no tile is lost."""
    for name, a, b in zip(NAMES, want, got, strict=True):
        difference, size = ((t.float().flatten(1)).norm(dim=1) for t in (a - b, a))
        error = float(difference.max() / size.square().mean().sqrt())
        assert error <= bound, f"{name} is off by {error:.1e}"


@pytest.fixture
def forbid_waiting() -> Iterator[Callable[[], None]]:
    """A function from whose call on, until the test ends, whatever waits for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_host(forbid_waiting: Callable[[], None]) -> None:
    """Forward and backward, once everything is compiled, are only issued."""
    inputs = leaves(512)
    dy = torch.randn_like(inputs[1])
    want = with_gradients(layer, inputs, dy)
    torch.cuda.synchronize()
    forbid_waiting()
    got = with_gradients(layer, inputs, dy)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@torch.no_grad()
def test_cuda_graph() -> None:
    """A captured forward, replayed with other tokens and other choices, gives the bits of an eager one."""
    inputs = leaves(512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(*inputs)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*inputs)
    for _ in range(2):
        for old, new in zip(inputs[:2], leaves(512), strict=False):
            old.copy_(new)
        graph.replay()
        assert torch.equal(y, layer(*inputs))


def test_descriptors_have_memory_in_a_fresh_thread() -> None:
    """Triton asks a context variable for it, which a new thread does not have: launches bring their own, and leave the
    thread's as it was."""
    from triton.runtime._allocation import _allocator

    inputs = leaves(8192)
    want = layer(*inputs)

    def work() -> tuple[Tensor, bool]:
        before = _allocator.get()
        return layer(*inputs), before is _allocator.get()

    with ThreadPoolExecutor(1) as pool:
        got, same = pool.submit(work).result()
    assert same
    assert torch.equal(got, want)


def test_compiled_by_inductor() -> None:
    """The whole layer is one graph, and computes what it computes without the compiler, gradients included."""
    inputs = leaves(512)
    dy = torch.randn_like(inputs[1])
    want = with_gradients(layer, inputs, dy)
    assert_close(want, with_gradients(torch.compile(layer, fullgraph=True), inputs, dy))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    """Tensors on cuda:1 are computed there while cuda:0 is current, and it stays so."""
    torch.cuda.set_device(0)
    inputs = leaves(512, "cuda:1")
    dy = torch.randn_like(inputs[1])
    got = with_gradients(layer, inputs, dy)
    assert {t.device for t in got} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert_close(with_gradients(by_torch, inputs, dy), got, bound=5e-2)


@pytest.mark.parametrize(
    ("tokens", "dtype", "block"),
    [
        (256, torch.bfloat16, 16),
        (2048, torch.bfloat16, 64),
        (8192, torch.bfloat16, 128),
        (256, torch.float32, 16),
        (2048, torch.float32, 64),
    ],
)
def test_programs_with_several_tiles(tokens: int, dtype: torch.dtype, block: int) -> None:
    """Every product has more tiles than programs run at once, so each program goes on to a second one."""
    inputs = leaves(tokens, dtype=dtype)
    rows, device = tokens * TOP_K, inputs[1].device
    assert row_block(dtype, rows, EXPERTS) == block
    for kernel, height, columns in (
        ("swiglu", rows, HIDDEN),
        ("swiglu_backward", rows, HIDDEN),
        ("product", rows, WIDTH),
        ("wgrad_gathered", EXPERTS * WIDTH, HIDDEN),
    ):
        config = config_for(kernel, dtype, device, block, aligned=True)
        tiles = (height // config.rows) * (columns // config.cols)
        assert n_programs(config, device, tiles) < tiles, f"{kernel} has one tile a program"
    dy = torch.randn_like(inputs[1])
    want, got = (with_gradients(run, inputs, dy) for run in (by_torch, layer))
    assert_close(want, got, bound=5e-2 if dtype == torch.bfloat16 else 1e-4)


def by_torch(*inputs: Tensor) -> Tensor:
    """The layer by the reference."""
    return layer(*inputs, backend="torch")
