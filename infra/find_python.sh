#!/bin/sh
# Prints a Python 3.13, or says in one sentence what is missing.
for candidate in "${TROOP_PYTHON:-}" python3.13 python3 python; do
  [ -n "$candidate" ] || continue
  "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 13))' >/dev/null 2>&1 && { command -v "$candidate"; exit 0; }
done
for candidate in "$HOME"/.pyenv/versions/3.13*/bin/python /opt/hostedtoolcache/Python/3.13*/x64/bin/python /opt/homebrew/bin/python3.13 /usr/local/bin/python3.13; do
  [ -x "$candidate" ] && "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 && { echo "$candidate"; exit 0; }
done
echo "Python 3.13 with venv is missing: install it (python.org, pyenv install 3.13, or apt install python3.13 python3.13-venv), then run make again." >&2
exit 1
