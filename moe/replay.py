"""Write down which experts each token was sent to, and send them there again.

A wrong loss is easier to find when two runs route alike; and in reinforcement learning the trainer must send tokens
where the rollout did, for a tenth of all choices differ between two implementations. Only choices are replayed: weights
and gradients are those of the scores at hand, and with the same weights everything is the same bit for bit.

The file is safetensors: `ROUTER/N` (T, K), in the smallest integers that hold the expert numbers, for the N-th forward
of each router. Every rank records its own tokens, into a file of its own.
"""

from collections import defaultdict
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
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def save(self, file: str | Path) -> None:
        """Write what was recorded so far."""
        from safetensors.torch import save_file

        tensors = {f"{name}/{n}": route for name, routes in self.routes.items() for n, route in enumerate(routes)}
        save_file(tensors, file, metadata=_FORMAT)

    def _hook(self, name: str) -> Any:
        def record(router: Router, _args: object, route: Any) -> None:
            if recomputation() == "":
                self.routes[name].append(route.topk_index_TK.to("cpu", _smallest(len(router.weight))))

        return record


class RouteReplay:
    """Sends tokens where a recording says, within a `with` block: forward N of a router takes its recorded choices N.

    Raises CheckpointError when the file is no recording or is of other routers; ConfigError, at the forward in
    question, when it has fewer forwards or was made of other numbers of tokens or choices.

    >>> with RouteReplay(model, "routes.safetensors"): model(ids, labels=ids).loss.backward()
    """

    def __init__(self, model: nn.Module, file: str | Path) -> None:
        self._routers = _routers(model)
        self._file = file
        self._routes = _read(Path(file))
        self._done: dict[str, int] = dict.fromkeys(self._routers, 0)
        if set(self._routes) != set(self._routers):
            odd = sorted(set(self._routes) ^ set(self._routers))[0]
            where = "the recording" if odd in self._routes else "the model"
            raise CheckpointError(f"{file}: router {odd!r} is only in {where}; give a recording of the same model")

    def __enter__(self) -> "RouteReplay":
        for name, router in self._routers.items():
            router.choices = self._source(name, router)
        return self

    def __exit__(self, *_: object) -> None:
        for router in self._routers.values():
            router.choices = None

    def _source(self, name: str, router: Router) -> Any:
        def choices(tokens: int) -> Tensor:
            # a recomputed forward is the one before, once more
            number = self._done[name] - (recomputation() != "")
            if number >= len(self._routes[name]):
                raise ConfigError(f"{self._file} holds {number} forwards of {name}, and this is one more")
            self._done[name] = number + 1
            route, shape = self._routes[name][number], (tokens, router.num_experts_per_tok)
            if route.shape != shape:
                raise ConfigError(
                    f"{self._file}: forward {number} of {name} is {tuple(route.shape)}, and this is {shape}"
                )
            return route.to(router.weight.device, torch.int64)

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
            if (opened.metadata() or {}).get("format") != _FORMAT["format"]:
                raise CheckpointError(f"{file} is no recording of routes: give a file that RouteRecorder.save wrote")
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                router, _, number = name.rpartition("/")
                routes[router][int(number)] = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); give a file that RouteRecorder.save wrote") from None
    return {name: [numbered[n] for n in sorted(numbered)] for name, numbered in routes.items()}
