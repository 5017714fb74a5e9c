#!/usr/bin/env bash
# Checks on one GPU, in ten minutes, what has never run there: see the top of tests/gpu.py.
# It looks at the environment, then runs the checks. Without a GPU they run small, on the CPU.
#     bash tests/gpu.sh [--only CHECK ...] [--out NEW_FOLDER]
# PYTHON: the interpreter (unset: .venv/bin/python, else python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

if ! "$python" -c "import torch, transformers, numpy, tqdm, matplotlib"; then
    echo "gpu.sh: $python lacks a package: pip install -r requirements.txt" >&2
    exit 2
fi
uses_gpu="import torch; raise SystemExit(not torch.cuda.is_available())"
if nvidia-smi -L > /dev/null 2>&1 && ! "$python" -c "$uses_gpu"; then
    echo "gpu.sh: there is a GPU, but this torch does not use it: install its CUDA build" >&2
    exit 2
fi
exec "$python" -m tests.gpu "$@"
