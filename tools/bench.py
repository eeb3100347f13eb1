"""Times parts of the model: `python tools/bench.py space --tokens 256 --text-tokens 77 --dim 128 --experts 6`."""

import argparse

import torch

from raphael_dist.benchmark import SpaceCase, bench_space
from raphael_dist.config import load_config


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


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("space", help="the Space-MoE: literal, grouped and wide", description=space.__doc__)
    command.set_defaults(run=space)
    for name, default in (("batch", 4), ("tokens", 256), ("text-tokens", 77), ("dim", 128), ("experts", 6), ("repeats", 7)):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--config", help="take the sizes of every attention level of a preset instead")
    command.add_argument("--latent", type=int, default=16, help="side of the latents, with --config")
    command.add_argument("--hidden", type=int, help="width of an expert (4 x dim)")
    command.add_argument("--masks", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
