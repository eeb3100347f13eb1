"""Times parts of a run: `python tools/bench.py space`, `torchrun --nproc_per_node 2 tools/bench.py checkpoint`."""

import argparse
import importlib
import sys

import checkout  # noqa: F401 (before the package)

COMMANDS = {
    "space": ("space", "the Space-MoE: reference, grouped and dense"),
    "moe": ("moe", "our layers compared with DeepSpeed's MoE and a loop"),
    "balance": ("balance", "how even time experts' loads are"),
    "checkpoint": ("checkpoint", "save, write, verify, convert"),
    "states": ("states", "bytes per parameter of each ZeRO configuration"),
    "start": ("start", "starting up with many ranks"),
    "gpu": ("gpu_step", "a whole optimizer step compared with diffusers' U-Net"),
    "plan": ("plan", "the planner compared with measurements and published runs"),
    "step": ("step", "an optimizer step of ours compared with diffusers' and DeepSpeed's"),
    "scaling": ("scaling", "a whole run over ranks of this host, strong and weak, compared with the plan"),
    "network": ("network", "bytes that nodes send in a step, compared with the plan, DDP and DeepSpeed"),
    "kernels": ("kernels", "the Triton kernels of train.kernels, compiled for GPUs that need not be there"),
    "syncs": ("syncs", "where a step's host waits for the GPU, without one"),
    "data": ("data", "decoding and reading shards, compared with other libraries"),
    "index": ("index", "the index of 100 million samples"),
    "convert": ("convert", "conversions of a model of any size"),
    "features": ("features", "latents and tokens made ahead, cached, or stored in the shards"),
}


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:  # the others are not imported: each needs other libraries
            benchmark = importlib.import_module(f"benchmarks.{module}")
            command.description = benchmark.run.__doc__
            benchmark.add_arguments(command)
            command.set_defaults(run=benchmark.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
