"""benchmark/variance.py against plain calculations, and on bad input."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import maipg_matrix as matrix
import maipg_mpe as mpe
import maipg_smac as smac
from benchmark import variance
from benchmark.baselines import qmix

torch.set_num_threads(1)
COMMON = dict(device="cpu", num_envs=4, hidden_dim=8, update_epochs=2)
SMAC = COMMON | dict(map_name="3m", backend="smax", rollout_steps=20, chunk_length=20)
MPE = COMMON | dict(num_agents=3, rollout_steps=25, chunk_length=25)


def noise(seed=2):
    return torch.Generator().manual_seed(seed)


class Toy:
    """Games of random numbers with deaths; an agent's own no-op is action 0, for the dead alone."""

    def __init__(self, args):
        self.count = args.num_envs

    def rand(self, *shape):
        return torch.rand(self.count, *shape, generator=self.rng)

    def look(self):
        avail = self.rand(3, 5) < 0.7
        avail[..., 0], avail[..., 1:3] = False, True
        avail[~self.living] = torch.eye(5, dtype=torch.bool)[0]
        return 2 * self.rand(3, 7) - 1, 2 * self.rand(6) - 1, avail

    def reset(self, seed):
        self.rng = torch.Generator().manual_seed(seed)
        self.living = torch.ones(self.count, 3, dtype=torch.bool)
        return self.look()

    def step(self, actions):
        self.living &= self.rand(3) > 0.1
        self.living[:, 0] = True
        done = self.rand() < 0.2
        self.living |= done.unsqueeze(-1)
        reward = self.rand() + 0.3 * actions.float().mean(-1)
        return *self.look(), reward, done, done & (self.rand() < 0.6)

    def close(self):
        pass


def prepare(script, **settings):
    """A run of variance.py: networks with weights that are not indifferent, and games."""
    args = script.Args(**(SMAC if script is smac else MPE) | {"nu": 0.5} | settings)
    envs = (Toy if script is smac else mpe.ParticleEnvs)(args)
    now = script.begin(envs, 1, args)
    torch.manual_seed(4)
    agent = script.Agent(now, args)
    for name, x in agent.named_parameters():
        lively = "head.weight" in name or "mixer.q." in name
        x.data += (3.0 if lively else 0.1) * torch.randn_like(x)
    for name, mean, std in (("v_norm", 2.0, 1.5), ("q_norm", 3.0, 0.7)):
        if hasattr(agent, name):
            norm = getattr(agent, name)
            norm.moments.copy_(torch.tensor([mean, mean**2 + std**2, 1.0]))
            norm.mean.fill_(mean)
            norm.std.fill_(std)
    return SimpleNamespace(script=script, args=args, agent=agent, envs=envs, now=now)


def measured(script=smac, **settings):
    """A run after a rollout that its compatible critic has seen, what `now` was before a second
    one, and what play() gives of that."""
    run, rng = prepare(script, **settings), noise()
    ((*_, run.agent),) = variance.play(run, rng, 1, "first")
    now = dict(run.now)
    (played,) = variance.play(run, rng, 1, "second")
    return run, now, played


def one_by_one(network, hidden, buffer, with_state):
    """A network over a buffer, a step at a time: outputs and last features [T + 1, N, n, ...]."""
    outs, features = [], []
    for t in range(len(buffer["obs"])):
        state = [buffer["state"][t][None]] if with_state else []
        out, hiddens = network(buffer["obs"][t][None], hidden, buffer["keep"][t][None], *state)
        hidden = hiddens[0]
        outs.append(out[0])
        features.append(network.norm(hidden))
    return torch.stack(outs), torch.stack(features)


def numpy_mixer(mixer, utilities, actions, state):
    """q_tot of utilities and actions [n, ...] in a state [S], by QMIX's formulas or VDN's."""
    if not isinstance(mixer, smac.Mixer | mpe.Mixer):
        inputs = [torch.tensor(x, dtype=torch.float64) for x in (utilities, actions, state)]
        mixer = copy.deepcopy(mixer).double()
        return mixer(*inputs[:2], mixer.weights(inputs[2])).item()
    numbers = lambda layer: (layer.weight.detach().numpy(), layer.bias.detach().numpy())
    apply = lambda layer, x: numbers(layer)[0] @ x + numbers(layer)[1]
    hyper = lambda net, x: apply(net[2], np.maximum(apply(net[0], x), 0))
    s = (state - state.mean()) / np.sqrt(state.var() + 1e-5)
    s = s * numbers(mixer.norm)[0] + numbers(mixer.norm)[1]
    value, chosen = hyper(mixer.value, s)[0], (utilities * actions).sum(-1)
    if mixer.kind == "vdn":
        return chosen.sum() + value
    x = chosen @ np.abs(hyper(mixer.w_1, s)).reshape(len(chosen), -1) + apply(mixer.b_1, s)
    return np.where(x > 0, x, np.expm1(x)) @ np.abs(hyper(mixer.w_2, s)) + value


