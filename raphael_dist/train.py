"""Command line: `deepspeed raphael_dist/train.py --config emoji-tiny train.max_steps=50`, or plain python.

Arguments are checked before torch is imported, so --help, --plan and mistakes answer at once.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

if __name__ == "__main__":
    # Run as a file, Python puts this package's own folder first on the path; its modules must not shadow others.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p or ".").resolve() != here)]

from raphael_dist import command_line
from raphael_dist.config import Config, RunConfig, load_config, to_yaml
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
    leave_exit_code,
    redact,
)
from raphael_dist.parallel import placement
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.stages import every_stage
from raphael_dist.training.console import let_output_fail
from raphael_dist.training.stopping import StopRequest, parse_time

HEAD_START_S = 2.0  # seconds that rank 0 has to say what every rank knows


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake. UserError when no configuration was chosen."""
    parser = argparse.ArgumentParser(
        prog="raphael_dist/train.py",
        description="Train RAPHAEL. The same command continues a run from its newest checkpoint.",
        epilog="precedence: defaults < --config < overrides, each key once. All keys: --plan prints them.",
    )
    command_line.add_config(parser)
    parser.add_argument(
        "--deepspeed_config",
        action=command_line.Once,
        metavar="JSON",
        help="DeepSpeed configuration, see ds_configs/ (default: ZeRO-2 in bfloat16, else 1)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration and batch plan, check shards, encoders, folders, and stop",
    )
    parser.add_argument("--plan", action="store_true", help="print configuration and batch plan alone; looks at no file")
    parser.add_argument("--world-size", type=int, help="number of ranks to plan for, with --dry-run and --plan")
    parser.add_argument(
        "--log-level",
        choices=get_args(RunConfig.model_fields["log_level"].annotation),
        help="what the terminal shows of the log: run.log_level",
    )
    command_line.add_version(parser)
    parser.add_argument("--max-time", metavar="TIME", help="save and stop after this time, written like Slurm's --time")
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = command_line.parse(parser, argv)
    if args.log_level:
        args.overrides.append(f"run.log_level={args.log_level}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (see errors.py)."""
    why = ""
    try:
        code, why = _main(sys.argv[1:] if argv is None else argv)
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else EXIT_USER_ERROR
    # A mistake meets all ranks, and the first that leaves may be the end of the others, of rank 0 before it has spoken.
    # So what is wrong goes into a file as well, and rank 0 has a head start.
    if _rank() == "0" or code == EXIT_USER_ERROR:
        leave_exit_code(code, why)
    if _rank() != "0" and why:
        time.sleep(HEAD_START_S)
    return code


def _main(argv: Sequence[str]) -> tuple[int, str]:
    """Return the exit code, and why where something went wrong."""
    training = False
    try:
        args = parse(argv)
        stop = StopRequest(None if args.max_time is None else parse_time(args.max_time))
        config = load_config(args.config, args.overrides)
        tree = ds_config.read_deepspeed_json(args.deepspeed_config, config.train.dtype)
        world_size = _launched_ranks() if args.world_size is None else args.world_size
        if world_size < 1:
            raise UserError(f"--world-size: given {world_size}, must be 1 or more")
        config = ds_config.fit_to_ranks(config, world_size)
        stages = every_stage(config)
        for stage in stages:
            plan = BatchPlan.of(stage, world_size)
            merged = ds_config.merge(stage, tree, plan.accumulation, world_size)
            if args.plan or args.dry_run:
                print(describe(stage, plan, merged), flush=True)
        if args.plan or args.dry_run:
            return 0 if args.plan else _check_ready(stages), ""
        training = True
        let_output_fail()
        stop.listen()
        return run(config, tree, stop), ""
    except UserError as error:
        return _fail(error, EXIT_USER_ERROR, training)
    except NonFiniteError as error:
        return _fail(error, EXIT_NON_FINITE, training)
    except NotSavedError as error:
        return _fail(error, EXIT_NOT_SAVED, training)
    except HungError as error:
        # Rank 0 may be the one that hangs, and the others may be ended as soon as one leaves.
        leave_exit_code(EXIT_HUNG)
        print(f"error on rank {_rank()}: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)  # threads may be waiting for the rank that hangs: nothing less is sure to end


def _check_ready(stages: Sequence[Config]) -> int:
    """Print what a start would be refused for, a line each; return the exit code."""
    from raphael_dist.training.ready import problems

    found = list(dict.fromkeys(line for stage in stages for line in problems(stage)))
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR if found else 0


def _rank() -> str:
    return next((os.environ[name] for name in ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID") if name in os.environ), "0")


def _launched_ranks() -> int:
    """Return the number of ranks by the launcher's variables, as `parallel.ranks.discover` does, without importing torch."""
    step = ("SLURM_NTASKS",) if "SLURM_STEP_ID" in os.environ else ()
    given = (os.environ.get(name, "") for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", *step))
    return next((int(text) for text in given if text.isdigit()), 1)


def describe(config: Config, plan: BatchPlan, merged: dict) -> str:
    """Return the resolved configuration, the batch plan and the DeepSpeed configuration as text."""
    import json

    lines = [
        to_yaml(config).rstrip(),
        "",
        f"# {plan.world_size} ranks x {plan.micro_batch} images x {plan.accumulation} micro-steps for exactly "
        f"{plan.global_batch} images per step; {plan.waste:.1%} of the slots are empty",
        *(f"# warning: {line}" for line in plan.advice()),
        *_spread(config, plan.world_size),
        *(f"# {line}" for line in placement.describe(placement.place(config, plan))),
        "# DeepSpeed: " + json.dumps(redact(merged)),
    ]
    return "\n".join(lines)


def _spread(config: Config, world_size: int) -> list[str]:
    lines = []
    for kind in ("space", "time"):
        experts, ep = getattr(config.model, f"{kind}_experts"), getattr(config.parallel, f"{kind}_ep")
        if ep > 1:
            lines.append(
                f"# {kind} experts: {ep} consecutive ranks share the {experts}, {experts // ep} on each; "
                f"every expert is on {world_size // ep} ranks"
            )
    return lines


def run(config: Config, tree: dict, stop: StopRequest) -> int:
    """Train; return 0 when complete, EXIT_INTERRUPTED when a signal or the time limit stopped it after saving."""
    import torch.distributed as dist

    from raphael_dist.parallel.ranks import discover, initialise
    from raphael_dist.training import trainer

    if not config.data.shards and not config.data.sources:
        raise UserError("data.shards: none given; e.g. data.shards='data/emoji/train-*'")
    ranks = discover()
    device = initialise(ranks)
    try:
        complete = trainer.train_stages(config, tree, ranks, device, stop)
    except (UserError, NonFiniteError, NotSavedError):
        dist.destroy_process_group()
        raise
    except Exception:
        # Into this rank's log too. The process group stays as it is: taking it down might wait for ranks that are gone.
        logging.getLogger("raphael_dist").exception("rank %d failed", ranks.rank)
        raise
    dist.destroy_process_group()
    return 0 if complete else EXIT_INTERRUPTED


def _fail(error: Exception, code: int, training: bool) -> tuple[int, str]:
    # What every rank knows is said once; what only one rank met, by that rank.
    rank = _rank()
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif training and not getattr(error, "agreed", True):
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return code, str(error)


if __name__ == "__main__":
    sys.exit(main())
