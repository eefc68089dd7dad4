"""The 23 maps: who fights whom, and the time limit in steps.

A roster such as "2s3z" is two stalkers and three zealots: m marine, a marauder, d medivac,
s stalker, z zealot, c colossus, h hydralisk, l zergling, b baneling, k spine crawler.
"""

import re

MAPS = {  # name: (allies, enemies, time limit)
    "3m": ("3m", "3m", 60),
    "8m": ("8m", "8m", 120),
    "25m": ("25m", "25m", 150),
    "5m_vs_6m": ("5m", "6m", 70),
    "8m_vs_9m": ("8m", "9m", 120),
    "10m_vs_11m": ("10m", "11m", 150),
    "27m_vs_30m": ("27m", "30m", 180),
    "MMM": ("2a7m1d", "2a7m1d", 150),
    "MMM2": ("2a7m1d", "3a8m1d", 180),
    "2s3z": ("2s3z", "2s3z", 120),
    "3s5z": ("3s5z", "3s5z", 150),
    "3s5z_vs_3s6z": ("3s5z", "3s6z", 170),
    "3s_vs_3z": ("3s", "3z", 150),
    "3s_vs_4z": ("3s", "4z", 200),
    "3s_vs_5z": ("3s", "5z", 250),
    "1c3s5z": ("1c3s5z", "1c3s5z", 180),
    "2m_vs_1z": ("2m", "1z", 150),
    "corridor": ("6z", "24l", 400),
    "6h_vs_8z": ("6h", "8z", 150),
    "2s_vs_1sc": ("2s", "1k", 300),
    "so_many_baneling": ("7z", "32b", 100),
    "bane_vs_bane": ("4b20l", "4b20l", 200),
    "2c_vs_64zg": ("2c", "64l", 400),
}
MAP_TYPES = {  # kinds of the allies: name
    "m": "marines",
    "amd": "MMM",
    "sz": "stalkers_and_zealots",
    "csz": "colossi_stalkers_zealots",
    "s": "stalkers",
    "z": "zealots",
    "h": "hydralisks",
    "bl": "bane",
    "c": "colossus",
}


def race(kinds):
    """T, P or Z."""
    return "T" if kinds[0] in "mad" else "P" if kinds[0] in "szc" else "Z"


def units(roster):
    """List of kinds, one letter a unit: "2s3z" -> ["s", "s", "z", "z", "z"]."""
    return [kind for n, kind in re.findall(r"(\d+)([a-z])", roster) for _ in range(int(n))]


def get_smac_map_registry():
    """Dictionary of the settings of every map."""
    registry = {}
    for name, (allies, enemies, limit) in MAPS.items():
        kinds = "".join(dict.fromkeys(units(allies)))
        registry[name] = {
            "n_agents": len(units(allies)),
            "n_enemies": len(units(enemies)),
            "limit": limit,
            "a_race": race(kinds),
            "b_race": race(units(enemies)),
            "unit_type_bits": len(kinds) if len(kinds) > 1 else 0,
            "map_type": MAP_TYPES[kinds],
        }
    return registry