def raw_advantages(run, now, buffer):
    """(GAE [T, N, n or 1] as a sum over later steps, V [T + 1, ...]) in the reward's unit."""
    T, N = run.args.rollout_steps, run.args.num_envs
    gamma, lam = run.args.gamma, run.args.gae_lambda
    with torch.no_grad():
        values, _ = one_by_one(run.agent.critic, now["critic_hidden"], buffer, True)
    values = values[..., 0].double().numpy() * 1.5 + 2.0
    reward, done, raw = buffer["reward"].numpy(), buffer["done"].numpy(), np.zeros_like(values[:T])
    for t, k in np.ndindex(T, N):
        for j in range(t, T):
            following = 0.0 if done[j, k] else gamma * values[j + 1, k]
            raw[t, k] += (gamma * lam) ** (j - t) * (reward[j, k] + following - values[j, k])
            if done[j, k]:
                break
    return raw, values


def numpy_policy(run, now, buffer):
    """(pi or the Gaussian's mean, features) [T + 1, N, n, ...], a step at a time."""
    with torch.no_grad():
        out, features = one_by_one(run.agent.policy, now["policy_hidden"], buffer, False)
    out = out.double().numpy()
    if hasattr(run.agent.policy, "log_std"):
        return np.tanh(out), features.numpy()
    weights = np.where(buffer["avail"].numpy(), np.exp(out - out.max(-1, keepdims=True)), 0.0)
    return weights / weights.sum(-1, keepdims=True), features.numpy()


def numpy_utilities(run, now, buffer):
    with torch.no_grad():
        return one_by_one(run.agent.q.utility, now["utility_hidden"], buffer, True)[0].numpy()


def living(run, buffer):
    """[T, N, n]: who has a choice."""
    actions = buffer["avail"].numpy().sum(-1)[: run.args.rollout_steps]
    return actions > 1


def by_numpy(run, now, buffer):
    """{r_var_pi, r_var_v, corr, slope} from sums over steps and agents."""
    pi, features = numpy_policy(run, now, buffer)
    paper = run.args.critic == "paper"
    utilities = numpy_utilities(run, now, buffer) if paper else None
    raw, values = raw_advantages(run, now, buffer)
    actions, alive, rows = buffer["actions"].numpy(), living(run, buffer), []
    sigma = np.broadcast_to(raw, alive.shape)[alive].std()
    of_team = lambda x, t, k: np.broadcast_to(x[t, k], alive[t, k].shape)[alive[t, k]].mean()
    for t, k in np.ndindex(*alive.shape[:2]):
        x, p, a = actions[t, k], pi[t, k], of_team(raw, t, k)
        if paper:
            u, state = utilities[t, k], buffer["state"][t, k].numpy()
            q, q_pi = (numpy_mixer(run.agent.q.mixer, u, y, state) for y in (x, p))
            rows.append((a, 0.7 * (q - q_pi), 0.7 * q + 3.0 - of_team(values, t, k)))
            continue
        w, qc = run.agent.compatible.weights.numpy(), 0.0
        for i in np.flatnonzero(alive[t, k]):
            h = np.append(features[t, k, i], 1.0)
            qc += (h @ w * (x[i] - p[i])).sum() * sigma  # it is fitted to A / sigma
        rows.append((a, qc, math.nan))
    a, qc, qv = np.array(rows).T
    cov = ((a - a.mean()) * (qc - qc.mean())).mean()
    figures = {"r_var_pi": (a - qc).var() / a.var(), "corr": cov / (a.std() * qc.std())}
    figures["slope"] = cov / qc.var()
    return figures | ({"r_var_v": (a - qv).var() / a.var()} if paper else {})


KINDS = [
    (smac, dict(mixer="qmix")),
    (smac, dict(mixer="vdn")),
    (smac, dict(critic="compatible")),
    (mpe, dict(mixer="qmix")),
    (mpe, dict(mixer="joint")),
    (mpe, dict(mixer="vdn", continuous=True)),
    (mpe, dict(critic="compatible")),
]


@pytest.mark.parametrize("script, settings", KINDS)
def test_control_variates(script, settings):
    run, now, (buffer, batch, metrics, _) = measured(script, **settings)
    ours = variance.control_variate(run.agent, batch, metrics)
    expected = by_numpy(run, now, buffer)
    ours = {name: x.item() for (name, *_), x in ours.items()}
    assert ours == {key: pytest.approx(x, rel=2e-4, abs=2e-5) for key, x in expected.items()}
    assert abs(ours["corr"]) > 0.01 and abs(ours["r_var_pi"] - 1) > 0.003


