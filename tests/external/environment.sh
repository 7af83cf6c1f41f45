# Sourced by the run.sh beside each test of an integration, with its own arguments: sets `root`, goes there, and activates a virtual environment in the folder
# given, kept and found again the next time, or in one that is gone with the script.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -gt 0 ]; then
    folder=$(mkdir -p "$1" && cd "$1" && pwd) # the caller's, so before we leave
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
cd "$root"
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
. "$folder/bin/activate"
rm -rf "$root"/acpo.egg-info # of an older build: found first from the checkout, it would hide entry points
extension=acpo_kernels/_C$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
if [ -e "$extension" ] && [ -z "$(find csrc setup.py -newer "$extension" -print -quit)" ]; then
    export ACPO_NO_EXT=1 # an editable install finds the checkout's own, which is up to date for this Python: it is not compiled again
fi
