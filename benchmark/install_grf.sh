#!/usr/bin/env bash
# Google Research Football (gfootball 2.10.2) for maipg_grf.py, compiled in about 4 minutes on 2 cores.
#
#     benchmark/install_grf.sh
#
# Run it in the virtual environment (Python 3.11) that requirements.txt was installed into, on Debian
# or Ubuntu. It needs root, or sudo, for the Debian packages; if these are there, neither.
set -euo pipefail
cd "$(dirname "$0")/.."

packages="g++ make cmake libgl1-mesa-dev libgl1-mesa-dri libegl1 libsdl2-dev libsdl2-image-dev"
packages+=" libsdl2-ttf-dev libsdl2-gfx-dev libboost-all-dev"
if ! dpkg -s $packages > /dev/null 2>&1; then
    root=""
    [ "$(id -u)" = 0 ] || root=sudo
    $root apt-get update -q
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $packages
fi
# The build asks `python3` on the PATH for psutil, and runs with the setuptools that is installed.
if ! python -c "import sys; sys.exit(sys.prefix == sys.base_prefix)"; then
    echo "error: activate the virtual environment first" >&2
    exit 2
fi
grep -v gfootball requirements-grf.txt | python -m pip install -q -r /dev/stdin
python -m pip install -q --no-build-isolation -r requirements-grf.txt
python -c "
from gfootball.env import create_environment
env = create_environment(env_name='academy_empty_goal_close', representation='simple115v2')
assert env.reset().shape == (115,)
print('gfootball works: python maipg_grf.py --scenario academy_empty_goal_close')
"
