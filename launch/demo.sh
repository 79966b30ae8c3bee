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
  --recipe launch/recipes/digits.toml --data "$DEMO/digits-shards" --out "$DEMO/run"
say "5/5 results"
"$BIN/python" - "$DEMO" <<'PY'
import pathlib, sys
from launch.monitor.panels import Timeline
from launch.run.metrics_file import read_metrics
demo = pathlib.Path(sys.argv[1])
run = Timeline("demo", read_metrics(demo / "run"))
last = [line for line in run.final if line["kind"] == "eval"][-1]
end = [line for line in run.final if line["kind"] == "end"][-1]
best, weights = run.best()
print(f"validation accuracy {last['top1']:.2%} (best {best:.2%}{', EMA' * (weights == 'average')}) "
      f"over {last['samples']} images, trained {end['seconds']:.0f} s")
print(f"figures: {demo}/batch.png, {demo}/run/curves.png")
PY
"$BIN/pipeline" report "$DEMO/run" --out "$DEMO/report.html"
