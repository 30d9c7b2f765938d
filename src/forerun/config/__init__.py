"""The typed recipe: settings with descriptions, defaults and checks; `recipes/` ships some."""

from forerun.config.recipe import *  # noqa: F403
