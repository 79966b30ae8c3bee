#!/usr/bin/env bash
# The complete workflow on real data in a few minutes: convert digits, verify and view the set, train FAT-B0, report.
set -euo pipefail
BIN=${BIN:-.venv/bin} DEMO=${DEMO:-demo}
say() { printf '\n== %s\n' "$*"; }

rm -rf "$DEMO"
mkdir -p "$DEMO"
say "1/5 writing handwritten digits (scikit-learn) as an ImageNet-like folder"
"$BIN/pipeline" sample digits "$DEMO/digits"
say "2/5 converting them to a shard set"
"$BIN/pipeline" shard "$DEMO/digits" --out "$DEMO/digits-shards"
"$BIN/pipeline" info "$DEMO/digits-shards"
say "3/5 verifying every byte, and drawing a batch of augmented images"
"$BIN/pipeline" verify "$DEMO/digits-shards"
"$BIN/pipeline" look "$DEMO/digits-shards" --size 64 --flip 0 --crop-scale 0.5 1 --out "$DEMO/batch.png"
say "4/5 training FAT-B0 at 64x64"
HF_HOME="$DEMO/no-launcher-defaults" "$BIN/accelerate" launch launch/train.py \
  --recipe launch/config/recipes/digits.toml --data "$DEMO/digits-shards" --out "$DEMO/run"
say "5/5 results"
"$BIN/python" - "$DEMO" <<'PY'
import pathlib, sys
from launch.run.metrics_file import read_metrics
demo = pathlib.Path(sys.argv[1])
lines = read_metrics(demo / "run")
evals = [line for line in lines if line["kind"] == "eval"]
end = [line for line in lines if line["kind"] == "end"][-1]
print(f"validation accuracy {evals[-1]['top1']:.2%} (best {max(e['top1'] for e in evals):.2%}) "
      f"over {evals[-1]['samples']} images, trained {end['seconds']:.0f} s")
print(f"figures: {demo}/batch.png, {demo}/run/curves.png")
PY
"$BIN/pipeline" report "$DEMO/run" --out "$DEMO/report.html"
