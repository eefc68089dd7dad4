"""maipg_mpe.py: what it does not share with maipg_smac.py, and its command line."""

import copy
import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import maipg_mpe as maipg

SCRIPT = Path(maipg.__file__)
TINY = "--num-agents 3 --num-envs 4 --update-epochs 2 --hidden-dim 16 --eval-episodes 6"
TINY += " --device cpu --eval-every 200 --checkpoint-every 1"
STEP = 100  # environment steps of an update
SETTINGS = dict(num_agents=3, num_envs=4, hidden_dim=12, device="cpu")


def call(*words):
    return maipg.main([x for word in words for x in str(word).split()])


def train(folder, *words):
    """A new run; its folder, which must be the only one in `folder`."""
    assert call(TINY, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def flat(x, name=""):
    if isinstance(x, dict | list):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: x}


def differing(a, b):
    """Names of what differs between two checkpoints, the arguments and the file's size aside."""
    a, b = (flat(maipg.load_checkpoint(path)) for path in (a, b))
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    names = [k for k in a.keys() | b.keys() if not k.startswith(("/args", "/progress/csv_size"))]
    return [k for k in names if k not in a or k not in b or not same(a[k], b[k])]


class Quadratic:
    """One-step games whose reward is a quadratic of the joint action, the same in all of them."""

    def __init__(self, args, num_agents=3, dims=2):
        self.args, rng = args, torch.Generator().manual_seed(1)
        size = num_agents * dims
        root = torch.randn(size, size, generator=rng)
        self.curvature = root @ root.T / size
        self.best = 0.5 * torch.randn(size, generator=rng)
        self.obs = torch.randn(num_agents, 4, generator=rng)

    def value(self, actions):
        """[..., n, A] -> [...]: agents interact through the curvature."""
        x = actions.flatten(-2) - self.best
        return -((x @ self.curvature) * x).sum(-1)

    def reset(self, seed):
        obs = torch.cat([self.obs, torch.eye(len(self.obs))], -1)
        obs = obs.expand(self.args.num_envs, -1, -1)
        return obs, obs.flatten(1), torch.ones(*obs.shape[:2], 2, dtype=torch.bool)

    def step(self, actions):
        reward = self.value(actions)
        return *self.reset(0), reward, torch.ones_like(reward, dtype=torch.bool)


def prepare(game=maipg.ParticleEnvs, **settings):
    """Networks, a rollout, and what is estimated from it."""
    args = maipg.Args(**SETTINGS | settings)
    envs, buffer = game(args), {}
    now = maipg.begin(envs, 1, args)
    torch.manual_seed(3)
    agent = maipg.Agent(now, args)
    start = copy.deepcopy(agent.state_dict())
    for parameter in agent.policy.head.parameters():
        parameter.data *= 30  # no longer indifferent between the actions
    maipg.rollout(
        agent.policy, envs, buffer, now, args.rollout_steps, torch.Generator().manual_seed(0)
    )
    played = {key: x.clone() for key, x in buffer.items()}
    batch, metrics = maipg.estimate(agent, buffer, now, args)
    sigma_a = metrics["diagnostics/sigma_a"]
    return SimpleNamespace(
        args=args,
        envs=envs,
        agent=agent,
        start=start,
        buffer=played,
        batch=batch,
        metrics=metrics,
        sigma_a=sigma_a,
    )


def flat_gradient(loss, module, **kwargs):
    """In one vector; 0 where the loss does not reach."""
    parameters = list(module.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, **kwargs)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)]
    return torch.cat([g.flatten() for g in grads])


def policy_gradient(x, batch=None, **settings):
    """Of the policy's loss, in one vector."""
    rng, args = torch.Generator().manual_seed(5), replace(x.args, **settings)
    losses, _ = maipg.policy_losses(x.agent, batch or x.batch, x.sigma_a, rng, args)
    return flat_gradient(losses["policy"], x.agent.policy)


