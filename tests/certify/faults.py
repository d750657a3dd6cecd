"""Faults, each put into a copy of one of the project's plugins, that `sft certify` must catch.

They were written from the texts of the techniques, and from what went wrong in other trainers, before the first check
was: a fault says what is wrong with the technique, not which check would see it. ``tests/certify/seed.py`` puts one
in, certifies the plugin, and says what caught it; docs/certify.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``edits`` are texts of ``module`` (a file of the distribution's package) and what stands there instead."""

    name: str
    plugin: str
    module: str
    edits: tuple[tuple[str, str], ...]
    wrong: str


def _fault(name: str, plugin: str, module: str, wrong: str, *edits: tuple[str, str]) -> Fault:
    return Fault(name, plugin, module, edits, wrong)


_LORA = (
    _fault(
        "lora-reload-unscaled", "lora", "sft_peft_lora/lora.py", "reloaded, the update has no scale",
        ("a.shape[1], adapter.scaling(name))", "a.shape[1], 1.0)"),
    ),
    _fault(
        "lora-merge-sign", "lora", "sft_peft_lora/files.py", "the merge subtracts the update",
        ("return weight + self._adapter", "return weight - self._adapter"),
    ),
    _fault(
        "lora-merge-unscaled", "lora", "sft_peft_lora/files.py", "the merge forgets the scale",
        ("weight + self._adapter.scaling(target) * paddle", "weight + paddle"),
    ),
    _fault(
        "lora-alpha-ignored", "lora", "sft_peft_lora/lora.py", "lora_alpha is accepted and ignored",
        ("if self.options.lora_alpha is not None:", "if False:"),
    ),
    _fault(
        "lora-rank-ignored", "lora", "sft_peft_lora/lora.py", "lora_rank is accepted and ignored",
        ("rank, alpha = options.lora_rank, self._alpha(run.hook, options.lora_rank)",
         "rank, alpha = 8, self._alpha(run.hook, 8)"),
    ),
    _fault(
        "lora-dropout-ignored", "lora", "sft_peft_lora/lora.py", "lora_dropout is accepted and ignored",
        ("rank, scaling, self.options.lora_dropout\n", "rank, scaling, 0.0\n"),
    ),
    _fault(
        "lora-targets-ignored", "lora", "sft_peft_lora/lora.py", "lora_target_modules is accepted and ignored",
        ("sft.target_layers(model, options.lora_target_modules)", "sft.target_layers(model, [])"),
    ),
    _fault(
        "lora-dropout-in-evaluation", "lora", "sft_peft_lora/layer.py", "dropout goes on in evaluation",
        ("self.dropout(x)", "paddle.nn.functional.dropout(x, self.dropout.p, training=True)"),
    ),
    _fault(
        "lora-dropout-on-base", "lora", "sft_peft_lora/layer.py", "dropout is on the input of W too",
        ("y = self.base(x) + self._product(update", "y = self.base(update) + self._product(update"),
    ),
    _fault(
        "lora-base-trains", "lora", "sft_peft_lora/lora.py", "the frozen weights train",
        ("        target.replace(layer)\n",
         "        target.replace(layer)\n        for one in target.layer.parameters():\n"
         "            one.stop_gradient = False\n"),
    ),
    _fault(
        "lora-starts-elsewhere", "lora", "sft_peft_lora/lora.py", "B begins at 0.01, not at zero",
        ("    bound = 1.0 / math.sqrt(layer.in_features)\n",
         "    bound = 1.0 / math.sqrt(layer.in_features)\n    layer.lora_B.set_value(layer.lora_B + 0.01)\n"),
    ),
    _fault(
        "lora-a-zero", "lora", "sft_peft_lora/lora.py", "A begins at zero beside B, so nothing is learned",
        ("rng.uniform(-bound, bound, ", "0.0 * rng.uniform(-bound, bound, "),
    ),
    _fault(
        "lora-a-too-large", "lora", "sft_peft_lora/lora.py", "A is drawn from U(±1), not from U(±1/√in)",
        ("bound = 1.0 / math.sqrt(layer.in_features)", "bound = 1.0"),
    ),
    _fault(
        "lora-a-not-transposed", "lora", "sft_peft_lora/files.py", "lora_A is written [in, r]",
        ('lora_A.weight"] = np.ascontiguousarray(a.T)', 'lora_A.weight"] = np.ascontiguousarray(a)'),
    ),
    _fault(
        "lora-own-layout", "lora", "sft_peft_lora/files.py", "tensors are written, and read, [in, out]: not as PEFT has them",
        ('lora_A.weight"] = np.ascontiguousarray(a.T)', 'lora_A.weight"] = np.ascontiguousarray(a)'),
        ('lora_B.weight"] = np.ascontiguousarray(b.T)', 'lora_B.weight"] = np.ascontiguousarray(b)'),
        ('found["A"].shape[0] != found["B"].shape[1] or not found["A"].shape[0]',
         'found["A"].shape[1] != found["B"].shape[0] or not found["A"].shape[1]'),
        ('(np.ascontiguousarray(found["A"].T), np.ascontiguousarray(found["B"].T))', '(found["A"], found["B"])'),
    ),
    _fault(
        "lora-own-names", "lora", "sft_peft_lora/files.py", "names lack PEFT's base_model.model.",
        ('PREFIX = "base_model.model."', 'PREFIX = ""'),
    ),
    _fault(
        "lora-alpha-not-written", "lora", "sft_peft_lora/files.py", "adapter_config.json does not say lora_alpha",
        ('        "lora_alpha": alpha,\n', ""),
    ),
    _fault(
        "lora-targets-not-written", "lora", "sft_peft_lora/files.py", "target_modules lacks a module that is adapted",
        ('"target_modules": modules,', '"target_modules": modules[:-1],'),
    ),
    _fault(
        "lora-refinement-forgotten", "lora", "sft_peft_lora/lora.py", "the scaling of a refinement is not asked for",
        ("provided = hook.lora_scaling(rank=rank, alpha=alpha)", "provided = None"),
    ),
    _fault(
        "lora-state-of-the-class", "lora", "sft_peft_lora/lora.py", "layers of one run are those of the next one too",
        ("        self.layers: dict[str, Any] = {}\n", "        self.layers = _LAYERS\n"),
        ("class Lora(sft.Plugin):", "_LAYERS: dict[str, Any] = {}\n\n\nclass Lora(sft.Plugin):"),
    ),
    _fault(
        "lora-global-random", "lora", "sft_peft_lora/lora.py", "A is drawn from numpy's global generator",
        ("set_value(rng.uniform(", "set_value(__import__('numpy').random.uniform("),
    ),
    _fault(
        "lora-foreign-tensors-dropped", "lora", "sft_peft_lora/files.py", "what a merge has no place for is dropped silently",
        ("return sorted(self._left)", "return []"),
    ),
    _fault(
        "lora-unknown-config-read", "lora", "sft_peft_lora/files.py",
        "a config that asks for more than LoRA is read as if it were LoRA",
        ("if self.config.get(key, plain[0]) not in (*plain, None):", "if False:"),
    ),
    _fault(
        "lora-divided-wrongly", "lora", "sft_peft_lora/layer.py", "processes that share a layer divide B like A",
        ('"lora_A": ("in", None),\n        "lora_B": (None, "out"),', '"lora_A": (None, None),\n        "lora_B": (None, None),'),
    ),
    _fault("rslora-no-effect", "rslora", "sft_peft_lora/rslora.py", "the scale is α/r", ("math.sqrt(rank)", "rank")),
    _fault(
        "rslora-other-root", "rslora", "sft_peft_lora/rslora.py", "the scale is α/∛r",
        ("alpha / math.sqrt(rank)", "alpha / rank ** (1 / 3)"),
    ),
    _fault(
        "lora-plus-no-effect", "lora-plus", "sft_peft_lora/lora_plus.py", "the ratio becomes 1, as in PaddleNLP",
        ("group.learning_rate * self.options.lora_plus_scale", "group.learning_rate"),
    ),
    _fault(
        "lora-plus-scale-ignored", "lora-plus", "sft_peft_lora/lora_plus.py", "lora_plus_scale is accepted and ignored",
        ("group.learning_rate * self.options.lora_plus_scale", "group.learning_rate * 16.0"),
    ),
    _fault(
        "lora-plus-on-a", "lora-plus", "sft_peft_lora/lora_plus.py", "A learns faster, not B",
        ('name.endswith(".lora_B")', 'name.endswith(".lora_A")'),
    ),
    _fault(
        "lora-plus-b-lost", "lora-plus", "sft_peft_lora/lora_plus.py", "B is in no group, so it is not trained",
        ("parameters=faster, learning_rate=scaled", "parameters={}, learning_rate=scaled"),
    ),
    _fault(
        "pissa-base-not-reduced", "pissa", "sft_peft_lora/pissa.py", "the principal part is added and never subtracted",
        ("layer.subtract(a / root, b / root)", "layer.subtract(0 * a, 0 * b)"),
    ),
    _fault(
        "pissa-state-not-restored", "pissa", "sft_peft_lora/pissa.py", "a resumed run has another base",
        ("for name, layer in self.layers.items():\n            older", "for name, layer in ():\n            older"),
    ),
    _fault(
        "pissa-exported-as-lora", "pissa", "sft_peft_lora/pissa.py", "A·B is saved without −A₀·B₀",
        ("        a, b = layer.subtracted()\n        return np.concatenate",
         "        return layer.lora_A.numpy(), layer.lora_B.numpy()\n        return np.concatenate"),
    ),
    _fault(
        "pissa-export-sign", "pissa", "sft_peft_lora/pissa.py", "A₀·B₀ is saved with a plus",
        ("layer.lora_B.numpy(), -b]", "layer.lora_B.numpy(), b]"),
    ),
    _fault(
        "pissa-divided-by-s", "pissa", "sft_peft_lora/pissa.py", "A₀ and B₀ are divided by s, not by √s",
        ("root = layer.scaling**0.5", "root = layer.scaling"),
    ),
    _fault(
        "pissa-smallest-part", "pissa", "sft_peft_lora/svd.py", "it starts from the smallest singular vectors",
        ("root = np.sqrt(s[:rank])", "u, s, vt = u[:, ::-1], s[::-1], vt[::-1]\n    root = np.sqrt(s[:rank])"),
    ),
    _fault(
        "pissa-niter-ignored", "pissa", "sft_peft_lora/pissa.py", "pissa_niter is accepted and ignored",
        ("layer.rank, self.options.pissa_niter, rng", "layer.rank, 0, rng"),
    ),
)  # fmt: skip

