"""The typed recipe: settings with descriptions, defaults and checks; `recipes/` ships some."""

from forerun.config.drafters import (
    GRAFT_PRESETS,
    Block,
    DrafterConfig,
    GraftConfig,
    NgramConfig,
    TrieConfig,
)
from forerun.config.load import (
    load_recipe,
    parse_overrides,
    recipe_names,
)
from forerun.config.recipe import (
    CheckpointConfig,
    ClusterConfig,
    ColdStartConfig,
    CompareConfig,
    DraftConfig,
    DType,
    EvalConfig,
    LoopConfig,
    LoraConfig,
    PolicyConfig,
    Recipe,
    RolloutConfig,
    SpeculationConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "GRAFT_PRESETS",
    "Block",
    "CheckpointConfig",
    "ClusterConfig",
    "ColdStartConfig",
    "CompareConfig",
    "DType",
    "DraftConfig",
    "DrafterConfig",
    "EvalConfig",
    "GraftConfig",
    "LoopConfig",
    "LoraConfig",
    "NgramConfig",
    "PolicyConfig",
    "Recipe",
    "RolloutConfig",
    "SpeculationConfig",
    "TaskConfig",
    "TrainConfig",
    "TrieConfig",
    "load_recipe",
    "parse_overrides",
    "recipe_names",
]
