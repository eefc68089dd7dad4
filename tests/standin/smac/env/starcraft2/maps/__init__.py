"""Settings of a map."""

from smac.env.starcraft2.maps.smac_maps import get_smac_map_registry


def get_map_params(map_name):
    """Dictionary of one map's settings; KeyError for an unknown map, like the genuine one."""
    return get_smac_map_registry()[map_name]
