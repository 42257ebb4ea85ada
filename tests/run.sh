#!/usr/bin/env bash
# The tests, a few minutes on two cores. Installs what they need into .venv (see environment.sh).
#
#     bash tests/run.sh                        # all
#     bash tests/run.sh tests/test_losses.py   # or what pytest takes
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/environment.sh tests/requirements.txt
pytest -q "$@"