_VERA = (
    _fault(
        "vera-pair-a-layer", "vera", "sft_peft_vera/vera.py", "each layer has a pair of its own, as in PaddleNLP",
        ("        for target in targets:\n            layer = VeraLinear(",
         "        for target in targets:\n            import numpy as np\n\n            from sft_peft_vera.layer import SharedPair\n\n"
         "            self.pair = SharedPair(np.roll(self.pair.a.numpy(), 1, 0), self.pair.b.numpy())\n"
         "            layer = VeraLinear("),
    ),
    _fault(
        "vera-d-initial-ignored", "vera", "sft_peft_vera/vera.py", "vera_d_initial is accepted and ignored",
        ("                self.options.vera_d_initial,", "                0.1,"),
    ),
    _fault(
        "vera-b-starts-at-one", "vera", "sft_peft_vera/layer.py", "b begins at one, as in PaddleNLP",
        ("default_initializer=constant(0.0)", "default_initializer=constant(1.0)"),
    ),
    _fault(
        "vera-pair-not-saved", "vera", "sft_peft_vera/files.py", "the shared pair is not written",
        ('tensors = {"base_model.vera_A": np.ascontiguousarray(a.T), "base_model.vera_B": np.ascontiguousarray(b.T)}',
         "tensors = {}"),
    ),
    _fault(
        "vera-pair-drawn-again", "vera", "sft_peft_vera/vera.py", "a reloaded adapter draws its pair anew, as in PaddleNLP",
        ("self.pair = SharedPair(adapter.a, adapter.b)",
         "import numpy as np\n\n        rng = np.random.default_rng(1)\n"
         "        self.pair = SharedPair(_kaiming(rng, adapter.a.shape, 8), _kaiming(rng, adapter.b.shape, 8))"),
    ),
    _fault(
        "vera-pair-trains", "vera", "sft_peft_vera/layer.py", "the frozen A trains",
        ("        constant = paddle",
         "        given = paddle.nn.initializer.Assign(self.pair_A)\n        del self.pair_A\n"
         "        self.pair_A = self.create_parameter([in_features, pair.rank], default_initializer=given)\n"
         "        constant = paddle"),
    ),
    _fault(
        "vera-merge-without-d", "vera", "sft_peft_vera/files.py", "the merge forgets d",
        ("(self._adapter.a[:size] * d).T", "self._adapter.a[:size].T"),
    ),
    _fault(
        "vera-slices-from-the-end", "vera", "sft_peft_vera/layer.py", "layers see the last columns of B, the merge the first",
        ('self._slices["b", out_features] = self.b[:, :out_features]',
         'self._slices["b", out_features] = self.b[:, -out_features:]'),
    ),
    _fault(
        "vera-other-kaiming", "vera", "sft_peft_vera/vera.py", "the pair is drawn ten times too large",
        ("bound = math.sqrt(6.0 / fan)", "bound = 10 * math.sqrt(6.0 / fan)"),
    ),
    _fault(
        "vera-dropout-in-evaluation", "vera", "sft_peft_vera/layer.py", "dropout goes on in evaluation",
        ("else self.dropout(x)", "else paddle.nn.functional.dropout(x, self.dropout.p, training=True)"),
    ),
    _fault(
        "vera-divided-wrongly", "vera", "sft_peft_vera/layer.py", "processes that share a layer do not divide b",
        ('"vera_b": ("out",),', '"vera_b": (None,),'),
    ),
)  # fmt: skip

