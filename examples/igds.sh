#!/usr/bin/env bash
# IGDS from a folder of FashionMNIST's own files to the accuracy of students: prior, estimator, distillation, evaluation.
#   bash examples/igds.sh [FOLDER] [OUT]       (apt-get install dataset-fashion-mnist brings the files)
# The sizes take minutes on two cores; a prior worth its name takes more images (no --images-per-class) and --width 32.
set -euo pipefail
data="fashion_mnist:${1:-/usr/share/datasets/fashion-mnist}"
out="${2:-igds-example}"
mkdir -p "$out"

ddfast train-prior --data "$data" --image-size 32 --images-per-class "${IMAGES:-200}" --epochs "${EPOCHS:-20}" \
    --width 16 --out "$out/prior" --resume
ddfast train-estimator --data "$data" --image-size 32 --images-per-class "${IMAGES:-200}" --epochs "${EPOCHS:-20}" \
    --width 64 --out "$out/estimator.safetensors" --resume
ddfast distill igds --data "$data" --prior "$out/prior" --estimator "$out/estimator.safetensors" --ipc 1 \
    --factor 1 --steps "${STEPS:-100}" --out "$out/distilled" --resume
ddfast evaluate --distilled "$out/distilled" --data "$data" --arch convnet3_in --protocol igds \
    --epochs "${STUDENT_EPOCHS:-100}" --seeds 1
