#!/bin/sh
# Run the GPU tests on a machine that has Python with torch, transformers, triton and pytest; nothing is installed.
cd "$(dirname "$0")/../.." && exec "${PYTHON:-python3}" -m pytest -m gpu tests/gpu "$@"
