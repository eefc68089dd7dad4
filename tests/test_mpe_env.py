"""The environments of maipg_mpe.py against mpe2 and PettingZoo themselves."""

import copy
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp

import maipg_mpe as m

TASKS = ["spread", "line", "formation"]


def mpe2_env(args):
    """The worlds of args in mpe2 itself."""
    name = {"spread": "spread_v3", "line": "line_v1", "formation": "formation_v1"}[args.scenario]
    make = importlib.import_module(f"mpe2.simple_{name}").parallel_env
    return make(N=args.num_agents, max_cycles=25, continuous_actions=args.continuous)


def to_mpe2(action, continuous):
    """An agent's action in mpe2's convention: the number of a move; or a force [2] as the five
    shares of (stay, left, right, down, up), in [0, 1]."""
    if not continuous:
        return int(action.argmax())
    x, y = action.clamp(-1, 1).tolist()
    return np.array([0, max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)], dtype=np.float32)


def make(task, n, num_envs, continuous=False):
    args = m.Args(scenario=task, num_agents=n, num_envs=num_envs, device="cpu")
    args.continuous = continuous
    return m.ParticleEnvs(args), mpe2_env(args)


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
    count, n = ours.args.num_envs, ours.n
    if ours.args.continuous:  # beyond the bounds too: both clip
        return torch.rand(count, n, 2, generator=rng) * 2.6 - 1.3
    return F.one_hot(torch.randint(5, (count, n), generator=rng), 5).to(torch.get_default_dtype())


def moves(ours, k, actions, reference):
    continuous = ours.args.continuous
    return {a: to_mpe2(actions[k, i], continuous) for i, a in enumerate(reference.agents)}


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 7])
@pytest.mark.parametrize("task", TASKS)
def test_equal_to_mpe2_step_by_step(task, n, continuous, double):
    """Whole episodes, every other one in a crowd, where discs push each other."""
    ours, reference = make(task, n, 3, continuous)
    ours.length = 99  # no reset: the last observation is compared too
    near = 1e-5 if continuous else 1e-10  # mpe2's forces are float32
    rng, touched = torch.Generator().manual_seed(1), 0
    for episode in range(4):
        ours.reset(episode)
        if episode % 2:
            ours.pos.mul_(m.RADIUS[task])
        reference.reset(seed=episode)
        put(ours, 1, reference)
        for t in range(25):
            actions = draw(ours, rng)
            obs, state, avail, reward, done = ours.step(actions)
            seen, rewards, terminated, truncated, _ = reference.step(
                moves(ours, 1, actions, reference)
            )
            expected = np.stack(list(seen.values()))
            np.testing.assert_allclose(obs[1, :, :-n], expected, atol=1e-5)
            np.testing.assert_allclose(state[1], expected.ravel(), atol=1e-5)
            assert torch.equal(obs[1, :, -n:], torch.eye(n)) and avail.all() and not done.any()
            assert reward[1].item() == pytest.approx(np.mean(list(rewards.values())), abs=near)
            assert not any(terminated.values()) and all(truncated.values()) == (t == 24)
            touched += (torch.pdist(ours.pos[1]) < 2 * m.RADIUS[task]).sum().item()
    assert touched > 0


@pytest.mark.parametrize("task", TASKS)
def test_single_precision_follows_mpe2_from_every_state(task):
    ours, reference = make(task, 5, 4)
    rng = torch.Generator().manual_seed(2)
    ours.reset(0)
    ours.pos.mul_(0.5)
    reference.reset(seed=0)
    for _ in range(24):
        put(ours, 2, reference)
        actions = draw(ours, rng)
        obs, _, _, reward, _ = ours.step(actions)
        seen, rewards, *_ = reference.step(moves(ours, 2, actions, reference))
        np.testing.assert_allclose(obs[2, :, :-5], np.stack(list(seen.values())), atol=1e-5)
        assert reward[2].item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_episodes_begin_as_in_mpe2(task):
    """Kolmogorov-Smirnov against 300 resets of mpe2, coordinate by coordinate."""
    ours, reference = make(task, 3, 2000)
    ours.reset(0)
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
    """Against dynamic programming over sets of targets; the limit comes after the choice."""
    distances = torch.tensor(np.random.default_rng(n).uniform(0, 3, size=(20, n, n)))
    got = m.assigned_distances(distances, 1.0)

    def best(d):
        """(least sum, sum of what is chosen, limited) of the agents and targets that are left."""

        @functools.cache
        def of(left):
            if not left:
                return 0.0, 0.0
            own = d[len(left) - 1]
            rest = [(of(left - {k}), own[k]) for k in left]
            return min((total + x, limited + min(x, 1.0)) for (total, limited), x in rest)

        return of(frozenset(range(n)))[1]

    expected = [best(d) for d in distances.tolist()]
    np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("task", TASKS)
