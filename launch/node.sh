# shellcheck shell=bash disable=SC2154
# Sourced by the launchers, with $root: the environment of this node's processes.

# The checkout's own environment if there is one (launch/environment.sh makes it), else the python at hand (an image's).
# shellcheck disable=SC1091
[ -f "$root/.venv/bin/activate" ] && source "$root/.venv/bin/activate"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without a GPU DeepSpeed is told so, or it warns that it found none.
[ -e /dev/nvidiactl ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
