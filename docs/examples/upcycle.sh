#!/bin/bash
# Give a dense U-Net of Stable Diffusion 2's structure experts and train it, at a small size: upcycle.sh OUT [overrides for train.py]
# With Stable Diffusion 2 itself, skip the first two commands, use its folder as $out/sd, and `base: raphael-sd2` below.
set -euo pipefail
out=$1
shift
mkdir -p "$out"

# The dense model: GEGLU of four times the width as in Stable Diffusion, no experts, no edge modules.
wide="model.time_activation=geglu model.expert_width=[128,256,384,384]"
# shellcheck disable=SC2086
python raphael_dist/train.py --config emoji-tiny run.dir="$out/dense" $wide model.space_experts=0 model.time_experts=0 edge.weight=0 "$@"
python tools/convert_checkpoint.py --from auto "$out/dense" --to diffusers "$out/sd"

cat >"$out/raphael.yaml" <<YAML
base: emoji-tiny
run: {dir: $out/raphael, init_from: $out/start}
model: {time_activation: geglu, expert_width: [128, 256, 384, 384]}
YAML
python tools/convert_checkpoint.py --from auto "$out/sd" --to canonical "$out/start" --config "$out/raphael.yaml"

# Before the first step, the model with experts samples the same images as the dense one.
for which in sd start; do
    python -m raphael_dist.sample --checkpoint "$out/$which" --prompt "a red heart, noto style" --steps "${STEPS:-20}" --images "$out/images-$which" --out "$out/$which.png"
done
python raphael_dist/train.py --config "$out/raphael.yaml" "$@"
python -m raphael_dist.sample --checkpoint "$out/raphael" --prompt "a red heart, noto style" --out "$out/heart.png"
