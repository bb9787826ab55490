#!/usr/bin/env bash
# The benchmarks' table on an NVIDIA GPU, in a new environment. Needs CUDA 13's driver and toolkit (llama.cpp is compiled)
# and pip's standard index (torch's CUDA build). benchmarks/gpu.sh [generation] [pipeline] … [--full-size]
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv --clear .venv-gpu
. .venv-gpu/bin/activate
pip install --quiet --require-hashes -r locked.txt
pip uninstall --quiet --yes onnxruntime onnxruntime-genai
pip install --quiet -r requirements-cuda.txt
# pip's cache may hold a llama.cpp that was compiled without CUDA
CMAKE_ARGS=-DGGML_CUDA=on pip install --quiet --no-cache-dir -r benchmarks/requirements.txt -c constraints.txt
python -m benchmarks --execution_provider=cuda "$@"