# ---------------------------------------------------------------------------------------- gradients
def gradients_by_hand(run, now, buffer, nu, rng=None):
    """The policy's gradient on each game, [N, parameters]: of probabilities, nothing clipped. With
    rng, q_tot is at a Gumbel-softmax sample."""
    T, parameters, rows = run.args.rollout_steps, list(run.agent.policy.parameters()), []
    raw, _ = raw_advantages(run, now, buffer)
    live = np.broadcast_to(raw, living(run, buffer).shape)[living(run, buffer)]
    advantages = torch.tensor((raw - live.mean()) / live.std(), dtype=torch.float32)
    for k in range(run.args.num_envs):
        part = {key: x[:, k : k + 1] for key, x in buffer.items()}
        one = {key: x[k : k + 1] for key, x in now.items()}
        avail = part["avail"][:T, 0]
        alive = torch.tensor(living(run, buffer)[:, k])
        logits, _ = one_by_one(run.agent.policy, one["policy_hidden"], part, False)
        p = torch.softmax(torch.where(avail, logits[:T, 0], -1e10), -1)
        taken = (p * part["actions"][:T, 0]).sum(-1)
        first = (taken / taken.detach() * advantages[:, k])[alive].mean()
        with torch.no_grad():
            utilities, _ = one_by_one(run.agent.q.utility, one["utility_hidden"], part, True)
        mu, weights = p, run.agent.q.mixer.weights(part["state"][:T, 0])
        if rng:
            exponential = torch.empty(T, 1, *p.shape[1:]).exponential_(generator=rng)[:, 0]
            soft = p / exponential / (p / exponential).sum(-1, keepdim=True)
            mu = F.one_hot(soft.argmax(-1), p.shape[-1]) + soft - soft.detach()
        q = 0.7 * run.agent.q.mixer(utilities[:T, 0], mu, weights).mean()
        second = q / (alive.float().sum(-1).mean() * live.std())
        grads = torch.autograd.grad(-((1 - nu) * first + nu * second), parameters)
        rows.append(np.concatenate([x.double().flatten().numpy() for x in grads]))
    return np.stack(rows)


def total_variance(rows):
    return ((rows - rows.mean(0)) ** 2).sum() / (len(rows) - 1)


@pytest.mark.parametrize("script", [smac, mpe])
def test_traces_and_cosines(script):
    run, now, played = measured(script, mixer="qmix")
    aim = torch.randn(sum(x.numel() for x in run.agent.policy.parameters()), generator=noise())
    ours = variance.mixtures(run, played, noise(9), [0.0, 0.6], aim)
    base = gradients_by_hand(run, now, played[0], 0.0)
    for nu, mu in itertools.product([0.0, 0.6], ["expectation", "gumbel"]):
        grads = base
        if nu:
            grads = gradients_by_hand(run, now, played[0], nu, noise(9) if mu == "gumbel" else None)
        mean = torch.tensor(grads.mean(0))
        close = lambda x: pytest.approx(float(x), rel=5e-3, abs=1e-4)
        assert ours.pop(("trace", nu, mu)).item() == close(
            total_variance(grads) / total_variance(base)
        )
        assert ours.pop(("cosine", nu, mu)).item() == close(
            mean @ aim.double() / mean.norm() / aim.norm()
        )
    assert not ours


def test_without_a_second_critic_there_is_only_nu_0():
    run, _, played = measured(mpe, nu=0.0)
    ours = variance.mixtures(run, played, noise(), [0.0, 0.3], None)
    assert ours == {("trace", 0.0, ""): 1.0}
    run, _, played = measured(mpe, continuous=True)
    ours = variance.mixtures(run, played, noise(), [0.3], None)
    assert list(ours) == [("trace", 0.3, "expectation")]


