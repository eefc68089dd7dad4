"""A folder that looks like an installed StarCraft II, and policies for the stand-in's battle."""

from pathlib import Path

from smac.env.starcraft2.maps.smac_maps import MAPS


def make_fake_sc2(path):
    """Make the folder tree of an installation at `path` (for SC2PATH). Returns the Path."""
    root = Path(path)
    game = root / "Versions" / "Base75689" / "SC2_x64"
    maps = root / "Maps" / "SMAC_Maps"
    for folder in (game.parent, maps, root / "Replays"):
        folder.mkdir(parents=True, exist_ok=True)
    game.write_text("#!/bin/sh\nexec sleep 100000\n")
    game.chmod(0o755)
    for name in MAPS:
        (maps / f"{name}.SC2Map").write_bytes(b"stand-in map\n")
    return root


def focus_fire(avail):
    """Wins: shoot at the first target in range, else stand. avail: lists of n masks."""
    return [next((a for a in range(6, len(m)) if m[a]), 1 - m[0]) for m in avail]


def stand_still(avail):
    """Loses: stop, or no-op for the dead."""
    return [1 - m[0] for m in avail]


def flee(avail):
    """Runs into the time limit: north, to the edge of the map."""
    return [2 if m[2] else 1 - m[0] for m in avail]
