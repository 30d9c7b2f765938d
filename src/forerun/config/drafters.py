"""Settings of drafters; `recipe.py` puts them together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from forerun.config.block import Block


class DrafterConfig(Block):
    """Base class of a drafter's own settings: the block `speculation.<name>`, else `speculation.settings`."""

    def draft_tokens(self, k: int) -> int:
        """Draft tokens per round where the recipe says `k`."""
        return k


class NgramConfig(DrafterConfig):
    """Prompt lookup (`method: ngram`): names, meaning and defaults are vLLM's."""

    prompt_lookup_max: int = Field(5, ge=1, description="longest suffix that is looked up, in tokens")
    prompt_lookup_min: int = Field(5, ge=1, description="shortest suffix that is looked up, in tokens")

    @model_validator(mode="after")
    def _check(self) -> NgramConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min {self.prompt_lookup_min} is above prompt_lookup_max {self.prompt_lookup_max}; "
                "set both"
            )
        return self


class TrieConfig(DrafterConfig):
    """Continuations from samples of the same prompt (`method: trie`)."""

    scope: Literal["prompt", "global"] = Field(
        "prompt", description="prompt: look only at samples of the same prompt; global: at everything"
    )
    match_min: int = Field(1, ge=1, description="shortest suffix that is looked up, in tokens")
    match_max: int = Field(16, ge=1, description="longest suffix that is compared, in tokens")
    floor: float = Field(0.5, ge=0, le=1, description="least share of the occurrences that must continue with a token")
    window: int = Field(8, ge=1, description="epochs of a prompt whose samples are kept (scope prompt)")
    max_tokens: int = Field(1_000_000, ge=1, description="tokens kept in all; beyond it the oldest samples are evicted")

    @model_validator(mode="after")
    def _check(self) -> TrieConfig:
        if self.match_min > self.match_max:
            raise ValueError(f"match_min {self.match_min} is above match_max {self.match_max}; set both")
        return self


GRAFT_PRESETS: dict[str, dict[str, Any]] = {
    "small": {},  # the defaults: few enough rows to pay on a CPU
    "paper": {  # 2605.20104, section 3.1 and table 7; depth and width are EAGLE-3's, the thresholds are not published
        "nodes": 60, "width": 10, "depth": 8, "checkpoints": (0, 1, 5), "thresholds": (0.35, 0.25, 0.15),
        "keep": (8, 24, 40), "template": (8, 10, 8, 6, 5, 4, 4, 4, 3), "successors": 8,
    },
}  # fmt: skip


class GraftConfig(DrafterConfig):
    """Hybrid draft trees (`method: graft`): an EAGLE-3 tree, pruned where unsure, then filled by retrieval."""

    preset: Literal["small", "paper"] = Field(
        "small", description="where values that are not set come from; paper: the 60 nodes of 2605.20104"
    )
    nodes: int = Field(12, ge=1, le=127, description="nodes of a tree, verified in one pass")
    width: int = Field(4, ge=1, description="candidates that are expanded per depth, and children of each")
    depth: int = Field(4, ge=1, description="deepest drafted candidates")
    checkpoints: tuple[int, ...] = Field(
        (0, 1), description="expansions of the head after which it may stop; 0: before the first"
    )
    thresholds: tuple[float, ...] = Field(
        (0.35, 0.2), description="per checkpoint: stop where the likeliest path is less likely than this"
    )
    keep: tuple[int, ...] = Field((3, 6), description="per checkpoint: drafted nodes that are kept when it stops there")
    template: tuple[int, ...] = Field((4, 4, 3, 2), description="retrieved nodes per depth below the root")
    successors: int = Field(8, ge=1, description="likeliest successors that are remembered of every token")
    variant: Literal["graft", "root", "tail", "prune", "eagle"] = Field(
        "graft",
        description="graft: prune, then fill from the root; root: fill without pruning (the last of keep is drafted); "
        "tail: prune, then fill below the deepest draft; prune: no retrieval; eagle: neither",
    )

    def draft_tokens(self, k: int) -> int:
        """The nodes of a tree."""
        return self.nodes if k > 0 else 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return {**GRAFT_PRESETS.get(str(data.get("preset")), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check(self) -> GraftConfig:
        if not len(self.checkpoints) == len(self.thresholds) == len(self.keep):
            lengths = f"{len(self.checkpoints)}, {len(self.thresholds)} and {len(self.keep)}"
            raise ValueError(
                f"checkpoints, thresholds and keep have {lengths} entries; give one of each per checkpoint"
            )
        if sorted(set(self.checkpoints)) != list(self.checkpoints) or min(self.checkpoints, default=0) < 0:
            raise ValueError(f"checkpoints {list(self.checkpoints)} must ascend from 0 on")
        if not all(0 <= kept <= self.nodes for kept in self.keep):
            raise ValueError(f"keep {list(self.keep)} must lie between 0 and nodes {self.nodes}")
        above = 1
        for width in self.template:
            if not 1 <= width <= above * self.successors:
                limit = f"{above} nodes with {self.successors} successors each"
                raise ValueError(f"template {list(self.template)}: {width} nodes cannot stand below {limit}")
            above = width
        return self