def test_reference():
    """With V as it is: PPO's gradient of the whole rollout. Refitted: V is better, and only V."""
    run = prepare(smac)
    before = copy.deepcopy(run.agent.state_dict())
    run.now = smac.begin(run.envs, 1, run.args)
    grads = variance.reference(run, noise(), 2, 0)
    run.now = smac.begin(run.envs, 1, run.args)
    bare = replace(run.args, nu=0.0, ent_coef=0.0)
    for ours, (_, batch, metrics, used) in zip(grads, variance.play(run, noise(), 2, "again")):
        losses, _ = smac.policy_losses(used, batch, metrics["diagnostics/sigma_a"], None, bare)
        whole = torch.autograd.grad(losses["policy"], list(used.policy.parameters()))
        whole = torch.cat([x.flatten() for x in whole])
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-5)
    # The sweeps begin with the hidden states of the first step, in the middle of episodes.
    run.args, now, games = replace(run.args, learning_rate=0.0), dict(run.now), run.envs
    run.agent.v_norm.beta, ends = 1.0, []
    for sweeps in (0, 2):
        run.now, run.envs = dict(now), copy.deepcopy(games)
        ends.append(variance.reference(run, noise(), 2, sweeps))
    torch.testing.assert_close(*ends)
    refitted, genuine = [], smac.estimate

    def watch(agent, *others):
        batch, metrics = genuine(agent, *others)
        refitted.append((batch["returns"] - batch["values"] * 1.5 - 2.0).square().mean().item())
        return batch, metrics

    run.args, run.now = replace(run.args, learning_rate=0.01), smac.begin(run.envs, 1, run.args)
    run.script = SimpleNamespace(**vars(smac) | {"estimate": watch})
    again = variance.reference(run, noise(), 2, 10)
    assert again.shape == grads.shape and not torch.allclose(again, grads, rtol=0.1)
    assert len(refitted) == 2 + 11 * 2 and refitted[-1] < 0.9 * refitted[1]
    assert all(torch.equal(x, before[key]) for key, x in run.agent.state_dict().items())


# ---------------------------------------------------------------------------------------- the truth
class Diary(mpe.ParticleEnvs):
    """Notes its states before each step."""

    def reset(self, seed):
        self.before = []
        return super().reset(seed)

    def step(self, actions):
        self.before.append(self.state_dict())
        return super().step(actions)


@pytest.mark.parametrize("scenario", ["spread", "line", "formation"])
def test_worlds_are_found_again(scenario):
    """Rollouts of 10 steps, of which the third begins in one episode and ends in the next."""
    run = prepare(mpe, scenario=scenario, rollout_steps=10, chunk_length=5)
    run.envs = Diary(run.args)
    run.now = mpe.begin(run.envs, 3, run.args)
    for number, (buffer, *_) in enumerate(variance.play(run, noise(), 3, "rollouts")):
        for t in range(10):
            world, steps = variance.world_at(run.envs, buffer, t)
            *expected, expected_steps, _ = run.envs.before[10 * number + t]
            assert steps == expected_steps == (10 * number + t) % 25
            for x, y in zip(world, expected):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def resolute(**settings):
    """A run of a policy that is all but certain, and a rollout of it."""
    run = prepare(mpe, **settings)
    for x in run.agent.policy.head.parameters():
        x.data *= 1e4
    ((buffer, *_),) = variance.play(run, noise(), 1, "rollout")
    return run, buffer


def test_play_on_is_the_rollout():
    """It does again what it did, to the episode's end."""
    run, buffer = resolute(gamma=0.9)
    envs = mpe.ParticleEnvs(run.args)
    envs.reset(0)
    for t in (0, 7, 24):
        world, steps = variance.world_at(run.envs, buffer, t)
        envs.load_state_dict([*world, steps, noise().get_state()])
        seen = [buffer[key][t] for key in ("obs", "policy_hidden", "keep")]
        with torch.no_grad():
            ours = variance.play_on(run.agent.policy, envs, *seen, torch.zeros(3, 5), noise(5))
        expected = sum(0.9 ** (j - t) * buffer["reward"][j] for j in range(t, 25))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_another_action_is_played_once():
    """Agent 1 begins with action 3, which the greedy policy follows by its own."""
    run, buffer = resolute(gamma=1.0)
    worlds = [mpe.ParticleEnvs(run.args) for _ in range(2)]
    world, steps = variance.world_at(run.envs, buffer, 15)
    for envs in worlds:
        envs.reset(0)
        envs.load_state_dict([*world, steps, noise().get_state()])
    seen = [buffer[key][15] for key in ("obs", "policy_hidden", "keep")]
    choice = torch.zeros(3, 5)
    choice[1, 3] = 1
    obs, hidden, keep = seen
    expected = 0.0
    with torch.no_grad():
        ours = variance.play_on(run.agent.policy, worlds[0], *seen, choice, noise(5))
        for t in range(15, 25):
            out, hidden = run.agent.policy(obs[None], hidden, keep[None])
            actions, hidden = F.one_hot(out[0].argmax(-1), 5).float(), hidden[0]
            if t == 15:
                actions[:, 1] = choice[1]
            obs, _, _, reward, _ = worlds[1].step(actions)
            expected, keep = expected + reward, torch.ones_like(keep)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, buffer["reward"][15:25].sum(0), atol=1e-3)


