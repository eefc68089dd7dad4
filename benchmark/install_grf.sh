#!/usr/bin/env bash
# Google Research Football (gfootball 2.10.2) for maipg_grf.py, compiled in about 4 minutes on 2 cores.
#
#     benchmark/install_grf.sh
#
# Run it on Debian or Ubuntu, in the virtual environment that requirements.txt was installed into.
# Its Python has to be of the distribution's version, for which Boost.Python is built. Root, or sudo,
# is needed for Debian packages that are not there yet.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}
python -c "import sys; sys.exit(sys.prefix == sys.base_prefix)" 2> /dev/null ||
    fail "activate the virtual environment first"
command -v apt-get > /dev/null || fail "no apt-get: this needs Debian or Ubuntu"

# Of Boost, what the engine links: see gfootball's CMakeLists.txt.
packages="g++ make cmake libgl1-mesa-dev libgl1-mesa-dri libegl1 libsdl2-dev libsdl2-image-dev"
packages+=" libsdl2-ttf-dev libsdl2-gfx-dev libboost-python-dev libboost-thread-dev"
packages+=" libboost-filesystem-dev libboost-system-dev"
missing=""
for package in $packages; do
    dpkg -s "$package" 2> /dev/null | grep -q "^Status: install ok installed" || missing+=" $package"
done
root=""
[ "$(id -u)" = 0 ] || root=sudo
if [ -n "$missing" ]; then
    [ -z "$root" ] || command -v sudo > /dev/null || fail "as root: apt-get install$missing"
    $root apt-get update -q
fi
version=$(python -c "import sys; print('%d.%d' % sys.version_info[:2])")
theirs=$(LC_ALL=C apt-cache policy libpython3-dev | sed -n 's/ *Candidate: \([0-9]*\.[0-9]*\).*/\1/p')
[ "$version" = "$theirs" ] || ls /usr/lib/*/libboost_python"${version//./}".so > /dev/null 2>&1 ||
    fail "this is Python $version, but Boost.Python of this system is for Python ${theirs:-?}"
if [ -n "$missing" ]; then
    echo "installing the Debian packages$missing, and what they depend on"
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi

# The build needs an old setuptools, and asks `python3` on the PATH for psutil; torch wants a new
# setuptools, so that it is put back, whatever happens.
echo "installing with pip: $(sed 's/ *#.*//' requirements-grf.txt | tr '\n' ' ')"
setuptools=$(python -m pip freeze --all | grep "^setuptools==" || true)
restore() {
    if [ -n "$setuptools" ]; then
        python -m pip install -q "$setuptools"
    else
        python -m pip uninstall -q -y setuptools
    fi
}
trap restore EXIT
grep -v "^gfootball" requirements-grf.txt | python -m pip install -q -r /dev/stdin
python -m pip install -q --no-build-isolation -r requirements-grf.txt
restore
trap - EXIT
python -W ignore -c "
from gfootball.env import create_environment
env = create_environment(env_name='academy_empty_goal_close', representation='simple115v2')
assert env.reset().shape == (115,)
print('gfootball works: python maipg_grf.py --scenario academy_empty_goal_close')
"
