"""Which plans are legal, and what they send."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import sft
from sft_parallel_4d import communication, memory
from sft_parallel_4d.communication import busiest, rank
from sft_parallel_4d.machines import MACHINES
from sft_parallel_4d.memory import Calculator
from sft_parallel_4d.model_size import Precision
from sft_parallel_4d.outline import Outline
from sft_parallel_4d.plans import Plan, Wanted, legal_plans
from sft_parallel_4d.ranking import ranked

Outlines = Callable[..., Outline]
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def test_plans_are_all_that_keep_the_rules(outline_of: Outlines) -> None:
    """4 layers, 8 heads: every combination is tried, and the rules are written out once more."""
    outline, expected = outline_of(), set()
    numbers = (1, 2, 4, 8)
    for data in numbers:
        for sharding in numbers:
            for tensor in numbers:
                for pipeline, context in itertools.product((1, 2, 4), (1, 2, 4, 8)):
                    # 8 query heads.
                    if data * sharding * tensor * pipeline * context != 8 or tensor * context > 8:
                        continue
                    for stage in (0, 1, 2, 3):
                        legal = sharding * context > 1 if stage else sharding == 1
                        legal = legal and not (stage > 1 and pipeline > 1)
                        for sequence in (False, True):
                            if legal and (tensor > 1 or not sequence):
                                expected.add((data, sharding, stage, tensor, pipeline, sequence, context))
    found = legal_plans(outline, 8, 16, 2)
    assert {(p.data, p.sharding, p.stage, p.tensor, p.pipeline, p.sequence, p.context) for p in found} == expected
    assert len(found) == 2 * len(expected)
    assert all(p.devices == 8 and p.data_world * p.accumulation * 2 == 16 for p in found)


@pytest.mark.parametrize(
    ("family", "changes", "wanted", "reason"),
    [
        (
            "llama",
            {"num_attention_heads": 2, "num_key_value_heads": 2},
            {"tensor": 4},
            "does not divide attention heads",
        ),
        (
            "llama",
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96},
            {"tensor": 4},
            r"neither divides key/value heads \(6\) nor is a multiple",
        ),
        ("llama", {}, {"pipeline": 8}, "8 pipeline stages are more than 4 layers"),
        ("llama", {}, {"pipeline": 4, "virtual": 2}, "4 pipeline stages of 2 parts each are more than 4 layers"),
        ("llama", {}, {"pipeline": 1, "virtual": 2}, r"2 parts a pipeline stage \(virtual_pp_degree\) need more than"),
        ("llama", {}, {"tensor": 3}, "do not divide 8 devices"),
        ("llama", {}, {"pipeline": 2, "stage": 3}, "stage3 does not go with pipeline parallelism; stage1 does"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, {"context": 4}, r"attention heads \(2\)"),
        ("llama", {}, {"context": 4, "tensor": 4}, "do not divide 8 devices"),
        ("llama", {}, {"context": 1, "sharding": 1, "stage": 1}, "stage1 has no ranks that could share pieces"),
        ("mistral", {}, {"tensor": 1, "sequence": True}, "sequence_parallel needs tensor parallelism"),
        ("llama", {}, {"experts": 2}, r"degree 2 has nothing to share out.*; give another degree, or leave it out"),
        ("mixtral", MIXTURE, {"experts": 4, "context": 4, "tensor": 2, "stage": 1}, r"hold the same pieces \(1\)"),
        ("mixtral", MIXTURE, {"experts": 4, "context": 2, "tensor": 4}, r"hold the same pieces \(2\)"),
        ("mixtral", MIXTURE, {"experts": 4, "tensor": 4}, r"does not divide the ranks that hold the same pieces \(2\)"),
    ],
)
def test_what_is_impossible_is_refused(
    outline_of: Outlines, family: str, changes: dict[str, Any], wanted: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sft.UsageError, match=reason):
        legal_plans(outline_of(family, **changes), 8, 16, 2, Wanted(**wanted))


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize(("family", "rows"), [("gemma3_text", 32), ("llama", 8)])
def test_the_fullest_and_the_busiest_rank_are_those_of_all(
    outline_of: Outlines, family: str, rows: int, virtual: int
) -> None:
    """Only one rank of stages that are alike is reckoned, and so many layers are not divided evenly."""
    outline = outline_of(family, num_hidden_layers=18, sliding_window=16)
    calculator = Calculator(outline, Precision(), 1, 64)
    for plan in legal_plans(outline, 8, rows, 1, Wanted(virtual=virtual, context=1)):
        stages = list(enumerate(calculator.stages(plan)))
        assert calculator.fullest(plan).peak == max(calculator.rank(plan, *one).peak for one in stages), plan
        assert busiest(calculator, plan).total == max(rank(calculator, plan, *one).total for one in stages), plan


def test_offload_is_for_those_who_ask(outline_of: Outlines) -> None:
    assert not any(plan.offload for plan in legal_plans(outline_of(), 4, 16, 2))
    found = legal_plans(outline_of(), 4, 16, 2, Wanted(stage=2, offload=True, tensor=1, pipeline=1, context=1))
    assert {(plan.data, plan.sharding, plan.stage, plan.offload) for plan in found} == {
        (4, 1, 2, True),
        (2, 2, 2, True),
        (1, 4, 2, True),
    }


def test_volumes_by_hand(outline_of: Outlines) -> None:
    """What real ranks send is counted in test_measured.py; here are devices that no test has."""
    outline = outline_of()
    calculator = Calculator(outline, Precision(), 2, 64)
    values, hidden = calculator.stages(Plan())[0].size.values, 2 * 64 * 64 * 4
    assert busiest(calculator, Plan()).total == 0
    # A ring's all-reduce among 4: each sends 2 · 3/4 of the gradients.
    assert busiest(calculator, Plan(data=4, accumulation=3)).data == 2 * 3 * values * 4 // 4
    # Slices of the nine vectors of 64 have 256 bytes, too.
    filled = 9 * 64 * 4
    cut = values - 9 * 64 + filled
    assert busiest(calculator, Plan(sharding=4, stage=1)).sharding == 2 * 3 * cut * 4 // 4
    # Stage 3: blocks' matrices twice, embedding and lm_head once, gradients once, each micro-batch; vectors at the end.
    ends, vectors = 2 * 512 * 64, filled
    blocks = cut - ends - vectors
    expected = 2 * 3 * (2 * blocks + ends + cut) + 3 * vectors
    assert busiest(calculator, Plan(sharding=4, stage=3, accumulation=2)).sharding == expected * 4 // 4
    # All-reduces of [tokens, hidden] among 2 (each sends it once): attention and MLP forward and backward in 4 blocks,
    # the embedding's, the loss's gradient, and three float32 a target.
    few = 3 * 4 * 2 * 64
    assert busiest(calculator, Plan(tensor=2, accumulation=3)).tensor == 3 * ((4 * 4 + 2) * hidden + few)
    assert busiest(calculator, Plan(tensor=2, recompute=True)).tensor == (4 * 6 + 2) * hidden + few
    # Of 4 that share rows each has a quarter of 128 tokens: 8 query heads of 8, 4 key and 4 value heads, and results;
    # three of four parts leave, in each of 4 blocks, forward and backward. Gradients are those of data ranks.
    plan = Plan(context=4, accumulation=3)
    assert busiest(calculator, plan).context == 3 * 4 * 2 * 3 * (32 * (64 + 32 + 32 + 64) * 4) // 4
    assert busiest(calculator, plan).data == busiest(calculator, Plan(data=4)).data
    # With 8 each key head is there twice.
    assert busiest(calculator, Plan(context=8)).context == 4 * 2 * 7 * (16 * (64 + 64 + 64 + 64) * 4) // 8
    # A middle stage sends one tensor each way.
    assert busiest(calculator, Plan(pipeline=4, accumulation=3)).pipeline == 3 * 2 * hidden


def test_data_ranks_share_out_experts(outline_of: Outlines) -> None:
    outline = outline_of("mixtral", **MIXTURE)
    found = {
        (plan.data, plan.sharding, plan.experts) for plan in legal_plans(outline, 8, 16, 2, Wanted(1, 1, context=1))
    }
    pairs = [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert found == {(data, shards, n) for data, shards in pairs for n in (1, 2, 4) if data % n == 0}
    only = legal_plans(outline, 8, 16, 2, Wanted(experts=4))
    assert {plan.experts for plan in only} == {4}
    # Those that share rows share out experts where they share no pieces.
    shared = legal_plans(outline, 8, 16, 2, Wanted(1, 1, sharding=1, context=4, sequence=False, recompute=False))
    assert {(plan.stage, plan.experts) for plan in shared} == {
        *((0, n) for n in (1, 2, 4)),
        *((stage, n) for stage in (1, 2, 3) for n in (1, 2)),
    }
    assert {plan.experts for plan in legal_plans(outline_of(), 8, 16, 2)} == {1}


def test_plans_of_a_mixture_are_told_apart(outline_of: Outlines) -> None:
    found = legal_plans(outline_of("mixtral", **MIXTURE), 4, 16, 2)
    assert len({str(plan) for plan in found}) == len(found)
    assert str(Plan(data=4, experts=2)) == "data 4 x experts on 2, 1 micro-batches a step"


def test_what_ranks_with_experts_hold_and_send(outline_of: Outlines) -> None:
    outline = outline_of("mixtral", **MIXTURE)
    calculator = Calculator(outline, Precision(), 2, 64)
    plan, alone = Plan(data=4, experts=2, accumulation=3), calculator.stages(Plan())[0].size
    size, expert = calculator.stages(plan)[0].size, 3 * 64 * 160
    assert size.values == alone.values - 4 * 2 * expert
    own = 4 * 2 * expert * 4  # bytes of the gradients of two experts in each of four blocks
    sent = busiest(calculator, plan)
    # Among 4 each sends 2 · 3/4 of the gradients, among the two that have the same experts 2 · 1/2 of theirs.
    assert sent.data == 2 * 3 * (size.gradients - own) // 4 + own
    # Half of the two choices of each token leave the rank: there, back, and the gradients of both.
    assert sent.experts == 3 * 4 * 4 * (2 * 128 * 64 * 4) // 2
    assert busiest(calculator, Plan(data=4, experts=2, recompute=True)).experts == 6 * 4 * (2 * 128 * 64 * 4) // 2
    # Two that share rows have half of the tokens, and the same gradients.
    shared = busiest(calculator, Plan(data=2, context=2, experts=2, accumulation=3))
    assert (shared.data, shared.experts) == (sent.data, sent.experts // 2)


# --- work ---


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what takes time is called while plans are ranked; and how many gradients are followed."""
    found = Counter[str]()

    def count(module: Any, name: str) -> None:
        own = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            found[name] += 1
            if name == "course":
                found["gradients"] += sum(len(one.gradients) + len(one.experts) for one in arguments[0])
            return own(*arguments)

        monkeypatch.setattr(module, name, counted)

    for name in ("course", "whole", "departures", "blocks_of", "stages"):
        count(memory, name)
    for name in ("block_kept", "backward_extra", "logits"):
        count(memory.activations, name)
    count(communication, "rank")
    return found