def test_all_actions_meet_the_same_noise(monkeypatch):
    run, genuine, states = prepare(mpe, num_agents=2), variance.play_on, []
    ((buffer, *_),) = variance.play(run, noise(), 1, "rollout")

    def watch(*words):
        states.append(words[-1].get_state())
        return genuine(*words)

    monkeypatch.setattr(variance, "play_on", watch)
    rng = noise(7)
    for _ in range(2):
        variance.true_advantages(run, buffer, 22, 2, rng)
    same = [[torch.equal(x, states[k]) for x in states] for k in (0, 11)]
    assert same == [[True] * 11 + [False] * 11, [False] * 11 + [True] * 11]


def spread_reward(pos, landmarks):
    """mpe2's, by loops, averaged over agents."""
    gap = lambda x, y: math.hypot(*(x - y))
    covering = sum(min(gap(a, mark) for a in pos) for mark in landmarks)
    touching = sum(gap(a, b) < 0.3 for a, b in itertools.permutations(pos, 2))
    return -0.5 * covering - 0.5 * touching / len(pos)


MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])


def last_return(pos, vel, landmarks, moves, gamma):
    """Two steps by hand: a force moves an agent in the step after the next."""
    push = np.zeros_like(pos)
    for i, j in itertools.permutations(range(len(pos)), 2):
        gap = math.hypot(*(pos[i] - pos[j]))
        depth = 1e-3 * np.logaddexp(0, (0.3 - gap) / 1e-3)
        push[i] += 100 * depth / gap * (pos[i] - pos[j])
    middle = pos + 0.1 * vel
    end = middle + 0.1 * (0.75 * vel + 0.1 * (5 * MOVES[list(moves)] + push))
    return spread_reward(middle, landmarks) + gamma * spread_reward(end, landmarks)


def exact_advantages(run, buffer, t):
    """Two steps before the end, by enumeration: of single actions [N, n, A], joint ones [N]."""
    pi, actions = buffer["mean"][t].double().numpy(), buffer["actions"][t].argmax(-1).numpy()
    (pos, vel, marks), _ = variance.world_at(run.envs, buffer, t)
    own, joint = np.zeros_like(pi), np.zeros(len(pi))
    for k in range(len(pi)):
        where = [x[k].double().numpy() for x in (pos, vel, marks)]
        table = {a: last_return(*where, a, run.args.gamma) for a in np.ndindex(5, 5)}
        chance = lambda a, k=k: pi[k, 0, a[0]] * pi[k, 1, a[1]]
        value = sum(chance(a) * x for a, x in table.items())
        joint[k] = table[tuple(actions[k])] - value
        for i, a in np.ndindex(2, 5):
            fits = {b: x for b, x in table.items() if b[i] == a}
            own[k, i, a] = sum(chance(b) * x for b, x in fits.items()) / pi[k, i, a] - value
    return own, joint


def test_the_truth_by_enumeration():
    """Two agents, two steps before the end of the episode."""
    run = prepare(mpe, num_agents=2, num_envs=6, gamma=0.8)
    for x in run.agent.policy.head.parameters():
        x.data *= 0.3  # every action has a chance
    ((buffer, *_),) = variance.play(run, noise(), 1, "rollout")
    copies = 1000
    own, joint = variance.true_advantages(run, buffer, 23, copies, noise(7))
    exact, exact_joint = exact_advantages(run, buffer, 23)
    scale = abs(exact).max()
    assert scale > 0.01 and own.shape == (2, *exact.shape)
    for half in own:
        np.testing.assert_allclose(half.numpy(), exact, atol=0.1 * scale)
    np.testing.assert_allclose(joint.mean(0).numpy(), exact_joint, atol=0.1 * scale)
    assert not torch.equal(*own)  # the halves have noise of their own
    # In the last step, an action comes too late.
    own, joint = variance.true_advantages(run, buffer, 24, 2, noise(7))
    assert own.abs().max() < 1e-6 and joint.abs().max() < 1e-6