def test_auto_reset_seeds_and_storage(task):
    ours, again, other = (make(task, 4, 5)[0] for _ in range(3))
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))
    assert same(ours.reset(3), again.reset(3))
    assert not torch.equal(ours._look()[0], other.reset(4)[0])
    rng = torch.Generator().manual_seed(0)
    for t in range(1, 61):  # through two resets
        actions = draw(ours, rng)
        obs, state, avail, reward, done = mine = ours.step(actions)
        assert same(mine, again.step(actions))
        assert done.all() == done.any() == (t % 25 == 0)
        assert ((obs[..., :2] == 0).all() == done.all()) and reward.isfinite().all()
    stored = [x.clone() if torch.is_tensor(x) else x for x in ours.state_dict()]
    restored, _ = make(task, 4, 5)
    restored.reset(9)
    restored.load_state_dict(stored)
    for _ in range(40):
        actions = draw(ours, rng)
        assert same(ours.step(actions), restored.step(actions))


def test_a_copy_has_games_of_its_own():
    ours, _ = make("line", 3, 2)
    ours.reset(1)
    before = [x.clone() if torch.is_tensor(x) else x for x in ours.state_dict()]
    other, rng = copy.copy(ours), torch.Generator().manual_seed(0)
    other.reset(2)
    for _ in range(30):
        other.step(draw(other, rng))
    for x, y in zip(before, ours.state_dict()):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


# ---------- other environments
TOY = '''
import os
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv

class Toy(ParallelEnv):
    """Four steps; b leaves after the second. The actions a, b and c are 5, 6 and 7."""
    metadata = {"name": "toy"}
    masks, unequal, box = True, False, None
    played = 0  # steps of all copies

    def __init__(self):
        self.possible_agents = ["a", "b", "c"]

    def observation_space(self, agent):
        seen = Box(-9, 9, (2 + (self.unequal and agent == "c"),), np.float32)
        mask = Box(0, 1, (3,), np.int8)
        return Dict({"observation": seen, "action_mask": mask}) if self.masks else seen

    def action_space(self, agent):
        return self.box or Discrete(3, start=5)

    def sick(self):
        return Toy.played >= int(os.environ.get("TOY_HEALTHY_FOR", 0))

    def see(self):
        seen = {}
        for i, agent in enumerate(self.possible_agents):
            if agent in self.agents:
                mask = np.array([1, 1, self.t % 2], np.int8)
                x = np.array([i, self.t], np.float32)
                seen[agent] = {"observation": x, "action_mask": mask}
        return seen if self.masks else {a: x["observation"] for a, x in seen.items()}

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        return self.see(), {a: {} for a in self.agents}

    def step(self, actions):
        Toy.played += 1
        self.t += 1
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
    box = Box(np.float32([-1, 0]), np.float32([1, 4]))
class Rounded(Plain):
    box = Box(-0.1, 0.2, (2,), np.float32)
class Narrow(Plain):
    box = Box(-1, 1, (1,), np.float32)
class Unbounded(Plain):
    box = Box(-np.inf, np.inf, (2,))
class Unequal(Plain):
    unequal = True
class Text(Toy):
    def observation_space(self, agent):
        from gymnasium.spaces import Text
        return Text(5)
class NoMask(Toy):
    def observation_space(self, agent):
        return Dict({"seen": Box(-9, 9, (2,))})
class State(Plain):
    def state(self):
        return np.array([[self.t, 7.0]])
class Stubborn(Plain):  # never empties its list of agents
    def step(self, actions):
        seen, rewards, left, late, info = super().step(actions)
        self.agents = self.agents or ["a", "c"]
        return seen, rewards, left, late, info

# Faults, from a certain step on.
class NanObs(Plain):
    def see(self):
        return {a: x * np.nan if self.sick() else x for a, x in super().see().items()}
class NanState(Plain):
    def state(self):
        return np.array([np.nan if self.sick() else 1.0])
class NanReward(Plain):
    def step(self, actions):
        seen, rewards, *others = super().step(actions)
        return seen, {a: np.nan for a in rewards} if self.sick() else rewards, *others
class Wide(Plain):
    def see(self):
        return {a: np.ones(3 if self.sick() else 2) for a in super().see()}
class Scalar(Plain):
    def see(self):
        return {a: np.ones(1 if self.sick() else 2) for a in super().see()}
class Absent(Plain):
    def see(self):
        return {} if self.sick() else super().see()
class ZeroMask(Toy):
    def see(self):
        seen = super().see()
        for x in seen.values():
            x["action_mask"] *= not self.sick()
        return seen
class WideMask(Toy):
    def see(self):
        seen = super().see()
        for x in seen.values():
            x["action_mask"] = np.ones(4 if self.sick() else 3)
        return seen
class Empty(Plain):
    def reset(self, seed=None, options=None):
        seen, info = super().reset()
        self.agents = [] if self.sick() else self.agents
        return seen, info
class Broken(Plain):
    def see(self):
        if self.sick():
            raise ValueError("the toy broke")
        return super().see()
'''
NAN, SHAPE = (
    "an observation, state or reward is not finite",
    "a's observation or mask has a wrong shape",
)
FAULTS = {
    "NanObs": NAN,
    "NanState": NAN,
    "Wide": SHAPE,
    "Scalar": SHAPE,
    "Absent": SHAPE,
    "WideMask": SHAPE,
    "ZeroMask": "a mask leaves no action",
    "Empty": "an episode has no agents",
}
STEPS = 12  # of a rollout: three episodes
RUN = f"--num-envs 2 --rollout-steps {STEPS} --chunk-length {STEPS} --update-epochs 1 --device cpu"
RUN += " --hidden-dim 8 --checkpoint-every 100 --eval-every 10000 --eval-episodes 2"
RUN += f" --total-timesteps {8 * STEPS}"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_env.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOY_HEALTHY_FOR", "1000000")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("toy_env", None)
    return tmp_path