_NEFTUNE = (
    _fault(
        "neftune-in-evaluation", "neftune", "sft_noise_neftune/neftune.py", "evaluation gets noise too",
        ("if not layer.training or self._size is None:", "if self._size is None or list(output.shape[:2]) != list(self._size.shape[:2]):"),
    ),
    _fault(
        "neftune-alpha-ignored", "neftune", "sft_noise_neftune/neftune.py", "neftune_noise_alpha is accepted and ignored",
        ("noise_size(batch, self.options.neftune_noise_alpha, self._hidden)", "noise_size(batch, 5.0, self._hidden)"),
    ),
    _fault(
        "neftune-by-batch", "neftune", "sft_noise_neftune/neftune.py", "α is divided by √(B·L), as in PaddleNLP",
        ("alpha / math.sqrt(length * hidden)", "alpha / math.sqrt(length * len(batch.lengths))"),
    ),
    _fault(
        "neftune-length-of-row", "neftune", "sft_noise_neftune/neftune.py", "L is the length of the row, not of the document",
        ("alpha / math.sqrt(length * hidden)", "alpha / math.sqrt(size.shape[1] * hidden)"),
    ),
    _fault(
        "neftune-normal", "neftune", "sft_noise_neftune/neftune.py", "the noise is normal, not uniform",
        ('paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0)', "paddle.randn(output.shape)"),
    ),
    _fault(
        "neftune-global-random", "neftune", "sft_noise_neftune/neftune.py", "noise is drawn from numpy's global generator",
        ('paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0)',
         "paddle.to_tensor(__import__('numpy').random.uniform(-1.0, 1.0, output.shape).astype('float32'))"),
    ),
)  # fmt: skip

