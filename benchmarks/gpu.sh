#!/usr/bin/env bash
# The benchmarks' table on an NVIDIA GPU, in an environment of their own. Needs CUDA 12's toolkit (llama.cpp is compiled)
# and pip's standard index (torch's CUDA build). benchmarks/gpu.sh [generation] [pipeline] … [--full-size]
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-gpu
. .venv-gpu/bin/activate
pip install --quiet -r requirements.txt -c constraints.txt
pip uninstall --quiet --yes onnxruntime onnxruntime-genai
pip install --quiet -r requirements-cuda.txt
CMAKE_ARGS=-DGGML_CUDA=on pip install --quiet --no-binary llama-cpp-python -r benchmarks/requirements.txt
python -m benchmarks --execution_provider=cuda "$@"
