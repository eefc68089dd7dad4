"""maipg_grf.py on the real engine, against gfootball's own wrappers."""

import contextlib
import copy
import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_grf as maipg

reason = "gfootball is not installed (benchmark/install_grf.sh)"
pytest.importorskip("gfootball", reason=reason, exc_type=ImportError)
SCRIPT = Path(maipg.__file__)
TINY = "--scenario academy_empty_goal_close --num-envs 4 --num-workers 2 --rollout-steps 30"
TINY += " --update-epochs 2 --hidden-dim 16 --eval-episodes 2 --device cpu"
TINY += " --checkpoint-every 1 --eval-every 240"
STEP = 120  # environment steps of an update


def call(*words):
    """The exit code of a command line."""
    try:
        return maipg.main([x for word in words for x in str(word).split()])
    except SystemExit as end:  # tyro's
        return end.code


def train(folder, *words):
    assert call(TINY, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def gone(pids, patience=10.0):
    """Whether all processes have ended, at the latest after some seconds."""
    deadline = time.monotonic() + patience
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def make(num_envs, num_workers=2, **settings):
    base = dict(scenario="academy_empty_goal_close", device="cpu")
    args = maipg.Args(num_envs=num_envs, num_workers=num_workers, **base | settings)
    return contextlib.closing(maipg.FootballEnvs(args))


@pytest.fixture(autouse=True)
def same_random():
    """gfootball's seeds are from Python's `random`."""
    state = random.getstate()
    yield
    random.setstate(state)


# ---------- one game
def aim(rng, n, t):
    """Run at the goal, and shoot: such a policy scores, so that goals are covered too."""
    return [5 if t < 10 else rng.choice([5, 11, 12, rng.randrange(19)]) for _ in range(n)]


@pytest.mark.parametrize("scenario", list(maipg.SCENARIOS))
def test_equal_to_the_wrappers_of_gfootball(scenario, monkeypatch):
    """Observations, summed rewards, ends and goals of whole episodes, with the same engine seeds:
    the reference comes first, and with the copies that Football leaves out."""
    from gfootball.env import create_environment, football_env_core

    monkeypatch.setattr(football_env_core, "copy", copy)
    n, rng = maipg.SCENARIOS[scenario], random.Random(5)
    random.seed(11)
    options = {"representation": "simple115v2", "rewards": "scoring,checkpoints"}
    count = {"number_of_left_players_agent_controls": n}
    reference = create_environment(env_name=scenario, **options, **count)
    obs, plan, expected = reference.reset(), [], []
    first, episodes = obs.reshape(n, 115).copy(), 0
    while episodes < (4 if scenario == "academy_empty_goal_close" else 2):
        plan.append(aim(rng, n, len(plan) % 40))
        obs, reward, done, info = reference.step(plan[-1])
        if done:
            obs, episodes = reference.reset(), episodes + 1
        goal = info["score_reward"] == 1
        expected.append((obs.reshape(n, 115).copy(), float(np.sum(reward)), done, goal))
    reference.close()

    random.seed(11)
    random.randint(0, 2_000_000_000)  # create_environment looks at one scenario more
    game = maipg.Football(scenario)
    obs = game.reset()
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(obs, first)
    for actions, (obs, *others) in zip(plan, expected):
        its_obs, *its_others = game.step(actions)
        np.testing.assert_array_equal(its_obs, obs)
        assert its_others == others
    if scenario == "academy_empty_goal_close":
        goals = sum(goal for *_, goal in expected)
        assert 0 < goals < sum(reward for _, reward, *_ in expected)  # goals, and checkpoints


def test_every_agent_has_a_player_of_its_own():
    for scenario, n in maipg.SCENARIOS.items():
        game, rng = maipg.Football(scenario), random.Random(1)
        obs, done = game.reset(), False
        while not done:
            players = obs[:, 97:108]
            assert (players.sum(1) == 1).all() and (players.sum(0) <= 1).all()
            last = obs
            obs, _, done, _ = game.step([rng.randrange(19) for _ in range(n)])
        assert not np.array_equal(obs, last)  # the next episode has begun


def test_a_goal_pays_two_per_agent():
    """A scored episode: one for the goal, one for all checkpoints, summed over the agents."""
    random.seed(2)  # the engine's seeds come from it; not every seed has a goal
    game, rng, totals = maipg.Football("academy_empty_goal_close"), random.Random(2), []
    game.reset()
    for _ in range(4):
        total, done, t = 0.0, False, 0
        while not done:
            _, reward, done, won = game.step(aim(rng, 1, t))
            total, t = total + reward, t + 1
        assert (total == pytest.approx(2.0, abs=1e-5)) == won and -1 <= total < 2.01
        totals.append(won)
    assert any(totals)


# ---------- worker processes
def play(envs, games, steps):
    """Step envs and, worker by worker, the same games in this process; compare all."""
    rng, ends = random.Random(7), 0
    for t in range(steps):
        actions = [aim(rng, 3, t % 30) for _ in range(sum(map(len, games.values())))]
        obs, state, avail, *others = envs.step(torch.tensor(actions))
        plan, expected = iter(actions), []
        for worker, its_games in games.items():
            random.setstate(worker.getstate())
            expected += [game.step(next(plan)) for game in its_games]
            worker.setstate(random.getstate())
        its_obs, *its_others = zip(*expected)
        np.testing.assert_array_equal(obs, np.stack(its_obs))
        for x, its_x in zip(others, its_others):
            np.testing.assert_array_equal(x, its_x)
        assert avail.all() and torch.equal(state[:, :97], obs[:, 1, :97])
        assert torch.equal(state[:, 97:], obs[:, 2, 108:])
        ends += others[1].sum().item()
    return ends


def test_vector_of_workers():
    """Three games in two workers, with the seeds 3 and 1003; episodes begin by themselves."""
    scenario = "academy_3_vs_1_with_keeper"
    with make(3, scenario=scenario) as envs:
        obs, state, avail = envs.reset(3)
        assert obs.shape == (3, 3, 115) and state.shape == (3, 104) and avail.shape == (3, 3, 19)
        games, first = {}, []
        for seed, count in ((3, 2), (1003, 1)):
            random.seed(seed)
            its_games = [maipg.Football(scenario) for _ in range(count)]
            first += [game.reset() for game in its_games]
            worker = random.Random()
            worker.setstate(random.getstate())
            games[worker] = its_games
        np.testing.assert_array_equal(obs, np.stack(first))
        assert play(envs, games, 150) >= 3
        pids = [worker.pid for worker in envs.workers.values()]
    assert len(pids) == 2 and gone(pids)


def test_a_copy_has_games_of_its_own():
    with make(2) as envs:
        envs.reset(1)
        mine = dict(envs.workers)
        with contextlib.closing(copy.copy(envs)) as games:
            games.reset(1)
            theirs = [worker.pid for worker in games.workers.values()]
        assert envs.workers == mine and all(worker.is_alive() for worker in mine.values())
        assert gone(theirs)
        assert envs.step(torch.zeros(2, 1, dtype=torch.long))[0].shape == (2, 1, 115)


NOTHING = torch.zeros(2, 1, dtype=torch.long)


def strike(envs, k, fault):
    """Cause a fault in worker k; the actions of the next step."""
    actions, pid = NOTHING.clone(), list(envs.workers.values())[k].pid
    if fault == "raises":
        actions[k] = 99
    else:
        os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    return actions


FAULTS = {"raises": "its process ended", "killed": "", "hangs": "silent for 2 s"}


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_a_game_error_and_leaves_nothing(fault, k, monkeypatch, capfd):
    forkserver._forkserver._stop()  # the next one writes to what capfd reads
    join = BaseProcess.join
    monkeypatch.setattr(BaseProcess, "join", lambda worker, timeout: join(worker, 1.0))
    with make(2, game_timeout=2.0) as envs:
        envs.reset(1)
        envs.step(NOTHING)
        pids = [worker.pid for worker in envs.workers.values()]
        actions = strike(envs, k, fault)
        with pytest.raises(maipg.GameError, match=f"^worker {k}: " + FAULTS[fault]):
            envs.step(actions)
        assert gone(pids)
        assert len(envs.reset(1)[0]) == len(envs.step(NOTHING)[0]) == 2  # new games
    assert capfd.readouterr().err.count("Traceback") == (fault == "raises")


def test_a_rollout_with_a_fault_is_played_again(tmp_path, monkeypatch):
    """In new games, and from its beginning: no step of the old ones is in the buffer."""
    seeds, firsts, batches, steps = [], [], [], []
    begin, estimate, step = maipg.begin, maipg.estimate, maipg.FootballEnvs.step

    def spy_begin(envs, seed, args):
        now = begin(envs, seed, args)
        seeds.append(seed)
        firsts.append(now["obs"])
        return now

    def spy_estimate(agent, buffer, *others):
        batches.append((len(steps), buffer["obs"][:2].clone()))
        return estimate(agent, buffer, *others)

    def spy_step(envs, actions):
        if len(steps) == 9:
            os.kill(next(iter(envs.workers.values())).pid, signal.SIGKILL)
        steps.append(None)
        seen = step(envs, actions)
        steps[-1] = seen[0]
        return seen

    monkeypatch.setattr(maipg, "begin", spy_begin)
    monkeypatch.setattr(maipg, "estimate", spy_estimate)
    monkeypatch.setattr(maipg.FootballEnvs, "step", spy_step)
    path = train(tmp_path, f"--total-timesteps {STEP} --nu 0 --seed 5")
    ((count, obs),) = batches
    assert seeds == [5, 5 + 100_003, 10**9 + 5 + STEP] and count == 10 + 30
    assert torch.equal(obs[0], firsts[1]) and torch.equal(obs[1], steps[10])
    assert not torch.equal(obs[1], steps[0])
    assert [float(row["charts/env_restarts"]) for row in rows(path)] == [1]


def test_failures_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    def fail(envs, actions):
        raise maipg.GameError("worker 7: gone")

    seen = torch.zeros(4, 1, 115), torch.zeros(4, 104), torch.ones(4, 1, 19, dtype=torch.bool)
    monkeypatch.setattr(maipg.FootballEnvs, "reset", lambda envs, seed: seen)
    monkeypatch.setattr(maipg.FootballEnvs, "step", fail)
    assert call(TINY, f"--runs-dir {tmp_path}") == 1
    error = capsys.readouterr().err
    assert error.count("worker 7: gone; new games begin") == 4
    assert error.endswith("error: worker 7: gone\n")
    (path,) = tmp_path.iterdir()
    assert maipg.load_checkpoint(path)["progress"]["restarts"] == 5


# ---------- command line
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), f"--total-timesteps {2 * STEP}")


