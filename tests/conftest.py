"""What several files of tests use."""

import copy

import pytest

import maipg_smac as smac


@pytest.fixture(scope="module")
def compiled_once():
    """SMAX is traced and compiled once for each map and number of games."""
    genuine, made = smac.SMAXEnvs, {}

    def games(args):
        key = args.map_name, args.num_envs
        made[key] = made.get(key) or genuine(args)
        envs = copy.copy(made[key])
        envs.args = args
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smac, "SMAXEnvs", games)
        yield
