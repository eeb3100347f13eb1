#!/bin/bash
# From a folder of images to a sampled image, on a CPU: own_folder.sh OUT [IMAGES] [overrides for train.py]
# Each image has its caption in a .txt file of the same name. Without IMAGES the demo's emoji are unpacked as such a folder.
set -euo pipefail
out=$1 images=${2:-}
shift $(($# > 1 ? 2 : 1))
mkdir -p "$out"

if [ -z "$images" ]; then
    images=$out/images
    python - data/emoji-demo/train-0000.tar "$images" <<'PYTHON'
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

texts=("$images"/*.txt)
caption=$(head -n1 "${texts[0]}" | tr -d '"')  # the prompt that is sampled during training and at the end

# Shards with edge maps. Canny is fast; `--edges hed` takes about a second for each image on a CPU.
python tools/prepare_data.py "$images" --out "$out/shards" --held-out 0.05 --edges canny
python tools/inspect_data.py "$out/shards" --out "$out/look.png"
python raphael_dist/train.py --config emoji-tiny run.dir="$out/run" \
    data.shards="$out/shards/train-*.tar" data.val_shards="$out/shards/val-*.tar" data.cache_dir="$out/cache" \
    sample.prompts="[\"$caption\"]" "$@"
python -m raphael_dist.sample --checkpoint "$out/run" --prompt "$caption" --out "$out/sample.png"
