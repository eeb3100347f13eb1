"""Measure parts of a run: `python tools/bench.py space`, `torchrun --nproc_per_node 2 tools/bench.py checkpoint`."""

import importlib
import sys

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser

COMMANDS = {
    "space": ("space", "time of the Space-MoE's implementations: the paper's formula as printed, grouped, dense"),
    "moe": ("moe", "time of our expert layers, compared with DeepSpeed's MoE"),
    "balance": ("balance", "how evenly the time experts are loaded"),
    "checkpoint": ("checkpoint", "time to save, write, verify and convert a checkpoint"),
    "states": ("states", "bytes per parameter in each ZeRO stage"),
    "start": ("start", "time to start and to save with many ranks"),
    "gpu": ("gpu_step", "time of an optimizer step on a GPU, compared with diffusers' U-Net"),
    "plan": ("plan", "predictions of the planner, compared with measurements and published runs"),
    "step": ("step", "time of an optimizer step, compared with diffusers and DeepSpeed's MoE"),
    "scaling": ("scaling", "speed with 1 to 8 ranks on this host, compared with the planner"),
    "network": ("network", "bytes that nodes send per step, compared with the planner, DDP and DeepSpeed"),
    "network-time": ("network_time", "time of a step over links of given bandwidth and latency, compared with the planner"),
    "network-data": ("network_data", "images per second from remote shards over links of a given bandwidth"),
    "kernels": ("kernels", "registers and memory of the Triton kernels of train.kernels; requires no GPU"),
    "syncs": ("syncs", "how often the host waits for the GPU in a step; runs without a GPU"),
    "data": ("data", "speed of decoding and reading shards, compared with other libraries"),
    "index": ("index", "time to open an index of 100 million samples"),
    "convert": ("convert", "time and memory to convert a model of any size"),
    "features": ("features", "cost of latents and tokens: encoded in the step, cached, or stored in the shards"),
}


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = Parser(
        example="python tools/bench.py space",
        description="Measure one part of a run.",
        epilog="`python tools/bench.py NAME --help` lists the options of a benchmark.",
        usage="%(prog)s NAME [options]",
    )
    commands = parser.add_subparsers(required=True, metavar="NAME", prog="bench.py")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in sys.argv[1:2]:  # other benchmarks are not imported, because each needs its own libraries
            benchmark = importlib.import_module(f"benchmarks.{module}")
            command.description = benchmark.run.__doc__
            benchmark.add_arguments(command)
            command.set_defaults(run=benchmark.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