@pytest.mark.parametrize("settings", [x for script, x in KINDS[3:5]] + [KINDS[6][1]])
def test_ranking(settings, monkeypatch):
    """Every figure from loops over games, agents and actions; chunks of 5 steps."""
    run, now, played = measured(mpe, chunk_length=5, **settings)
    buffer, _, metrics, used = played
    N, n, A = buffer["avail"].shape[1:]
    halves = torch.randn(2, N, n, A, generator=noise()) * 0.2 + torch.randn(
        N, n, A, generator=noise(3)
    )
    joints = torch.randn(2, N, generator=noise()) * 0.1 + torch.randn(N, generator=noise(4))
    pi, features = numpy_policy(run, now, buffer)
    t = 13
    halves -= (torch.tensor(pi[t]) * halves).sum(-1, keepdim=True).float()
    monkeypatch.setattr(variance, "true_advantages", lambda *words: (halves, joints))
    ours = variance.ranking(run, played, t, 2, None)

    raw, _ = raw_advantages(run, now, buffer)
    gae = raw[t, :, 0] - raw.mean()
    truth, p, taken = halves.double().numpy(), pi[t], buffer["actions"][t].numpy()
    sums = {name: np.zeros((N, 3)) for name in ("reliability", "gae_true", "q_true")}
    for k, i, a in np.ndindex(N, n, A):
        x, y = truth[:, k, i, a]
        sums["reliability"][k] += p[k, i, a] * np.array(
            [x * y, ((x + y) / 2) ** 2, ((x + y) / 2) ** 2]
        )
        sums["gae_true"][k] += taken[k, i, a] * np.array([gae[k] * (x + y) / 2, gae[k] ** 2, 0])
        sums["gae_true"][k, 2] += p[k, i, a] * x * y
    if run.args.critic == "compatible":
        slope = np.pad(features[t], ((0, 0), (0, 0), (0, 1)), constant_values=1)
        slope = slope @ used.compatible.weights.numpy()
    else:
        u, state, slope = (
            numpy_utilities(run, now, buffer)[t],
            buffer["state"][t].numpy(),
            np.zeros_like(p),
        )
        for k, i, a in np.ndindex(N, n, A):
            ends = []
            for step in (1e-5, -1e-5):
                mu = p[k].copy()
                mu[i, a] += step
                ends.append(numpy_mixer(run.agent.q.mixer, u[k], mu, state[k]))
            slope[k, i, a] = (ends[0] - ends[1]) / 2e-5
    for k, i in np.ndindex(N, n):
        q = slope[k, i] - p[k, i] @ slope[k, i]
        sums["q_true"][k] += [p[k, i] @ (q * truth[:, k, i].mean(0)), p[k, i] @ q**2, 0]
        sums["q_true"][k, 2] += p[k, i] @ truth[:, k, i].prod(0)
    corr = lambda xy, xx, yy: xy / math.sqrt(xx * yy)
    expected = {name: corr(*x.sum(0)) for name, x in sums.items()}
    expected["ceiling"] = math.sqrt(joints.double().prod(0).sum() / (gae**2).sum())
    expected["ceiling_sum"] = math.sqrt(sums["q_true"][:, 2].sum() / (gae**2).sum())
    ours = {name: variance.correlation(x)[0] for (name, *_), x in ours.items()}
    assert ours == {name: pytest.approx(x, rel=5e-3, abs=1e-3) for name, x in expected.items()}


def test_correlation():
    x, y = np.random.default_rng(1).normal(size=(2, 40))
    y += x
    corr = lambda keep: x[keep] @ y[keep] / math.sqrt((x[keep] @ x[keep]) * (y[keep] @ y[keep]))
    without = np.array([corr(np.arange(40) != k) for k in range(40)])
    error = math.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
    value, ours = variance.correlation(torch.tensor(np.stack([x * y, x * x, y * y])))
    assert (value, ours) == pytest.approx((corr(slice(None)), error), rel=1e-9)
    ones = torch.ones(40)
    value, ours = variance.correlation(torch.stack([torch.tensor(x), ones, ones]))
    assert (value, ours) == pytest.approx((x.mean(), x.std(ddof=1) / math.sqrt(40)), rel=1e-6)


# ------------------------------------------------------------------------------------ command lines
def save_run(folder, script=mpe, **settings):
    """A run folder of prepare()'s agent."""
    run = prepare(script, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"agent": run.agent.state_dict(), "progress": {"step": 1234}}
    script.write_checkpoint(folder, run.args, parts)
    return run


def test_runs_of_particle_worlds(tmp_path, capsys):
    """Whole command line, twice the same; the CSV is what is printed; the runs are left alone."""
    save_run(tmp_path / "qmix", mixer="qmix")
    save_run(tmp_path / "mappo", nu=0.0)
    before = {x: x.read_bytes() for x in tmp_path.rglob("*.pt")}
    words = [
        str(tmp_path / "qmix"),
        str(tmp_path / "mappo"),
        "--nus",
        "0",
        "0.5",
        "--rollouts",
        "2",
    ]
    words += "--truth --copies 2 --cosine --reference-rollouts 2 --sweeps 1 --out".split()
    assert variance.main([*words, str(tmp_path / "a.csv")]) == 0
    out = capsys.readouterr().out
    assert variance.main([*words, str(tmp_path / "b.csv")]) == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    table = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    common = ["halves", "trace", "cosine", "reliability", "ceiling", "ceiling_sum", "gae_true"]
    for name, figures in (
        ("mappo", common),
        ("qmix", common + ["q_true", "r_var_pi", "r_var_v", "corr", "slope"]),
    ):
        rows = table[table["run"] == str(tmp_path / name)]
        assert set(rows["figure"]) == set(figures)
        pairs = set(map(tuple, rows[rows["figure"] == "trace"][["nu", "mu"]].values.tolist()))
        all_pairs = set(itertools.product(["0.0", "0.5"], ["expectation", "gumbel"]))
        assert pairs == ({("0.0", "")} if name == "mappo" else all_pairs)
        assert f"{tmp_path / name}, step 1,234" in out
    for value in table["value"]:
        assert f"{float(value or 'nan'):.4f}" in out.replace("NaN", "nan")
    half = table[(table["figure"] == "trace") & (table["nu"] == "0.5")]["value"].astype(float)
    assert ((half > 0) & (half < 1)).all() and "1 expectation" not in out
    assert before == {x: x.read_bytes() for x in tmp_path.rglob("*.pt")}


