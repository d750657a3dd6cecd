"""The memory that a run has, and what installed plugins know of what it needs."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft import hookspecs
from sft.plugins.discovery import with_refined
from sft.plugins.registry import Plugins
from sft.plugins.requests import requests
from sft.settings.reading import build

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory() -> tuple[str, int]:
    """Where the run computes, "cpu" or "gpu", and the bytes that it could have there."""
    paddle = sys.modules.get("paddle")
    if paddle is not None and paddle.device.get_device().startswith("gpu"):
        return "gpu", int(paddle.device.cuda.get_device_properties().total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return "cpu", min(limit for limit in limits if limit > 0)


def asked(ask: Callable[[Any], Any]) -> Any:
    """What installed plugins, whether or not they are active in the run, answer where ``ask`` calls one of the hooks
    about memory; None if none does, or can. What they raise is of no use to a run that does without an answer."""
    for name in requests("advice").get("memory", []):
        try:
            plugins = Plugins.load(with_refined(name), hookspecs)
            plugins.start(build({}, plugins).options)
            found = ask(plugins.hook)
        except (Exception, MemoryError):
            continue
        answers = found if isinstance(found, list) else [found]
        if answers and answers[0] is not None:
            return answers[0]
    return None
