#!/usr/bin/env bash
# StarCraft II 4.10 (Linux), the SMAC maps and oxwhirl's smac, for `maipg_smac.py --backend sc2`.
#
#     AGREE_TO_EULA=1 benchmark/install_sc2.sh [FOLDER]      (default: $SC2PATH, or ~/StarCraftII)
#     benchmark/install_sc2.sh --check [FOLDER]              is all there, and if not, what to mend?
#
# Needs internet access, curl, unzip, git and about 8 GB; run it in the virtual environment that
# requirements.txt was installed into. Blizzard's archive is protected by the words with which one
# accepts its licence (https://github.com/Blizzard/s2client-proto): set AGREE_TO_EULA=1 to do so.
set -euo pipefail

only_check=""
if [ "${1:-}" = --check ]; then
    only_check=yes
    shift
fi
SC2PATH=$(realpath -m "${1:-${SC2PATH:-$HOME/StarCraftII}}")
SMAC_COMMIT=d6aab33f76abc3849c50463a8592a84f59a5ef84

fail() {
    echo "error: $1" >&2
    exit 2
}

check() {
    [ -d "$SC2PATH" ] || fail "no folder $SC2PATH: set SC2PATH, or run this script without --check"
    set -- "$SC2PATH"/Versions/Base*/SC2_x64
    [ -x "$1" ] || fail "no game in $SC2PATH (Versions/Base*/SC2_x64): delete it, and run this script"
    build=$(basename "$(dirname "$1")")
    echo "game: $build$([ "$build" != Base75689 ] || echo ", which is version 4.10") in $SC2PATH"
    set -- "$SC2PATH"/Maps/SMAC_Maps/*.SC2Map
    [ -s "$1" ] || fail "no SMAC map in $SC2PATH/Maps/SMAC_Maps: run this script"
    echo "maps: $# in $SC2PATH/Maps/SMAC_Maps"
    folder=$(python -c "import smac; print(smac.__path__[0])" 2> /dev/null) ||
        fail "smac is not installed for $(command -v python): run this script"
    [ -d "$folder/env" ] || fail "smac is AutoML's: pip uninstall smac, and run this script"
    problem=$(python -W ignore -c "from smac.env import StarCraft2Env" 2>&1) ||
        fail "smac cannot be imported: ${problem##*$'\n'}"
    echo "smac: $folder"
    [ "$SC2PATH" = "$HOME/StarCraftII" ] || echo "set this: export SC2PATH=$SC2PATH"
}

if [ -n "$only_check" ]; then
    check
    exit
fi
[ "${AGREE_TO_EULA:-0}" = 1 ] ||
    fail "set AGREE_TO_EULA=1 to accept Blizzard's AI and Machine Learning licence"
for tool in curl unzip git python; do
    command -v "$tool" > /dev/null || fail "$tool is missing"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -d "$SC2PATH/Versions" ]; then
    curl -fL -o "$work/game.zip" https://blzdistsc2-a.akamaihd.net/Linux/SC2.4.10.zip
    mkdir -p "$work/game"
    unzip -q -P iagreetotheeula "$work/game.zip" -d "$work/game"
    mkdir -p "$SC2PATH"
    mv "$work/game/StarCraftII/Versions" "$work/Versions"
    cp -r "$work/game/StarCraftII/." "$SC2PATH/"
    rm -rf "$SC2PATH/Versions.part"  # the last, and whole: what is asked for above
    cp -r "$work/Versions" "$SC2PATH/Versions.part"
    mv "$SC2PATH/Versions.part" "$SC2PATH/Versions"
fi
git clone -q https://github.com/oxwhirl/smac.git "$work/smac"
git -C "$work/smac" checkout -q "$SMAC_COMMIT"
mkdir -p "$SC2PATH/Maps"  # the maps are in smac's repository; its installation leaves them out
cp -rn "$work/smac/smac/env/starcraft2/maps/SMAC_Maps" "$SC2PATH/Maps/"
# smac asks for protobuf < 3.21 and TensorBoard for 6.31 or newer. Both work with today's protobuf if
# the game's protocol is generated for it (pys2clientprotocol), so smac's own pins are left out.
python -m pip install absl-py deepdiff mock mpyq portpicker requests six websocket-client \
    s2protocol pygame-ce scipy pys2clientprotocol==1.0.2
python -m pip install --no-deps pysc2==4.0.0 "$work/smac"

check
# Does it work? Ten steps of training and a greedy episode.
SC2PATH="$SC2PATH" python "$(dirname "$0")/../maipg_smac.py" --backend sc2 --map-name 3m \
    --num-envs 1 --rollout-steps 10 --total-timesteps 10 --eval-episodes 1 --runs-dir "$work"
echo "ok: maipg_smac.py has played StarCraft II"