# ---------- policies
def test_gaussian_policies():
    torch.manual_seed(0)
    policy = torch.nn.Module()
    policy.log_std = torch.nn.Parameter(torch.tensor([-0.7, 0.3]))
    out, std = torch.randn(4, 3, 2), np.exp([-0.7, 0.3])
    pi = maipg.distribution(policy, out, torch.ones(4, 3, 2, dtype=torch.bool))
    mean = np.tanh(out.numpy())
    np.testing.assert_allclose(pi.mean, mean, atol=1e-6)
    np.testing.assert_allclose(pi.mode, mean, atol=1e-6)
    actions = maipg.sample(pi, torch.Generator().manual_seed(1))
    z = (actions.detach().numpy() - mean) / std
    expected = (-(z**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2).sum(-1)
    np.testing.assert_allclose(pi.log_prob(actions).detach(), expected, atol=1e-5)
    entropy = (np.log(std) + np.log(2 * np.pi * np.e) / 2).sum()
    np.testing.assert_allclose(pi.entropy().detach(), np.full((4, 3), entropy), atol=1e-5)
    many = torch.ones(20000, 4, 3, 2, dtype=torch.bool)
    many = maipg.distribution(policy, out.expand(many.shape), many)
    many = maipg.sample(many, torch.Generator().manual_seed(2)).detach().numpy()
    np.testing.assert_allclose(many.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(many.std(0), np.broadcast_to(std, (4, 3, 2)), atol=0.05)
    # No critic can move the mean of who has left.
    avail = torch.ones(4, 3, 2, dtype=torch.bool)
    avail[:, 1] = False
    maipg.distribution(policy, out.requires_grad_(), avail).mean.sum().backward()
    assert (out.grad[:, 1] == 0).all() and (out.grad[:, ::2] > 0).all()


def test_discrete_policies():
    torch.manual_seed(0)
    out, avail = torch.randn(4, 3, 5), torch.rand(4, 3, 5) < 0.7
    avail[..., 2] = True
    assert 5 < (~avail).sum()
    p = np.exp(out.numpy()) * avail.numpy()
    p /= p.sum(-1, keepdims=True)
    policy = torch.nn.Module()
    pi = maipg.distribution(policy, out, avail)
    np.testing.assert_allclose(pi.mean, p, atol=1e-6)
    assert np.array_equal(pi.mode.argmax(-1), p.argmax(-1)) and (pi.mode.sum(-1) == 1).all()
    actions = maipg.sample(pi, torch.Generator().manual_seed(1))
    assert torch.equal(actions.sum(-1), torch.ones(4, 3)) and actions.max() == 1
    chosen = np.take_along_axis(p, actions.argmax(-1, keepdim=True).numpy(), -1)[..., 0]
    np.testing.assert_allclose(pi.log_prob(actions), np.log(chosen), atol=1e-5)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    np.testing.assert_allclose(pi.entropy(), entropy, atol=1e-5)
    many = maipg.distribution(policy, out.expand(20000, 4, 3, 5), avail.expand(20000, 4, 3, 5))
    many = maipg.sample(many, torch.Generator().manual_seed(2)).mean(0)
    np.testing.assert_allclose(many, p, atol=0.02)
    assert (many[~avail] == 0).all()


# ---------- q_tot
@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def new_mixer(kind, n, width, state_dim):
    if kind == "joint":
        return maipg.JointMixer(n, width, state_dim, 8)
    return maipg.Mixer(kind, n, state_dim, 8)


@pytest.mark.parametrize("kind", ["qmix", "vdn", "joint"])
def test_the_gradient_through_continuous_actions(kind, double):
    """deterministic_pg_loss by the mean, against finite differences; none reaches beyond +-1."""
    torch.manual_seed(0)
    mixer = maipg.ContinuousMixer(new_mixer(kind, 3, 6, 4), 2, 6)
    utilities, state = torch.randn(2, 5, 3, 6), torch.randn(2, 5, 4)
    mu = 0.9 * torch.rand(2, 5, 3, 2)
    mu[0, 0, 0, 0] = 1.5  # where the environment clips
    loss = lambda x: maipg.deterministic_pg_loss(mixer(utilities, x, mixer.weights(state)), 0.3)
    x = mu.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    assert grad[0, 0, 0, 0] == 0 and grad.abs().max() > 1e-4
    for index in [(0, 0, 0, 1), (1, 4, 2, 0), (0, 3, 1, 1)]:
        up, down = mu.clone(), mu.clone()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (loss(up) - loss(down)) / 2e-6
        assert grad[index].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("continuous", [False, True])
def test_only_the_joint_q_knows_interactions(continuous):
    """Two agents that are paid for doing the same: Q(s, a_1, a_2) can be fitted, VDN cannot."""
    torch.manual_seed(0)
    first, second = torch.randint(2, (2, 256))
    payoff = (first == second).float()
    actions = F.one_hot(torch.stack([first, second], 1), 2).float()
    if continuous:
        actions = torch.stack([first, second], 1).unsqueeze(-1) * 1.6 - 0.8
    width, state = 6 if continuous else 2, torch.zeros(256, 3)
    errors = {}
    for kind in ("joint", "vdn"):
        mixer = new_mixer(kind, 2, width, 3)
        mixer = maipg.ContinuousMixer(mixer, 1, width) if continuous else mixer
        utilities = torch.nn.Parameter(0.1 * torch.randn(2, width))
        optimizer = torch.optim.Adam([utilities, *mixer.parameters()], 0.02)
        for _ in range(300):
            q_tot = mixer(utilities.expand(256, 2, width), actions, mixer.weights(state))
            loss = F.mse_loss(q_tot, payoff)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[kind] = loss.item()
    assert errors["joint"] < 0.01 and errors["vdn"] > 0.2, errors


def test_the_joint_q_uses_state_utilities_and_actions():
    torch.manual_seed(0)
    mixer = maipg.JointMixer(2, 3, 5, 8)
    utilities, actions, state = torch.randn(4, 2, 3), torch.rand(4, 2, 3), torch.randn(4, 5)
    inputs = [x.requires_grad_() for x in (utilities, actions, state)]
    q_tot = mixer(utilities, actions, mixer.weights(state))
    assert q_tot.shape == (4,)
    for grad in torch.autograd.grad(q_tot.sum(), inputs):
        assert (grad.flatten(1).abs().amax(1) > 1e-4).all()


CRITICS = [dict(critic="paper", mixer=mixer) for mixer in ("qmix", "joint")]
CRITICS += [dict(critic="compatible"), dict(critic="paper", q_scale="raw")]


TERMS = [(continuous, settings) for continuous in (False, True) for settings in CRITICS]
TERMS += [(False, dict(mu="gumbel")), (False, dict(mu="gumbel", critic="compatible"))]


@pytest.mark.parametrize("continuous, settings", TERMS, ids=str)
def test_the_gradient_is_interpolated_linearly(continuous, settings):
    x = prepare(continuous=continuous, nu=0.5, ent_coef=0.0, **settings)
    noise = 0.2 * torch.randn(x.batch["log_probs"].shape)
    batch = x.batch | {"log_probs": x.batch["log_probs"] + noise}
    first, middle, last = (policy_gradient(x, batch, nu=nu) for nu in (1e-9, 0.3, 1.0))
    assert (first - last).norm() > 1e-4 and first.norm() > 1e-4 and last.norm() > 1e-4
    torch.testing.assert_close(middle, 0.7 * first + 0.3 * last, atol=1e-6, rtol=1e-4)
    mappo = prepare(continuous=continuous, nu=0.0, ent_coef=0.0)
    noisy = mappo.batch | {"log_probs": mappo.batch["log_probs"] + noise}
    torch.testing.assert_close(policy_gradient(mappo, noisy), first, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mixer", ["qmix", "vdn", "joint"])
@pytest.mark.parametrize("continuous", [False, True])
def test_q_is_trained_by_its_own_loss_only(continuous, mixer):
    """The policy's loss leaves utility and mixer alone, and the loss of q the policy."""
    x = prepare(continuous=continuous, nu=0.5, mixer=mixer)
    losses, _ = maipg.policy_losses(x.agent, x.batch, x.sigma_a, None, x.args)
    for name, loss in losses.items():
        for net in ("policy", "q"):
            gradient = flat_gradient(loss, getattr(x.agent, net), retain_graph=True)
            assert (gradient != 0).any() == (name == net), (name, net)


@pytest.mark.parametrize("settings", CRITICS[:3], ids=str)
@pytest.mark.parametrize("continuous", [False, True])
def test_every_nu_starts_from_the_same_weights_and_rollout(continuous, settings):
    mappo = prepare(nu=0.0, continuous=continuous)
    ours = prepare(nu=0.5, continuous=continuous, **settings)
    assert {k.split(".")[0] for k in mappo.start} == {"policy", "critic", "v_norm"}
    assert all(torch.equal(mappo.start[key], ours.start[key]) for key in mappo.start)
    for key, x in mappo.buffer.items():
        assert torch.equal(x, ours.buffer[key]), key
    for key in ("advantages", "returns", "log_probs"):
        assert torch.equal(mappo.batch[key], ours.batch[key]), key


def test_estimates_by_hand():
    """V(s) once a game; GAE and TD(lambda) over whole episodes, which time limits end."""
    x = prepare(nu=0.5, critic="paper")
    batch, T, N = x.batch, 25, 4
    assert batch["values"].shape == (T, N, 1) and batch["advantages"].shape == (T, N, 1)
    r, done = x.buffer["reward"][:-1].double(), x.buffer["done"][:-1]
    assert done[-1].all() and not done[:-1].any()
    v = 0.1 * batch["values"][..., 0].double()  # ValueNorm's first deviation is 0.1
    for k in range(N):
        for t in (0, 10, 24):
            deltas = [r[j, k] + (0.99 * v[j + 1, k] if j < 24 else 0) - v[j, k] for j in range(T)]
            expected = sum((0.99 * 0.95) ** (j - t) * deltas[j] for j in range(t, T))
            got = (batch["returns"][t, k, 0] - v[t, k]).item()
            assert got == pytest.approx(expected.item(), abs=1e-4)
    assert (batch["q_targets"][24] - r[24]).abs().max() < 1e-5  # nothing comes after the end
    advantages = batch["advantages"].flatten()
    assert advantages.mean().abs() < 1e-5 and advantages.std(correction=0) == pytest.approx(1, 1e-4)
    assert all(math.isfinite(x) for x in x.metrics.values())


def test_returns_are_summed_from_an_episodes_first_step():
    buffer = prepare(nu=0.0, rollout_steps=50).buffer
    r = buffer["reward"][:50].double()
    expected = torch.cat([r[:25].cumsum(0), r[25:].cumsum(0)])
    np.testing.assert_allclose(buffer["return"][:50].double(), expected, atol=1e-4)


@pytest.mark.parametrize("continuous", [False, True])
def test_q_targets_look_at_the_next_states_greedy_action(continuous):
    """TD(lambda) of the target networks, which are still copies of the networks here."""
    x = prepare(continuous=continuous, nu=0.5, critic="paper", td_lambda=0.7)
    b = x.buffer
    with torch.no_grad():
        # Hidden states go on from step to step; an episode has 25.
        utilities, _ = x.agent.target_q.utility(
            b["obs"], torch.zeros(4, 3, 12), b["keep"], b["state"]
        )
        greedy = b["mean"]
        if not continuous:
            greedy = (greedy == greedy.max(-1, keepdim=True).values).float()
        mixer = x.agent.target_q.mixer
        q = 0.1 * mixer(utilities, greedy, mixer.weights(b["state"])).double()
    target, r = torch.zeros(4).double(), b["reward"].double()
    for t in reversed(range(25)):
        after = (0.3 * q[t + 1] + 0.7 * target) if t < 24 else 0.0
        target = r[t] + 0.99 * after
        np.testing.assert_allclose(x.batch["q_targets"][t], target, atol=1e-5)
    assert q.std() > 1e-3


# ---------- the compatible critic
@pytest.mark.parametrize("continuous", [False, True])
def test_the_compatible_critic_is_ridge_regression(continuous):
    """Against numpy's least squares with the ridge as rows of its own."""
    x = prepare(continuous=continuous, nu=0.5, critic="compatible", ridge=0.01)
    T, N, n = 25, 4, 3
    with torch.no_grad():
        h = x.agent.policy.norm(x.buffer["policy_hidden"][1:]).double().numpy()
    h = np.concatenate([h, np.ones((T, N, n, 1))], -1)
    scores = (x.buffer["actions"] - x.buffer["mean"])[:-1].double().numpy()
    inputs = np.stack(
        [
            sum(np.outer(h[t, k, i], scores[t, k, i]) for i in range(n)).ravel()
            for t in range(T)
            for k in range(N)
        ]
    )
    width = inputs.shape[1]
    padded = np.vstack([inputs, math.sqrt(0.01 * T * N) * np.eye(width)])
    targets = np.append(x.batch["advantages"].double().numpy().ravel(), np.zeros(width))
    w = np.linalg.lstsq(padded, targets, rcond=None)[0].reshape(h.shape[-1], -1)
    assert np.abs(w).max() > 0.01
    np.testing.assert_allclose(x.batch["utilities"], h @ w, atol=2e-3)


def test_the_compatible_gradient_of_a_quadratic_game():
    """Gaussian actions: utilities are the gradient of E[Q] by the mean, and the second term's
    gradient is that of E[Q] by the policy's weights, both by autograd. (By Stein's lemma a
    quadratic's least-squares slope is its slope at the mean.)"""
    settings = dict(num_envs=20_000, rollout_steps=5, chunk_length=5, ridge=1e-7, ent_coef=0.0)
    x = prepare(Quadratic, continuous=True, nu=1.0, critic="compatible", **settings)
    out, _ = x.agent.policy(
        x.batch["obs"][:1, :1], x.batch["policy_hidden"][0, :1], torch.zeros(1, 1)
    )
    mu = out[0, 0].tanh()
    at = mu.detach().requires_grad_()
    (slope,) = torch.autograd.grad(x.envs.value(at), at)
    slope = slope / x.sigma_a
    utilities = x.batch["utilities"].flatten(0, 1)
    assert slope.abs().max() > 0.5
    torch.testing.assert_close(utilities.mean(0), slope, atol=0.02, rtol=0.02)

    loss = -x.envs.value(mu) / (3 * x.sigma_a)  # q_scale: 1 / live agents, in A's unit
    expected, got = flat_gradient(loss, x.agent.policy), policy_gradient(x)
    assert (got - expected).norm() < 0.03 * expected.norm()


# ---------- the real thing
def test_a_policy_earns_the_same_in_mpe2(tmp_path):
    """The greedy policy of a run, played step by step in mpe2 itself."""
    from test_mpe_env import mpe2_env, to_mpe2

    words = "--total-timesteps 300 --learning-rate 0.01 --nu 0 --scenario line --continuous"
    saved = maipg.load_checkpoint(train(tmp_path, words))
    args = maipg.Args(**saved["args"] | dict(num_envs=256, eval_episodes=256))
    envs = maipg.ParticleEnvs(args)
    agent = maipg.Agent(maipg.begin(envs, 0, args), args)
    agent.load_state_dict(saved["agent"])
    batched = maipg.evaluate(agent.policy, envs, 7, args)["eval/episodic_return"]
    env, returns = mpe2_env(args), []
    for seed in range(60):
        seen, _ = env.reset(seed=seed)
        hidden, keep, total = torch.zeros(1, 3, 16), torch.zeros(1, 1), 0.0
        while env.agents:
            obs = torch.tensor(np.concatenate([np.stack(list(seen.values())), np.eye(3)], 1))
            with torch.no_grad():
                out, after = agent.policy(obs.float()[None, None], hidden, keep)
            hidden, keep = after[0], torch.ones(1, 1)
            moves = [to_mpe2(action, True) for action in out[0, 0].tanh()]
            seen, rewards, *_ = env.step(dict(zip(env.agents, moves)))
            total += sum(rewards.values()) / 3
        returns.append(total)
    error = np.std(returns) * math.sqrt(1 / 60 + 1 / 256)
    assert abs(np.mean(returns) - batched) < 4 * error


# ---------- command line
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four updates in one go."""
    return train(tmp_path_factory.mktemp("whole"), f"--total-timesteps {4 * STEP}")


def test_run_folder(whole):
    assert {"progress.csv", "args.json", "checkpoint.pt"} < set(os.listdir(whole))
    assert whole.name.startswith("spread-3__maipg_mpe__nu0.4__compatible__s1__")
    table = rows(whole)
    assert [int(row["global_step"]) for row in table] == [STEP * k for k in (1, 2, 3, 4)]
    evaluations = [float(row["eval/episodic_return"]) for row in table]
    assert [math.isnan(x) for x in evaluations] == [True, False, True, False]
    names = "charts/episodic_return charts/SPS losses/policy losses/critic losses/entropy"
    names += " diagnostics/sigma_a diagnostics/approx_kl diagnostics/clip_fraction"
    names += " diagnostics/policy_grad_norm diagnostics/critic_grad_norm"
    names += " variance/corr variance/slope"
    for key in names.split():
        assert all(math.isfinite(float(row[key])) for row in table), key
    args = json.loads((whole / "args.json").read_text())
    assert args["scenario"] == "spread" and args["num_agents"] == 3


RUNS = [
    f"{actions} {method}"
    for actions in ("", "--continuous --scenario line")
    for method in ("--nu 0", "--critic paper", "--critic compatible")
]
RUNS += ["--mixer joint --mu gumbel --nu 0.7 --scenario formation", "--continuous --mixer joint"]


@pytest.mark.parametrize("words", RUNS)
def test_resume_is_bit_for_bit(words, tmp_path):
    # Rollouts of 20 steps end in the middle of an episode.
    words += " --rollout-steps 20 --chunk-length 10 --eval-every 160"
    whole = train(tmp_path / "whole", words, "--total-timesteps 320")
    path = train(tmp_path / "half", words, "--total-timesteps 160")
    assert any(name.startswith("/agent") for name in differing(whole, path))
    assert call(f"--resume {path} --total-timesteps 320") == 0
    assert differing(whole, path) == []
    tables = [[{**row, "charts/SPS": 0} for row in rows(x)] for x in (whole, path)]
    assert tables[0] == tables[1] and len(tables[0]) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(number, tmp_path):
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--runs-dir", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--total-timesteps", "10000000"],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # if nohup runs the tests
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    (path,) = tmp_path.iterdir()
    step = maipg.load_checkpoint(path)["progress"]["step"]
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    assert [int(r["global_step"]) for r in rows(path)] == list(range(STEP, step + STEP + 1, STEP))


def test_a_run_in_use_is_left_alone(whole, capsys):
    before = (whole / "progress.csv").read_bytes()
    with open(whole / "progress.csv", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call(f"--resume {whole} --total-timesteps {9 * STEP}") == 2
    assert "in use" in capsys.readouterr().err and before == (whole / "progress.csv").read_bytes()


def test_nan_stops_the_run_before_the_weights(tmp_path, monkeypatch, capsys):
    path, step = train(tmp_path, f"--total-timesteps {STEP}"), maipg.ParticleEnvs.step
    before = (path / "checkpoint.pt").read_bytes()

    def poisoned(envs, actions):
        *seen, reward, done = step(envs, actions)
        return *seen, reward * math.nan, done

    monkeypatch.setattr(maipg.ParticleEnvs, "step", poisoned)
    assert call(f"--resume {path} --total-timesteps {2 * STEP}") == 1
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("error: not finite")]
    assert (path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("words", ["", "--continuous", "--continuous --scenario line"])
def test_weights_that_explode_are_not_saved(words, tmp_path, capsys):
    words += f" --learning-rate 1e6 --runs-dir {tmp_path} --total-timesteps {9 * STEP}"
    assert call(TINY, words, "--checkpoint-every 99") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: not finite")
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_random_streams_are_separate(monkeypatch, tmp_path):
    seeds, rollout = [], maipg.rollout

    def spy(policy, envs, buffer, now, steps, rng=None):
        seeds.extend([envs.rng.initial_seed(), rng.initial_seed()] if rng else [])
        return rollout(policy, envs, buffer, now, steps, rng)

    monkeypatch.setattr(maipg, "rollout", spy)
    train(tmp_path, f"--total-timesteps {STEP}")
    assert seeds[0] == 1 and seeds[1] == 1 + 10**9


def test_no_evaluation_begins_after_a_signal(tmp_path, signalled):
    signalled(maipg)
    assert call(TINY, f"--runs-dir {tmp_path} --total-timesteps {STEP}") == 128 + 15
    (path,) = tmp_path.iterdir()
    assert len(rows(path)) == 1


BAD = [
    ("--gamma 1.5", "gamma"),
    ("--forgetting 2", "forgetting"),
    ("--critic compatible --mixer joint", "only with --critic paper"),
    ("--critic compatible --mixer qmix", "only with --critic paper"),
    ("--q-scale raw", "only with --critic paper"),
    ("--num-envs 0", "num_envs"),
    ("--rollout-steps -5", "rollout_steps"),
    ("--nu 1.01", "nu 1.01"),
    ("--nu nan", "nu nan"),
    ("--seed -1", "seed"),
    ("--threads 0", "threads"),
    ("--eval-episodes 0", "eval_episodes"),
    ("--chunk-length 7", "chunk-length"),
    ("--num-minibatches 3", "minibatches"),
    ("--mu gumbel --continuous", "mu gumbel"),
    ("--env-id nowhere.at:all", "nowhere"),
    ("--env-id json:nothing", "nothing"),
    ("--env-id json", "package.module:function"),
    ("--env-id a:b:c", "a:b:c"),
    ("--env-id json:JSONDecoder", "PettingZoo"),
    ("--env-id mpe2.simple_world_comm_v3:parallel_env", "differ"),
    ("--env-id mpe2.simple_spread_v3:parallel_env --continuous", "--continuous"),
    ("--resume missing", "missing"),
    ("--resume damaged", "damaged"),
    ("--resume foreign", "foreign maipg_mpe"),
    ("--resume whole --nu 0.3", "nu"),
    ("--resume whole --env-id json:dumps", "env-id"),
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "GPU"))
REFUSED = [  # by tyro, in a message of its own
    ("--scenario tag", "line"),
    ("--num-agents 1", "10"),
    ("--num-agents 11", "10"),
    ("--mixer sum", "joint"),
    ("--critic best", "compatible"),
    ("--no-such-flag 1", "no-such-flag"),
    ("--total-timesteps 1e6", "1e6"),
]


@pytest.fixture(scope="module")
def corner(whole, tmp_path_factory):
    folder, good = tmp_path_factory.mktemp("corner"), (whole / "checkpoint.pt").read_bytes()
    for name in ("damaged", "foreign"):
        (folder / name).mkdir()
    (folder / "damaged" / "checkpoint.pt").write_bytes(good[: len(good) // 2])
    torch.save({"script": "maipg_smac", "args": {}}, folder / "foreign" / "checkpoint.pt")
    (folder / "whole").symlink_to(whole)
    return folder


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input(command, words, corner, monkeypatch, capsys):
    monkeypatch.chdir(corner)
    before = sorted(os.listdir(corner)), sorted(os.listdir(corner / "whole"))
    saved = "--resume" in command
    assert call("" if saved else TINY, "" if saved else "--total-timesteps 100", command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words.split()), error
    assert before == (sorted(os.listdir(corner)), sorted(os.listdir(corner / "whole")))


@pytest.mark.parametrize("command, word", REFUSED, ids=[command for command, _ in REFUSED])
def test_what_tyro_refuses(command, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(TINY, "--total-timesteps 100", command)
    assert end.value.code == 2 and word in capsys.readouterr().err and not os.listdir(tmp_path)


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport maipg_mpe\n"
    code += "assert not {'mpe2', 'pettingzoo', 'gymnasium', 'wandb', 'pygame'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not os.listdir(tmp_path)
