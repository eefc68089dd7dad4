"""The environments of maipg_mpe.py against mpe2 and PettingZoo themselves."""

import importlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import ks_2samp

import maipg_mpe as m

TASKS = ["spread", "line", "formation"]


def make(task, n, num_envs, continuous=False, seed=0):
    args = m.Args(scenario=task, num_agents=n, num_envs=num_envs, device="cpu")
    args.continuous_actions = continuous
    return m.ParticleEnvs(args, seed), m.mpe2_env(args)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def put(ours, k, reference):
    """World k of ours into mpe2."""
    world, scenario = reference.unwrapped.world, reference.unwrapped.scenario
    for i, agent in enumerate(world.agents):
        agent.state.p_pos = ours.pos[k, i].double().numpy().copy()
        agent.state.p_vel = ours.vel[k, i].double().numpy().copy()
    for i, landmark in enumerate(world.landmarks):
        landmark.state.p_pos = ours.landmarks[k, i].double().numpy().copy()
    if ours.task == "line":  # where mpe2 has put its targets, beginning at landmark 0
        first, second = (landmark.state.p_pos for landmark in world.landmarks)
        shares = np.linspace(0, 1, len(world.agents))
        scenario._expected_positions = [first + x * (second - first) for x in shares]


def draw(ours, rng):
    count, n = ours.args.num_envs, ours.num_agents
    if ours.args.continuous_actions:  # beyond the bounds too: both clip
        return torch.rand(count, n, 2, generator=rng) * 2.6 - 1.3
    return F.one_hot(torch.randint(5, (count, n), generator=rng), 5).to(torch.get_default_dtype())


def moves(ours, k, actions, reference):
    continuous = ours.args.continuous_actions
    return {a: m.to_mpe2(actions[k, i], continuous) for i, a in enumerate(reference.agents)}


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 7])
@pytest.mark.parametrize("task", TASKS)
def test_equal_to_mpe2_step_by_step(task, n, continuous, double):
    """Whole episodes, every other one in a crowd, where discs push each other."""
    ours, reference = make(task, n, 3, continuous)
    rng, touched = torch.Generator().manual_seed(1), 0
    for episode in range(4):
        ours.reset()
        if episode % 2:
            ours.pos.mul_(m.RADIUS[task])
            ours._measure()
        obs, state, _ = ours._view()
        seen, _ = reference.reset(seed=episode)
        put(ours, 1, reference)
        for t in range(25):
            actions = draw(ours, rng)
            _, _, _, reward, done, info = ours.step(actions)
            seen, rewards, terminated, truncated, _ = reference.step(
                moves(ours, 1, actions, reference)
            )
            obs, state, _ = info["final"]
            expected = np.stack(list(seen.values()))
            np.testing.assert_allclose(obs[1, :, : ours.raw_dim], expected, atol=1e-5)
            np.testing.assert_allclose(state[1, 0], expected.ravel(), atol=1e-5)
            assert torch.equal(obs[1, :, ours.raw_dim :], torch.eye(n))
            assert reward[1].item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-5)
            assert not any(terminated.values())
            assert all(truncated.values()) == done[1].item() == (t == 24)
            distance = info["final"][0][1, :, 2:4]
            touched += (torch.pdist(distance) < 2 * m.RADIUS[task]).sum().item()
    assert touched > 0


@pytest.mark.parametrize("task", TASKS)
def test_single_precision_follows_mpe2_from_every_state(task):
    ours, reference = make(task, 5, 4)
    rng = torch.Generator().manual_seed(2)
    ours.reset()
    ours.pos.mul_(0.5)
    ours._measure()
    reference.reset(seed=0)
    for _ in range(24):
        put(ours, 2, reference)
        actions = draw(ours, rng)
        _, _, _, reward, _, info = ours.step(actions)
        seen, rewards, *_ = reference.step(moves(ours, 2, actions, reference))
        expected = np.stack(list(seen.values()))
        np.testing.assert_allclose(info["final"][0][2, :, : ours.raw_dim], expected, atol=1e-5)
        assert reward[2].item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_episodes_begin_as_in_mpe2(task):
    """Kolmogorov-Smirnov against 300 resets of mpe2, coordinate by coordinate."""
    ours, reference = make(task, 3, 2000)
    ours.reset()
    theirs = {"agents": [], "landmarks": []}
    for seed in range(300):
        reference.reset(seed=seed)
        world = reference.unwrapped.world
        for key in theirs:
            theirs[key].append([e.state.p_pos for e in getattr(world, key)])
    assert (ours.vel == 0).all()
    for key, mine in (("agents", ours.pos), ("landmarks", ours.landmarks)):
        them = np.array(theirs[key])
        assert np.abs(mine.numpy()).max() <= max(1.0, np.abs(them).max())
        for i in range(mine.shape[1]):
            for axis in range(2):
                assert ks_2samp(mine[:, i, axis], them[:, i, axis]).pvalue > 1e-3, (key, i, axis)
    if task == "line":
        apart = (ours.landmarks[:, 1] - ours.landmarks[:, 0]).numpy()
        assert np.linalg.norm(apart, axis=-1) == pytest.approx(1.25, abs=1e-5)
        assert (ours.landmarks.abs() < 1).all()
        them = np.array(theirs["landmarks"])
        angle = lambda x: np.arctan2(x[:, 1], x[:, 0])
        assert ks_2samp(angle(apart), angle(them[:, 1] - them[:, 0])).pvalue > 1e-3


