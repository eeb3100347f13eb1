"""Train a small VAE on the training shards of a data set: `python tools/train_vae.py --data data/emoji --out DIR`."""

import argparse
import sys
import time
from pathlib import Path

import torch

import checkout  # noqa: F401 (before the package)
from emoji_data import vae
from raphael_dist.cli.common import Parser
from raphael_dist.errors import UserError, run_command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/train_vae.py --data data/emoji --out models/my-vae",
        description="Train a small VAE on the training shards of a data set.",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/emoji"), help="folder with train-*.tar and val-*.tar, or .tar.gz"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and the weights")
    parser.add_argument("--init", type=Path, help="folder of a VAE to continue from (default: from scratch)")
    parser.add_argument("--mirror", type=float, default=0.5, help="share of mirrored images; 0 for images of text")
    parser.add_argument(
        "--decoder-only", action="store_true", help="keep the encoder of --init, so that latents stay as they are"
    )
    parser.add_argument("--steps", type=int, default=4000, help="number of optimizer steps (default 4000)")
    parser.add_argument("--batch", type=int, default=4, help="images per step (default 4)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="convolve in bfloat16: faster on CPUs that support it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Train the VAE, save it, and print the PSNR of the saved weights on the validation images.

    Raises UserError for mistakes that the user can correct.
    """
    shards = {split: sorted(args.data.glob(f"{split}-*.tar*")) for split in ("train", "val")}
    if not (shards["train"] and shards["val"]):
        raise UserError(
            f"--data={args.data} must contain train-*.tar and val-*.tar, but it does not. Make them with "
            "`python tools/make_emoji_dataset.py --out data/emoji`."
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda requires a GPU, but there is none. Use --device cpu.")
    if args.decoder_only and not args.init:
        raise UserError("--decoder-only requires --init, whose encoder is kept. Add `--init DIR`, the folder of a VAE.")
    torch.set_num_threads(args.threads)
    images, held_out = (vae.read_images(shards[split]) for split in ("train", "val"))
    if not 1 <= args.batch <= len(images):
        raise UserError(
            f"--batch={args.batch} must be from 1 to {len(images)}, the number of training images. Use e.g. "
            f"--batch={min(4, len(images))}."
        )
    start = time.monotonic()

    def report(done: int, loss: float, average: vae.Vae) -> None:
        db = vae.psnr(average, held_out).mean().item()
        print(f"step {done} loss {loss:.4f} val PSNR {db:.2f} dB {time.monotonic() - start:.0f} s", flush=True)

    model = vae.load(args.init).train() if args.init else vae.small_vae(args.seed)
    sizes = (args.steps, args.batch, args.rate, args.seed, args.device, args.bf16)
    model = vae.train(model, images, *sizes, report, mirror=args.mirror, decoder_only=args.decoder_only)
    saved = vae.save(model, images, args.out)
    db = vae.psnr(saved, held_out).mean().item()
    print(f"{args.out}: val PSNR {db:.2f} dB from the saved weights, scaling_factor {saved.config['scaling_factor']}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    return run_command(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
