"""Optimizers, schedules, objectives, what goes by evaluations, and exports."""

from __future__ import annotations

from seeded_faults.fault import fault

OPTIMIZERS = (
    fault(
        "lion-moment-not-kept",
        "lion",
        "sft_optimizers/lion.py",
        "the average of gradients is no part of a checkpoint",
        ('self.values[name], self.kept[name]["moment"]', "self.values[name], self._moment(name)"),
        (
            "    def update(self",
            "    def _moment(self, name: str) -> Any:\n"
            '        found = vars(self).setdefault("_moments", {})\n'
            "        return found.setdefault(name, paddle.zeros_like(self.values[name]))\n\n"
            "    def update(self",
        ),
    ),
    fault(
        "lion-beta-ignored",
        "lion",
        "sft_optimizers/plugins.py",
        "lion_beta2 is accepted and ignored",
        (
            "Lion(groups, self.options.lion_beta1, self.options.lion_beta2)",
            "Lion(groups, self.options.lion_beta1, 0.99)",
        ),
    ),
    fault(
        "lion-uphill",
        "lion",
        "sft_optimizers/lion.py",
        "it steps along the gradient, not against it",
        (".subtract_(rate * direction)", ".add_(rate * direction)"),
    ),
    fault(
        "adafactor-steps-not-counted",
        "adafactor",
        "sft_optimizers/adafactor.py",
        "each step counts as the first, so nothing is averaged",
        ('kept["steps"].set_value(np.array([steps]))', 'kept["steps"].set_value(np.array([0]))'),
    ),
    fault(
        "adafactor-divides-what-cannot-be",
        "adafactor",
        "sft_optimizers/adafactor.py",
        "processes that share a matrix keep rows and columns of their own parts",
        ('grains: ClassVar[dict[str, int]] = {"steps": 0, "row": 0, "column": 0}', "elementwise = True"),
    ),
    fault(
        "adamw-8bit-scale-lost",
        "adamw-8bit",
        "sft_optimizers/adamw_8bit.py",
        "codes are read back with the scale of the first moment",
        ('kept[f"scale{number}"][blocks])', 'kept["scale1"][blocks])'),
    ),
    fault(
        "adamw-8bit-min-size-ignored",
        "adamw-8bit",
        "sft_optimizers/plugins.py",
        "adamw_8bit_min_size is accepted and ignored",
        (">= self.options.adamw_8bit_min_size\n", ">= 4096\n"),
    ),
    fault(
        "muon-steps-ignored",
        "muon",
        "sft_optimizers/plugins.py",
        "muon_steps is accepted and ignored",
        ("self.options.muon_momentum, self.options.muon_steps)", "self.options.muon_momentum, 5)"),
    ),
    fault(
        "wsd-counts-its-calls",
        "wsd",
        "sft_optimizers/schedules.py",
        "the rate depends on how often it was asked, not on the step",
        (
            "        def rate(step: int) -> float:\n            done = step - 1\n            if done < warmup:\n"
            "                factor",
            "        calls: list[int] = []\n\n        def rate(step: int) -> float:\n            done = len(calls)\n"
            "            calls.append(step)\n            if done < warmup:\n                factor",
        ),
    ),
    fault(
        "wsd-shape-ignored",
        "wsd",
        "sft_optimizers/schedules.py",
        "wsd_decay_type is accepted and ignored",
        ("_SHAPES[options.wsd_decay_type]", '_SHAPES["cosine"]'),
    ),
)

OBJECTIVES = (
    fault(
        "dpo-prefers-the-rejected",
        "dpo",
        "sft_objectives/preference.py",
        "the chosen answer becomes less likely",
        ("surrogate - surrogate.detach() + value, values", "surrogate.detach() - surrogate + value, values"),
    ),
    fault(
        "dpo-no-reference",
        "dpo",
        "sft_objectives/preference.py",
        "the reference is the model itself, so no preference is ever learned",
        ("with paddle.no_grad(), self._reference():", "with paddle.no_grad():"),
    ),
    fault(
        "dpo-beta-ignored",
        "dpo",
        "sft_objectives/dpo.py",
        "dpo_beta is accepted and ignored",
        ("Preference(run, self.before, self.options.dpo_beta,", "Preference(run, self.before, 0.1,"),
    ),
    fault(
        "dpo-counts-rows",
        "dpo",
        "sft_objectives/preference.py",
        "a row that holds several pairs counts as one",
        ("return float(sum(len(row) // 2 for row in batch.lengths))", "return float(len(batch.lengths))"),
    ),
    fault(
        "dpo-pairs-mixed",
        "dpo",
        "sft_objectives/preference.py",
        "in a row of several pairs the rejected answer is that of the next one",
        ("zip(each[::2], each[1::2], strict=False)", "zip(each[::2], each[1::2][1:] + each[1:2], strict=False)"),
    ),
    fault(
        "label-smoothing-ignored",
        "label-smoothing",
        "sft_objectives/label_smoothing.py",
        "label_smoothing_factor is accepted and ignored",
        ("Smoothed(self.options.label_smoothing_factor)", "Smoothed(0.1)"),
    ),
    fault(
        "focal-loss-of-the-batch",
        "focal-loss",
        "sft_objectives/focal_loss.py",
        "a token counts by the mean probability of its chunk, not by its own",
        ("return before * missed.pow(self.gamma)", "return before * missed.mean().pow(self.gamma)"),
    ),
    fault(
        "z-loss-global-random",
        "z-loss",
        "sft_objectives/z_loss.py",
        "its weight is drawn from numpy's global generator",
        (
            "return before + targets.log_normaliser.square() * self.weight",
            "import numpy as np\n\n        weight = self.weight * (1 + 0.01 * float(np.random.standard_normal()))\n"
            "        return before + targets.log_normaliser.square() * weight",
        ),
    ),
)

EVENTS = (
    fault(
        "early-stopping-count-lost",
        "early-stopping",
        "sft_early_stopping/early_stopping.py",
        "a resumed run begins to count anew",
        ('self._best, self._without = state["best"], state["without"]', "pass"),
    ),
    fault(
        "early-stopping-patience-ignored",
        "early-stopping",
        "sft_early_stopping/early_stopping.py",
        "early_stopping_patience is accepted and ignored",
        ("if self._without >= self.options.early_stopping_patience:", "if self._without >= 1:"),
    ),
    fault(
        "early-stopping-at-once",
        "early-stopping",
        "sft_early_stopping/early_stopping.py",
        "an improvement counts as none",
        ("self._without = 0 if gain >", "self._without = 0 if gain <"),
    ),
    fault(
        "tracker-prints",
        "visualdl",
        "sft_track/tracker.py",
        "it writes to the terminal, past the run",
        ('            self.write(record["step"]', '            print(record)\n            self.write(record["step"]'),
    ),
)

EXPORTS = (
    fault(
        "gguf-without-the-adapter",
        "gguf",
        "sft_export_gguf/families.py",
        "the base is written, and its adapter is not",
        ("model.read(name)", "(model.read(name), model._weights.read_stored(model._stored[name]))[1]"),
    ),
    fault(
        "gguf-type-ignored",
        "gguf",
        "sft_export_gguf/exporter.py",
        "gguf_type is accepted and ignored",
        ("write(path, model, self.options.gguf_type)", "write(path, model, None)"),
    ),
    fault(
        "gguf-says-when",
        "gguf",
        "sft_export_gguf/writing.py",
        "the file says when it was written, so none is the same again",
        (
            "    writer.add_name(model.name)\n",
            '    import time\n\n    writer.add_name(f"{model.name} {time.time()}")\n',
        ),
    ),
)