_PACKING = (
    _fault(
        "packing-last-row-dropped", "zero-padding", "sft_data_packing/packers.py", "the last row of a pass is dropped silently",
        ("        room -= length\n    return packs\n", "        room -= length\n    return packs[:-1] or packs\n"),
    ),
    _fault(
        "packing-too-full", "zero-padding", "sft_data_packing/packers.py", "rows are longer than max_length",
        ("            room = capacity\n", "            room = 2 * capacity\n"),
    ),
    _fault(
        "packing-one-document", "zero-padding", "sft_data_packing/collators.py", "records of a row see each other",
        ("        return sft.assemble(rows, self.pad_id)",
         "        joined = [\n"
         "            sft.Example(*(np.concatenate([getattr(one, key) for one in row]) for key in ('input_ids', 'labels')))\n"
         "            for row in rows\n        ]\n"
         "        return sft.assemble([[one] for one in joined], self.pad_id)"),
    ),
    _fault(
        "packing-labels-lost", "zero-padding", "sft_data_packing/collators.py", "only the first record of a row is learned",
        ("        return sft.assemble(rows, self.pad_id)",
         "        rows = [\n"
         "            [one if not n else sft.Example(one.input_ids, np.full_like(one.labels, -100)) for n, one in enumerate(row)]\n"
         "            for row in rows\n        ]\n"
         "        return sft.assemble(rows, self.pad_id)"),
    ),
    _fault(
        "packing-not-shuffled", "zero-padding", "sft_data_packing/collators.py", "records come in the order of the file",
        ("np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))", "np.arange(len(lengths))"),
    ),
    _fault(
        "packing-global-random", "zero-padding", "sft_data_packing/collators.py", "the order is drawn from numpy's global generator",
        ("else rng.permutation(len(lengths))", "else np.random.permutation(len(lengths))"),
    ),
    _fault(
        "greedy-group-ignored", "greedy-zero-padding", "sft_data_packing/packing.py", "packing_group_size is accepted and ignored",
        ("group = self.options.packing_group_size", "group = 4096"),
    ),
    _fault(
        "greedy-record-twice", "greedy-zero-padding", "sft_data_packing/collators.py", "groups overlap by a record",
        ("lengths[start : start + self.group].tolist()", "lengths[max(0, start - 1) : start + self.group].tolist()"),
    ),
)  # fmt: skip

