"""DeepSpeed's ZeRO: each rank keeps a share of the optimizer's state, from stage 2 of gradients, in 3 of the weights.

DeepSpeed joins all parameters of an optimizer group into one flat tensor and gives each rank a part of it (in stage 3 a
part of every parameter). The optimizer of the recipe then steps those flat parts, so its state belongs to them; a
checkpoint holds whole tensors by parameter, as every engine's does, gathered here one at a time.

All is fp32: weights, gradients in flight, optimizer state. bf16 and fp8 are autocast, as everywhere.
ZeRO: arXiv:1910.02054.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.checkpoint import Snapshot, load_checkpoint, random_states
from moe.config import Recipe
from moe.model import Transformer
from moe.parallel import ranks
from moe.parallel.clipping import scale, sum_of_squares
from moe.parallel.engine import Engine

__all__ = ["ZeroEngine"]

_BUCKET = 2**26  # elements that gradients travel in: 256 MB in fp32, where DeepSpeed's own choice is 2 GB


class ZeroEngine(Engine):
    """An engine of ZeRO `stage` 1, 2 or 3, in a process that `accelerate launch` started for DeepSpeed."""

    def __init__(self, recipe: Recipe, *, stage: int) -> None:
        _quieten()
        super().__init__(recipe.train)
        self._recipe, self._stage = recipe, stage
        self.name = f"zero{stage}"
        self._engine: Any = None  # DeepSpeed's
        self._parameter_names: list[list[str]] = []  # by optimizer group
        self._checkpoint: Path | None = None

    def prepare(self, model: Transformer, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model with its weights and `optimizer` cut up, and the state of a loaded checkpoint put in."""
        import deepspeed

        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parameter_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._settings())
        if self._checkpoint is not None:
            self._restore(model, self._checkpoint / "optimizer.safetensors")
            self._checkpoint = None
        return self._engine

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        train, model = self._recipe.train, self._recipe.model
        return {
            "train_micro_batch_size_per_gpu": train.micro_batch(self.ranks),
            "gradient_accumulation_steps": train.accumulation(self.ranks),
            "gradient_clipping": 0.0,  # none by DeepSpeed, whose default is 1: `clip` does it
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": _BUCKET,
                # smaller parameters stay whole on every rank; Hugging Face's rule
                "stage3_param_persistence_threshold": 10 * model.hidden_size,
            },
            "zero_allow_untested_optimizer": True,
            # DeepSpeed switches an autocast off that it was not told of; no gradient travels in bf16
            "torch_autocast": {
                "enabled": train.precision != "fp32",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }

    def evaluating(self) -> AbstractContextManager[Any]:
        """Without gradients, but not in inference mode: weights gathered there could not be trained on afterwards."""
        return torch.no_grad()

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Tells DeepSpeed whether a step follows; from stage 2 on gradients travel after every micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of a micro-batch's objective, already divided by the number of micro-batches."""
        self._engine.backward(objective, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale this rank's part of the gradient; return the norm of all, infinite when any of it is not finite."""
        mine = [gradient for group in self._zero.averaged_gradients.values() for gradient in group]
        squares = ranks.all_reduce_sum(sum_of_squares(mine).to(self.device))
        norm = squares.sqrt().float().nan_to_num(nan=torch.inf)
        scale(mine, norm, max_norm)
        return norm

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer on this rank's part, gather the weights, forget the gradients."""
        self._engine.step()

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients without a step, as DeepSpeed itself does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = None
            if self._stage < 3:
                self._zero.all_grad_tensors[group] = None

    def capture(
        self, model: Transformer, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, copy: bool
    ) -> Snapshot | None:
        """The run as it is now, whole tensors on the first rank; the others send their parts and get None."""
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            for group, names in zip(optimizer.param_groups, self._parameter_names, strict=True)
        ]
        buffers = dict(model.named_buffers())
        weights = {name: tensor.cpu().clone() for name, tensor in model.stored_weights().items() if name in buffers}
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._gathered(model):
            if ranks.is_first():
                kept = tensors if "/" in name else weights
                kept[name] = tensor.cpu()
        if not ranks.is_first():
            return None
        return Snapshot(
            config=model.config,
            weights=weights,
            optimizer=tensors,
            random=random_states(),
            state={**state, "param_groups": groups},
        )

    def load(self, checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put a checkpoint into model and random generators; the optimizer's tensors follow in `prepare`, cut up."""
        self._checkpoint = checkpoint
        return load_checkpoint(checkpoint, model, optimizer, optimizer_tensors=False)

    def release(self) -> None:
        """Forget the prepared model, so that another can take its place in memory."""
        self._engine.destroy()
        self._engine = None
        super().release()

    def close(self) -> None:
        """Leave the process group, which accelerate on a CPU does not know it is in."""
        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer around the recipe's."""
        return self._engine.optimizer

    @property
    def _parts(self) -> list[Tensor]:
        """This rank's flat parts of the weights, to which the optimizer's state belongs."""
        if self._stage < 3:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    def _gathered(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        """Each parameter and its optimizer state as PARAMETER/FIELD, whole and fresh, one by one; a collective each."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_state()
        fields = self._zero.optimizer.state.get(self._parts[0], {})
        for name, parameter in model.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)
            for field, value in fields.items():
                # a number, like the count of steps, is the same for all
                whole = value.clone() if value.dim() == 0 else safe_get_full_optimizer_state(parameter, field)
                yield f"{name}/{field}", whole

    def _restore(self, model: Transformer, file: Path) -> None:
        """Put the optimizer state of a checkpoint into this rank's parts, one tensor at a time."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as stored:
            keys = stored.keys()
            self._make_state({key.rpartition("/")[2]: stored.get_tensor(key) for key in _of_first_parameter(keys)})
            for name, parameter in model.named_parameters():
                for field in self._zero.optimizer.state[self._parts[0]]:
                    whole = stored.get_tensor(f"{name}/{field}")
                    if whole.dim():
                        self._set_part(parameter, whole, field)

    def _make_state(self, like: Mapping[str, Tensor]) -> None:
        """State as the optimizer would make it in its first step: numbers as given, all else zero."""
        for part in self._parts:
            self._zero.optimizer.state[part] = {
                field: torch.zeros_like(part) if tensor.dim() else tensor.to(part.device, copy=True)
                for field, tensor in like.items()
            }
        self._link_state()

    def _link_state(self) -> None:
        """Let DeepSpeed find each parameter's state; by itself it looks once, before the second group has any."""
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_part(self, parameter: nn.Parameter, whole: Tensor, field: str) -> None:
        """Keep this rank's part of one parameter's optimizer state."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, whole, field)
            return
        # cut here, with the last part filled up: DeepSpeed's own cut fails where the ranks do not divide a parameter
        size = parameter.partition_numel()  # type: ignore[attr-defined]
        filled = torch.zeros(size * self.ranks, dtype=whole.dtype)
        filled[: whole.numel()] = whole.flatten()
        safe_set_local_optimizer_state(parameter, filled[size * ranks.rank() :][:size], field)


def _quieten() -> None:
    """DeepSpeed as a library: only its errors are printed, and it compiles nothing."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 renames a collective that DeepSpeed calls; the new name is not known to torch 2.11
    warnings.filterwarnings("ignore", ".*(all_gather|reduce_scatter)_.*", FutureWarning)
    # collectives between processes of a CPU machine: a minute of C++ at the first start, for what gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _of_first_parameter(keys: Sequence[str]) -> list[str]:
    """The keys PARAMETER/FIELD of one parameter: all have the same fields."""
    first = keys[0].rpartition("/")[0] if keys else ""
    return [key for key in keys if key.rpartition("/")[0] == first]
