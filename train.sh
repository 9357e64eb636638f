#!/usr/bin/env bash
# Trains. Sets up .venv on first use; then runs config/config.json if there is one, else the embedded demo.
#     bash train.sh [flags of the script]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh requirements.txt

if [ -f config/config.json ]; then
    exec accelerate launch ${ACCELERATE_FLAGS:-} train_sdxl.py --config_file config/config.json "$@"
fi
exec bash config/demo/run.sh "$@"
