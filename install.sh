#!/usr/bin/env bash
# Sets up hvlite in .venv beside this file, from the versions in constraints.txt. Run it again at any time: it does only
# what has changed. Nothing outside .venv is touched.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./install.sh [--dev] [--flash] [--verbose]

  --dev      also what the tests and linters need
  --flash    also build flash-attn from source: needs nvcc and an hour or so; never done otherwise
  --verbose  show what pip does

PYTHON=/path/to/python chooses the interpreter for a new .venv. Delete .venv to start afresh.
TEXT
}

say() { printf '%s\n' "$*"; }

die() {
    printf 'install.sh: %s\n' "$2" >&2
    exit "$1"
}

refuse_native_windows() {
    case "$(uname -s)" in
        MINGW* | MSYS* | CYGWIN*)
            die 2 "native Windows is not supported: streaming needs pinned host memory and file renames as Linux does \
them. Use WSL2: run 'wsl --install', then this script inside it."
            ;;
    esac
}

# Prints the interpreter for a new .venv. 3.11 first: it is what the tests run with.
find_python() {
    local candidate without_venv=""
    if [ -n "${PYTHON:-}" ]; then
        runs 'sys.version_info >= (3, 11)' "$PYTHON" || die 1 "PYTHON=$PYTHON is not a Python of 3.11 or newer that runs."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        runs 'sys.version_info >= (3, 11)' "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    [ -z "$without_venv" ] || die 1 "$without_venv cannot make virtual environments: its venv or ensurepip module is missing. \
On Debian and Ubuntu: sudo apt install python3-venv; then run this again."
    die 1 "no Python of 3.11 or newer found (looked for python3.11 to python3.14, python3, python). Install one, or name it: \
PYTHON=/path/to/python ./install.sh"
}

# runs CONDITION PYTHON: whether that interpreter exists, starts, and meets the condition.
runs() {
    "$2" -c "import sys; sys.exit(not ($1))" 2>/dev/null
}

# Keeps a .venv that works; one that was moved or copied here does not, since its scripts name their old folder.
make_venv() {
    if runs 'sys.version_info >= (3, 11)' "$python" && "$python" -c 'import pip' 2>/dev/null &&
        grep -qF "$PWD/.venv" .venv/bin/activate; then
        return
    fi
    local base
    base="$(find_python)"
    say "making .venv with $("$base" --version) ($base)"
    "$base" -m venv --clear .venv
}

pip_install() {
    "$python" -m pip install "$pip_talk" --disable-pip-version-check --no-input -c constraints.txt "$@"
}

# What decides whether an earlier run still holds.
fingerprint() {
    cat pyproject.toml constraints.txt | cksum
}

# install_hvlite EXTRAS: `core` or `dev`; dev includes core.
install_hvlite() {
    local now stamp
    now="$(fingerprint)"
    for stamp in ".venv/.hvlite-$1" .venv/.hvlite-dev; do
        if [ -x .venv/bin/hvlite ] && [ "$(cat "$stamp" 2>/dev/null)" = "$now" ]; then
            say "hvlite and its packages are up to date"
            return
        fi
    done
    say "installing hvlite and its packages; torch is large: the first time takes minutes and several GB of disk"
    rm -f .venv/.hvlite-core .venv/.hvlite-dev
    if [ "$1" = dev ]; then
        pip_install -e '.[dev]'
    else
        pip_install -e .
    fi
    "$python" -I -c 'import hvlite'
    printf '%s\n' "$now" >".venv/.hvlite-$1"
}

