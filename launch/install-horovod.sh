#!/usr/bin/env bash
# Horovod for .venv, built against its torch and its MPI (once: about five minutes on two cores):
#     ./launch/install-horovod.sh
# Plain "pip install horovod" does not do: in pip's isolated build there is no torch to build against, and Horovod
# 0.28.1 asks for C++14 where today's torch headers need C++17. Needs a C++ compiler and make (Debian, Ubuntu: apt-get
# install build-essential); CXX names another compiler. The wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/fedmpi/wheels,
# by the versions it was built for, so that the next clone has it in seconds. A Horovod that works stays as it is.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pip_install() { "$VENV/bin/pip" install --disable-pip-version-check --quiet -c "$ROOT/launch/constraints.txt" "$@"; }

# What a wheel is good for: Horovod, torch, Python, the MPI that mpi4py loads, the machine.
wheel_key() {
    "$VENV/bin/python" - "$1" <<'PYTHON'
import platform, re, sys
from importlib.metadata import version
from mpi4py import MPI

mpi = MPI.Get_library_version().splitlines()[0].split(",")[0]
python = f"py{sys.version_info.major}.{sys.version_info.minor}"
print(*(re.sub(r"[^\w.+-]+", "-", part.strip()) for part in
        (sys.argv[1], f"torch-{version('torch')}", python, mpi, platform.machine())), sep="_")
PYTHON
}

works() { # a real collective of two ranks, torch tensors in and out
    (
        mpi_env 2
        "$VENV/bin/python" -c 'import horovod.torch' && mpiexec -n 2 "$VENV/bin/python" -c '
import torch, horovod.torch as hvd
hvd.init()
assert hvd.size() == 2 and hvd.mpi_built()
assert hvd.allreduce(torch.full((3,), float(hvd.rank())), op=hvd.Sum).tolist() == [1.0] * 3
hvd.shutdown()'
    ) </dev/null
}

# compiler_shim FILE COMPILER: a compiler that knows C++14 as C++17. Run paths into .venv become relative to
# horovod/torch/mpi_lib_v2.so, or a second clone's Horovod would load the first one's libmpi beside its own.
compiler_shim() {
    local packages
    packages=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    cat >"$1" <<SHIM
#!/usr/bin/env bash
arguments=()
for a; do
    case \$a in
        -std=c++14 | -std=gnu++14) a=-std=c++17 ;;
        -Wl,*) a=\${a//"$packages"/'\$ORIGIN/../..'} a=\${a//"$VENV/lib"/'\$ORIGIN/../../../..'} ;;
    esac
    arguments+=("\$a")
done
exec "$2" "\${arguments[@]}"
SHIM
    chmod +x "$1"
}

build() { # build REQUIREMENT FOLDER: the wheel of Horovod, in FOLDER
    local compiler tmp jobs hint="Horovod has to be built (Debian, Ubuntu: apt-get install build-essential)"
    # shellcheck disable=SC2086 # several names
    compiler=$(command -v ${CXX:-c++ g++ clang++} | head -n 1) || true
    [[ -n $compiler ]] || die "no C++ compiler (${CXX:-c++, g++, clang++}), and $hint"
    command -v make >/dev/null || die "no make, and $hint"
    command -v mpicxx >/dev/null || die "no mpicxx, and Horovod has to be built with the MPI that it will run under"
    jobs=$(cores)
    say "building $1 (once; about five minutes on two cores)"
    pip_install cmake setuptools packaging psutil cloudpickle cffi PyYAML # what its setup.py and CMakeLists.txt use
    mkdir -p "$2" || die "cannot write in $2, where the wheel has to go; XDG_CACHE_HOME names another place"
    tmp=$(mktemp -d "$2/build.XXXXXX")
    # shellcheck disable=SC2064 # expanded now: tmp is local
    trap "rm -rf '$tmp'" EXIT
    compiler_shim "$tmp/c++" "$compiler"
    # Never from pip's cache, which does not know for which torch a wheel was built.
    CXX=$tmp/c++ MAKEFLAGS=-j$((jobs > 2 ? 2 : jobs)) CMAKE_POLICY_VERSION_MINIMUM=3.5 \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        "$VENV/bin/pip" wheel --disable-pip-version-check --no-cache-dir --no-build-isolation --no-deps \
        --no-binary horovod --wheel-dir "$tmp" "$1" ||
        die "Horovod could not be built; the compiler's message is above"
    mv "$tmp"/horovod-*.whl "$2/"
}

cd "$ROOT"
[[ ${VIRTUAL_ENV-} == "$VENV" ]] || ensure_venv mpi # launch/test.sh has made it, with more in it
requirement=$(grep '^horovod==' launch/constraints.txt)
key=$(wheel_key "${requirement/==/-}")
stamp=$VENV/.fedmpi-horovod
[[ ! -e $stamp || $(<"$stamp") != "$key" ]] || exit 0 # installed, and nothing that it was built for has changed

if ! works 2>/dev/null; then
    folder=${XDG_CACHE_HOME:-$HOME/.cache}/fedmpi/wheels/$key
    compgen -G "$folder/horovod-*.whl" >/dev/null || build "$requirement" "$folder"
    say "installing $requirement from $folder"
    pip_install --force-reinstall --no-deps "$folder"/horovod-*.whl
    pip_install "$folder"/horovod-*.whl # its dependencies
    works || die "Horovod was installed but two ranks could not add up a tensor; delete $folder to build it anew"
fi
printf '%s\n' "$key" >"$stamp"
