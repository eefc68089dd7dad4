"""What several files of tests use."""

import copy
import os
import signal

import pytest

import maipg_smac as smac


@pytest.fixture
def signalled(monkeypatch):
    """signalled(script): a signal comes before each of its rollouts; no evaluation may follow."""

    def patch(script):
        rollout = script.rollout

        def after_a_signal(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return rollout(*args)

        monkeypatch.setattr(script, "rollout", after_a_signal)
        monkeypatch.setattr(script, "evaluate", lambda *_: pytest.fail("an evaluation begins"))

    return patch


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