@pytest.mark.parametrize("n", range(2, 11))
def test_assignment_is_optimal(n):
    rng = np.random.default_rng(n)
    distances = rng.uniform(0, 3, size=(20, n, n))
    expected = []
    for d in distances:
        rows, columns = linear_sum_assignment(d)
        expected.append(np.minimum(d[rows, columns], 1.0).sum())
    layers = m.subset_layers(n, "cpu")
    got = m.assigned_distances(torch.tensor(distances), layers, 1.0)
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_auto_reset_seeds_and_storage(task):
    (ours, _), (again, _), (other, _) = (make(task, 4, 5, seed=s) for s in (3, 3, 4))
    assert torch.equal(ours.reset()[0], again.reset()[0])
    assert not torch.equal(ours._view()[0], other.reset()[0])
    rng, total = torch.Generator().manual_seed(0), 0
    for _ in range(25):
        actions = draw(ours, rng)
        obs, _, _, reward, done, info = ours.step(actions)
        again.step(actions)
        total = total + reward
    assert done.all() and info["truncated"].all() and not info["broken"].any()
    torch.testing.assert_close(info["return"], total)
    assert (info["length"] == 25).all()
    assert not torch.equal(obs, info["final"][0]) and (obs[..., :2] == 0).all()
    for _ in range(10):
        ours.step(draw(ours, rng))
    stored = {k: v.clone() if torch.is_tensor(v) else v for k, v in ours.state_dict().items()}
    copy, _ = make(task, 4, 5, seed=9)
    copy.reset()
    copy.load_state_dict(stored)
    for _ in range(40):  # through a reset
        actions = draw(ours, rng)
        mine, theirs = ours.step(actions), copy.step(actions)
        assert all(torch.equal(a, b) for a, b in zip(mine[:5], theirs[:5]))
        assert torch.equal(mine[5]["return"], theirs[5]["return"])


