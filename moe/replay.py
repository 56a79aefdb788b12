"""Write down which experts each token was sent to, and send them there again.

A wrong loss is easier to find when two runs route alike; and in reinforcement learning the trainer must send tokens
where the rollout did, for a tenth of all choices differ between two implementations. Only choices are replayed: weights
and gradients are those of the scores at hand, and with the same weights everything is the same bit for bit.

The file is safetensors: `ROUTER/N` (T, K), in the smallest integers that hold the expert numbers, for the N-th forward
of each router. Every rank records its own tokens, into a file of its own. Within the `with` blocks compiled models run
eagerly: what is recorded is Python's doing.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.balancer import find_routers
from moe.errors import CheckpointError, ConfigError
from moe.layers.router import Router, recomputation

__all__ = ["RouteRecorder", "RouteReplay"]

_FORMAT = {"format": "frugal-moe routes", "version": "1"}


class RouteRecorder:
    """Records every forward of the routers in `model` within a `with` block, in training as in evaluation.

    >>> with RouteRecorder(model) as recorder: model(ids)
    >>> recorder.save("routes.safetensors")
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = _routers(model)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.routes: dict[str, list[Tensor]] = {name: [] for name in self._routers}

    def __enter__(self) -> "RouteRecorder":
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *reason: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._eager.__exit__(*reason)

    def join(self, sequences: int) -> None:
        """Make one forward of all recorded ones, each over the next tokens of the same `sequences` sequences.

        So a rollout, a prompt and then token by token, can be replayed in one forward over the whole sequences. Raises
        ConfigError when a forward's tokens are not `sequences` equal parts.
        """
        for name, routes in self.routes.items():
            for number, route in enumerate(routes):
                if len(route) % sequences:
                    raise ConfigError(f"sequences={sequences}: forward {number} of {name} had {len(route)} tokens")
            if routes:
                parts = [route.view(sequences, -1, route.shape[1]) for route in routes]
                self.routes[name] = [torch.cat(parts, dim=1).flatten(0, 1)]

    def save(self, file: str | Path) -> None:
        """Write what was recorded so far."""
        from safetensors.torch import save_file

        tensors = {f"{name}/{n}": route for name, routes in self.routes.items() for n, route in enumerate(routes)}
        save_file(tensors, file, metadata=_FORMAT)

    def _hook(self, name: str) -> Callable[..., None]:
        def record(router: Router, _args: object, route: Any) -> None:
            if recomputation() == "":
                self.routes[name].append(route.topk_index_TK.to("cpu", _smallest(len(router.weight))))

        return record


class RouteReplay:
    """Sends tokens where a recording says, within a `with` block: forward N of a router takes its recorded choices N.

    A forward that activation checkpointing repeats takes the choices it took first, recognised by its input. Routers
    the recording has none of, such as those of multi-token prediction in a recorded evaluation, choose freely.

    Raises CheckpointError when the file is no recording, or has a router that the model has not; ConfigError, at the
    forward in question, when it has fewer forwards or was made of other numbers of tokens or choices.

    >>> with RouteReplay(model, "routes.safetensors"): model(ids, labels=ids).loss.backward()
    """

    def __init__(self, model: nn.Module, file: str | Path) -> None:
        self._file = file
        self._routes = _read(Path(file))
        routers = _routers(model)
        for name in self._routes:
            if name not in routers:
                raise CheckpointError(f"{file} has routes of {name!r}, which the model has not; give its own recording")
        self._routers = {name: routers[name] for name in self._routes}

    def __enter__(self) -> "RouteReplay":
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        for name, router in self._routers.items():
            router.choices = self._source(name, router)
        return self

    def __exit__(self, *reason: Any) -> None:
        for router in self._routers.values():
            router.choices = None
        self._eager.__exit__(*reason)

    def _source(self, name: str, router: Router) -> Callable[[Tensor], Tensor]:
        seen: list[bytes] = []  # of each forward so far, a number of every token: enough to know its input by

        def choices(x_TD: Tensor) -> Tensor:
            mark = x_TD.detach()[:, 0].float().cpu().numpy().tobytes()
            if recomputation() == "":
                seen.append(mark)
                number = len(seen) - 1
            else:
                number = len(seen) - 1 - seen[::-1].index(mark)
            if number >= len(self._routes[name]):
                raise ConfigError(f"{self._file} holds {number} forwards of {name}, and this is one more")
            route, shape = self._routes[name][number], (len(x_TD), router.num_experts_per_tok)
            if route.shape != shape:
                raise ConfigError(
                    f"{self._file}: forward {number} of {name} is {tuple(route.shape)}, and this is {shape}"
                )
            return route.to(x_TD.device, torch.int64)

        return choices


def _routers(model: nn.Module) -> dict[str, Router]:
    return {name: router for name, router in find_routers(model).items() if isinstance(router, Router)}


def _smallest(experts: int) -> torch.dtype:
    return torch.uint8 if experts <= 2**8 else torch.int16 if experts <= 2**15 else torch.int32


def _read(file: Path) -> dict[str, list[Tensor]]:
    from safetensors import SafetensorError, safe_open

    routes: dict[str, dict[int, Tensor]] = defaultdict(dict)
    try:
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
            if any(said.get(key) != value for key, value in _FORMAT.items()):
                raise CheckpointError(f"{file} is no recording of routes: give a file that RouteRecorder.save wrote")
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                router, _, number = name.rpartition("/")
                routes[router][int(number)] = opened.get_tensor(name)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); give a file that RouteRecorder.save wrote") from None
    return {name: [numbered[n] for n in sorted(numbered)] for name, numbered in routes.items()}
