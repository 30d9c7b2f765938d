"""The typed recipe: settings with descriptions, defaults and checks; `recipes/` ships some."""

from forerun.config.drafters import *  # noqa: F403
from forerun.config.load import *  # noqa: F403
from forerun.config.recipe import *  # noqa: F403
