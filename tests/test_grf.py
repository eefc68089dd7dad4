"""maipg_grf.py on the real engine, against gfootball's own wrappers."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_grf as maipg

reason = "gfootball is not installed (benchmark/install_grf.sh)"
pytest.importorskip("gfootball", reason=reason, exc_type=ImportError)
SCRIPT = Path(maipg.__file__)
TINY = "--scenario academy_empty_goal_close --num-envs 4 --num-workers 2 --rollout-steps 30"
TINY += " --update-epochs 2 --hidden-dim 16 --mixer-dim 16 --eval-episodes 2 --threads 1"
TINY += " --device cpu --checkpoint-every 1 --eval-every 240"
STEP = 120  # environment steps of an update


def call(*words):
    return maipg.main([x for word in words for x in str(word).split()])


def train(folder, *words):
    assert call(TINY, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def make(num_envs=2, **settings):
    base = dict(scenario="academy_empty_goal_close", device="cpu", num_workers=2)
    return maipg.make_envs(maipg.Args(num_envs=num_envs, **base | settings), seed=3)


def aim(rng, actions, t):
    """Run at the goal, and shoot: such a policy scores, so that goals are covered too."""
    return [5 if t < 10 else rng.choice([5, 11, 12, rng.randrange(19)]) for _ in range(actions)]


# ------------------------------------------------------------------------------------- environment
@pytest.mark.parametrize("scenario", list(maipg.SCENARIOS))
def test_equal_to_the_wrappers_of_gfootball(scenario):
    """Observations, summed rewards and ends of whole episodes, with the same engine seeds."""
    from gfootball.env import create_environment

    n, rng = maipg.SCENARIOS[scenario], random.Random(5)
    episodes = 3
    state = random.getstate()
    try:
        random.seed(11)
        options = {"representation": "simple115v2", "rewards": "scoring,checkpoints"}
        count = {"number_of_left_players_agent_controls": n}
        reference = create_environment(env_name=scenario, **options, **count)
        plan, expected = [], []
        for _ in range(episodes):
            expected.append((reference.reset(), 0.0, False))
            done = False
            while not done:
                actions = aim(rng, n, len(plan) % 40)
                plan.append(actions)
                obs, reward, done, _ = reference.step(actions)
                expected.append((obs, float(np.sum(reward)), done))
        reference.close()
        random.seed(11)
        random.randint(0, 2_000_000_000)  # create_environment looks at one scenario more
        game, actions, goals, total = maipg.Football(scenario), iter(plan), 0, 0.0
        results = iter(expected)
        for _ in range(episodes):
            obs, done = game.reset(), False
            assert obs.shape == (n, 115) and obs.dtype == np.float32
            np.testing.assert_array_equal(obs, np.reshape(next(results)[0], (n, 115)))
            while not done:
                obs, reward, done, won, limit = game.step(next(actions))
                wanted, its_reward, its_done = next(results)
                np.testing.assert_array_equal(obs, np.reshape(wanted, (n, 115)))
                assert reward == pytest.approx(its_reward, abs=1e-5) and done == its_done
                assert not (won and limit) and (not won or done)
                goals, total = goals + won, total + reward
    finally:
        random.setstate(state)
    assert next(actions, None) is None
    if scenario == "academy_empty_goal_close":
        assert goals > 0 and total > goals  # goals, and checkpoints besides


def test_every_agent_has_a_player_of_its_own():
    for scenario, n in maipg.SCENARIOS.items():
        game, rng = maipg.Football(scenario), random.Random(1)
        obs, done = game.reset(), False
        while not done:
            players = obs[:, 97:108]
            assert (players.sum(1) == 1).all() and (players.sum(0) <= 1).all()
            obs, _, done, *_ = game.step([rng.randrange(19) for _ in range(n)])


def test_vector_of_workers():
    envs = make(num_envs=3)
    try:
        obs, state, avail = envs.reset()
        assert obs.shape == (3, 1, 115) and state.shape == (3, 1, 104) and avail.all()
        assert avail.shape == (3, 1, 19)
        returns, finished = torch.zeros(3), 0
        for _ in range(250):
            actions = torch.full((3, 1), 5)
            obs, state, _, reward, done, info = envs.step(actions)
            returns += reward
            final = info["final"][0]
            for k in done.nonzero().flatten().tolist():
                finished += 1
                assert info["return"][k].item() == pytest.approx(returns[k].item(), abs=1e-4)
                assert not torch.equal(final[k], obs[k]) and info["length"][k] <= 400
                returns[k] = 0
            still = ~done
            assert torch.equal(final[still], obs[still])
            assert torch.equal(state[:, 0, :97], obs[:, 0, :97])
        assert finished >= 3 and not info["broken"].any()
        seeds = {tuple(x.flatten().tolist()) for x in obs}
        assert len(seeds) > 1  # games differ
    finally:
        envs.close()
    assert all(gone(worker.pid) for worker in envs.workers.values())


def test_a_killed_worker_is_replaced(capsys):
    envs = make(num_envs=4)
    try:
        envs.reset()
        envs.step(torch.zeros(4, 1, dtype=torch.long))
        os.kill(envs.workers[1].pid, signal.SIGKILL)
        *_, done, info = envs.step(torch.zeros(4, 1, dtype=torch.long))
        assert info["broken"].tolist() == done.tolist() == [False, True, False, True]
        assert envs.restarts == 1 and "worker 1 is replaced" in capsys.readouterr().err
        *_, info = envs.step(torch.zeros(4, 1, dtype=torch.long))
        assert not info["broken"].any() and (info["length"] > 0).all()
    finally:
        envs.close()


def test_a_worker_that_hangs_is_replaced():
    envs = make(num_envs=2)
    try:
        envs.reset()
        envs.step(torch.zeros(2, 1, dtype=torch.long))
        os.kill(envs.workers[0].pid, signal.SIGSTOP)
        start, envs.args.env_timeout = envs._start, 1.0

        def patient(w):
            envs.args.env_timeout = 60.0
            start(w)

        envs._start = patient
        *_, done, info = envs.step(torch.zeros(2, 1, dtype=torch.long))
        assert info["broken"].tolist() == [True, False] and envs.restarts == 1
    finally:
        envs.close()


def test_failures_in_a_row_stop_the_run():
    envs = make(num_envs=2, max_failures=1)
    try:
        envs.reset()
        os.kill(envs.workers[0].pid, signal.SIGKILL)
        with pytest.raises(maipg.GameError, match="worker 0 failed 1 times"):
            envs.step(torch.zeros(2, 1, dtype=torch.long))
    finally:
        envs.close()
    assert all(gone(worker.pid) for worker in envs.workers.values())


# ------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), f"--total-timesteps {2 * STEP}")


def test_run_folder(whole):
    table = rows(whole)
    assert [int(row["global_step"]) for row in table] == [STEP, 2 * STEP]
    names = "losses/policy losses/critic losses/q losses/entropy diagnostics/sigma_a charts/SPS"
    for key in names.split():
        assert all(math.isfinite(float(row[key])) for row in table), key
    result = json.loads((whole / "result.json").read_text())
    assert 0 <= result["final_win_rate"] <= 1 and result["step"] == 2 * STEP
    assert whole.name.startswith("academy_empty_goal_close__maipg_grf__nu0.5__qmix__s1__")


def test_resume_and_evaluate(whole, tmp_path, capsys):
    path = train(tmp_path, f"--total-timesteps {STEP}")
    assert call(f"--resume {path} --total-timesteps {3 * STEP}") == 0
    assert [int(row["global_step"]) for row in rows(path)] == [STEP, 2 * STEP, 3 * STEP]
    capsys.readouterr()
    assert call(f"--evaluate {path} --eval-episodes 3") == 0
    assert "95% interval [" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_nothing_and_goes_on(number, tmp_path):
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--runs-dir", str(tmp_path)]
    process = subprocess.Popen([*command, "--total-timesteps", "10000000"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(gone(pid) for pid in children)
    (path,) = tmp_path.iterdir()
    step = maipg.load_checkpoint(path)["done"]["step"]
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    assert int(rows(path)[-1]["global_step"]) == step + STEP


BAD = [
    ("--scenario 11_vs_11", "11_vs_11 academy_corner"),
    ("--num-workers 0", "num-workers"),
    ("--num-workers 9", "num-workers"),
    ("--num-envs 0", "num-envs"),
    ("--nu 1.5", "nu"),
    ("--nu nan", "nu"),
    ("--mixer sum", "sum"),
    ("--q-scale none", "none"),
    ("--chunk-length 7", "chunk-length"),
    ("--num-minibatches 5", "num-minibatches"),
    ("--update-epochs 0", "update-epochs"),
    ("--rollout-steps -1", "rollout-steps"),
    ("--gamma 2", "gamma"),
    ("--gae-lambda -1", "gae-lambda"),
    ("--td-lambda 1.1", "td-lambda"),
    ("--temperature 0", "temperature"),
    ("--learning-rate inf", "learning-rate"),
    ("--seed -1", "seed"),
    ("--total-timesteps 0", "total-timesteps"),
    ("--eval-episodes 0", "eval-episodes"),
    ("--env-timeout 0", "env-timeout"),
    ("--max-failures 0", "max-failures"),
    ("--device abacus", "abacus"),
    ("--device meta", "meta"),
    ("--threads 0", "threads"),
    ("--no-such-flag 1", "no-such-flag"),
    ("stray", "stray"),
    ("--capture-video", "evaluate"),
    ("--runs-dir file", "file"),
    ("--resume nowhere", "nowhere"),
    ("--resume whole --nu 0.1", "nu"),
    ("--evaluate whole --hidden-dim 8", "hidden-dim"),
]


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input(command, words, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").symlink_to(whole)
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(whole))
    saved = "--resume" in command or "--evaluate" in command
    assert call("" if saved else TINY, "" if saved else "--total-timesteps 120", command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words.split()), error
    assert before == (sorted(os.listdir(tmp_path)), sorted(os.listdir(whole)))