# ------------------------------------------------------------------------------- other environments
TOY = """
import os, signal, time
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

class Toy(ParallelEnv):
    metadata = {"name": "toy"}
    masks, unequal, box = True, False, False

    def __init__(self):
        self.possible_agents = ["a", "b", "c"]

    def observation_space(self, agent):
        seen = Box(-9, 9, (2 + (self.unequal and agent == "c"),), np.float32)
        mask = Box(0, 1, (3,), np.int8)
        return Dict({"observation": seen, "action_mask": mask}) if self.masks else seen

    def action_space(self, agent):
        return Box(np.float32([-1, 0]), np.float32([1, 4])) if self.box else Discrete(3, start=5)

    def see(self):
        one = lambda i: np.array([i, self.t], np.float32)
        mask = np.array([1, 1, self.t % 2], np.int8)
        full = {a: one(i) for i, a in enumerate(self.possible_agents) if a in self.agents}
        if not self.masks:
            return full
        return {a: {"observation": x, "action_mask": mask} for a, x in full.items()}

    def reset(self, seed=None, options=None):
        self.agents, self.t, self.taken = list(self.possible_agents), 0, []
        return self.see(), {a: {} for a in self.agents}

    def step(self, actions):
        self.t += 1
        if os.environ.get("TOY_FAULT") == "raise" and self.t == 2:
            raise ValueError("the toy broke")
        if os.environ.get("TOY_FAULT") == "hang" and self.t == 2 and not os.path.exists("hung"):
            open("hung", "w").close()
            time.sleep(100)
        rewards = {a: float(np.sum(x)) for a, x in actions.items()}
        left = {a: a == "b" and self.t >= 2 for a in self.agents}
        late = {a: self.t >= 4 for a in self.agents}
        acted, self.agents = list(self.agents), [a for a in self.agents if not left[a]]
        seen = self.see()
        if self.t >= 4:
            self.agents = []
        return seen, rewards, left, late, {a: {} for a in acted}

class Plain(Toy):
    masks = False
class Continuous(Plain):
    box = True
class Unequal(Plain):
    unequal = True
class Text(Toy):
    def observation_space(self, agent):
        from gymnasium.spaces import Text
        return Text(5)
class NoReset(Toy):
    def reset(self, seed=None, options=None):
        raise ValueError("cannot begin")
class NoSpace(Toy):
    def observation_space(self, agent):
        raise NotImplementedError("has no space")
def broken():
    raise RuntimeError("no such luck")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_env.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("toy_env", None)
    return tmp_path


def zoo(env_id, num_envs=2, **settings):
    args = m.Args(env_id=env_id, num_envs=num_envs, device="cpu", **settings)
    return m.PettingZooEnvs(args, seed=5)


def gone(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("env_id", ["mpe2.simple_spread_v3", "pettingzoo.sisl.pursuit_v5"])
def test_equal_to_the_library_driven_directly(env_id):
    envs, rng = zoo(env_id), torch.Generator().manual_seed(0)
    try:
        obs, state, avail = envs.reset()
        n, width = envs.num_agents, envs.obs_dim - envs.num_agents
        assert avail.all() and torch.equal(obs[0, :, width:], torch.eye(n))
        directly = [importlib.import_module(env_id).parallel_env() for _ in range(2)]
        seen = [env.reset(seed=5 + 1000 * k)[0] for k, env in enumerate(directly)]
        totals, ended = [0.0, 0.0], 0
        for _ in range(40):
            for k in range(2):
                expected = np.stack([x.ravel() for x in seen[k].values()])
                np.testing.assert_allclose(obs[k, :, :width], expected, atol=1e-6)
            index = torch.randint(envs.num_actions, (2, n), generator=rng)
            step = envs.step(F.one_hot(index, envs.num_actions).float())
            obs, state, avail, reward, done, info = step
            for k, env in enumerate(directly):
                actions = dict(zip(env.agents, index[k].tolist()))
                seen[k], rewards, terminated, truncated, _ = env.step(actions)
                totals[k] += np.mean(list(rewards.values()))
                assert reward[k].item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-5)
                assert done[k].item() == (not env.agents)
                if not env.agents:
                    ended += 1
                    assert info["return"][k].item() == pytest.approx(totals[k], rel=1e-5)
                    assert info["truncated"][k].item() == any(truncated.values())
                    seen[k], totals[k] = env.reset()[0], 0.0
        assert ended >= (2 if "spread" in env_id else 0)
    finally:
        envs.close()


def test_agents_that_leave_masks_and_offsets(toy):
    envs = zoo("toy_env:Toy", 1)
    try:
        obs, state, avail = envs.reset()
        assert avail.tolist() == [[[True, True, False]] * 3]
        assert state.shape == (1, 3, 6)  # no state of its own: all that the agents see
        one = F.one_hot(torch.tensor([[0, 1, 0]]), 3).float()
        obs, _, avail, reward, done, _ = envs.step(one)
        assert reward.item() == pytest.approx((5 + 6 + 5) / 3) and avail[0, 0].all()
        obs, state, avail, reward, done, _ = envs.step(one)  # b leaves
        assert obs[0, 1, :2].tolist() == [0, 0] and avail[0, 1].tolist() == [True, False, False]
        assert obs[0, 2, :2].tolist() == [2, 2] and not done.item()
        *_, reward, done, _ = envs.step(one)
        assert reward.item() == pytest.approx((5 + 5) / 3)
        obs, _, avail, _, done, info = envs.step(one)
        assert done.item() and info["truncated"].item() and info["length"].item() == 4
        assert info["return"].item() == pytest.approx((16 + 16 + 10 + 10) / 3)
        assert info["final"][0][0, 2, :2].tolist() == [2, 4] and obs[0, 1, :2].tolist() == [1, 0]
    finally:
        envs.close()


def test_continuous_actions_reach_the_bounds_of_the_box(toy):
    envs = zoo("toy_env:Continuous", 1, continuous_actions=True)
    try:
        envs.reset()
        *_, reward, _, _ = envs.step(torch.tensor([[[-1.0, -1.0], [1.0, 1.0], [0.0, 7.0]]]))
        assert reward.item() == pytest.approx(((-1 + 0) + (1 + 4) + (0 + 4)) / 3)
    finally:
        envs.close()


@pytest.mark.parametrize(
    "env_id, continuous, words",
    [
        ("nowhere.at.all", False, "ModuleNotFoundError"),
        ("toy_env:Nothing", False, "Nothing"),
        ("toy_env", False, "parallel_env"),
        ("toy_env:broken", False, "no such luck"),
        ("toy_env:Unequal", False, "differ"),
        ("toy_env:Text", False, "neither Box nor Discrete"),
        ("toy_env:Plain", True, "--continuous-actions"),
        ("toy_env:Continuous", False, "--continuous-actions"),
        ("json:dumps", False, "json:dumps"),
        ("json:JSONDecoder", False, "possible_agents"),
    ],
)
def test_environments_that_do_not_fit(env_id, continuous, words, toy):
    with pytest.raises(m.UsageError) as error:
        zoo(env_id, continuous_actions=continuous)
    text = str(error.value)
    assert env_id in text and words in text and "\n" not in text


def stay(envs):
    shape = (envs.args.num_envs, envs.num_agents)
    return F.one_hot(torch.zeros(shape, dtype=torch.long), envs.num_actions).float()


def test_a_killed_worker_is_replaced(toy, capsys):
    envs = zoo("toy_env:Toy", 4)
    try:
        envs.reset()
        envs.step(stay(envs))
        pid = envs.workers[0].pid
        os.kill(pid, signal.SIGKILL)
        obs, _, _, _, done, info = envs.step(stay(envs))
        mine = list(envs.rows[0])
        others = [k for k in range(4) if k not in mine]
        assert info["broken"][mine].all() and done[mine].all() and envs.restarts == 1
        assert not info["broken"][others].any() and not done[others].any()
        assert (obs[mine, :, 1] == 0).all() and "worker 0 is replaced" in capsys.readouterr().err
        *_, done, info = envs.step(stay(envs))
        assert not info["broken"].any()
    finally:
        envs.close()
    assert all(gone(worker.pid) for worker in envs.workers.values()) and gone(pid)


def test_a_worker_that_hangs_is_replaced(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "hang")
    envs = zoo("toy_env:Toy", 1, env_timeout=8.0)
    try:
        envs.reset()
        envs.step(stay(envs))
        envs.args.env_timeout = 1.0
        pipes = envs.pipes[0]
        original = envs._start

        def start(w):
            envs.args.env_timeout = 60.0  # a new process needs its time
            original(w)

        monkeypatch.setattr(envs, "_start", start)
        *_, done, info = envs.step(stay(envs))
        assert info["broken"].all() and done.all() and envs.restarts == 1
        assert envs.pipes[0] is not pipes
    finally:
        envs.close()


def test_failures_in_a_row_stop_the_run(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAULT", "raise")
    envs = zoo("toy_env:Toy", 1, max_failures=1)
    try:
        envs.reset()
        envs.step(stay(envs))
        with pytest.raises(m.GameError, match="the toy broke"):
            envs.step(stay(envs))
    finally:
        envs.close()


def test_failures_in_every_episode_stop_the_run(toy, monkeypatch):
    """A fault in the second step of every episode: no episode is ever whole."""
    monkeypatch.setenv("TOY_FAULT", "raise")
    envs = zoo("toy_env:Toy", 1, max_failures=2)
    try:
        envs.reset()
        with pytest.raises(m.GameError, match="2 times in a row"):
            for _ in range(4):
                envs.step(stay(envs))
    finally:
        envs.close()


@pytest.mark.parametrize("name, words", [("NoReset", "cannot begin"), ("NoSpace", "has no space")])
def test_environments_that_fail_when_they_are_looked_at(name, words, toy, capsys):
    assert m.main(f"--env-id toy_env:{name} --num-envs 1 --device cpu".split()) == 2
    error = capsys.readouterr().err
    assert f"toy_env:{name}" in error and words in error and error.count("\n") == 1


def test_no_worker_outlives_a_killed_trainer(toy):
    code = "import maipg_mpe as m, time\n"
    code += "if __name__ == '__main__':\n"
    code += "    e = m.PettingZooEnvs(m.Args(env_id='toy_env:Toy', num_envs=2, device='cpu'), 1)\n"
    code += "    print(*[w.pid for w in e.workers.values()], flush=True)\n    time.sleep(100)\n"
    (toy / "main.py").write_text(code)
    path = os.pathsep.join([str(toy), os.path.dirname(m.__file__)])
    command = [sys.executable, str(toy / "main.py")]
    env = os.environ | {"PYTHONPATH": path}
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    pids = [int(x) for x in trainer.stdout.readline().split()]
    assert pids and not any(gone(pid) for pid in pids)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(gone(pid) for pid in pids)
