"""One weight version on its way into a worker: cut into pieces, put together again, checked before anything changes.

Pieces are flat slices of one tensor each, so that no message is larger than the chunk size. The receiver gathers the
whole version beside the weights in use (one more copy of them while it lasts) and compares checksums over it: a version
that is partial or damaged leaves the engine as it was. Processes of one machine need neither: `shared_memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forerun.errors import UserError
from forerun.models.checksum import checksum

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and number format


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` and on of the flattened tensor `name` of a group."""

    group: str
    name: str
    start: int
    values: Tensor  # [n]


def shapes(state: Mapping[str, Tensor]) -> Shapes:
    """What is to be expected of a group."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def chunks(groups: Mapping[str, Mapping[str, Tensor]], size_bytes: int) -> Iterator[list[Piece]]:
    """Lists of pieces of at most `size_bytes` together (and at least one element)."""
    chunk: list[Piece] = []
    room = size_bytes
    for group, state in groups.items():
        for name, tensor in state.items():
            flat, start = tensor.detach().reshape(-1), 0
            while start < flat.numel():
                count = min(flat.numel() - start, max(1, room // flat.element_size()))
                chunk.append(Piece(group, name, start, flat[start : start + count]))
                start += count
                room -= count * flat.element_size()
                if room < flat.element_size():
                    yield chunk
                    chunk, room = [], size_bytes
    if chunk:
        yield chunk


@dataclass(slots=True)
class Staging:
    """The receiver's side of one transfer."""

    tensors: dict[str, dict[str, Tensor]]
    _missing: dict[tuple[str, str], int] = field(default_factory=dict)  # elements

    @classmethod
    def of(cls, groups: Mapping[str, Shapes]) -> Staging:
        """Room for the groups."""
        tensors = {g: {n: torch.empty(s, dtype=d) for n, (s, d) in some.items()} for g, some in groups.items()}
        return cls(tensors, {(g, n): t.numel() for g, some in tensors.items() for n, t in some.items()})

    def add(self, pieces: list[Piece]) -> None:
        """Put pieces in their places."""
        for piece in pieces:
            flat = self.tensors[piece.group][piece.name].view(-1)
            flat[piece.start : piece.start + len(piece.values)] = piece.values.to(flat.device)
            self._missing[piece.group, piece.name] -= len(piece.values)

    def checksums(self) -> dict[str, str]:
        """Of the groups as they arrived.

        Raises:
            UserError: elements are missing, or came twice.
        """
        for (group, name), count in self._missing.items():
            if count:
                raise UserError(f"{name} of the {group} arrived with {count} elements missing; send the version again")
        return {group: checksum(state) for group, state in self.tensors.items()}

    def check(self, expected: Mapping[str, str]) -> None:
        """Compare with the checksums that were announced.

        Raises:
            UserError: a group is partial, damaged, or was not announced.
        """
        compare(self.checksums(), expected)


def compare(arrived: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Checksums of groups against those that were announced.

    Raises:
        UserError: a group is damaged, or was not announced.
    """
    for group, found in arrived.items():
        if found != expected.get(group):
            raise UserError(
                f"The {group} weights have checksum {expected.get(group)}, but {found} arrived: the transfer was "
                "damaged, or the version was changed while it was sent"
            )
