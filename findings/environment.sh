# Sourced by every finding: runs the Python on standard input in a temporary environment that holds
# the named packages and nothing of this project.
# Its exit code is the finding's: 0 behaves as described, 1 has changed.
set -euo pipefail

in_an_environment_of() {
  local scratch code=0
  scratch=$(mktemp -d)
  cat > "$scratch/look.py"
  python3 -m venv "$scratch/venv"
  "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  (cd "$scratch" && env -u PYTHONPATH HF_HUB_OFFLINE=1 "$scratch/venv/bin/python" -W ignore look.py) ||
    code=$?
  rm -rf "$scratch"
  return "$code"
}
