"""Packing and quantizers."""

from __future__ import annotations

from seeded_faults.fault import fault

PACKING = (
    fault(
        "packing-last-row-dropped",
        "zero-padding",
        "sft_data_packing/packers.py",
        "the last row of a pass is dropped silently",
        ("        room -= length\n    return packs\n", "        room -= length\n    return packs[:-1] or packs\n"),
    ),
    fault(
        "packing-too-full",
        "zero-padding",
        "sft_data_packing/packers.py",
        "rows are longer than max_length",
        ("            room = capacity\n", "            room = 2 * capacity\n"),
    ),
    fault(
        "packing-one-document",
        "zero-padding",
        "sft_data_packing/collators.py",
        "records of a row see each other",
        (
            "        return sft.assemble(rows, self.pad_id)",
            "        joined = [\n"
            "            sft.Example(*(np.concatenate([getattr(one, key) for one in row]) "
            "for key in ('input_ids', 'labels')))\n"
            "            for row in rows\n        ]\n"
            "        return sft.assemble([[one] for one in joined], self.pad_id)",
        ),
    ),
    fault(
        "packing-labels-lost",
        "zero-padding",
        "sft_data_packing/collators.py",
        "only the first record of a row is learned",
        (
            "        return sft.assemble(rows, self.pad_id)",
            "        rows = [\n"
            "            [sft.Example(one.input_ids, np.full_like(one.labels, -100)) if n else one\n"
            "             for n, one in enumerate(row)]\n"
            "            for row in rows\n        ]\n"
            "        return sft.assemble(rows, self.pad_id)",
        ),
    ),
    fault(
        "packing-not-shuffled",
        "zero-padding",
        "sft_data_packing/collators.py",
        "records come in the order of the file",
        ("np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))", "np.arange(len(lengths))"),
    ),
    fault(
        "packing-global-random",
        "zero-padding",
        "sft_data_packing/collators.py",
        "the order is drawn from numpy's global generator",
        ("else rng.permutation(len(lengths))", "else np.random.permutation(len(lengths))"),
    ),
    fault(
        "greedy-group-ignored",
        "greedy-zero-padding",
        "sft_data_packing/packing.py",
        "packing_group_size is accepted and ignored",
        ("group = self.options.packing_group_size", "group = 4096"),
    ),
    fault(
        "greedy-record-twice",
        "greedy-zero-padding",
        "sft_data_packing/collators.py",
        "groups overlap by a record",
        ("lengths[start : start + self.group].tolist()", "lengths[max(0, start - 1) : start + self.group].tolist()"),
    ),
)

QUANTIZERS = (
    fault(
        "nf4-code-misprinted",
        "nf4",
        "sft_quant_nf4/codes.py",
        "one of the 16 values is another (0.7229 is 0.8229)",
        ("0.7229568362236023", "0.8229568362236023"),
    ),
    fault(
        "nf4-not-transposed",
        "nf4",
        "sft_quant_nf4/quantizers.py",
        "the weight is coded as [in, out] and read as [out, in]",
        ("self._make(weight.T, bias)", "self._make(weight.reshape(weight.shape[::-1]), bias)"),
    ),
    fault(
        "nf4-nibbles-swapped",
        "nf4",
        "sft_quant_nf4/codes.py",
        "the first value of a pair is written into the low bits",
        ("(code[0::2] << 4) | code[1::2]\n\n", "(code[1::2] << 4) | code[0::2]\n\n"),
    ),
    fault(
        "nf4-offset-forgotten",
        "nf4",
        "sft_quant_nf4/layers.py",
        "doubly quantized scales are read back without their mean",
        (" * paddle.gather(absmax, group) + self.offset", " * paddle.gather(absmax, group)"),
        ("return scales + np.float32(self.offset)", "return scales"),
    ),
    fault(
        "nf4-blocksize-ignored",
        "nf4",
        "sft_quant_nf4/quantizers.py",
        "qlora_weight_blocksize is accepted and ignored",
        (
            "        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant\n"
            "        return _Quantizer",
            "        size, double = 64, self.options.qlora_weight_double_quant\n        return _Quantizer",
        ),
    ),
    fault(
        "nf4-double-ignored",
        "nf4",
        "sft_quant_nf4/quantizers.py",
        "qlora_weight_double_quant is accepted and ignored",
        (
            "        size, double = self.options.qlora_weight_blocksize, self.options.qlora_weight_double_quant\n"
            "        return _Quantizer",
            "        size, double = self.options.qlora_weight_blocksize, False\n        return _Quantizer",
        ),
    ),
    fault(
        "quantizer-bias-dropped",
        "int8",
        "sft_quant_nf4/layers.py",
        "the bias of a quantized Linear is lost",
        ("self.bias = None if bias is None else paddle.to_tensor(bias)", "self.bias = None"),
    ),
    fault(
        "quantizer-gradient",
        "fp4",
        "sft_quant_nf4/layers.py",
        "no gradient goes back through the quantized weight of other rows",
        (
            "grad = share if grad is None else grad.add_(share)",
            "grad = 0.5 * share if grad is None else grad.add_(share)",
        ),
    ),
    fault(
        "int8-one-scale",
        "int8",
        "sft_quant_nf4/codes.py",
        "a scale for the whole weight, not for each output channel",
        (
            "scales = np.abs(parts).max(axis=2) / np.float32(largest)",
            "scales = np.full(parts.shape[:2], np.abs(parts).max(), np.float32) / np.float32(largest)",
        ),
    ),
    fault(
        "int4-part-of-another",
        "int4",
        "sft_quant_nf4/layers.py",
        "divided by outputs, each process has the scales of the first",
        (
            "self.codes.numpy()[where], self.scales.numpy()[where], shape, bias",
            "self.codes.numpy()[where], self.scales.numpy()[: where.stop - where.start], shape, bias",
        ),
    ),
    fault(
        "int4-group-ignored",
        "int4",
        "sft_quant_nf4/quantizers.py",
        "weight_only_group_size is accepted and ignored",
        (
            "ChannelLinear(quantize_channels(weight, 4, group), bias, kernel)",
            "ChannelLinear(quantize_channels(weight, 4, None), bias, kernel)",
        ),
    ),
)
