"""The typed recipe: settings with descriptions, defaults and checks; `recipes/` ships some."""

from forerun.config.block import *  # noqa: F403
from forerun.config.drafters import *  # noqa: F403
from forerun.config.load import *  # noqa: F403
from forerun.config.recipe import *  # noqa: F403
from forerun.config.task import *  # noqa: F403
