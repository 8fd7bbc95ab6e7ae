# Sourced by examples/quickstart.sh and tests/run.sh: afterwards `python` and `torchrun` are those of an environment
# that holds everything in requirements/pinned.txt and a torch.
#
# An active virtual or conda environment is used as it is; otherwise .venv in the repository. A torch that is there
# already stays, whatever it is. Interrupt and run again at will: a stamp is written last, and a .venv without one is
# rebuilt.

MEGATRON_COCOA_TORCH="torch==2.13.0"
MEGATRON_COCOA_STAMP=".megatron_cocoa-ready"

say() { printf '[set-up] %s\n' "$*"; }
fail() { printf '[set-up] ERROR: %s\n' "$*" >&2; exit 1; }

# Some version managers leave a launcher on PATH that only says which versions exist, and Debian ships Python without
# ensurepip: so each candidate is asked to run.
python_serves() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if python_serves "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module was found on PATH ($(python3 --version 2>&1 | head -n 1)):" \
        "install one (Debian, Ubuntu: apt-get install python3 python3-venv), or activate an environment that has one"
}

# A container with its own build of torch must keep it: the environment then sees the interpreter's packages.
create_venv() {
    local python=$1 site=""
    if "$python" -c 'import torch' >/dev/null 2>&1; then
        site="--system-site-packages"
        say "$python brings its own torch, which will be used"
    fi
    rm -rf .venv
    "$python" -m venv $site .venv || fail "$python could not create .venv in $PWD"
}

choose_environment() {
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        MEGATRON_COCOA_ENV=$VIRTUAL_ENV
    elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
        MEGATRON_COCOA_ENV=$CONDA_PREFIX
    else
        MEGATRON_COCOA_ENV=$PWD/.venv
        if [ ! -e .venv/$MEGATRON_COCOA_STAMP ] || ! .venv/bin/python -c '' 2>/dev/null; then
            local python
            python=$(find_python) || exit 1
            say "creating .venv with $("$python" --version)"
            create_venv "$python"
        fi
    fi
    export PATH="$MEGATRON_COCOA_ENV/bin:$PATH"
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "the environment in $MEGATRON_COCOA_ENV has $(python --version 2>&1), needed Python 3.11 or newer"
}

torch_version() {
    python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null
}

install_packages() {
    local torch constraints
    torch=$(torch_version) || {
        say "installing $MEGATRON_COCOA_TORCH (the largest part, some minutes)"
        python -m pip install "$MEGATRON_COCOA_TORCH" || fail "pip could not install $MEGATRON_COCOA_TORCH"
        torch=$(torch_version)
    }
    say "torch $torch is installed, adding the packages of requirements/pinned.txt"
    constraints=$(mktemp)
    echo "torch==$torch" >"$constraints"
    python -m pip install --quiet --constraint "$constraints" --requirement requirements/pinned.txt ||
        fail "pip could not install requirements/pinned.txt beside torch $torch in $MEGATRON_COCOA_ENV"
    rm -f "$constraints"
}

# Call from the repository root.
setup_environment() {
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if command -v flock >/dev/null; then
        exec 9>.venv.lock
        flock --nonblock 9 || { say "waiting for another set-up in this folder" && flock 9; }
    fi
    choose_environment
    local wanted stamp
    wanted=$(python -c 'import hashlib, sys
print(sys.version.split()[0], hashlib.sha256(open("requirements/pinned.txt", "rb").read()).hexdigest())')
    stamp=$MEGATRON_COCOA_ENV/$MEGATRON_COCOA_STAMP
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -n "$(torch_version)" ]; then
        say "environment $MEGATRON_COCOA_ENV is ready"
    else
        rm -f "$stamp"
        install_packages
        echo "$wanted" >"$stamp"
        say "environment $MEGATRON_COCOA_ENV is ready: $(python --version), torch $(torch_version)"
    fi
    if command -v flock >/dev/null; then
        exec 9>&-
    fi
}
