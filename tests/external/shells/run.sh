#!/usr/bin/env bash
# Completion in the shells that are installed (Debian: apt-get install zsh fish), with the extra `completion` in an environment of its own.
#   tests/external/shells/run.sh [FOLDER of the environment, kept]
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
pip install -q -c constraints.txt -e '.[completion]'
python tests/external/shells/check.py
