"""The training command: `deepspeed raphael_dist/train.py --config emoji-tiny train.max_steps=50`.

`python` in place of `deepspeed` starts one rank.

Arguments are checked before torch is imported, so that --help, --plan and error messages appear within a second.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import get_args

if __name__ == "__main__":
    # When run as a file, Python puts this folder first on the path, where its modules would shadow others.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p or ".").resolve() != here)]
    from raphael_dist.cli.missing_packages import report_missing_packages

    report_missing_packages()

from raphael_dist.cli import common
from raphael_dist.config.run_sections import RunConfig
from raphael_dist.config.schema import Config, load_config, load_leniently, to_yaml
from raphael_dist.config.training_stages import every_stage
from raphael_dist.config.types import EXPERT_KINDS
from raphael_dist.engine import ds_config
from raphael_dist.errors import (
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_NON_FINITE,
    EXIT_NOT_SAVED,
    EXIT_USER_ERROR,
    HungError,
    NonFiniteError,
    NotSavedError,
    UserError,
    describe_error,
    write_exit_code,
)
from raphael_dist.parallel import placement
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.launcher_env import rank_of, world_size_of
from raphael_dist.runtime.stop_request import StopRequest, parse_time
from raphael_dist.text import counted, hide_secrets_in_text, prepare_streams, print_line, redact
from raphael_dist.training.console import ignore_output_errors
from raphael_dist.training.lr_schedule import draw_schedule

_LOST_RANK = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset|refused)|Broken pipe")
HEAD_START_S = 2.0  # seconds in which rank 0 reports an error before other ranks exit
DEFAULT_CONFIG = "raphael-3b"
SMALL_RUN = "python -m raphael_dist train --config emoji-tiny"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the training command. On a mistake, argparse ends the process with exit code 2.

    The result also has `chosen`: whether --config was given. Without it, `config` is DEFAULT_CONFIG.
    """
    parser = common.Parser(
        prog="raphael_dist train",
        example=f"{SMALL_RUN} train.max_steps=50",
        description=f"Train a model. The same command resumes the run. Without --config it trains {DEFAULT_CONFIG}.",
        epilog="section.key=value overrides --config, which overrides the defaults. `python -m raphael_dist config WORD` "
        "finds keys.",
    )
    common.add_config(parser)
    parser.add_argument(
        "--deepspeed_config",
        action=common.Once,
        metavar="JSON",
        help="DeepSpeed configuration, e.g. ds_configs/zero2.json (default: ZeRO-2 in bfloat16, ZeRO-1 in float32)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print settings, learning rates and how a step divides its images over ranks, and exit; reads no data",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="like --plan, and also check that shards, encoders and folders can be used"
    )
    parser.add_argument("--world-size", type=int, help="number of ranks for --plan and --dry-run")
    levels = get_args(RunConfig.model_fields["log_level"].annotation)
    parser.add_argument(
        "--log-level", choices=levels, help="lowest level of log messages on the terminal (default: run.log_level)"
    )
    parser.add_argument(
        "--max-time", metavar="TIME", help="save and stop after this time, written as for Slurm's --time, e.g. 11:30:00"
    )
    common.add_version(parser)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_intermixed_args(argv)
    if args.log_level:
        args.overrides.append(f"run.log_level={args.log_level}")
    args.chosen = args.config is not None
    args.config = args.config or DEFAULT_CONFIG
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command; return the exit code, one of those in errors.py.

    `argv`: the command-line arguments; None: those of this process.
    """
    prepare_streams()
    why = ""
    try:
        code, why = _main(sys.argv[1:] if argv is None else argv)
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else EXIT_USER_ERROR
    # When one rank exits, the launcher may kill the others, also rank 0 before it has reported the error.
    # So the error is also written to a file, and the other ranks wait.
    if rank_of() == "0" or code == EXIT_USER_ERROR:
        write_exit_code(code, why)
    if rank_of() != "0" and why:
        time.sleep(HEAD_START_S)
    return code


def _main(argv: Sequence[str]) -> tuple[int, str]:
    """Run the command; return the exit code, and the error message or ""."""
    training = False
    try:
        args = parse(argv)
        sys.argv = [hide_secrets_in_text(word) for word in sys.argv]  # trackers store it
        stop = StopRequest(None if args.max_time is None else parse_time(args.max_time))
        if args.dry_run and not args.plan:
            return _dry_run(args), ""
        config = load_config(args.config, args.overrides)
        tree = ds_config.read_deepspeed_json(args.deepspeed_config, config.train.dtype)
        world_size = _world_size(args)
        config = ds_config.fit_to_ranks(config, world_size)
        stages = every_stage(config)
        for stage in stages:
            plan = BatchPlan.of(stage, world_size)
            merged = ds_config.merge(stage, tree, plan.accumulation, world_size)
            if args.plan:
                print(describe(stage, plan, merged), flush=True)
        if args.plan:
            return 0, ""
        if not args.chosen:
            _check_default(config)
        training = True
        ignore_output_errors()
        stop.listen()
        return run(config, tree, stop), ""
    except UserError as error:
        return _fail(error, EXIT_USER_ERROR, training)
    except NonFiniteError as error:
        return _fail(error, EXIT_NON_FINITE, training)
    except NotSavedError as error:
        return _fail(error, EXIT_NOT_SAVED, training)
    except HungError as error:
        # Rank 0 may be the one that hangs, and the launcher may kill the others as soon as one exits.
        write_exit_code(EXIT_HUNG)
        print_line(f"error on rank {rank_of()}: {error}", file=sys.stderr)
        os._exit(EXIT_HUNG)  # threads may wait for the hanging rank, so that a normal exit would hang as well
    except Exception as error:
        if not training:
            raise
        return _fail_unforeseen(error), ""


def _dry_run(args: argparse.Namespace) -> int:
    """Carry out --dry-run: check a run without training; return exit code 2 if there are mistakes, else 0.

    Prints the settings, the batch plan and the DeepSpeed configuration as --plan does, and a line for each mistake.
    """
    from raphael_dist.training.dry_run import attempt, problems

    config, lines = load_leniently(args.config, args.overrides)
    world_size = attempt(lines, lambda: _world_size(args)) or 1
    dtype = "float32" if config is None else config.train.dtype
    tree = attempt(lines, lambda: ds_config.read_deepspeed_json(args.deepspeed_config, dtype))
    tree = ds_config.read_deepspeed_json(None, dtype) if tree is None else tree
    stages: list[Config] = []
    if config is not None:
        fitted = attempt(lines, partial(ds_config.fit_to_ranks, config, world_size)) or config
        stages = attempt(lines, partial(every_stage, fitted)) or [fitted]
    for stage in stages:
        plan = attempt(lines, partial(BatchPlan.of, stage, world_size))
        if plan is not None:
            merged = attempt(lines, partial(ds_config.merge, stage, tree, plan.accumulation, world_size))
            if merged is not None:
                print(describe(stage, plan, merged), flush=True)
        lines += problems(stage)
    for line in dict.fromkeys(lines):
        print_line(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR if lines else 0


def _world_size(args: argparse.Namespace) -> int:
    world_size = world_size_of() if args.world_size is None else args.world_size
    if world_size < 1:
        raise UserError(f"--world-size={world_size} must be at least 1. Set it to the number of ranks, e.g. 8.")
    return int(world_size)


def _check_default(config: Config) -> None:
    """Check that this machine meets the requirements of the default configuration.

    Prints a line for each one that is not met, and then raises UserError.
    """
    import torch

    from raphael_dist.training.dry_run import problems

    lines = problems(config)
    if not torch.cuda.is_available():
        lines.append("GPU: none is available on this machine, but the paper's model requires several GPUs with 80 GB each.")
    if lines:
        for line in lines if rank_of() == "0" else ():
            print_line(f"missing: {line}", file=sys.stderr)
        raise UserError(
            f"--config={DEFAULT_CONFIG} (the default) requires more than this machine has: see the lines "
            "'missing: ...'. Provide what these lines name, choose another --config, or try a small model on this machine: "
            f"{SMALL_RUN}"
        )


def describe(config: Config, plan: BatchPlan, merged: dict[str, object]) -> str:
    """Return the text that --plan prints: settings, learning-rate schedule, batch plan and DeepSpeed configuration.

    Args:
        config: the settings of the run, or of one of its stages (train.stages).
        plan: how a step's images are divided over ranks and micro-steps.
        merged: the DeepSpeed JSON with the keys that this project adds, as DeepSpeed receives it.
    """
    lines = [
        to_yaml(config).rstrip(),
        "",
        f"# {draw_schedule(config)}",
        f"# {counted(plan.world_size, 'rank')} x {counted(plan.micro_batch_size, 'image')} x "
        f"{counted(plan.accumulation, 'micro-step')} for exactly {counted(plan.global_batch_size, 'image')} per step; "
        f"{plan.waste:.1%} of the slots are empty",
        *(f"# warning: {line}" for line in [*config.find_warnings(), *plan.advice()]),
        *_describe_experts(config, plan.world_size),
        *(f"# {line}" for line in placement.describe(placement.choose_placement(config, plan))),
        "# DeepSpeed: " + json.dumps(redact(merged)),
    ]
    return "\n".join(lines)


def _describe_experts(config: Config, world_size: int) -> list[str]:
    lines = []
    for kind in EXPERT_KINDS:
        experts, ep = config.model.num_experts(kind), config.parallel.ep(kind)
        if ep > 1:
            lines.append(
                f"# {kind} experts: {experts} sharded over {ep} consecutive ranks, {experts // ep} on each; "
                f"every expert is on {counted(world_size // ep, 'rank')}"
            )
    return lines


def run(config: Config, tree: dict[str, object], stop: StopRequest) -> int:
    """Train on this rank, together with the other ranks of the launcher; return the exit code.

    Args:
        config: the settings of the run.
        tree: the content of the DeepSpeed JSON (--deepspeed_config).
        stop: the request to stop, by a signal or by --max-time.

    Returns:
        0 if the run is complete, EXIT_INTERRUPTED if it was stopped by a signal or the time limit, after saving.
    """
    import torch.distributed as dist

    from raphael_dist.data.shards.open_index import require_shards
    from raphael_dist.runtime import long_work
    from raphael_dist.runtime.ranks import TIMEOUT, discover, host_name, initialise
    from raphael_dist.runtime.watchdog import SLOW, Watchdog
    from raphael_dist.training import trainer

    require_shards(config)
    ranks = discover()
    watchdog = Watchdog(ranks, config.run.dir, config.run.hang_timeout_s, stop.launchers).start()
    # Longer than the watchdog's, which names the missing ranks.
    timeout = max(TIMEOUT, timedelta(seconds=SLOW * config.run.hang_timeout_s + 60))
    try:
        device = initialise(ranks, timeout, partial(watchdog.heartbeat, timeout_factor=SLOW))
        watchdog.heartbeat("the first exchange with the other ranks", SLOW)
        complete = trainer.train_stages(config, tree, ranks, device, stop, watchdog)
    except (UserError, NonFiniteError, NotSavedError):
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    except Exception as error:
        # Also into this rank's log. The process group is kept: destroying it might wait for ranks that have ended.
        logging.getLogger("raphael_dist").info("rank %d failed", ranks.rank, exc_info=True)  # not on the terminal again
        long_work.report_failure(f"rank {ranks.rank} on {host_name()} failed: {describe_error(error)}")
        raise
    finally:
        watchdog.stop()
    dist.destroy_process_group()
    return 0 if complete else EXIT_INTERRUPTED


def _fail_unforeseen(error: Exception) -> int:
    """Print an error that is not the user's: a bug, or the loss of another rank. Return exit code 1.

    The traceback is printed first, unless another rank was lost. The last line describes the error.
    """
    what = describe_error(error)
    if _LOST_RANK.search(what):  # its traceback, which is in this rank's log, does not explain the loss
        why = "Its process failed, its node is gone, or the system killed it for lack of memory (see dmesg)"
        what = f"the connection to another rank was lost ({what[:120]}). {why}. See the log of that rank in logs/ of run.dir"
    else:
        print(hide_secrets_in_text(traceback.format_exc()), end="", file=sys.stderr)
    print_line(f"error on rank {rank_of()}: {what}. The same command continues from the newest checkpoint.", file=sys.stderr)
    return 1


def _fail(error: Exception, code: int, training: bool) -> tuple[int, str]:
    # Rank 0 reports an error of all ranks; an error of one rank is reported by that rank.
    rank, text = rank_of(), hide_secrets_in_text(str(error))
    if rank == "0":
        print_line(f"error: {error}", file=sys.stderr)
    elif training and not getattr(error, "agreed", True):
        print_line(f"error on rank {rank}: {error}", file=sys.stderr)
    return code, text


if __name__ == "__main__":
    sys.exit(main())
