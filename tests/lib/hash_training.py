"""Train 20 steps of `emoji-tiny` on two ranks (ZeRO-2) and print a SHA-256 of weights, moments, average and gradient norms.

Run `python tests/lib/hash_training.py [section.key=value ...]` before and after a change of the code that must not change
numbers, and compare the two hashes. Do not store a hash, because it depends on the machine and on the versions of torch and
DeepSpeed. A run takes about a minute.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Without validation and samples, which change no weight.
        arguments = ["--config", "emoji-tiny", f"train.max_steps={STEPS}", f"run.dir={folder}/run", "train.log_every=1"]
        arguments += ["data.val_shards=[]", "sample.prompts=[]"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, "raphael_dist/train.py", "--deepspeed_config", "ds_configs/zero2.json", *arguments, *overrides]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        print(digest(Path(folder) / "run"))


def digest(run: Path) -> str:
    """Return the SHA-256 of all tensors of the newest checkpoint in a run directory, and of the logged gradient norms."""
    sha = hashlib.sha256()
    newest = max((run / "checkpoints").glob("step-*"))
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                sha.update(f"{path.name} {name}".encode() + file.get_tensor(name).contiguous().view(-1).numpy().tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        sha.update(f"{record['step']} {record.get('optim/grad_norm')}".encode())
    return sha.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
