"""The files of a hub directory: config.json, and one safetensors file or several with an index."""

import json
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError

__all__ = ["INDEX", "SINGLE", "HubTensors", "read_json"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError in one sentence."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a Hugging Face directory") from None
    except ValueError as error:  # JSON, or not even UTF-8
        raise CheckpointError(f"{file} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return value


class HubTensors:
    """Names and tensors of a directory's safetensors files. A tensor is read when asked for, never all at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if (directory / INDEX).exists():
            self._read_index()
        elif (directory / SINGLE).exists():
            self._file_of = dict.fromkeys(self._reader(directory / SINGLE).keys(), directory / SINGLE)
        else:
            pickled = any(directory.glob("pytorch_model*.bin"))
            why = ": its weights are pickled, which runs whatever is in them; convert them first" if pickled else ""
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}{why}")

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._file_of)

    def read(self, name: str) -> Any:
        """The tensor; on a CPU it may be a view of the file."""
        return self._reader(self._file_of[name]).get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the header alone."""
        return list(self._reader(self._file_of[name]).get_slice(name).get_shape())

    def _read_index(self) -> None:
        index = self.directory / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index} names {file!r} for {name}: it must be a file of the same directory")
            self._file_of[name] = self.directory / file
        for file in sorted(set(self._file_of.values())):
            held = set(self._reader(file).keys())
            said = {name for name, where in self._file_of.items() if where == file}
            if held != said:
                raise CheckpointError(f"{file} and {INDEX} disagree on {min(held ^ said)}")

    def _reader(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); copy it again") from None
        return self._open[file]
