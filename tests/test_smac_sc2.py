"""The StarCraft II backend of maipg_smac.py, with tests/standin in place of the smac package."""

import contextlib
import copy
import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_smac as m

STANDIN = str(Path(__file__).with_name("standin"))
SMALL = "--map-name 3m --backend sc2 --device cpu --num-envs 1 --rollout-steps 20 --hidden-dim 8"
SMALL += " --eval-episodes 1 --update-epochs 1 --mixer-dim 8 --seed 3"


@pytest.fixture(autouse=True)
def standin(monkeypatch, tmp_path):
    """The stand-in in sys.path, an SC2PATH, a log, and a temporary folder of this test's own."""
    monkeypatch.syspath_prepend(STANDIN)
    from fake_install import make_fake_sc2

    monkeypatch.setenv("PYTHONPATH", STANDIN)
    monkeypatch.setenv("SC2PATH", str(make_fake_sc2(tmp_path / "sc2")))
    monkeypatch.setenv("STANDIN_SMAC_LOG", str(tmp_path / "log"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def order(monkeypatch, *faults):
    monkeypatch.setenv("STANDIN_SMAC_FAULTS", json.dumps(faults))


def read_log(folder, *calls):
    """The calls that workers made; the last line may be in the making."""
    path = folder / "log"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return [e for e in entries if e["call"] in calls and e["pid"] != os.getpid()]


def processes(folder):
    """Every worker and every game that the log tells of."""
    pids = {e["pid"] for e in read_log(folder, "init")}
    return pids | {e["child"] for e in read_log(folder, "launch")}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def leftovers(folder, patience=8.0):
    """Processes and temporary folders that are still there after some seconds."""
    deadline = time.monotonic() + patience
    while True:
        left = [pid for pid in processes(folder) if alive(pid)]
        left += [p.name for kind in ("sc-*", "maipg-*") for p in (folder / "tmp").glob(kind)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def make(num_envs, **settings):
    args = m.Args(map_name="3m", backend="sc2", device="cpu", num_envs=num_envs, **settings)
    return m.SC2Envs(args, seed=args.seed)


def stand_still(avail):
    return torch.where(avail[..., 0], 0, 1)


def progress(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------- healthy games
def test_equals_the_package_driven_directly(standin):
    from fake_install import flee, focus_fire
    from fake_install import stand_still as stand
    from smac.env import StarCraft2Env

    direct = StarCraft2Env("3m", seed=7, continuing_episode=True)
    outcomes, saw_dead = [], 0
    with contextlib.closing(make(1, seed=7)) as envs, contextlib.closing(direct):
        direct.reset()
        n, eye = direct.n_agents, np.eye(direct.n_agents)
        shape = direct.get_obs_size() + n, direct.get_state_size(), direct.n_actions
        assert (envs.obs_dim, envs.state_dim, envs.num_actions) == shape and envs.num_agents == n

        def same(seen):
            obs, state, avail = (x.numpy()[0] for x in seen)
            expected = np.concatenate([direct.get_obs(), eye], 1)
            np.testing.assert_allclose(obs, expected, atol=1e-6)
            np.testing.assert_allclose(state, np.stack([direct.get_state()] * n), atol=1e-6)
            np.testing.assert_array_equal(avail, np.array(direct.get_avail_actions(), dtype=bool))
            dead = direct._battle.allies.health == 0
            assert (obs[dead, :-n] == 0).all() and (avail[dead].argmax(1) == 0).all()
            assert (avail[dead].sum(1) == 1).all() and not avail[~dead, 0].any()
            return dead.sum()

        same(envs.reset())
        for policy in (stand, flee, focus_fire):
            done, total, length = False, 0.0, 0
            while not done:
                actions = policy(direct.get_avail_actions())
                reward, done, outcome = direct.step(actions)
                total, length = total + reward, length + 1
                *seen, got_reward, got_done, info = envs.step(torch.tensor([actions]))
                assert got_reward.item() == pytest.approx(reward, abs=1e-6)
                assert got_done.tolist() == [done] and info["broken"].tolist() == [False]
                saw_dead += same(info["final"])
                if done:
                    assert info["return"].item() == pytest.approx(total, abs=1e-5)
                    assert info["length"].item() == length
                    assert info["won"].item() == outcome["battle_won"]
                    outcomes.append((info["won"].item(), info["truncated"].item(), length))
                    direct.reset()
                same(seen)
        assert envs.restarts == 0
    # Lost the battle; ran into the limit; won the battle.
    assert [o[:2] for o in outcomes] == [(False, False), (False, True), (True, False)]
    assert outcomes[1][2] == direct.episode_limit and saw_dead > 0
    assert len(read_log(standin, "reset")) == 4  # three episodes, and the one just begun
    assert len(read_log(standin, "close")) == 1  # by itself, not killed
    assert leftovers(standin) == []


# ----------------------------------------------------------------------------------------- faults
def test_games_that_crash_die_or_hang_are_replaced(standin, monkeypatch, capfd):
    kinds = {3: "crash", 5: "die", 7: "hang"}  # step: what happens, in the first episode
    faults = zip(kinds.items(), (1, 1001, 2001))  # the seeds of the three games
    order(monkeypatch, *[{"seed": s, "step": t, "kind": kind} for (t, kind), s in faults])
    with contextlib.closing(make(3)) as envs:
        patient, start = envs.args, envs._start
        envs.args = copy.copy(patient)
        envs.args.game_timeout = 2.0  # for the hang, but not for the launch of a new game

        def start_patiently(k):
            envs.args = patient
            start(k)
            envs.args = copy.copy(patient)

        def receive(k, receive=envs._receive):
            envs.args.game_timeout = 2.0 if k == 2 else 120.0
            return receive(k)

        envs._start, envs._receive = start_patiently, receive
        _, _, avail = envs.reset()
        for t in range(1, 10):
            obs, state, avail, reward, done, info = envs.step(stand_still(avail))
            expected = [t == 3, t == 5, t == 7]
            assert info["broken"].tolist() == expected and done.tolist() == expected
            assert envs.restarts == sum(t >= s for s in kinds)
            for k in range(3):
                if expected[k]:  # all alive, all healthy: the first observation of an episode
                    assert reward[k] == 0 and not avail[k, :, 0].any()
                    assert not info["won"][k] and not info["truncated"][k]
                    battle = fresh_battle(1 + 1000 * k + 100_003)
                    np.testing.assert_allclose(obs[k, :, :-3], battle[0], atol=1e-6)
                    np.testing.assert_allclose(state[k, 0], battle[1], atol=1e-6)
        assert envs.failures == [1, 1, 1]  # in a row, until an episode ends
        while not done[0]:
            *_, avail, _, done, info = envs.step(stand_still(avail))
        assert envs.failures[0] == 0 and not info["broken"][0] and info["length"][0] > 1
        pids = processes(standin)
    assert len(pids) == 13 and leftovers(standin) == []  # smac itself relaunched game 0, too
    said = capfd.readouterr().err
    assert "game 0 is replaced: RuntimeError: the game crashed" in said
    assert "game 1 is replaced: its process ended" in said
    assert "game 2 is replaced: no answer within 2 s" in said
    rewards = {e["max_reward"] for e in read_log(standin, "step")}
    assert rewards == {365.0}  # 3 * 10 + 200 + 135: never grown by a second reset


def fresh_battle(seed):
    """(obs, state) of the first episode of a game with this seed."""
    from smac.env import StarCraft2Env

    with contextlib.closing(StarCraft2Env("3m", seed=seed)) as env:
        return env.reset()


def test_failures_in_a_row_stop_the_run(standin, monkeypatch):
    order(monkeypatch, {"step": 1, "kind": "raise", "builtin": False})
    with contextlib.closing(make(1, max_failures=2)) as envs:
        _, _, avail = envs.reset()
        envs.step(stand_still(avail))  # the first failure: replaced
        with pytest.raises(m.RunError, match="game 0 failed 2 times in a row: .*raise"):
            envs.step(stand_still(avail))
    assert leftovers(standin) == []


def test_dead_units_of_the_last_episode_are_no_beginning(standin, monkeypatch):
    """play_sc2 itself, in this process: what a worker sends when a later reset() goes wrong."""
    sent, stop = [], EOFError()

    class Pipe:
        send = staticmethod(sent.append)

        def recv(self):
            if isinstance(sent[-1], str) or len(sent) > 200:
                raise stop
            return [0 if dead else 1 for dead in sent[-1][0][2][:, 0]]

    for name in ("setsid", "killpg"):
        monkeypatch.setattr(os, name, lambda *_: None)
    monkeypatch.setattr(m.threading, "Thread", lambda **_: type("T", (), {"start": lambda s: 0})())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    parent = type("Parent", (), {"is_alive": lambda self: True})
    monkeypatch.setattr(m.multiprocessing, "parent_process", parent)
    order(monkeypatch, {"reset": 2, "kind": "dead_reset"})
    m.play_sc2(Pipe(), "3m", 1, 60, str(standin / "tmp"), "")
    assert sent[-1] == "RuntimeError: the game did not restart"
    assert all(isinstance(x, tuple) and not x[2]["done"] for x in sent[:-1]) and len(sent) > 5


def test_training_masks_a_crash_and_resumes(standin, monkeypatch, capfd):
    once = str(standin / "once")
    order(monkeypatch, {"step": 8, "kind": "crash", "once": once})
    seen, estimate = [], m.estimate

    def spy(*args, **kwargs):
        batch, metrics = estimate(*args, **kwargs)
        seen.append(batch["valid"].transpose(0, 1).flatten().tolist())  # one game: chunks in order
        return batch, metrics

    monkeypatch.setattr(m, "estimate", spy)
    runs = ["--runs-dir", str(standin / "runs")]
    assert m.main([*SMALL.split(), *runs, "--total-timesteps", "40"]) == 0
    assert seen[0] == [0.0] * 8 + [1.0] * 12 and seen[1] == [1.0] * 20
    (run,) = (standin / "runs").iterdir()
    assert run.name.startswith("sc2-3m__")
    assert json.loads((run / "args.json").read_text())["backend"] == "sc2"
    assert [float(row["charts/env_restarts"]) for row in progress(run)] == [1, 1]
    assert all(np.isfinite(float(row["losses/policy"])) for row in progress(run))
    assert m.main(["--resume", str(run), "--total-timesteps", "60"]) == 0, capfd.readouterr().err
    assert [int(row["global_step"]) for row in progress(run)] == [20, 40, 60]
    assert float(progress(run)[-1]["charts/env_restarts"]) == 1
    assert "backend sc2 (as asked for)" in capfd.readouterr().out and leftovers(standin) == []


def test_a_killed_training_leaves_nothing(standin):
    command = [sys.executable, m.__file__, *SMALL.split(), "--total-timesteps", "1000000"]
    with open(standin / "output", "w") as output:
        trainer = subprocess.Popen(command, stdout=output, stderr=output, cwd=standin)
    try:
        deadline = time.monotonic() + 60
        while not read_log(standin, "step") and time.monotonic() < deadline:
            assert trainer.poll() is None, (standin / "output").read_text()
            time.sleep(0.1)
        pids = processes(standin)
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        assert list((standin / "tmp").glob("maipg-*"))
    finally:
        trainer.kill()
        trainer.wait()
    assert leftovers(standin) == []


# ------------------------------------------------------------------------------ the broken episode
class Script:
    """Random observations; (step, game) pairs at which an episode ends or breaks."""

    num_agents, num_actions, obs_dim, state_dim = 2, 3, 5, 4

    def __init__(self, num_envs, ends, breaks):
        self.num_envs, self.ends, self.breaks, self.t = num_envs, ends, breaks, -1

    def seen(self):
        avail = torch.ones(self.num_envs, 2, 3, dtype=torch.bool)
        return torch.randn(self.num_envs, 2, 5), torch.randn(self.num_envs, 2, 4), avail

    def step(self, actions):
        self.t += 1
        at = lambda pairs: torch.tensor([(self.t, k) in pairs for k in range(self.num_envs)])
        never, zero = at([]), torch.zeros(self.num_envs)
        info = {"return": zero, "length": zero, "won": never, "truncated": never}
        info |= {"broken": at(self.breaks), "final": self.seen()}
        return *self.seen(), torch.randn(self.num_envs), at(self.ends + self.breaks), info


def test_exactly_the_broken_episodes_are_masked():
    ends, breaks = [(2, 0), (9, 0), (4, 1), (11, 2)], [(6, 0), (8, 1), (0, 3), (11, 3)]
    args = m.Args(num_envs=4, rollout_steps=12, chunk_length=12, hidden_dim=8, nu=0.0, device="cpu")
    torch.manual_seed(0)
    envs = Script(4, ends, breaks)
    agent = m.Agent(envs, args)
    obs, state, avail = envs.seen()
    now = {"obs": obs, "state": state[:, 0], "avail": avail, "keep": torch.zeros(4)}
    now |= {f"{name}_hidden": torch.zeros(4, 2, 8) for name in ("policy", "critic")}
    rng, buffer = torch.Generator(), {}
    m.rollout(agent.policy, envs, buffer, now, rng, args)
    batch, _ = m.estimate(agent, buffer, now, rng, args)
    expected = torch.ones(12, 4)
    expected[3:7, 0] = 0  # game 0: an episode before and one after it count
    expected[5:9, 1] = 0
    expected[0, 3] = expected[1:12, 3] = 0  # game 3: two broken ones
    torch.testing.assert_close(batch["valid"], expected)
    torch.testing.assert_close(batch["alive"], expected.unsqueeze(-1).expand(-1, -1, 2))


# ------------------------------------------------------------------------------------- the set-up
def forget_smac(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "smac"]:
        monkeypatch.delitem(sys.modules, name)


def no_smac(monkeypatch, folder):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != STANDIN])
    forget_smac(monkeypatch)


def namesake(monkeypatch, folder):
    package = folder / "automl" / "smac"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    forget_smac(monkeypatch)
    importlib.invalidate_caches()


def no_home(monkeypatch, folder):
    monkeypatch.setenv("SC2PATH", str(folder / "nowhere"))


def no_game(monkeypatch, folder):
    next((folder / "sc2").glob("Versions/*/SC2_x64")).unlink()


def no_map(monkeypatch, folder):
    (folder / "sc2/Maps/SMAC_Maps/3m.SC2Map").unlink()


MISSING = [  # how it comes to be missing, the step of --check, what the line must say
    (no_smac, "smac", "PyPI's smac is another project"),
    (namesake, "right smac", "AutoML's namesake"),
    (no_home, "SC2PATH", "nowhere: set SC2PATH"),
    (no_game, "game", "Versions/Base*/SC2_x64"),
    (no_map, "map", "3m.SC2Map is missing"),
]


@pytest.mark.parametrize("spoil, step, says", MISSING)
def test_what_is_missing_has_its_own_line(standin, monkeypatch, capsys, spoil, step, says):
    spoil(monkeypatch, standin)
    runs = ["--runs-dir", str(standin / "runs")]
    assert m.main([*SMALL.split(), *runs]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --backend sc2: ") and error.count("\n") == 1 and says in error
    assert not (standin / "runs").exists()

    assert m.main([*SMALL.split(), "--check"]) == 1
    *fine, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"MISSING {step}: ") and says in last
    assert fine == [f"ok      {what}" for _, what, _ in MISSING[: len(fine)]]
    assert MISSING[len(fine)][1] == step

    args = m.Args(map_name="3m", device="cpu")
    backend, why = m.choose_backend(args)
    assert backend == "smax" and says in why


def test_auto_takes_the_game_where_it_is_there(capsys):
    args = m.resolve(m.Args(map_name="3m", device="cpu"))
    assert args.backend == "sc2" and "are installed" in args.backend_reason
    assert m.choose_backend(m.Args(map_name="3m", backend="smax")) == ("smax", "as asked for")
    assert m.main(["--backend", "sc2", "--map-name", "4m"]) == 2  # unknown: the maps are listed
    error = capsys.readouterr().err
    assert "4m" in error and "2s3z" in error and error.count("\n") == 1


def test_check_plays_five_steps(standin, monkeypatch, capfd):
    assert m.main([*SMALL.split(), "--check"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[:5] == [f"ok      {what}" for _, what, _ in MISSING]
    assert said[-1] == "ok      five steps of 3m" and len(read_log(standin, "step")) == 5
    order(monkeypatch, {"kind": "no_launch", "builtin": False})
    assert m.main([*SMALL.split(), "--check"]) == 1
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILED  game 0 failed 1 times") and "no_launch" in last
    assert leftovers(standin) == []
