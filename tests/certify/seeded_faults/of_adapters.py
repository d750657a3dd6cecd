"""VeRA and NEFTune."""

from __future__ import annotations

from seeded_faults.fault import fault

VERA = (
    fault(
        "vera-pair-a-layer",
        "vera",
        "sft_peft_vera/vera.py",
        "each layer has a pair of its own, as in PaddleNLP",
        (
            "        for target in targets:\n            layer = VeraLinear(",
            "        for target in targets:\n            import numpy as np\n\n"
            "            from sft_peft_vera.layer import SharedPair\n\n"
            "            self.pair = SharedPair(np.roll(self.pair.a.numpy(), 1, 0), self.pair.b.numpy())\n"
            "            layer = VeraLinear(",
        ),
    ),
    fault(
        "vera-d-initial-ignored",
        "vera",
        "sft_peft_vera/vera.py",
        "vera_d_initial is accepted and ignored",
        ("                self.options.vera_d_initial,", "                0.1,"),
    ),
    fault(
        "vera-b-starts-at-one",
        "vera",
        "sft_peft_vera/layer.py",
        "b begins at one, as in PaddleNLP",
        ("default_initializer=constant(0.0)", "default_initializer=constant(1.0)"),
    ),
    fault(
        "vera-pair-not-saved",
        "vera",
        "sft_peft_vera/files.py",
        "the shared pair is not written",
        (
            'tensors = {"base_model.vera_A": np.ascontiguousarray(a.T), '
            '"base_model.vera_B": np.ascontiguousarray(b.T)}',
            "tensors = {}",
        ),
    ),
    fault(
        "vera-pair-drawn-again",
        "vera",
        "sft_peft_vera/vera.py",
        "a reloaded adapter draws its pair anew, as in PaddleNLP",
        (
            "self.pair = SharedPair(adapter.a, adapter.b)",
            "import numpy as np\n\n        rng = np.random.default_rng(1)\n"
            "        self.pair = SharedPair(_kaiming(rng, adapter.a.shape, 8), _kaiming(rng, adapter.b.shape, 8))",
        ),
    ),
    fault(
        "vera-pair-trains",
        "vera",
        "sft_peft_vera/layer.py",
        "the frozen A trains",
        (
            "        constant = paddle",
            "        given = paddle.nn.initializer.Assign(self.pair_A)\n        del self.pair_A\n"
            "        self.pair_A = self.create_parameter([in_features, pair.rank], default_initializer=given)\n"
            "        constant = paddle",
        ),
    ),
    fault(
        "vera-merge-without-d",
        "vera",
        "sft_peft_vera/files.py",
        "the merge forgets d",
        ("(self._adapter.a[:size] * d).T", "self._adapter.a[:size].T"),
    ),
    fault(
        "vera-slices-from-the-end",
        "vera",
        "sft_peft_vera/layer.py",
        "layers see the last columns of B, the merge the first",
        (
            'self._slices["b", out_features] = self.b[:, :out_features]',
            'self._slices["b", out_features] = self.b[:, -out_features:]',
        ),
    ),
    fault(
        "vera-other-kaiming",
        "vera",
        "sft_peft_vera/vera.py",
        "the pair is drawn ten times too large",
        ("bound = math.sqrt(6.0 / fan)", "bound = 10 * math.sqrt(6.0 / fan)"),
    ),
    fault(
        "vera-dropout-in-evaluation",
        "vera",
        "sft_peft_vera/layer.py",
        "dropout goes on in evaluation",
        ("else self.dropout(x)", "else paddle.nn.functional.dropout(x, self.dropout.p, training=True)"),
    ),
    fault(
        "vera-divided-wrongly",
        "vera",
        "sft_peft_vera/layer.py",
        "processes that share a layer do not divide b",
        ('"vera_b": ("out",),', '"vera_b": (None,),'),
    ),
)

NEFTUNE = (
    fault(
        "neftune-in-evaluation",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "evaluation gets noise too",
        (
            "if not layer.training or self._size is None:",
            "if self._size is None or list(output.shape[:2]) != list(self._size.shape[:2]):",
        ),
    ),
    fault(
        "neftune-alpha-ignored",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "neftune_noise_alpha is accepted and ignored",
        ("noise_size(batch, self.options.neftune_noise_alpha, self._hidden)", "noise_size(batch, 5.0, self._hidden)"),
    ),
    fault(
        "neftune-by-batch",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "α is divided by √(B·L), as in PaddleNLP",
        ("alpha / math.sqrt(length * hidden)", "alpha / math.sqrt(length * len(batch.lengths))"),
    ),
    fault(
        "neftune-length-of-row",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "L is the length of the row, not of the document",
        ("alpha / math.sqrt(length * hidden)", "alpha / math.sqrt(size.shape[1] * hidden)"),
    ),
    fault(
        "neftune-normal",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "the noise is normal, not uniform",
        ('paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0)', "paddle.randn(output.shape)"),
    ),
    fault(
        "neftune-global-random",
        "neftune",
        "sft_noise_neftune/neftune.py",
        "noise is drawn from numpy's global generator",
        (
            'paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0)',
            "paddle.to_tensor(__import__('numpy').random.uniform(-1.0, 1.0, output.shape).astype('float32'))",
        ),
    ),
)
