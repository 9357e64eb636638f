#!/usr/bin/env bash
# Trains. Sets up .venv on first use; then runs config/config.json if there is one, with the script for its model_family and
# model_type, else the embedded demo.
#     bash train.sh [flags of the script]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh requirements.txt

if [ -f config/config.json ]; then
    script=$(python -c 'from library import dialects; print(dialects.script_of("config/config.json"))')
    exec accelerate launch ${ACCELERATE_FLAGS:-} "$script" --config_file config/config.json "$@"
fi
exec bash config/demo/run.sh "$@"
