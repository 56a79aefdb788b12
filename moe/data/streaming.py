"""Sequences packed from documents as they come: only forwards, each rank from its own share, with a place to keep."""

import hashlib
from collections.abc import Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.data.sources import DocumentStream
from moe.data.tokenizer import DocumentEncoder
from moe.errors import ConfigError, DataError

__all__ = ["TokenStream", "fingerprint"]

_DOCUMENTS_AT_ONCE = 32


def fingerprint(text: str) -> bytes:
    """What stands for a document in the set of those to leave out."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


class TokenStream:
    """This rank's documents without gaps, in sequences of `seq_len`; those whose fingerprint is in `left_out` are not
    used: they are for validation.

    The state is the place before the documents read last and how many of their tokens are used: as small for long
    documents as for short ones. It fits the same number of ranks only.
    """

    def __init__(
        self, name: str, documents: DocumentStream, encoder: DocumentEncoder, seq_len: int, left_out: Set[bytes], *,
        ranks: int,
    ) -> None:  # fmt: skip
        self._name, self._documents, self._encoder = name, documents, encoder
        self._seq_len, self._left_out, self._ranks = seq_len, left_out, ranks
        self._before = documents.state()  # where the documents read last began
        self._group = np.empty(0, encoder.dtype)  # their tokens
        self._unused = self._group  # the end of them that no sequence holds yet

    def batch(self, first: int, size: int) -> Tensor:
        """The next `size` sequences: (size, seq_len) int64 on the CPU. `first` counts where sequences have numbers.

        Raises DataError when this rank's share holds no text.
        """
        wanted = size * self._seq_len
        taken, missing = [self._unused], wanted - len(self._unused)
        while missing > 0:
            self._read()
            taken.append(self._group)
            missing -= len(self._group)
        self._unused = taken[-1][missing:] if missing < 0 else taken[-1][:0]
        tokens = np.concatenate(taken)[:wanted]
        return torch.from_numpy(tokens.astype(np.int64).reshape(size, self._seq_len))

    def state(self) -> dict[str, Any]:
        """The place after the last batch."""
        return {
            "ranks": self._ranks, "documents": self._before, "tokens_used": len(self._group) - len(self._unused)
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ConfigError when that was with another number of ranks."""
        if state["ranks"] != self._ranks:
            raise ConfigError(
                f"data.streaming=true: this run's place in {self._name!r} is that of {state['ranks']} ranks, and there "
                f"are {self._ranks}; go on with {state['ranks']}, or train from `moe data prepare`, which any number "
                "of ranks can read"
            )
        self._documents.restore(state["documents"])
        self._before, self._group = state["documents"], np.empty(0, self._encoder.dtype)
        if state["tokens_used"]:
            self._read()
        self._unused = self._group[state["tokens_used"] :]

    def _read(self) -> None:
        """Read the next documents that have tokens."""
        epoch = self._documents.epoch
        while True:
            self._before = self._documents.state()
            texts = [text for text in self._documents.read(_DOCUMENTS_AT_ONCE) if self._used(text)]
            self._group = _joined(list(self._encoder.encode(texts)), self._encoder.dtype)
            if len(self._group):
                return
            if self._documents.epoch > epoch + 1:  # a whole epoch, from its beginning, without a token
                raise DataError(
                    f"data.source={self._name!r} has no text for each of {self._ranks} ranks; launch fewer, or give "
                    "more documents"
                )

    def _used(self, text: str) -> bool:
        return bool(text) and fingerprint(text) not in self._left_out


def _joined(arrays: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