# Prints one line about the NVIDIA card of this machine, or nothing: its name and driver, or why there is no driver.
nvidia_card() {
    local device cards
    PATH="$PATH:/usr/lib/wsl/lib"
    if cards="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null)" && [ -n "$cards" ]; then
        cards="${cards%%$'\n'*}"
        say "${cards%, *}, driver ${cards##*, }"
        return
    fi
    if [ -r /proc/driver/nvidia/version ]; then
        say "unnamed, driver $(sed -nE '1s/.* ([0-9]{3,}(\.[0-9]+)+).*/\1/p' /proc/driver/nvidia/version)"
        return
    fi
    for device in /sys/bus/pci/devices/*; do
        if [ "$(cat "$device/vendor" 2>/dev/null)" = 0x10de ] && [[ "$(cat "$device/class" 2>/dev/null)" == 0x03* ]]; then
            say "unnamed, no driver"
            return
        fi
    done
}

# Says what to do when there is an NVIDIA card that torch cannot use. Never fails: hvlite then runs on the CPU.
check_nvidia() {
    local card
    card="$(nvidia_card)"
    [ -n "$card" ] || return 0
    "$python" - "$card" <<'PYTHON' || say "warning: torch could not be asked about the NVIDIA card ($card)"
import os
import re
import sys
import warnings

import torch

card = sys.argv[1]
driver = re.search(r"driver ((\d+)[\d.]*)", card)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    usable = torch.cuda.is_available()
cuda = torch.version.cuda
built = f"torch {torch.__version__}, built " + (f"for CUDA {cuda}" if cuda else "without CUDA")
needed = {"11": 450, "12": 525, "13": 580}.get((cuda or "").split(".")[0])

if usable:
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        print(f"GPU {index}: {name}, {driver[0] if driver else 'driver unknown'}, {built}")
        if capability < (8, 0):
            print(f"  compute capability {capability[0]}.{capability[1]} is below 8.0, so it lacks bf16: use --dtype fp32")
    sys.exit()
print(f"warning: this machine's NVIDIA card ({card}) cannot be used by {built}.")
if driver is None:
    print("  why:  no NVIDIA driver is loaded")
    print("  next: install your distribution's NVIDIA driver, reboot, and run ./install.sh again")
elif not cuda:
    print("  why:  this build of torch is for the CPU only")
    print(f"  next: install torch {torch.__version__.split('+')[0]} for CUDA into .venv, as PyTorch's installation page says")
elif needed and int(driver[2]) < needed:
    print(f"  why:  CUDA {cuda} needs driver {needed} or newer; found {driver[1]}")
    print(f"  next: update the driver, or install torch {torch.__version__.split('+')[0]} for an older CUDA into .venv,")
    print("        as PyTorch's installation page says")
elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
    print(f"  why:  perhaps because CUDA_VISIBLE_DEVICES is set to \"{os.environ['CUDA_VISIBLE_DEVICES']}\"")
    print("  next: unset it and run ./install.sh again")
else:
    said = " ".join(str(caught[-1].message).split()) if caught else "torch gives no reason"
    print(f"  why:  {said}")
    print("  next: run nvidia-smi; if it fails, reboot (a driver updated under a running system does this)")
print("  Until then hvlite runs on the CPU.")
PYTHON
}

# Prints the path of CUDA's compiler, or nothing.
find_nvcc() {
    local candidate
    for candidate in "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "$(command -v nvcc || true)"; do
        if [ -x "$candidate" ]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

announce_flash() {
    say "flash-attn is built from source. That needs:"
    say "  nvcc   CUDA's compiler, of the same major version as torch's CUDA"
    say "  time   10 minutes on 32 cores, an hour or more on 8"
    say "  memory about 6 GiB for each compiler job (MAX_JOBS sets how many)"
    say "Without it hvlite uses torch's own attention kernels; nothing else changes."
    [ -n "$(find_nvcc)" ] || die 1 "--flash needs nvcc, and none was found in CUDA_HOME, /usr/local/cuda or PATH. \
Install the CUDA toolkit, or leave --flash away."
}

build_flash() {
    local nvcc found wanted jobs cores
    if "$python" -c 'import flash_attn' 2>/dev/null; then
        say "flash-attn is already there"
        return
    fi
    nvcc="$(find_nvcc)"
    found="$("$nvcc" --version | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')"
    wanted="$("$python" -c 'import torch; print(torch.version.cuda or "")')"
    [ -n "$wanted" ] || die 1 "--flash needs a torch that is built for CUDA; this one is for the CPU only."
    [ "${found%%.*}" = "${wanted%%.*}" ] || die 1 "--flash needs nvcc of CUDA ${wanted%%.*} (torch is built for $wanted); \
$nvcc is of CUDA $found. Set CUDA_HOME to the folder of a CUDA ${wanted%%.*} toolkit."
    jobs=$(($(sed -nE 's/^MemAvailable: *([0-9]+).*/\1/p' /proc/meminfo) / 1048576 / 6))
    cores="$(nproc)"
    [ "$jobs" -le "$cores" ] || jobs="$cores"
    [ "$jobs" -ge 1 ] || jobs=1
    export MAX_JOBS="${MAX_JOBS:-$jobs}" CUDA_HOME="${nvcc%/bin/nvcc}"
    say "building flash-attn with nvcc $found, $MAX_JOBS jobs at a time, started $(date +%H:%M)"
    pip_install ninja packaging psutil setuptools wheel
    pip_install --no-build-isolation 'flash-attn>=2.7,<3'
}

main() {
    local extras=core flash=false argument
    pip_talk=--quiet
    for argument in "$@"; do
        case "$argument" in
            --dev) extras=dev ;;
            --flash) flash=true ;;
            --verbose) pip_talk=--progress-bar=on ;;
            -h | --help)
                usage
                exit 0
                ;;
            *)
                usage >&2
                die 2 "unknown argument '$argument'"
                ;;
        esac
    done
    refuse_native_windows
    cd -P "$(dirname "${BASH_SOURCE[0]}")"
    python="$PWD/.venv/bin/python"
    [ "$flash" = false ] || announce_flash
    make_venv
    install_hvlite "$extras"
    [ "$flash" = false ] || build_flash
    check_nvidia
    say "done in $SECONDS s. Next:"
    [ "$extras" = core ] || say '  .venv/bin/pytest'
    say '  .venv/bin/hvlite gen "a red circle moving left on a black background"'
}

main "$@"
