"""Each code block of README.md and docs/*.md is run by a test, or says here why it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from chinese_pages import sections

ROOT = Path(__file__).resolve().parent.parent
HERE = "tests/test_documents.py"
TYPED = "tests/test_shown_commands.py::test_what_a_page_shows_is_typed"
KIT = "tests/test_kit_pages.py"
MORE = "tests/test_shown_code.py"
RECIPES = "tests/test_recipes.py"

Blocks = list[tuple[str, str]]
SHOWN: dict[str, str | Blocks] = {
    "README.md": [
        ("make demo", "not run: it makes .venv; tests/test_fresh_install.py installs, core/tests/test_demo.py runs it"),
        ("sft run --plugin lora \\", TYPED),
        ("import sft", f"{HERE}::test_readme_python_runs_as_shown"),
        ("export PIP_EXTRA_INDEX_URL=...", "not run: it needs a GPU"),
    ],
    "docs/adapters.md": [
        ('[project.entry-points."sft.requests"]', f"{MORE}::test_the_guide_shows_the_examples"),
        ("import sft", f"{RECIPES}::test_half_of_an_adapter_is_folded_in_and_exported"),
        ("import numpy as np", f"{RECIPES}::test_olora_begins_at_the_decomposition_and_keeps_what_an_adapter_must"),
        ("import sft", f"{RECIPES}::test_the_gain_trains_and_keeps_what_an_adapter_must"),
    ],
    "docs/answers.md": "tests/test_answering.py::test_the_guide_shows_what_works",
    "docs/api-policy.md": [("api_version = ", f"{MORE}::test_the_range_of_the_page_has_this_api")],
    "docs/architecture.md": "tests/test_import_graph.py::test_the_picture_in_the_documentation_is_the_graph",
    "docs/board.md": "not run: it serves until Ctrl-C; the tests of sft-ui-board start it",
    "docs/certify.md": [
        ("sft certify my-plugin", "not run: minutes; tests/certify/test_certify.py types it with a check of its own"),
        ("certify = sft.Trial(", f"{MORE}::test_a_plugin_may_need_all_that_the_page_shows"),
        ("from sft.testing import check_plugin", f"{MORE}::test_a_plugin_is_certified_as_the_page_shows"),
        ('[project.entry-points."sft.certify"]', f"{MORE}::test_the_formula_of_the_page_is_a_check"),
        ("import numpy as np", f"{MORE}::test_the_formula_of_the_page_is_a_check"),
        ("make certify-faults", "not run: an hour"),
    ],
    "docs/control.md": [
        ("touch out/SAVE", f"{MORE}::test_the_files_of_the_page_are_obeyed"),
        ("import time", f"{HERE}::test_the_clock_of_the_page_ends_a_run"),
        ("import sft", f"{HERE}::test_the_padding_of_the_page_is_measured_and_figures_of_steps_are_read"),
    ],
    "docs/data.md": [
        ("sft run … --dataset_name_or_path", TYPED),
        ("dataset_name_or_path:", TYPED),
        ("sft data settings.json", TYPED),
        ('{"src": "What is 12', f"{HERE}::test_the_data_guide_shows_each_format"),
        ('{"messages": [{"role": "system"', f"{HERE}::test_the_data_guide_shows_each_format"),
        ('{"tools": [', f"{MORE}::test_the_tools_of_the_page_are_read"),
        ('{"conversations": [', f"{HERE}::test_the_data_guide_shows_each_format"),
        ("instruction,input,output", f"{HERE}::test_the_data_guide_shows_each_format"),
        ('{"text": ', f"{HERE}::test_the_data_guide_shows_each_format"),
        ('{"conversation": [', f"{HERE}::test_the_data_guide_shows_what_is_learned"),
        ("sft run --plugin lora", TYPED),
        ("Q: a", f"{HERE}::test_the_data_guide_shows_what_is_learned"),
        ('{"messages": [{"role": "user", "content": "12', f"{MORE}::test_the_weights_of_the_page_are_read"),
        ("sft run … --on_bad_record skip", TYPED),
    ],
    "docs/exit-codes.md": [("sft: Unknown setting", f"{MORE}::test_the_sentences_of_the_page_are_said")],
    "docs/export.md": [
        ("sft export", TYPED),
        ("from pathlib import Path", f"{HERE}::test_the_archive_of_the_page_holds_the_model"),
    ],
    "docs/first-plugin.md": f"{KIT}::test_the_first_plugin_is_made_as_the_page_says",
    "docs/influence.md": [
        ("sft why out --prompt", TYPED),
        ("prompt: shop in Bergen", "not run: what one run said; test_why.py of sft-influence holds the form"),
    ],
    "docs/kit.md": [
        ("sft run lora.json --plugin ./my_plugin.py", TYPED),
        ("sft plugins new", "tests/test_new_plugin.py::test_it_installs_validates_and_passes_its_own_tests"),
        ("trace: sft_collator", "not run: the times of one run; core/tests/test_plugin_trace.py holds the form"),
    ],
    "docs/objectives.md": [
        ("from dataclasses import dataclass", f"{HERE}::test_the_loss_of_the_guide_leaves_out_what_is_known"),
        ("import sft", f"{KIT}::test_rows_count_alike"),
    ],
    "docs/optimizers.md": f"{HERE}::test_the_optimizer_of_its_page_steps_as_it_says",
    "docs/parallel.md": [
        ("pip install ./plugins/parallel_4d", "not run: four processes; test_launch.py of parallel-4d starts two"),
        (
            "sft run settings.json --nproc 8",
            "not run: eight processes; the tests of parallel-4d share rows among two and four",
        ),
        ("sft run settings.json --nproc 4", "not run: four processes; test_launch.py of parallel-4d starts two"),
        (
            "sft: rank 3: …",
            "plugins/parallel_4d/tests/test_launch.py::test_a_refusal_in_one_rank_ends_all_and_is_told_once",
        ),
        ("python -m paddle.distributed.launch --nproc", "not run: tried by hand, as the page says"),
        (
            "python -m paddle.distributed.launch --master",
            "not run: two machines; test_two_launchers.py of parallel-4d runs it twice on one",
        ),
        ("sft: rank 2 is missing", "plugins/parallel_4d/tests/test_watch.py::test_a_rank_that_never_comes_is_named"),
        (
            "sft run settings.json --nproc auto",
            "not run: it needs GPUs; test_elastic.py of parallel-4d kills ranks of 2 and 4",
        ),
        (
            "make DEVICE=gpu test-gpu-parallel",
            "tests/test_parallel_checks.py::test_two_processes_on_cpus",
        ),
        ("sft run settings.json --output_dir one", "not run: several machines"),
        (
            "git worktree add --detach ../before",
            "not run: minutes; test_trace.py of parallel-4d makes a row of it",
        ),
    ],
    "docs/performance.md": "not run: hours",
    "docs/plan.md": TYPED,
    "docs/plugins.md": [
        ("from dataclasses import dataclass", f"{HERE}::test_plugin_of_the_guide_is_the_example_and_works"),
        ('[project.entry-points."sft.plugins"]', f"{MORE}::test_the_guide_shows_the_examples"),
        ("import sft", f"{MORE}::test_the_family_of_the_guide_keeps_the_protocol"),
        ("from sft.testing import check_family", f"{MORE}::test_the_family_of_the_guide_keeps_the_protocol"),
        ("sides: ClassVar", f"{MORE}::test_the_sides_of_the_guide_are_those_of_lora"),
        ('pytest_plugins = ["sft.testing"]', f"{MORE}::test_the_guide_shows_the_examples"),
        ("import pytest", f"{MORE}::test_the_suite_of_the_guide_passes"),
    ],
    "docs/recipes.md": [
        ("import sft", f"{KIT}::test_the_format_reads_what_the_core_reads_otherwise"),
        ("import sft", f"{KIT}::test_positions_are_half_as_far_apart"),
        ("import shutil", f"{KIT}::test_the_newest_checkpoint_is_copied"),
        ("import sft", f"{RECIPES}::test_wide_norms_compute_what_the_core_computes"),
        ("import fcntl", f"{RECIPES}::test_a_run_waits_until_the_other_one_has_ended"),
        ("import json", f"{RECIPES}::test_the_command_prints_the_losses"),
        ('[project.entry-points."sft.plugins"]', f"{RECIPES}::test_the_command_prints_the_losses"),
        ("import json", f"{RECIPES}::test_a_run_that_goes_on_is_said_to_need_what_it_took"),
        ('[project.entry-points."sft.plugins"]', f"{RECIPES}::test_a_run_that_goes_on_is_said_to_need_what_it_took"),
        ("import os", f"{RECIPES}::test_a_run_says_which_job_it_was"),
    ],
    "docs/reliability.md": "not run: hours",
    "docs/replay.md": [
        ("sft replay out", TYPED),
        ("import numpy as np", TYPED),
        ("sft blame out", TYPED),
        ("loss − usual =", "not run: a formula; core/tests/test_blame.py holds it"),
    ],
    "docs/report.md": [
        ("report: out/report.html", TYPED),
        ("sft report out ", TYPED),
        ("import sft", TYPED),
    ],
    "docs/strategies.md": [
        ("from dataclasses import replace", f"{HERE}::test_the_strategy_of_the_guide_is_the_example"),
        (
            "PADDLE_DISTRI_BACKEND=gloo python -m paddle.distributed.launch",
            "tests/test_third_parties.py::test_two_processes_of_the_data_parallel_example_learn_what_one_does",
        ),
    ],
    "docs/terminal.md": [
        ("plan:", "not run: what one run said; core/tests/test_outlook.py holds the form"),
        ("sft run settings.yaml --json_logs", "not run: it needs jq; core/tests/test_voice.py reads the events"),
        (
            "sft completion bash",
            "core/tests/test_completing.py::test_a_shell_completes_the_name_of_a_plugin",
        ),
    ],
    "docs/trackers.md": [
        ("import json", f"{RECIPES}::test_the_shared_log_has_each_line_and_says_where_a_run_goes_on"),
        ('[project.entry-points."sft.requests"]', f"{RECIPES}::test_report_to_asks_for_the_shared_log"),
    ],
    "docs/tutorial.md": TYPED,
}
"""How each block of a page is run: all of them by one test, or in their order how each begins and by which test; or
``not run:`` and why."""


def pages() -> list[str]:
    with_code = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if blocks(path)]
    return [str(path.relative_to(ROOT)) for path in with_code if path.name != "index.md"]


def blocks(path: Path) -> list[str]:
    return [text for section in sections(path.read_text(encoding="utf-8")) for _, text in section.code]


def test_each_page_with_code_says_what_runs_it() -> None:
    assert sorted(SHOWN) == sorted(pages())


@pytest.mark.parametrize("page", SHOWN)
def test_each_block_is_run_or_says_why_not(page: str) -> None:
    found, claimed = blocks(ROOT / page), SHOWN[page]
    if isinstance(claimed, str):
        claimed = [(text[:1], claimed) for text in found]
    missing = "name the test that runs a new block, or say why none can"
    assert len(found) == len(claimed), missing
    for text, (beginning, how) in zip(found, claimed, strict=True):
        assert text.startswith(beginning), f"{missing}: {text}"
        if not how.startswith("not run: "):
            path, _, test = how.partition("::")
            assert f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"there is no {how}"
