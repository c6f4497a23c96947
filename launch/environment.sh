# shellcheck shell=bash
# Sourced, from the checkout's root: source launch/environment.sh [EXTRAS]        (EXTRAS: "", "test", "test,dev", "gpu")
#
# Makes or re-uses .venv in the checkout, installs the package with the tested versions of constraints.txt, and
# activates it. Later calls see by a stamp that nothing changed. Safe to interrupt, and to start twice at once.
#
#   PYTHON       interpreter to make .venv with (default: python3.11, else the first python3 from 3.11)
#   TORCH_INDEX  package index to take torch from, such as one of CPU-only builds (default: pip's own)

zebra_say() { printf '%s\n' "$*" >&2; }

zebra_python() { # the interpreter to make .venv with
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        if ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            zebra_say "error: $candidate has no venv module with pip in it; install it (Debian, Ubuntu: apt install $("$candidate" -c \
                'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
            return 1
        fi
        printf '%s\n' "$candidate"
        return
    done
    zebra_say "error: no ${PYTHON:-python3} of version 3.11 or later found; install Python 3.11, or name one: PYTHON=/path/to/python3.11"
    return 1
}

zebra_pip() { # pip install, its progress on one line (without a terminal: only what is large), all of it in a log
    local large='^ *(Downloading .*[0-9]{2,}(\.[0-9]+)? [MG]B|Building wheel|Installing collected)' here=0
    [ -t 2 ] && here=1
    set -o pipefail
    .venv/bin/python -m pip install --progress-bar off --no-input --disable-pip-version-check "$@" 2>&1 | tee -a .venv/install.log |
        awk -v terminal="$here" -v large="$large" '
            terminal && /^ *(Collecting|Downloading|Building|Installing)/ { printf "\r\033[K  %s", substr($0, 1, 100); fflush() }
            !terminal && $0 ~ large { print "  " substr($0, 1, 100); fflush() }
            END { if (terminal) printf "\r\033[K" }' >&2
}

zebra_install() { # EXTRAS, comma-separated
    local extras=${1:+[$1]} torch_index=()
    [ -n "${TORCH_INDEX:-}" ] && torch_index=(--index-url "$TORCH_INDEX")
    zebra_pip -c constraints.txt "${torch_index[@]+"${torch_index[@]}"}" torch || return
    # DeepSpeed is installed after torch, and compiles nothing now: its kernels are made at first use where there is a GPU.
    DS_BUILD_OPS=0 zebra_pip -c constraints.txt -e ".$extras" || return
    if [[ ",$1," == *,test,* ]]; then
        # Its reader of .bin/.idx is an oracle of one test; the rest of its dependencies is not needed.
        zebra_pip -c constraints.txt --no-deps megatron-core || return
    fi
}

zebra_prepare() { # EXTRAS; with the lock held
    local wanted=$1 stamp=.venv/.zebra-installed version python extra begun=$SECONDS
    version="$(cat pyproject.toml constraints.txt | cksum) $PWD"
    local have_version="" have_extras=","
    [ -f $stamp ] && { IFS= read -r have_version && IFS= read -r have_extras; } <$stamp
    if [ "$have_version" = "$version" ] && [ -x .venv/bin/python ]; then
        local missing=""
        for extra in ${wanted//,/ }; do [[ $have_extras == *,$extra,* ]] || missing=yes; done
        [ -z "$missing" ] && return
    else
        have_extras=","
    fi
    if [ -e .venv/.incomplete ] || { [ -n "$have_version" ] && [ "${have_version#* * }" != "$PWD" ]; }; then
        zebra_say "environment: .venv was left half-made, or made for another folder; making it anew"
        find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    fi
    rm -f $stamp
    touch .venv/.incomplete
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(zebra_python) || { rm -f .venv/.incomplete; return 1; }
        zebra_say "environment: making .venv with $("$python" --version)"
        "$python" -m venv .venv || return
    fi
    for extra in ${have_extras//,/ }; do [[ ,$wanted, == *,$extra,* ]] || wanted=${wanted:+$wanted,}$extra; done
    zebra_say "environment: installing megatron-zebra${wanted:+[$wanted]} and what it needs (some minutes the first time; log: .venv/install.log)"
    if ! zebra_install "$wanted"; then
        zebra_say "environment: that failed; once more"
        if ! zebra_install "$wanted"; then
            rm -f .venv/.incomplete
            tail -n 15 .venv/install.log >&2
            zebra_say "error: installing failed (see above; the whole log: .venv/install.log)"
            return 1
        fi
    fi
    printf '%s\n,%s,\n' "$version" "$wanted" >$stamp.new
    mv $stamp.new $stamp
    rm -f .venv/.incomplete
    zebra_say "environment: ready after $((SECONDS - begun)) s"
}

zebra_environment() { # EXTRAS
    if [ ! -f constraints.txt ] || [ ! -f pyproject.toml ]; then
        zebra_say "error: launch/environment.sh is to be sourced from the checkout's root"
        return 1
    fi
    mkdir -p .venv
    # In a subshell that holds the lock: it goes with the subshell, however that ends.
    (
        if command -v flock >/dev/null; then
            exec 9>.venv/.lock
            flock -n 9 || { zebra_say "environment: waiting for another call that is making .venv"; flock 9; }
        fi
        zebra_prepare "$1"
    ) || return
    # shellcheck disable=SC1091
    source .venv/bin/activate
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Without a GPU DeepSpeed is told so, or it warns that it found none.
    if [ ! -e /dev/nvidiactl ] && [ ! -e /dev/kfd ] && [ ! -e /dev/dxg ]; then
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    fi
}

# shellcheck disable=SC2046
zebra_environment "${1-}" || { unset -f $(compgen -A function zebra_); return 1; }
# shellcheck disable=SC2046
unset -f $(compgen -A function zebra_)
