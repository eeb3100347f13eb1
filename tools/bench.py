"""Times parts of a run: `python tools/bench.py space`, `torchrun --nproc_per_node 2 tools/bench.py checkpoint`."""

import argparse
from pathlib import Path

import numpy as np
import torch

from raphael_dist import parallel
from raphael_dist.benchmark import SpaceCase, bench_space
from raphael_dist.benchmark_moe import MoeRow, bench_balance, bench_moe
from raphael_dist.config import load_config
from raphael_dist.diffusion import draw_timestep


def space(args: argparse.Namespace) -> None:
    """Print what each way to run a Space-MoE takes, forward and backward, at several densities of the masks."""
    for case in cases(args):
        space_case(case, args)


def cases(args: argparse.Namespace) -> list[SpaceCase]:
    """Return the one case of the arguments, or one per attention level of a preset's U-Net."""
    if args.config is None:
        return [SpaceCase(args.batch, args.tokens, args.text_tokens, args.dim, args.hidden or 4 * args.dim, args.experts)]
    config = load_config(args.config)
    m, found = config.model, []
    for level, (dim, hidden) in enumerate(zip(m.channels, m.expert_width, strict=True)):
        if m.attention[level]:
            tokens = (args.latent // 2**level) ** 2
            found.append(SpaceCase(config.train.micro_batch, tokens, config.text.max_tokens, dim, hidden, m.space_experts))
    return found


def space_case(case: SpaceCase, args: argparse.Namespace) -> None:
    """Print one table."""
    print(f"{case}, {args.dtype} on {args.device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    print("mask = share of image tokens in a text token's region; density = share of (image token, expert) pairs in use")
    print("  mask  density  literal ms  grouped ms   wide ms  grouped x  wide x")
    for row in bench_space(case, args.masks, args.repeats, args.device, getattr(torch, args.dtype)):
        ms = row.milliseconds
        print(
            f"{row.mask:6.2f} {row.density:8.2f} {ms['literal']:11.2f} {ms['grouped']:11.2f} {ms['wide']:9.2f} "
            f"{ms['literal'] / ms['grouped']:10.1f} {ms['literal'] / ms['wide']:7.1f}"
        )


def moe(args: argparse.Namespace) -> None:
    """Print our expert layers beside DeepSpeed's and a loop, on the ranks that torchrun starts, or one."""
    ranks = parallel.discover()
    parallel.initialise(ranks)
    torch.set_num_threads(args.threads)
    for case in cases(args):
        for mask in args.masks:
            rows = bench_moe(case, mask, args.repeats, ranks, args.uneven)
            if ranks.is_main:
                moe_table(case, mask, rows, ranks.world_size, args)
    torch.distributed.destroy_process_group()


def moe_table(case: SpaceCase, mask: float, rows: list[MoeRow], world_size: int, args: argparse.Namespace) -> None:
    """Print one table."""
    load = "half of the load wants one expert" if args.uneven else "even load"
    print(f"{case}, mask {mask}, {load}, {world_size} ranks, {args.threads} threads each, median of {args.repeats}")
    print("layer                        rows       ms   rows/s  time per row / DeepSpeed's k=1, k=2    MB sent")
    native = [row for row in rows if row.name.startswith("DeepSpeed")]
    for row in rows:
        ratios = "  ".join(f"{row.rows_per_second / other.rows_per_second:8.2f}x" for other in native)
        print(
            f"{row.name:<24} {row.rows:>8} {row.milliseconds:8.2f} {row.rows_per_second:8.0f}  faster by {ratios}  "
            f"{row.sent / 1e6:14.2f}"
        )


def balance(args: argparse.Namespace) -> None:
    """Print how even the loads of time experts are when timesteps are drawn independently, by stratum, and as we do."""
    config, seed = load_config("raphael-3b").diffusion, 0
    total, T = args.global_batch, config.num_timesteps
    bins = lambda uniform: (np.asarray(uniform) * args.experts).astype(int).tolist()  # noqa: E731
    draws = {
        "independent": lambda step: bins(np.random.default_rng(step).random(total)),
        "strata in random order": lambda step: bins((np.random.default_rng(step).permutation(total) + 0.5) / total),
        "strata, runs even (ours)": lambda step: bins(
            [draw_timestep(config, seed, step * total + i, total) / T for i in range(total)]
        ),
    }
    for group in args.group:
        print(
            f"global batch {total}, {args.experts} time experts, {group} samples of a group a micro-step, {args.steps} steps"
        )
        for row in bench_balance(draws, args.steps, group, args.experts):
            print(f"  {row.name:<26} busiest expert {row.mean:5.2f}x an even share on average, {row.worst:5.2f}x at worst")


def add_sizes(command: argparse.ArgumentParser, batch: int, masks: list[float]) -> None:
    """Add what describes a Space-MoE layer and the measurement."""
    for name, default in (("batch", batch), ("tokens", 256), ("text-tokens", 77), ("dim", 128), ("experts", 6)):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--config", help="take the sizes of every attention level of a preset instead")
    command.add_argument("--latent", type=int, default=16, help="side of the latents, with --config")
    command.add_argument("--hidden", type=int, help="width of an expert (4 x dim)")
    command.add_argument("--masks", type=float, nargs="+", default=masks)
    command.add_argument("--threads", type=int, default=torch.get_num_threads())


def checkpoint(args: argparse.Namespace) -> None:
    """Print what a save costs beside torch.save and DeepSpeed's own; as one process, or as the ranks of a launcher."""
    from raphael_dist import benchmark_checkpoint

    benchmark_checkpoint.run(load_config(args.config), args.zero, args.folder, args.repeats)


def conversion(args: argparse.Namespace) -> None:
    """Print what conversions of a checkpoint cost, one process, beside a copy of it; --folder must have room for two."""
    from raphael_dist import benchmark_convert
    from raphael_dist.convert.plan import Options

    config = load_config(args.config, ["optim.kind=sgd"] if "exp_avg" not in args.kinds else [])
    options = Options(world=args.world, stage=args.zero)
    benchmark_convert.run(config, args.kinds, options, args.folder, args.to, args.repeats)


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("space", help="the Space-MoE: literal, grouped and wide", description=space.__doc__)
    command.set_defaults(run=space)
    add_sizes(command, 4, [0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command = commands.add_parser("moe", help="our layers beside DeepSpeed's MoE and a loop", description=moe.__doc__)
    command.set_defaults(run=moe)
    add_sizes(command, 8, [0.05, 1.0])
    command.add_argument("--uneven", action="store_true", help="half of the load wants one expert")
    command = commands.add_parser("balance", help="how even time experts' loads are", description=balance.__doc__)
    command.set_defaults(run=balance, threads=1)
    for name, default in (("global-batch", 2000), ("experts", 4), ("steps", 20)):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--group", type=int, nargs="+", default=[4, 8, 16, 64])
    command = commands.add_parser("checkpoint", help="save, write, verify, convert", description=checkpoint.__doc__)
    command.set_defaults(run=checkpoint, threads=1)
    command.add_argument("--config", default="emoji-tiny")
    command.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=1)
    command.add_argument("--folder", type=Path, default=Path("runs/bench-checkpoint"), help="on the disk to measure")
    command.add_argument("--repeats", type=int, default=5)
    command = commands.add_parser("convert", help="conversions of any model", description=conversion.__doc__)
    command.set_defaults(run=conversion, threads=1)
    command.add_argument("--config", default="emoji-small")
    command.add_argument("--kinds", nargs="+", default=["master", "exp_avg", "exp_avg_sq", "ema"])
    command.add_argument("--world", type=int, default=4, help="files of the source")
    command.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=2)
    command.add_argument("--to", nargs="+", default=["canonical", "deepspeed"])
    command.add_argument("--folder", type=Path, default=Path("runs/bench-convert"), help="on the disk to measure")
    command.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