def test_run_folder(whole):
    table = rows(whole)
    assert [int(row["global_step"]) for row in table] == [STEP, 2 * STEP]
    names = "losses/policy losses/critic losses/entropy diagnostics/sigma_a charts/SPS"
    for key in names.split():
        assert all(math.isfinite(float(row[key])) for row in table), key
    assert table[0]["eval/win_rate"] == "nan" and 0 <= float(table[1]["eval/win_rate"]) <= 1
    assert whole.name.startswith("academy_empty_goal_close__maipg_grf__nu0.5__compatible__s1__")
    assert json.loads((whole / "args.json").read_text())["num_workers"] == 2


VARIANTS = [
    ("--nu 0", False),
    ("--mixer vdn --mu gumbel", True),
    ("--critic paper", True),
    ("--critic-epochs 4", False),
]


@pytest.mark.parametrize("words, has_q", VARIANTS)
def test_variants(words, has_q, tmp_path):
    (row,) = rows(train(tmp_path, f"--total-timesteps {STEP}", words))
    assert math.isfinite(float(row["losses/policy"])) and ("losses/q" in row) == has_q


def test_resume(whole, tmp_path, monkeypatch):
    seeds, begin = [], maipg.begin
    spy = lambda envs, seed, args: [seeds.append(seed), begin(envs, seed, args)][1]
    monkeypatch.setattr(maipg, "begin", spy)
    path = train(tmp_path, f"--total-timesteps {STEP}")
    before = maipg.load_checkpoint(path)
    assert call(f"--resume {path} --total-timesteps {STEP}") == 0  # loads and saves: nothing to do
    after = maipg.load_checkpoint(path)
    for part in ("agent", "optimizer", "rngs", "progress"):
        same = [torch.equal(x, y) for x, y in zip(leaves(before[part]), leaves(after[part]))]
        assert same and all(same)
    table = rows(path)
    assert call(f"--resume {path} --total-timesteps {3 * STEP}") == 0
    assert [int(row["global_step"]) for row in rows(path)] == [STEP, 2 * STEP, 3 * STEP]
    assert rows(path)[:1] == table
    # New episodes, not those of the beginning again.
    assert [x for x in seeds if x < 10**9] == [1, 1 + STEP, 1 + STEP]
    moved = maipg.load_checkpoint(path)["agent"]
    assert any(not torch.equal(x, moved[key]) for key, x in after["agent"].items())


