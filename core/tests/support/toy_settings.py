"""Two plugins with an option of one name, and settings that are made with plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sft
from sft import hookspecs
from sft.plugins.registry import Plugins
from sft.settings.arguments import Settings
from sft.settings.reading import build


@dataclass
class FirstOptions:
    first_rank: int = sft.option(8, "a rank", minimum=1)


class First(sft.Plugin):
    name = "first"
    api_version = 1
    Options = FirstOptions


class Twin(sft.Plugin):
    name = "twin"
    api_version = 1
    Options = FirstOptions


def built(values: dict[str, Any], *plugins: type) -> Settings:
    return build(values, Plugins.load([], hookspecs, plugins))