def zoo(env_id, num_envs=1, **settings):
    args = m.Args(env_id=env_id, num_envs=num_envs, device="cpu", **settings)
    return m.PettingZooEnvs(args)


def run(*words):
    return m.main([x for word in words for x in word.split()])


@pytest.mark.parametrize("module", ["mpe2.simple_spread_v3", "pettingzoo.sisl.pursuit_v5"])
def test_equal_to_the_library_driven_directly(module):
    envs, rng = zoo(f"{module}:parallel_env", 2), torch.Generator().manual_seed(0)
    obs, state, avail = envs.reset(5)
    n = obs.shape[1]
    assert avail.all() and torch.equal(obs[0, :, -n:], torch.eye(n))
    directly = [importlib.import_module(module).parallel_env() for _ in range(2)]
    seen, ended = [env.reset(seed=5 + 1000 * k)[0] for k, env in enumerate(directly)], 0
    for _ in range(40):
        for k in range(2):
            expected = np.stack([x.ravel() for x in seen[k].values()])
            np.testing.assert_allclose(obs[k, :, :-n], expected, atol=1e-6)
        index = torch.randint(avail.shape[-1], (2, n), generator=rng)
        obs, state, avail, reward, done = envs.step(F.one_hot(index, avail.shape[-1]).float())
        for k, env in enumerate(directly):
            actions = dict(zip(env.agents, index[k].tolist()))
            seen[k], rewards, *_ = env.step(actions)
            assert reward[k].item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-5)
            assert done[k].item() == (not env.agents)
            if not env.agents:
                seen[k], ended = env.reset()[0], ended + 1
    assert ended == (2 if "spread" in module else 0)
    envs.close()


