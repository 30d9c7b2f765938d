"""The weight version of an engine with its own copy of the weights, and which version it may load next.

An engine holds nothing after a load that failed halfway and after a sleep that discarded the weights. Then only a
version with the tensors of every group is accepted: there are no bytes for a checksum to match.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from forerun.engine.base import Weights, check_drafter
from forerun.errors import UserError
from forerun.models.checksum import checksum
from forerun.models.load import check_shapes
from forerun.workers.weights import Shapes

Given = dict[str, Mapping[str, Tensor]]  # tensors by group


@dataclass(slots=True)
class WeightVersionState:
    """The version that is held, for groups of known shapes. A group without tensors cannot be stale."""

    groups: dict[str, Shapes]
    held: Weights = field(default_factory=lambda: Weights(0, {}))
    lost: str = ""  # why nothing is held, a sentence without its full stop
    discarded: Weights | None = None  # what a sleep discarded

    @property
    def version(self) -> int | None:
        """None: nothing is held."""
        return None if self.lost else self.held.version

    def require(self) -> None:
        """Raises UserError when nothing is held."""
        if self.lost:
            raise UserError(f"{self.lost}; load a version again")

    def check(self, weights: Weights) -> Given:
        """The tensors of a version that may be taken.

        Raises:
            UserError: a group is missing, partial, or not held where only its checksum is given; or the version is
                older than the discarded one, or other bytes under its number.
        """
        given = weights.groups
        self._check_groups(weights, given)
        self._check_age(weights)
        known = {group: checksum({}) for group, names in self.groups.items() if not names}
        known |= {} if self.lost else dict(self.held.checksums)
        for group, expected in weights.checksums.items():
            if group not in given and known.get(group) != expected:
                raise UserError(
                    f"The {group} weights of version {weights.version} have checksum {expected}, but the engine holds "
                    f"{known.get(group, 'none that it knows of')}; it keeps a copy of its own, so a new version must "
                    "carry the tensors"
                )
        for group, state in given.items():
            check_shapes(state, {name: shape for name, (shape, _) in self.groups[group].items()}, f"the {group}")
        return given

    def take(self, weights: Weights) -> Weights:
        """A version is held now; returns it without the tensors."""
        self.held, self.lost, self.discarded = Weights(weights.version, dict(weights.checksums)), "", None
        return self.held

    def lose(self, why: str) -> None:
        """Nothing is held any more."""
        self.lost = why

    def discard(self) -> None:
        """The weights were discarded by a sleep."""
        self.discarded = self.discarded if self.lost else self.held
        self.lost = "The engine threw its weights away when it went to sleep"

    def _check_groups(self, weights: Weights, given: Given) -> None:
        for group in given:
            if group not in weights.checksums:
                raise UserError(f"Version {weights.version} carries {group} weights without a checksum")
        check_drafter(weights, "draft" in self.groups)
        if "policy" not in weights.checksums:
            raise UserError(f"Version {weights.version} carries no policy")

    def _check_age(self, weights: Weights) -> None:
        """Compare with the version that was discarded, by number and checksum: its bytes are gone."""
        old = self.discarded
        if old is None:
            return
        if weights.version < old.version:
            raise UserError(
                f"Version {weights.version} is older than version {old.version}, which the engine held before it "
                "slept: it is stale; send the current one (to go back on purpose, load the older one before the sleep)"
            )
        for group, before in old.checksums.items():
            if weights.version == old.version and weights.checksums.get(group) != before:
                raise UserError(
                    f"The {group} weights of version {weights.version} had checksum {before} before the sleep and have "
                    f"{weights.checksums.get(group)} now: one number, two versions; give the new one its own number"
                )
