"""A moe.Transformer becomes a directory that transformers loads as its own class."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from moe.errors import CheckpointError
from moe.hf.families import Family
from moe.hf.files import INDEX, SINGLE, read_json
from moe.hf.names import copies, layouts
from moe.hf.settings import config_to_hub
from moe.model import Transformer
from moe.rundir import write_json

__all__ = ["save"]

_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What belongs to a model besides its weights; nothing here is code.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def save(
    model: Transformer, directory: str | Path, *, like: str | Path | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and safetensors in the hub's layout, experts one by one.

    Args:
        directory: made when missing; weights that are already there are replaced.
        like: a Hugging Face directory, such as the one the model was loaded from, whose tokenizer files, generation
            settings and token ids go along. Without it the ids are null and generation stops at a length only.
        max_shard_bytes: weights beyond this are written as several files with an index.

    Raises:
        ConfigError: transformers has no class for this architecture; names the field.
    """
    directory = Path(directory)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    family, config = config_to_hub(model.config, dtype)
    if like is not None:
        stored = read_json(Path(like) / "config.json")
        config.update({name: stored.get(name) for name in _TOKEN_IDS})
    directory.mkdir(parents=True, exist_ok=True)
    written = _write_shards(list(_shards(model, family, max_shard_bytes)), directory)
    for path in directory.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in written:
            path.unlink()  # of a model that was here before: a reader would find two
    write_json(directory / "config.json", config)
    if like is not None:
        _copy_companions(Path(like), directory)


def _shards(model: Transformer, family: Family, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The hub's tensors in groups of at most `max_bytes`, or of one tensor that is larger; views, not copies."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _hub_tensors(model, family):
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _hub_tensors(model: Transformer, family: Family) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # the embedding, stored once
        for piece in layouts(name, tensor, family, model.config)[0]:
            yield piece.hub_name, tensor.detach()[piece.where]
    for hub_name, name in copies(model.config):
        yield hub_name, model.get_parameter(name).detach()
    yield from _empty_shared_experts(model)


def _empty_shared_experts(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """DeepSeek's classes always have shared experts: without any they are of width 0, and would be called missing."""
    config = model.config
    if config.attention != "mla" or config.n_shared_experts:
        return
    for layer in filter(config.is_moe_layer, range(config.num_hidden_layers + config.num_nextn_predict_layers)):
        for part, shape in (("gate", (0, config.hidden_size)), ("up", (0, config.hidden_size)),
                            ("down", (config.hidden_size, 0))):  # fmt: skip
            empty = model.embed_tokens.weight.new_empty(shape)
            yield f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight", empty


def _write_shards(shards: list[dict[str, Tensor]], directory: Path) -> set[str]:
    """Each file is written aside and renamed; the index last. Returns the names of the files."""
    from safetensors.torch import save_file

    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    weight_map: dict[str, str] = {}
    size = 0
    for file, shard in zip(names, shards, strict=True):
        aside = directory / f".{file}.{os.getpid()}"
        try:
            save_file(_apart(shard), aside, metadata={"format": "pt"})
        except OSError as error:
            raise CheckpointError(f"{aside} cannot be written ({error.strerror})") from None
        aside.replace(directory / file)
        weight_map.update(dict.fromkeys(shard, file))
        size += sum(tensor.nbytes for tensor in shard.values())
    if total == 1:
        (directory / INDEX).unlink(missing_ok=True)
    else:
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
    return set(names)


def _apart(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can write: whole tensors, of which no two are the same memory under two names."""
    whole: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in shard.items():
        place = (tensor.data_ptr(), tensor.nbytes)
        whole[name] = tensor.clone() if tensor.nbytes and place in seen else tensor.contiguous()
        seen.add(place)
    return whole


def _copy_companions(source: Path, directory: Path) -> None:
    for name in _COMPANIONS:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)
