"""Every promise that the README makes in words has a test that fails when it is broken; test_docs.py runs its commands."""

import re
from functools import cache

import pytest

from tests.documents import text_of
from tests.launch import ROOT
from tests.test_imports import ROOMS

# What the README says, and the tests that hold it to that: "file: names", without "test_".
PROMISES = {
    "an expert per word, at work in the image region that the word attends to": (
        "moe: space_moe_is_the_papers_formula_in_value_and_every_gradient "
        "a_region_is_where_attention_reaches_the_threshold_and_carries_no_gradient"
    ),
    "The same command continues a run from its newest checkpoint that verifies, bit for bit": (
        "training: six_steps_equal_three_steps_and_a_resume_of_three_bit_for_bit "
        "resume_falls_back_to_the_newest_checkpoint_that_verifies"
    ),
    "`torchrun` starts it as well": "docs: the_training_that_the_readme_shows_trains",
    "the ranks talk through gloo and compute in float32": (
        "training: the_deepspeed_launcher_trains_and_leaves_metrics_samples_and_a_checkpoint"
    ),
    "Defaults < `--config` (a preset or a YAML file, which may begin with `base: PRESET`) < `section.key=value`": (
        "config: overrides_win_over_the_file a_file_builds_on_a_preset_or_on_another_file"
    ),
    "overrides, each key once": "config: a_key_given_twice_is_refused_with_both_values",
    "and the DeepSpeed configuration at once": "training: help_and_plan_answer_within_a_second_and_a_half_without_torch",
    "`--dry-run` also checks what a start would be refused for": "ready: a_dry_run_finds_what_a_start_would_be_refused_for",
    "From a wheel it works in any folder": "wheel: the_commands_work_from_any_folder",
    "All keys with type, default, range and meaning": "config_reference: the_document_is_current the_commands_answer",
    "A mistake is one line that names the field (and the line of the file), and exit code 2": (
        "training: the_command_line_exits_with_2_and_one_line mistakes_are_refused_in_one_line_that_names_field_and_values\n"
        "config: a_mistake_in_a_base_is_told_with_its_own_file_and_line"
    ),
    "a JSON that says otherwise is refused, showing both values": (
        "config: a_number_that_contradicts_ours_is_told_with_both_values"
    ),
    "an image (`jpg`, `png`, `webp`), a caption (`txt`": (
        "shards: offsets_lead_to_the_members_and_sizes_to_the_image a_gzipped_shard_gives_the_samples_of_the_plain_one"
    ),
    "starts a new run from the weights of a checkpoint in any layout": (
        "training: a_bfloat16_run_starts_from_float32_weights_without_rounding_them\n"
        "upcycle: a_new_run_says_how_to_start_from_a_dense_folder"
    ),
    "kept in `data.cache_dir` (`cached`, the default)": (
        "stream: a_caption_is_encoded_once_per_shard_and_nothing_is_computed_twice"
    ),
    "Corrupt samples are replaced, counted (`data/replaced`) and reported": (
        "stream: a_corrupt_image_is_replaced_from_its_bucket_counted_and_reported_once"
    ),
    "goes on by itself after time limits, preemptions, crashes, hangs and lost nodes": (
        "slurm: a_run_survives_signals_kills_requeues_and_a_lost_node the_time_limit_is_met_by_a_restart "
        "a_crash_loop_ends_and_a_mistake_is_not_tried_again"
    ),
    "`parallel.elastic=true` lets it continue on fewer nodes": (
        "slurm: on_fewer_nodes_the_run_goes_on_with_the_same_global_batch\n"
        "elastic: expert_groups_become_as_large_as_the_ranks_allow_when_asked"
    ),
    "`--seed`, `--scheduler ddim|dpm++|euler`": (
        "training: sampling_is_the_same_for_the_same_seed_and_differs_for_another sampling_refuses_mistakes_in_one_line"
    ),
    "Under `torchrun` the ranks divide them; no image depends on batch or rank": (
        "sampling: ranks_draw_what_one_draws an_image_is_the_same_in_a_batch_of_one_and_of_eight"
    ),
    "An exported pipeline is called like Stable Diffusion's": (
        "sampling: an_exported_pipeline_is_sampled_like_its_checkpoint"
    ),
    "The first shows which experts words and timesteps go through": "paths: the_command_writes_figures_and_routes",
    "`evaluate images` has FID, KID, precision, recall and CLIP score over guidance": (
        "evaluation: distances_are_those_of_torch_fidelity_on_the_same_features the_clip_score_is_that_of_torchmetrics "
        "precision_and_recall_tell_few_kinds_from_wrong_ones"
    ),
    "3 losses or gradients that stay infinite or NaN": (
        "training: a_loss_that_is_not_finite_stops_all_ranks_and_leaves_the_checkpoint\n"
        "guard: three_bad_steps_in_a_row_end_the_run_with_its_own_exit_code"
    ),
    "4 the last state could not be saved (a full disk)": (
        "checkpoint_faults: no_space_at_the_end_of_a_run_is_an_exit_code_of_its_own\n"
        "full_disk: the_command_line_on_a_full_disk_is_one_line_and_exit_code_4"
    ),
    "75 stopped by a signal or `--max-time` after saving": (
        "training: a_signal_to_one_rank_stops_all_after_saving\nwatchdog: max_time_saves_and_the_same_command_continues"
    ),
    "76 ended by the watchdog": (
        "watchdog: a_hang_ends_with_stacks_even_when_the_interpreter_lock_is_held a_hung_run_names_the_late_rank_and_ends"
    ),
    "written while training goes on, read back before they count": (
        "checkpoint_faults: nothing_is_visible_before_the_slowest_rank_has_written_and_training_goes_on_meanwhile\n"
        "checkpoint_files: a_device_that_returns_other_bytes_is_found_out"
    ),
    "published whole or not at all: kill any rank at any moment": (
        "checkpoint_faults: a_kill_at_every_point_of_a_save_loses_at_most_that_save "
        "kills_at_random_moments_of_a_save_lose_at_most_one_interval_each"
    ),
    "`keep` (the last K), `keep_every` (every Nth for ever)": ("checkpoint_files: retention_keeps_the_last_and_every_nth"),
    "Damaged ones are reported, kept aside and passed over": (
        "checkpoint_faults: ranks_fall_back_together_and_name_the_damage"
    ),
    "returns to the newest one when the loss jumps": (
        "guard: a_rollback_goes_on_with_the_samples_after_the_spike_and_survives_a_resume"
    ),
    "both must divide the experts and the ranks. Works with ZeRO-1 and 2": (
        "config: experts_that_cannot_be_spread_are_refused_with_the_numbers_and_a_way_out\n"
        "expert_parallel: spread_experts_take_the_steps_of_one_process"
    ),
    "the bytes of moving rows to the experts and of keeping them all on every rank": (
        "placement: dry_run_shows_rows_parameters_bytes_and_the_choice the_bytes_of_one_level_by_hand"
    ),
    "The global batch need not divide by anything": (
        "batch_plan: a_step_sees_each_position_of_its_global_batch_exactly_once"
    ),
    "A run resumes with any other sizes, stage or number of ranks": (
        "checkpoint_topology: loading_and_saving_again_changes_no_bit_along_a_chain_of_topologies"
    ),
    "wants `run.allow_change=[optim.lr]`": "identity: a_changed_number_is_refused_with_both_values_or_told",
    "any number of ranks, streamed, checksummed, also under `mpirun`": (
        "convert: every_pair_of_layouts_goes_there_and_back_bit_for_bit\n"
        "convert_damage: a_damaged_source_is_refused_and_leaves_nothing\n"
        "convert_mpi: two_processes_write_the_same_bytes_as_one"
    ),
    "The upcycled model computes what its dense source computes": (
        "upcycle: the_upcycled_model_computes_what_its_source_computes_and_every_part_learns"
    ),
    "against the gradient of plain PyTorch": ("precision: one_step_changes_the_masters_by_the_gradient_of_the_whole_batch"),
    "one host synchronisation per optimizer step": ("syncs: an_optimizer_step_waits_once_and_no_layer_or_micro_step_waits"),
}


@cache
def named_in(file: str) -> set[str]:
    return set(re.findall(r"^def test_(\w+)", (ROOT / f"tests/test_{file}.py").read_text(), re.MULTILINE))


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_stands_in_the_readme_and_has_its_tests(promise: str) -> None:
    assert promise in " ".join(text_of("README.md").split()), "the README says it otherwise now: look at its tests too"
    for line in PROMISES[promise].splitlines():
        file, _, names = line.partition(": ")
        for name in names.split():
            assert any(test.startswith(name) for test in named_in(file)), f"tests/test_{file}.py has no test_{name}"


def test_the_readmes_tree_and_the_picture_name_every_room() -> None:
    rooms = set(ROOMS) - {"base", "commands"}
    tree = text_of("README.md").partition("## Start")[0]
    assert rooms <= set(re.findall(r"(\w+)/", tree))
    assert len(re.findall(r"^    \S", tree, re.MULTILINE)) <= 12
    assert rooms <= set(re.findall(r">(\w+)/<", text_of("docs/modules.svg")))