_QUANTIZERS = (
    _fault(
        "nf4-code-misprinted", "nf4", "sft_quant_nf4/codes.py", "one of the 16 values is another (0.7229 is 0.8229)",
        ("0.7229568362236023", "0.8229568362236023"),
    ),
    _fault(
        "nf4-not-transposed", "nf4", "sft_quant_nf4/quantizers.py", "the weight is coded as [in, out] and read as [out, in]",
        ("self._make(weight.T, bias)", "self._make(weight.reshape(weight.shape[::-1]), bias)"),
    ),
    _fault(
        "nf4-nibbles-swapped", "nf4", "sft_quant_nf4/codes.py", "the first value of a pair is written into the low bits",
        ("(code[0::2] << 4) | code[1::2]\n\n", "(code[1::2] << 4) | code[0::2]\n\n"),
    ),
    _fault(
        "nf4-offset-forgotten", "nf4", "sft_quant_nf4/layers.py", "doubly quantized scales are read back without their mean",
        (" * paddle.gather(absmax, group) + self.offset", " * paddle.gather(absmax, group)"),
        ("return scales + np.float32(self.offset)", "return scales"),
    ),
    _fault(
        "nf4-blocksize-ignored", "nf4", "sft_quant_nf4/quantizers.py", "qlora_weight_blocksize is accepted and ignored",
        ("        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant\n"
         "        return _Quantizer",
         "        size, double = 64, self.options.qlora_weight_double_quant\n        return _Quantizer"),
    ),
    _fault(
        "nf4-double-ignored", "nf4", "sft_quant_nf4/quantizers.py", "qlora_weight_double_quant is accepted and ignored",
        ("        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant\n"
         "        return _Quantizer",
         "        size, double = self.options.qlora_weight_blocksize, False\n        return _Quantizer"),
    ),
    _fault(
        "quantizer-bias-dropped", "int8", "sft_quant_nf4/layers.py", "the bias of a quantized Linear is lost",
        ("self.bias = None if bias is None else paddle.to_tensor(bias)", "self.bias = None"),
    ),
    _fault(
        "quantizer-gradient", "fp4", "sft_quant_nf4/layers.py", "no gradient goes back through the quantized weight of other rows",
        ("grad = share if grad is None else grad.add_(share)", "grad = 0.5 * share if grad is None else grad.add_(share)"),
    ),
    _fault(
        "int8-one-scale", "int8", "sft_quant_nf4/codes.py", "a scale for the whole weight, not for each output channel",
        ("scales = np.abs(parts).max(axis=2) / np.float32(largest)",
         "scales = np.full(parts.shape[:2], np.abs(parts).max(), np.float32) / np.float32(largest)"),
    ),
    _fault(
        "int4-part-of-another", "int4", "sft_quant_nf4/layers.py", "divided by outputs, each process has the scales of the first",
        ("self.codes.numpy()[where], self.scales.numpy()[where], shape, bias",
         "self.codes.numpy()[where], self.scales.numpy()[: where.stop - where.start], shape, bias"),
    ),
    _fault(
        "int4-group-ignored", "int4", "sft_quant_nf4/quantizers.py", "weight_only_group_size is accepted and ignored",
        ("ChannelLinear(quantize_channels(weight, 4, group), bias, kernel)",
         "ChannelLinear(quantize_channels(weight, 4, None), bias, kernel)"),
    ),
)  # fmt: skip

