"""Which layers are adapted, by name: those of the blocks, and the embedding and lm_head where they are named."""

from __future__ import annotations

from collections.abc import Sequence

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
OUTER = (EMBEDDING, HEAD)
_NAMED = {"embed_tokens": EMBEDDING, EMBEDDING: EMBEDDING, HEAD: HEAD}


def wanted(patterns: Sequence[str], tied: bool) -> tuple[list[str] | None, list[str]]:
    """What of ``lora_target_modules`` is for layers of the blocks (no patterns: all of them; None: none of them), and
    which of the embedding and the head are named: of a ``tied`` model the embedding for both. No expression means these
    two, so that ``.*`` means what it meant."""
    outer = list(dict.fromkeys(_NAMED[pattern] for pattern in patterns if pattern in _NAMED))
    left = [pattern for pattern in patterns if pattern not in _NAMED]
    return left if left or not outer else None, [EMBEDDING] if tied and outer else outer