def test_the_truth_is_seen_at_the_middles(tmp_path, monkeypatch):
    """Three rollouts of 25 steps: the steps are the middles of thirds."""
    run, steps, genuine = prepare(mpe), [], variance.ranking
    keep = lambda run, played, t, *others: steps.append(t) or genuine(run, played, t, *others)
    monkeypatch.setattr(variance, "ranking", keep)
    own = variance.Args(run_dirs=(), rollouts=3, truth=True, copies=2, nus=(0.0,))
    table = variance.study(run, own)
    assert steps == [4, 12, 20] and np.isfinite(table["value"]).sum() > 5


def test_a_run_of_starcraft(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", smac, critic="compatible", chunk_length=10)
    monkeypatch.setattr(smac, "SMAXEnvs", Toy)
    assert variance.main([str(tmp_path / "run"), "--rollouts", "2"]) == 0
    out = capsys.readouterr().out
    for name in ("r_var_pi", "corr", "slope", "trace"):
        assert name in out
    assert "r_var_v" not in out and "truth" not in out


def spoil(path, **parts):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | parts, path)


def put_nan(path):
    saved = torch.load(path, weights_only=True)
    saved["agent"]["critic.head.bias"][0] = torch.nan
    torch.save(saved, path)


SPOILED = {
    "nan": (put_nan, "not finite"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "checkpoint.pt"),
    "missing": (lambda path: path.unlink(), "checkpoint.pt"),
    "foreign": (lambda path: torch.save({"model": torch.ones(2)}, path), "checkpoint.pt"),
    "old": (lambda path: spoil(path, args={"temperature": 1.0}), "checkpoint.pt"),
}
BAD = [
    ("--rollouts 1", {}, "at least two"),
    ("--copies 3", {}, "even"),
    ("--copies 0", {}, "at least two"),
    ("--cosine --reference-rollouts 1", {}, "at least two"),
    ("--sweeps -1", {}, "--sweeps"),
    ("--nus 0 1.5", {}, "--nus"),
    ("--nus nan", {}, "--nus"),
    ("--seed -1", {}, "--seed"),
    ("--out nowhere/x.csv", {}, "--out"),
    ("--truth", {"script": smac}, "with moves"),
    ("--truth", {"continuous": True}, "with moves"),
    ("", {"env_id": "pettingzoo.sisl.pursuit_v5:parallel_env"}, "particle worlds"),
    ("", {"num_envs": 1}, "one game"),
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", {}, "no GPU"))


def refused(words, about, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert variance.main(words) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and about in error
    assert not out and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", SPOILED)
def test_refusals(kind, tmp_path, capsys):
    """A sound run first: no run is measured before all are seen."""
    save_run(tmp_path / "sound")
    save_run(tmp_path / "run")
    spoiler, about = SPOILED[kind]
    spoiler(tmp_path / "run" / "checkpoint.pt")
    refused([str(tmp_path / "sound"), str(tmp_path / "run")], about, tmp_path, capsys)


@pytest.mark.parametrize("words, settings, about", BAD)
def test_bad_input(words, settings, about, tmp_path, capsys):
    save_run(tmp_path / "run", **settings)
    refused([str(tmp_path / "run"), *words.split()], about, tmp_path, capsys)


def test_no_run_and_a_baseline(tmp_path, capsys):
    refused([], "give run folders", tmp_path, capsys)
    args = qmix.Args(map_name="3m", backend="smax", device="cpu", num_envs=2, hidden_dim=8)
    obs, state, avail = Toy(args).reset(0)
    agent = qmix.Agent({"obs": obs, "state": state, "avail": avail}, args)
    folder = tmp_path / "qmix"
    folder.mkdir()
    parts = {"agent": agent.state_dict(), "progress": {"step": 1}}
    smac.write_checkpoint(folder, args, parts)
    refused([str(folder)], "is of qmix", tmp_path, capsys)


# ------------------------------------------------------------------------------------- matrix games
def games(count=2):
    """Payoffs of count games of 2 agents with 3 actions, and policies' log pi."""
    payoffs = torch.rand(count, 3, 3, generator=noise(), dtype=torch.float32)
    return payoffs, torch.randn(count, 2, 3, generator=noise(3)).log_softmax(-1)


def test_r_var_of_games():
    payoffs, log_pi = games()
    for kind in ("vdn", "joint"):
        shape, args = log_pi.shape, matrix.Args(device="cpu", critic_steps=3)
        samples = matrix.rollout(log_pi, payoffs, noise(), args)
        critic = variance.fitted(kind, shape, samples, args, noise())
        ours = variance.exact_r_var(critic, payoffs, log_pi)
        for g in range(2):
            rows = []
            for a in np.ndindex(3, 3):
                one_hot = torch.eye(3)[list(a)].expand(2, 1, 2, 3)
                p = math.exp(log_pi[g, 0, a[0]] + log_pi[g, 1, a[1]])
                rows.append((p, payoffs[g][a].item(), critic(one_hot)[g, 0].item()))
            p, r, q = np.array(rows).T
            var = lambda x, p=p: p @ x**2 - (p @ x) ** 2
            assert ours[g].item() == pytest.approx(var(r - q) / var(r), rel=1e-4)


def test_traces_of_games():
    """nu = 0: 1. A frozen VDN has slopes that are the same for all samples: with mu = pi, only the
    first term varies, as (1 - nu)^2; and a critic fitted to the batch varies with it."""
    payoffs, log_pi = games(3)
    logits = log_pi.clone().requires_grad_()
    args = matrix.Args(device="cpu", mu="expectation", batch_size=16, critic_steps=5)
    samples = matrix.rollout(log_pi, payoffs, noise(), args)
    frozen = {"vdn": variance.fitted("vdn", log_pi.shape, samples, args, noise())}
    own = variance.Args((), nus=(0.0, 0.5, 1.0), rollouts=4)
    figures = variance.traces(payoffs, logits, frozen, own, args, noise())
    assert len(figures) == 2 * 3 and {mu for _, _, mu in figures} == {"expectation"}
    for nu in own.nus:
        trace = figures["trace, vdn frozen", nu, "expectation"]
        assert len(trace) == 3
        torch.testing.assert_close(trace, torch.full((3,), (1 - nu) ** 2), atol=1e-5, rtol=1e-7)
    fresh = [figures["trace, vdn same batch", nu, "expectation"] for nu in own.nus]
    assert (fresh[2] > 0).all() and (fresh[0] == 1).all()


def test_the_table_of_games(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variance, "SAMPLES", (32, 2048))
    shorter = lambda *args: fitted(*args[:3], replace(args[3], critic_steps=2), args[4])
    fitted = variance.fitted
    monkeypatch.setattr(variance, "fitted", shorter)
    path = tmp_path / "games.csv"
    words = f"--games 3 --rollouts 2 --nus 0 1 --out {path}".split()
    assert variance.main(words) == 0
    table = pd.read_csv(path)
    assert list(table) == ["run", "figure", "nu", "mu", "value", "stderr"]
    assert (table["run"] == "matrix games").all()
    r_vars = table[table["figure"].str.startswith("r_var_pi")]
    traces = table[table["figure"].str.startswith("trace")]
    assert len(r_vars) == 3 * 2 and len(traces) == 3 * 2 * 2 and len(table) == 18
    assert (traces.loc[traces["nu"] == 0, ["value", "stderr"]] == [1.0, 0.0]).all().all()
    text = capsys.readouterr().out
    assert "r_var_pi, joint 2048" in text and "trace, qmix same batch" in text
    assert variance.main(words) == 0 and pd.read_csv(path).equals(table)


def test_a_mean_and_its_standard_error():
    figures = {("x", 0.5, "gumbel"): torch.tensor([1.0, 4.0, 7.0])}
    (row,) = variance.table_of(figures).to_dict("records")
    expected = {"figure": "x", "nu": 0.5, "mu": "gumbel"}
    assert row == expected | {"value": pytest.approx(4.0), "stderr": pytest.approx(3**0.5)}


BAD_GAMES = [  # command line, what the error names
    ("--games 1", "--games"),
    ("--games -2", "--games"),
    ("--games 10001", "--games"),
    ("--games 3 no-run", "no-run"),
    ("--games 3 --rollouts 1", "rollouts"),
    ("--games 3 --nus 0 1.5", "--nus"),
    ("--games 3 --seed -1", "--seed"),
    ("--games 3 --out no-folder/x.csv", "no-folder"),
]


@pytest.mark.parametrize("words, about", BAD_GAMES)
def test_bad_games(words, about, tmp_path, capsys):
    refused(words.split(), about, tmp_path, capsys)