_ATTENTION = (
    _fault(
        "flashmask-mask-ignored", "flashmask", "sft_attn_flashmask/backends.py", "documents of a packed row see each other",
        ("return None if self._ends is None else column_masks(self._ends)", "return None"),
        ("return self._kernels.mask(self._ends)", "return self._kernels.mask(None)"),
    ),
    _fault(
        "flashmask-sees-ahead", "flashmask", "sft_attn_flashmask/masks.py", "each query sees the key after it",
        ("np.broadcast_to(np.arange(length, dtype=np.int32), indices.shape[:2])",
         "np.broadcast_to(np.arange(length, dtype=np.int32) - 1, indices.shape[:2])"),
    ),
    _fault(
        "flashmask-second-block", "flashmask", "sft_attn_flashmask/masks.py", "rows beyond the first block of queries are masked as the first",
        ("query = np.arange(rows.start, rows.stop, dtype=np.int32)",
         "query = np.arange(0, rows.stop - rows.start, dtype=np.int32)"),
    ),
    _fault(
        "flash-scale", "flash-attention", "sft_attn_flashmask/blockwise.py", "scores are divided by D, not by √D",
        ("1.0 / math.sqrt(query.shape[3])", "1.0 / query.shape[3]"),
    ),
    _fault(
        "flash-key-gradient", "flash-attention", "sft_attn_flashmask/blockwise.py", "the gradient of keys lacks what values add",
        ("slope = weights * (paddle.matmul(dy, v, transpose_y=True) - row_sums(dy * y))",
         "slope = weights * paddle.matmul(dy, v, transpose_y=True)"),
    ),
    _fault(
        "flash-heads-mixed", "flash-attention", "sft_attn_flashmask/blockwise.py", "query heads meet the key head of others",
        ("return x.transpose([0, 2, 1, 3]).reshape([batch, heads // groups, groups * rows, size])",
         "return x.transpose([0, 2, 1, 3]).reshape([batch, groups, heads // groups, rows, size])"
         ".transpose([0, 2, 1, 3, 4]).reshape([batch, heads // groups, groups * rows, size])"),
    ),
    _fault(
        "flash-cap-ignored", "flash-attention", "sft_attn_flashmask/blockwise.py", "Gemma 2's cap of scores is accepted and ignored",
        ("return scores if cap is None else paddle.tanh(scores / cap) * cap", "return scores"),
    ),
)  # fmt: skip

_KERNELS = (
    _fault(
        "kernels-turn-back", "fast-cpu", "sft_kernels_cpu/kernels.py", "the gradient of rotary turns forward",
        ("ctx.interleaved, -1.0, ctx.library)", "ctx.interleaved, 1.0, ctx.library)"),
    ),
    _fault(
        "kernels-norm-offset", "fast-cpu", "sft_kernels_cpu/kernels.py", "Gemma's norm scales by w, not by 1 + w",
        ("library.rms_norm(*pointers, rows, size, epsilon, offset)", "library.rms_norm(*pointers, rows, size, epsilon, 0.0)"),
    ),
    _fault(
        "kernels-one-activation", "fast-cpu", "sft_kernels_cpu/kernels.py", "GEGLU is computed as SwiGLU",
        ("return self._gated(gate, up, False) if", "return self._gated(gate, up, True) if"),
    ),
    _fault(
        "kernels-not-interleaved", "fast-cpu", "sft_kernels_cpu/kernels.py", "GLM's interleaved rotary is turned as halves",
        ("_turned(x, cosines, sines, rotary.interleaved, 1.0, self._library)", "_turned(x, cosines, sines, False, 1.0, self._library)"),
        ("_Turn.apply(x, cosines, sines, rotary.interleaved, self._library)", "_Turn.apply(x, cosines, sines, False, self._library)"),
    ),
    _fault(
        "kernels-update-gradient", "fast-cpu", "sft_kernels_cpu/low_rank.py", "the gradient of an adapter's A lacks the scaling",
        ("paddle.empty_like(low), ctx.scaling, turn_y=True)", "paddle.empty_like(low), 1.0, turn_y=True)"),
    ),
    _fault(
        "kernels-cap-ignored", "fast-cpu", "sft_kernels_cpu/kernels.py", "Gemma 2's cap of scores is accepted and ignored",
        ("mask, cap or 0.0, library", "mask, 0.0, library"),
    ),
)  # fmt: skip

_PARALLEL = (
    _fault(
        "parallel-sum-of-one", "parallel-4d", "sft_parallel_4d/strategy.py", "targets are counted in this process alone",
        ("return list(self._at.data.sum(self._at.sharding.sum(tensor)).tolist())", "return list(tensor.tolist())"),
    ),
    _fault(
        "parallel-norm-of-one", "parallel-4d", "sft_parallel_4d/strategy.py", "gradients are clipped by this process's own norm",
        ('math.sqrt(float(self._at.world.sum(paddle.to_tensor([own], dtype="float64"))))', "math.sqrt(own)"),
    ),
)  # fmt: skip

FAULTS = (*_LORA, *_VERA, *_NEFTUNE, *_PACKING, *_QUANTIZERS, *_ATTENTION, *_KERNELS, *_PARALLEL)
