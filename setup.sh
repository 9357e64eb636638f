# Sourced by train.sh and test/run.sh: makes .venv on first use and puts it on the PATH.
# Usage: source setup.sh REQUIREMENTS_FILE
# The environment is made anew only when the requirements change.

complain() { echo "error: $*" >&2; exit 1; }

find_python() {
    for candidate in "${PYTHON:-python3.11}" python3.12 python3.13 python3.10 python3 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$candidate"; return; }
    done
    return 1
}

prepare() {
    local wanted="$1" stamp venv="${VENV:-.venv}"
    stamp="$venv/installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$wanted" .txt)"
    if [ ! -e "$stamp" ]; then
        local python
        python=$(find_python) || complain "Python 3.10 or newer is needed and was not found. Install it, or name it: PYTHON=/path/to/python bash $0"
        "$python" -c 'import venv, ensurepip' 2>/dev/null || complain "$python has no venv module. On Debian and Ubuntu: apt install python3-venv"
        local free
        free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
        [ "$free" -ge "${NEED_GB:-8}" ] || complain "the packages need ${NEED_GB:-8} GB of disk and $PWD has $free GB left. Free some space"
        echo "Installing $wanted into $venv (once)"
        [ -e "$venv/bin/python" ] || "$python" -m venv "$venv" || complain "cannot make $venv in $PWD: is the disk full or read-only?"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" >"$venv/install.log" 2>&1 || {
            tail -n 3 "$venv/install.log" >&2
            complain "pip could not install $wanted: is there a network, or a mirror in pip's config? All of its words are in $venv/install.log"
        }
        touch "$stamp"
    fi
    PATH="$PWD/$venv/bin:$PATH"
    export PATH
}

prepare "$1"