def test_agents_that_leave_masks_and_offsets(toy):
    envs = zoo("toy_env:Toy")
    obs, state, avail = envs.reset(0)
    assert avail.tolist() == [[[True, True, False]] * 3]
    assert state.tolist() == [[0, 0, 1, 0, 2, 0]]  # no state of its own: all that is seen
    one = F.one_hot(torch.tensor([[0, 1, 0]]), 3).float()
    obs, _, avail, reward, done = envs.step(one)
    assert reward.item() == pytest.approx((5 + 6 + 5) / 3) and avail[0, 0].all()
    obs, state, avail, reward, done = envs.step(one)  # b leaves
    assert obs[0, 1].tolist() == [0, 0, 0, 1, 0] and avail[0, 1].tolist() == [True, False, False]
    assert obs[0, 2, :2].tolist() == [2, 2] and not done.item()
    *_, reward, done = envs.step(one)
    assert reward.item() == pytest.approx((5 + 5) / 3) and not done.item()
    obs, _, avail, _, done = envs.step(one)
    assert done.item() and obs[0, :, :2].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert avail.tolist() == [[[True, True, False]] * 3]


def test_continuous_actions_reach_the_bounds_of_the_box(toy):
    envs = zoo("toy_env:Continuous", continuous=True)
    _, _, avail = envs.reset(0)
    assert avail.all() and avail.shape == (1, 3, 2)
    actions = torch.tensor([[[-1.0, -1.0], [1.0, 1.0], [0.0, 7.0]]])
    *_, reward, _ = envs.step(actions)
    assert reward.item() == pytest.approx(((-1 + 0) + (1 + 4) + (0 + 4)) / 3)
    _, _, avail, *_ = envs.step(actions)
    assert avail.tolist() == [[[True, True], [False, False], [True, True]]]


def test_bounds_hold_to_the_last_bit(toy):
    """In single precision, -0.1 + (0.2 - -0.1) is more than 0.2."""
    envs, seen = zoo("toy_env:Rounded", continuous=True), []
    envs.reset(0)
    step = envs.games[0].step
    envs.games[0].step = lambda actions: [seen.extend(actions.values()), step(actions)][1]
    envs.step(torch.tensor([[[-1.0, 1.0], [1.0, 9.0], [-9.0, 0.3]]]))
    assert len(seen) == 3 and all(envs.action.contains(x) for x in seen)


def test_a_state_of_its_own(toy):
    envs = zoo("toy_env:State")
    assert envs.reset(0)[1].tolist() == [[0, 7]]
    assert envs.step(torch.ones(1, 3, 3))[1].tolist() == [[1, 7]]


def test_an_environment_that_keeps_the_list_of_its_agents(toy):
    envs = zoo("toy_env:Stubborn")
    envs.reset(0)
    done = [envs.step(torch.ones(1, 3, 3))[-1].item() for _ in range(8)]
    assert done == [False, False, False, True] * 2


@pytest.mark.parametrize("name", ["Plain", "Continuous", "Narrow"])
def test_who_has_left_does_not_count(name, toy):
    args = m.Args(env_id=f"toy_env:{name}", device="cpu")
    args.num_envs, args.rollout_steps, args.chunk_length, args.hidden_dim = 2, 8, 8, 8
    args.continuous = name != "Plain"
    envs, buffer = m.PettingZooEnvs(args), {}
    now = m.begin(envs, 0, args)
    agent = m.Agent(now, args)
    m.rollout(agent.policy, envs, buffer, now, args.rollout_steps, torch.Generator().manual_seed(0))
    batch, _ = m.estimate(agent, buffer, now, args)
    alive = [[1, 1, 1]] * 2 + [[1, 0, 1]] * 2
    assert batch["alive"][:, 0].tolist() == alive * 2


