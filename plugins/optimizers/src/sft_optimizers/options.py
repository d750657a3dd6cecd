"""The settings of the optimizers' plugins."""

from __future__ import annotations

from dataclasses import dataclass

import sft


@dataclass
class LionOptions:
    lion_beta1: float = sft.option(0.9, "Lion's share of the average in the step's direction", minimum=0, below=1)
    lion_beta2: float = sft.option(0.99, "Lion's decay of the average", minimum=0, below=1)


@dataclass
class AdafactorOptions:
    adafactor_decay_rate: float = sft.option(-0.8, "exponent of the step in the decay of squares", maximum=0)
    adafactor_clip_threshold: float = sft.option(1.0, "largest root mean square of a parameter's update", above=0)
    adafactor_beta1: float | None = sft.option(None, "decay of an average of updates; unset: none", minimum=0, below=1)
    adafactor_scale_parameter: bool = sft.option(False, "the rate times the root mean square of the parameter")
    adafactor_epsilon1: float = sft.option(1e-30, "added to squared gradients", minimum=0)
    adafactor_epsilon2: float = sft.option(1e-3, "least root mean square of a parameter", minimum=0)


@dataclass
class AdamW8bitOptions:
    adamw_8bit_min_size: int = sft.option(4096, "values from which on a parameter's state has 8 bits", minimum=1)


@dataclass
class MuonOptions:
    muon_momentum: float = sft.option(0.95, "decay of Muon's average of gradients", minimum=0, below=1)
    muon_steps: int = sft.option(5, "Newton-Schulz steps of the orthogonalisation", minimum=1, maximum=99)
