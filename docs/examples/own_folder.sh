#!/bin/bash
# From a folder of pictures to a sampled picture: own_folder.sh OUT [PICTURES] [train.py's overrides]
# A picture has its caption in a .txt of the same name. Without PICTURES the demo's emoji are unpacked, as such a folder.
set -euo pipefail
out=$1 pictures=${2:-}
shift $(($# > 1 ? 2 : 1))
mkdir -p "$out"

if [ -z "$pictures" ]; then
    pictures=$out/pictures
    python - data/emoji-demo/train-0000.tar "$pictures" <<'PYTHON'
import json, sys, tarfile
from pathlib import Path
folder = Path(sys.argv[2])
folder.mkdir(parents=True)
with tarfile.open(sys.argv[1]) as tar:
    for member in tar:
        key, _, kind = member.name.partition(".")
        data = tar.extractfile(member).read()
        if kind == "webp":
            (folder / f"{key}.webp").write_bytes(data)
        elif kind == "json":
            (folder / f"{key}.txt").write_text(json.loads(data)["captions"][0])
PYTHON
fi

# Shards with edge maps; Canny's are there at once, `--edges hed` takes about a second for each picture on a CPU.
python tools/prepare_data.py "$pictures" --out "$out/shards" --held-out 0.05 --edges canny
python tools/inspect_data.py "$out/shards" --out "$out/look.png"
python raphael_dist/train.py --config emoji-tiny run.dir="$out/run" \
    data.shards="$out/shards/train-*.tar" data.val_shards="$out/shards/val-*.tar" data.cache_dir="$out/cache" "$@"
python -m raphael_dist.sample --checkpoint "$out/run" --prompt "a red heart, noto style" --out "$out/heart.png"