@pytest.mark.parametrize(
    "env_id, continuous, words",
    [
        ("nowhere.at:all", False, "nowhere"),
        ("toy_env:Nothing", False, "Nothing"),
        ("toy_env", False, "package.module:function"),
        ("toy_env:Unequal", False, "differ"),
        ("toy_env:Text", False, "observations Text"),
        ("toy_env:NoMask", False, "action_mask"),
        ("toy_env:Plain", True, "bounded Box"),
        ("toy_env:Continuous", False, "--continuous"),
        ("toy_env:Unbounded", True, "bounded Box"),
        ("json:JSONDecoder", False, "no PettingZoo parallel environment"),
    ],
)
def test_environments_that_do_not_fit(env_id, continuous, words, toy, capsys):
    before = sorted(os.listdir(toy))
    assert run(RUN, f"--env-id {env_id}", "--continuous" if continuous else "") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --env-id {env_id}: ") and error.count("\n") == 1, error
    assert words in error and {*os.listdir(toy)} - {*before} <= {"__pycache__"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_before_the_first_step_is_bad_input(name, toy, monkeypatch, capsys):
    monkeypatch.setenv("TOY_HEALTHY_FOR", "0")
    assert run(RUN, f"--env-id toy_env:{name}") == 2
    assert capsys.readouterr().err == f"error: --env-id toy_env:{name}: {FAULTS[name]}\n"
    assert not (toy / "runs").exists()


@pytest.mark.parametrize("name", [*FAULTS, "NanReward"])
def test_a_fault_in_the_middle_saves_and_ends_the_run(name, toy, monkeypatch, capsys):
    monkeypatch.setenv("TOY_HEALTHY_FOR", str(3 * STEPS))  # in the second rollout
    assert run(RUN, f"--env-id toy_env:{name}") == 1
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert error == [f"error: --env-id toy_env:{name}: {(FAULTS | {'NanReward': NAN})[name]}"]
    (path,) = (toy / "runs").iterdir()
    assert m.load_checkpoint(path)["progress"]["step"] == 2 * STEPS
    monkeypatch.setenv("TOY_HEALTHY_FOR", "1000000")  # mended
    again = f"--resume {path} --env-id toy_env:{name} --total-timesteps {4 * STEPS}"
    assert run(again) == 0 and m.load_checkpoint(path)["progress"]["step"] == 4 * STEPS


def test_what_an_environment_raises_is_the_users_own_traceback(toy, monkeypatch):
    monkeypatch.setenv("TOY_HEALTHY_FOR", str(3 * STEPS))
    command = [sys.executable, m.__file__, *RUN.split(), "--env-id", "toy_env:Broken"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "toy_env.py" in done.stderr and done.stderr.endswith("ValueError: the toy broke\n")
    (path,) = (toy / "runs").iterdir()
    assert m.load_checkpoint(path)["progress"]["step"] == 2 * STEPS


@pytest.mark.parametrize("words", ["", "--continuous", "--critic compatible", "--nu 0"])
def test_a_foreign_environment_trains_and_resumes(words, toy, monkeypatch):
    seeds, begin = [], m.begin
    spy = lambda envs, seed, args: [seeds.append(seed), begin(envs, seed, args)][1]
    monkeypatch.setattr(m, "begin", spy)
    env = "--env-id toy_env:" + ("Continuous" if "continuous" in words else "Toy")
    words += f" --eval-every {4 * STEPS} --total-timesteps {4 * STEPS}"
    assert run(RUN, env, words) == 0
    (path,) = (toy / "runs").iterdir()
    assert path.name.startswith(env.split()[1].replace(":", "-") + "__maipg_mpe__nu")
    assert run(f"--resume {path} {env} --total-timesteps {6 * STEPS}") == 0
    header, *table = (path / "progress.csv").read_text().splitlines()
    assert [int(x.split(",")[0]) for x in table] == [2 * STEPS, 4 * STEPS, 6 * STEPS]
    evaluated = header.split(",").index("eval/episodic_return")
    assert [x.split(",")[evaluated] == "nan" for x in table] == [True, False, False]
    # New episodes after a resume, not those of the beginning again.
    assert [x for x in seeds if x < 10**9] == [1, 1 + 4 * STEPS]


def test_code_named_in_a_checkpoint_is_not_imported(toy, capsys):
    (toy / "wicked.py").write_text("open('touched', 'w')\nfrom toy_env import Toy\n")
    assert run(RUN, f"--env-id toy_env:Toy --total-timesteps {2 * STEPS}") == 0
    (path,) = (toy / "runs").iterdir()
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    saved["args"]["env_id"] = "wicked:Toy"
    torch.save(saved, path / "checkpoint.pt")
    more = f"--resume {path} --total-timesteps {4 * STEPS}"
    capsys.readouterr()
    for words in ("", "--env-id toy_env:Toy"):
        assert run(more, words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--env-id 'wicked:Toy'" in error, error
        assert not Path("touched").exists() and "wicked" not in sys.modules
    assert run(more, "--env-id wicked:Toy") == 0  # at the user's word
    assert Path("touched").exists()