def ranked_on_16384(outline: Outline, wanted: Wanted) -> int:
    """How many plans there are."""
    plans = legal_plans(outline, 16_384, 16_384, 1, wanted)
    calculator = Calculator(outline, Precision(16, 16), 1, 4096, device_memory=80 << 30)
    assert len(ranked(calculator, plans, MACHINES["8xA100-80G"])) == len(plans)
    return len(plans)


def test_thousands_of_plans_share_what_is_worked_out(outline_of: Outlines, work: Counter[str]) -> None:
    """Of Llama-3-70B on 16,384 devices; work, as a clock would also count what else a machine does."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    outline = outline_of(**sizes, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=4096)
    plans = ranked_on_16384(outline, Wanted(most_context=4))
    assert 5000 < plans < 6000
    # A stage of each kind: the first one, one or two lengths between, the last one. Sends are asked for twice.
    assert work["rank"] <= 2 * 4 * plans
    # A block with each tensor and context degree, with sequence parallelism and without; all blocks are alike.
    degrees = 7 * 3 * 2
    assert max(work["block_kept"], work["backward_extra"]) <= degrees
    # Backward of each kind of stage with each tensor and pipeline degree; where there are pieces, for their numbers.
    kinds = 7 * 7 * 4 * 2
    assert work["course"] <= kinds
    assert work["gradients"] <= 50_000  # 9 a block
    assert max(work["departures"], work["whole"]) <= 15 * kinds
    assert max(work["blocks_of"], work["stages"]) <= 7 * 15 * 7


def test_experts_are_followed_once_for_all_numbers_of_pieces(outline_of: Outlines, work: Counter[str]) -> None:
    mixture = {"num_local_experts": 32, "num_experts_per_tok": 2, "num_hidden_layers": 16}
    plans = ranked_on_16384(outline_of("mixtral", **mixture), Wanted(tensor=1, pipeline=1, context=1))
    assert plans > 400
    # For each degree by which 32 experts are shared out, with buckets and with units of a layer.
    assert work["course"] <= 6 * 2
    assert work["gradients"] <= 2 * 16 * (6 * 10 + 2 * 3 * 32)