def leaves(x):
    """The tensors and numbers of a checkpoint's part."""
    if isinstance(x, dict | list | tuple):
        parts = x.values() if isinstance(x, dict) else x
        return [leaf for part in parts for leaf in leaves(part)]
    return [torch.as_tensor(x if x is not None else 0)]


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_nothing_and_goes_on(number, tmp_path):
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--runs-dir", str(tmp_path)]
    command += ["--total-timesteps", "10000000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    servers = children(process.pid)
    left = [*servers, *(pid for server in servers for pid in children(server))]
    assert len(left) >= 3  # a server and two workers
    process.send_signal(number)
    # Not communicate(): it would wait for whoever holds the trainer's stdout.
    assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 143)
    assert gone(left)
    (path,) = tmp_path.iterdir()
    step = maipg.load_checkpoint(path)["progress"]["step"]
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    assert int(rows(path)[-1]["global_step"]) == step + STEP


BAD = [
    ("--scenario 11_vs_11", "11_vs_11 academy_corner"),
    ("--num-workers -1", "num_workers"),
    ("--num-envs 0", "num_envs"),
    ("--nu 1.5", "nu"),
    ("--nu nan", "nu"),
    ("--mixer sum", "sum"),
    ("--critic none", "none"),
    ("--critic compatible --mixer qmix", "only with --critic paper"),
    ("--chunk-length 7", "chunk-length"),
    ("--num-minibatches 5", "minibatches"),
    ("--update-epochs 0", "update_epochs"),
    ("--game-timeout -1", "game_timeout"),
    ("--device abacus", "abacus"),
    ("--threads 0", "threads"),
    ("--no-such-flag 1", "no-such-flag"),
    ("--resume nowhere", "nowhere"),
    ("--resume whole --nu 0.1", "nu"),
    ("--resume whole --scenario academy_corner", "scenario"),
]


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input(command, words, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").symlink_to(whole)
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(whole))
    capsys.readouterr()
    assert call("" if "--resume" in command else TINY, command) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words.split()), error
    assert before == (sorted(os.listdir(tmp_path)), sorted(os.listdir(whole)))
