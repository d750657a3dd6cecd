"""Attention, kernels, several processes."""

from __future__ import annotations

from seeded_faults.fault import fault

ATTENTION = (
    fault(
        "flashmask-mask-ignored",
        "flashmask",
        "sft_attn_flashmask/backends.py",
        "documents of a packed row see each other",
        ("return None if self._ends is None else column_masks(self._ends)", "return None"),
        ("return self._kernels.mask(self._ends)", "return self._kernels.mask(None)"),
    ),
    fault(
        "flashmask-sees-ahead",
        "flashmask",
        "sft_attn_flashmask/masks.py",
        "each query sees the key after it",
        (
            "np.broadcast_to(np.arange(length, dtype=np.int32), indices.shape[:2])",
            "np.broadcast_to(np.arange(length, dtype=np.int32) - 1, indices.shape[:2])",
        ),
    ),
    fault(
        "flashmask-second-block",
        "flashmask",
        "sft_attn_flashmask/masks.py",
        "rows beyond the first block of queries are masked as the first",
        (
            "query = np.arange(rows.start, rows.stop, dtype=np.int32)",
            "query = np.arange(0, rows.stop - rows.start, dtype=np.int32)",
        ),
    ),
    fault(
        "flash-scale",
        "flash-attention",
        "sft_attn_flashmask/blockwise.py",
        "scores are divided by D, not by √D",
        ("1.0 / math.sqrt(query.shape[3])", "1.0 / query.shape[3]"),
    ),
    fault(
        "flash-key-gradient",
        "flash-attention",
        "sft_attn_flashmask/blockwise.py",
        "the gradient of keys lacks what values add",
        (
            "slope = weights * (paddle.matmul(dy, v, transpose_y=True) - row_sums(dy * y))",
            "slope = weights * paddle.matmul(dy, v, transpose_y=True)",
        ),
    ),
    fault(
        "flash-heads-mixed",
        "flash-attention",
        "sft_attn_flashmask/blockwise.py",
        "query heads meet the key head of others",
        (
            "return x.transpose([0, 2, 1, 3]).reshape([batch, heads // groups, groups * rows, size])",
            "return x.transpose([0, 2, 1, 3]).reshape([batch, groups, heads // groups, rows, size])"
            ".transpose([0, 2, 1, 3, 4]).reshape([batch, heads // groups, groups * rows, size])",
        ),
    ),
    fault(
        "flash-cap-ignored",
        "flash-attention",
        "sft_attn_flashmask/blockwise.py",
        "Gemma 2's cap of scores is accepted and ignored",
        ("return scores if cap is None else paddle.tanh(scores / cap) * cap", "return scores"),
    ),
)

KERNELS = (
    fault(
        "kernels-turn-back",
        "fast-cpu",
        "sft_kernels_cpu/kernels.py",
        "the gradient of rotary turns forward",
        ("ctx.interleaved, -1.0, ctx.library)", "ctx.interleaved, 1.0, ctx.library)"),
    ),
    fault(
        "kernels-norm-offset",
        "fast-cpu",
        "sft_kernels_cpu/kernels.py",
        "Gemma's norm scales by w, not by 1 + w",
        (
            "library.rms_norm(*pointers, rows, size, epsilon, offset)",
            "library.rms_norm(*pointers, rows, size, epsilon, 0.0)",
        ),
    ),
    fault(
        "kernels-one-activation",
        "fast-cpu",
        "sft_kernels_cpu/kernels.py",
        "GEGLU is computed as SwiGLU",
        ("return self._gated(gate, up, False) if", "return self._gated(gate, up, True) if"),
    ),
    fault(
        "kernels-not-interleaved",
        "fast-cpu",
        "sft_kernels_cpu/kernels.py",
        "GLM's interleaved rotary is turned as halves",
        (
            "_turned(x, cosines, sines, rotary.interleaved, 1.0, self._library)",
            "_turned(x, cosines, sines, False, 1.0, self._library)",
        ),
        (
            "_Turn.apply(x, cosines, sines, rotary.interleaved, self._library)",
            "_Turn.apply(x, cosines, sines, False, self._library)",
        ),
    ),
    fault(
        "kernels-update-gradient",
        "fast-cpu",
        "sft_kernels_cpu/low_rank.py",
        "the gradient of an adapter's A lacks the scaling",
        ("empty(low.shape), ctx.scaling, turn_y=True)", "empty(low.shape), 1.0, turn_y=True)"),
    ),
    fault(
        "kernels-cap-ignored",
        "fast-cpu",
        "sft_kernels_cpu/kernels.py",
        "Gemma 2's cap of scores is accepted and ignored",
        ("mask, cap or 0.0, library", "mask, 0.0, library"),
    ),
)

PARALLEL = (
    fault(
        "parallel-sum-of-one",
        "parallel-4d",
        "sft_parallel_4d/strategy.py",
        "targets are counted in this process alone",
        ('return self.phases.exchange("sums over data ranks", own, "sum")', "return list(own)"),
    ),
    fault(
        "parallel-norm-of-one",
        "parallel-4d",
        "sft_parallel_4d/strategy.py",
        "gradients are clipped by this process's own norm",
        ("return [*found[:-1], math.sqrt(found[-1])]", "return [*found[:-1], math.sqrt(float(squares))]"),
    ),
)
