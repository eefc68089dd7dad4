"""Every formula of maipg_smac.py against a calculation of its own: sums, closed forms, JaxMARL."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import maipg_smac as maipg

SETTINGS = dict(map_name="3m", backend="smax", device="cpu", num_envs=3, rollout_steps=30)
SETTINGS |= dict(hidden_dim=12, mixer_dim=10, update_epochs=3, temperature=0.8, nu=0.4)
ADAM_EPS = 1e-5


class Toy:
    """Games of random numbers with deaths, time limits and, on request, crashes."""

    num_agents, num_actions, obs_dim, state_dim = 3, 5, 7, 6

    def __init__(self, num_envs, crashes, seed=0):
        self.N, self.crashes, self.rng = num_envs, crashes, torch.Generator().manual_seed(seed)
        self.living = torch.ones(num_envs, self.num_agents, dtype=torch.bool)

    def random(self, *shape):
        return torch.rand(self.N, *shape, generator=self.rng)

    def look(self):
        obs = torch.randn(self.N, self.num_agents, self.obs_dim, generator=self.rng)
        state = torch.randn(self.N, 1, self.state_dim, generator=self.rng)
        avail = self.random(self.num_agents, self.num_actions) < 0.7
        avail[..., 0], avail[..., 1] = False, True
        avail[..., 2] = True
        avail[~self.living] = torch.eye(self.num_actions, dtype=torch.bool)[0]
        return obs, state.expand(-1, self.num_agents, -1), avail

    def reset(self):
        return self.look()

    def step(self, actions):
        self.living &= self.random(self.num_agents) > 0.08
        final, over = self.look(), self.random()
        broken = (over < 0.04) & self.crashes
        done, truncated = over < 0.15, (over > 0.04) & (over < 0.1)
        self.living |= done.unsqueeze(-1)
        seen = [torch.where(done[:, None, None], new, old) for new, old in zip(self.look(), final)]
        reward = 3 * self.random() + 0.1 * actions.float().sum(-1)
        info = {"return": reward, "length": reward, "won": done, "truncated": truncated}
        return *seen, reward, done, info | {"broken": broken, "final": final}


def new_optimizers(agent, args):
    groups = {"policy": [agent.policy], "critic": [agent.critic]}
    if args.nu > 0:
        groups["q"] = [agent.utility, agent.mixer]
    parameters = {
        name: [p for m in group for p in m.parameters()] for name, group in groups.items()
    }
    return {name: torch.optim.Adam(p, 5e-4, eps=ADAM_EPS) for name, p in parameters.items()}


def new_rngs():
    return {k: torch.Generator().manual_seed(7) for k in ("explore", "gumbel", "shuffle", "diag")}


def play(envs=None, crashes=False, rollouts=2, **settings):
    """Networks and rollouts with their estimates; the last rollout's at the top level."""
    args = maipg.Args(**SETTINGS | settings)
    envs = envs or Toy(args.num_envs, crashes)
    torch.manual_seed(3)
    agent, rngs, buffer, played = maipg.Agent(envs, args), new_rngs(), {}, []
    first_weights = copy.deepcopy(agent.state_dict())
    obs, state, avail = envs.reset()
    now = {"obs": obs, "state": state[:, 0], "avail": avail, "keep": obs.new_zeros(args.num_envs)}
    for name in ("policy", "critic", "utility", "target")[: 4 if args.nu > 0 else 2]:
        now[f"{name}_hidden"] = obs.new_zeros(*obs.shape[:2], args.hidden_dim)
    agent.value_norm.moments.copy_(torch.tensor([2.0, 7.0, 1.0]))
    if args.nu > 0:
        agent.q_norm.moments.copy_(torch.tensor([3.0, 13.0, 1.0]))
        for p in (*agent.target_utility.parameters(), *agent.target_mixer.parameters()):
            p.data += 0.1 * torch.randn_like(p)  # so that the targets differ from the networks
    for net in (agent.policy, agent.utility if args.nu > 0 else agent.critic):
        net.head[-1].weight.data *= 30  # no longer indifferent between the actions
    for _ in range(rollouts):
        maipg.rollout(agent.policy, envs, buffer, now, rngs["explore"], args)
        batch, metrics = maipg.estimate(agent, buffer, now, rngs["diag"], args)
        played.append({k: x.clone() for k, x in buffer.items()})
    return SimpleNamespace(
        args=args,
        agent=agent,
        rngs=rngs,
        batch=batch,
        metrics=metrics,
        sigma_a=metrics["diagnostics/sigma_a"],
        buffer=played[-1],
        played=played,
        first_weights=first_weights,
    )


@pytest.fixture(scope="module")
def ready():
    return play()


@pytest.fixture(scope="module")
def smax():
    args = maipg.Args(**SETTINGS | dict(num_envs=2))
    return lambda seed: maipg.make_envs(args, seed)


def time_major(x, args):
    """[L, B, ...] -> [T, N, ...], by indices: chunk c of game k is column c * N + k."""
    N, L = args.num_envs, args.chunk_length
    rows = [[x[t % L, t // L * N + k] for k in range(N)] for t in range(args.rollout_steps)]
    return torch.stack([torch.stack(row) for row in rows])


def one_by_one(net, rollouts, T, with_state):
    """Outputs and hidden states at each step, a GRU step at a time over all rollouts."""
    obs = rollouts[0]["obs"]
    hidden = torch.zeros(obs.shape[1], obs.shape[2], net.gru.hidden_size)
    for b in rollouts:
        outs, hiddens = [], []
        for t in range(T + 1):
            hidden_before = hidden * b["keep"][t].view(-1, 1, 1)
            x = net.obs_in(b["obs"][t])
            if with_state:
                x = x + net.state_in(b["state"][t])[:, None]
            x = net.body(x)
            after = net.gru(x.flatten(0, 1), hidden_before.flatten(0, 1)).view_as(x)
            outs.append(net.head(after))
            hiddens.append(after)
            if t < T:
                hidden = after
    return torch.stack(outs), torch.stack(hiddens)


def ppo_loss(agent, b, clip, ent_coef, stochastic_weight=1.0):
    """MAPPO's policy loss, written with where() instead of min and clamp."""
    logits, _ = agent.policy(b["obs"], b["policy_hidden"][0], b["keep"])
    logits = torch.where(b["avail"], logits, torch.tensor(-1e10))
    p = torch.softmax(logits, -1)
    log_p = torch.log(torch.where(b["avail"], p, torch.ones(())))
    taken = b["actions"].argmax(-1, keepdim=True)
    ratio = p.gather(-1, taken).squeeze(-1) / b["log_probs"].exp()
    A, alive = b["advantages"], b["alive"] > 0
    unclipped = torch.where(A > 0, ratio < 1 + clip, ratio > 1 - clip)
    gain = torch.where(unclipped, ratio * A, torch.where(A > 0, (1 + clip) * A, (1 - clip) * A))
    entropy = -(p * log_p).sum(-1)
    return -stochastic_weight * gain[alive].mean() - ent_coef * entropy[alive].mean()


def huber(error, delta):
    return torch.where(error.abs() <= delta, error**2 / 2, delta * (error.abs() - delta / 2))


def mix(mixer, kind, state, chosen, actions):
    """q_tot of the utilities `chosen` [..., n], from the formulas and the mixer's layers."""
    s = mixer.norm(state)
    value = mixer.value(s)[..., 0]
    if kind == "vdn":
        return sum(chosen[..., i] for i in range(chosen.shape[-1])) + value
    if kind == "joint":
        x = torch.cat([actions.flatten(-2), chosen], -1)
        return mixer.out(mixer.joint_in(x) + mixer.state_in(s))[..., 0] + value
    n = chosen.shape[-1]
    w_1 = mixer.w_1(s).abs().view(*s.shape[:-1], n, -1)
    x = sum(chosen[..., i, None] * w_1[..., i, :] for i in range(n)) + mixer.b_1(s)
    x = torch.where(x > 0, x, torch.exp(x) - 1)
    return (x * mixer.w_2(s).abs()).sum(-1) + value


def q_gain(agent, b, args, sigma_a, rng):
    """mean q_tot(s, mu) * q_scale with a straight-through sample, to be differentiated."""
    logits, _ = agent.policy(b["obs"], b["policy_hidden"][0], b["keep"])
    log_pi = torch.log_softmax(torch.where(b["avail"], logits, torch.tensor(-1e10)), -1)
    noise = -torch.log(torch.empty_like(log_pi).exponential_(generator=rng))
    soft = torch.softmax((log_pi + noise) / args.temperature, -1)
    hard = (soft == soft.max(-1, keepdim=True).values).float()
    mu = soft + (hard - soft).detach()
    with torch.no_grad():
        utilities, _ = agent.utility(b["obs"], b["utility_hidden"][0], b["keep"], b["state"])
    q_tot = mix(agent.mixer, args.mixer, b["state"], (utilities * mu).sum(-1), mu)
    mean, square = agent.q_norm.moments[:2] / agent.q_norm.moments[2]
    scale = (square - mean**2).sqrt()
    if args.q_scale == "advantage":
        scale = scale / (b["alive"].shape[-1] * (sigma_a + 1e-5))
    return q_tot[b["valid"] > 0].mean() * scale


def flat_gradient(loss, module):
    grads = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([g.flatten() for g in grads])


def policy_gradient(x, seed=11, batch=None, **settings):
    rng, args = torch.Generator().manual_seed(seed), replace(x.args, **settings)
    losses, _ = maipg.compute_losses(x.agent, batch or x.batch, x.sigma_a, rng, args)
    return flat_gradient(losses["policy"], x.agent.policy)


# --------------------------------------------------------------------------------------- estimators
def n_step_mixture(r, boot, terminated, done, gamma, lam):
    """lambda-return of each step of one sequence, a sum over all its n-step returns."""
    out = []
    for t in range(len(r)):
        last = next((j for j in range(t, len(r)) if done[j]), len(r) - 1)
        total, rewards = 0.0, 0.0
        for j in range(t, last + 1):
            rewards += gamma ** (j - t) * r[j]
            n_step = rewards + (0 if terminated[j] else gamma ** (j - t + 1) * boot[j])
            total += n_step * lam ** (j - t) * (1 if j == last else 1 - lam)
        out.append(total)
    return np.array(out)


@pytest.mark.parametrize("truncations", [False, True])
def test_gae_and_td_lambda(truncations):
    T, N, n, gamma, lam = 25, 4, 3, 0.93, 0.7
    rng = np.random.default_rng(1)
    r, done = rng.normal(size=(T, N)), rng.random((T, N)) < 0.2
    terminated = done & (rng.random((T, N)) < 0.5) if truncations else done.copy()
    assert done[:-1].sum() > 8 and (terminated == done).all() != truncations
    v, after = rng.normal(size=(2, T, N, n))  # unrelated: V(s_{t+1}) need not be v[t + 1]
    arguments = [torch.as_tensor(x) for x in (r, v, after, terminated, done)]
    got = maipg.gae(*arguments, gamma, lam)
    expected = np.zeros((T, N, n))
    for t, k, i in np.ndindex(T, N, n):  # sum of (gamma lambda)^l delta_{t+l} up to the end
        for j in range(t, T):
            delta = r[j, k] - v[j, k, i] + (not terminated[j, k]) * gamma * after[j, k, i]
            expected[t, k, i] += (gamma * lam) ** (j - t) * delta
            if done[j, k]:
                break
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    got = maipg.td_lambda(arguments[0], *(arguments[2][..., 0], *arguments[3:]), gamma, lam)
    for k in range(N):
        columns = (r[:, k], after[:, k, 0], terminated[:, k], done[:, k])
        np.testing.assert_allclose(got[:, k], n_step_mixture(*columns, gamma, lam), atol=1e-6)


def test_gae_and_td_lambda_by_hand():
    # three steps, the second one ends the episode by a time limit; gamma = lambda = 1/2
    to = lambda *x: torch.tensor(x)[:, None]
    r, v, after = to(1.0, 2.0, 3.0), to(4.0, 6.0, 8.0), to(6.0, 10.0, 12.0)
    done, none = to(False, True, False), to(False, False, False)
    # deltas 1+3-4=0, 2+5-6=1 (2-6=-4 if it counts as an end), 3+6-8=1; A_0 = delta_0 + delta_1 / 4
    gae = lambda ends: maipg.gae(r, v[..., None], after[..., None], ends, done, 0.5, 0.5)
    assert gae(none).flatten().tolist() == [0.25, 1.0, 1.0]
    assert gae(done).flatten().tolist() == [-1.0, -4.0, 1.0]
    # G_2 = 3+6 = 9, G_1 = 2+5 = 7 or 2, G_0 = 1 + (6 / 2 + G_1 / 2) / 2
    assert maipg.td_lambda(r, after, none, done, 0.5, 0.5).flatten().tolist() == [4.25, 7.0, 9.0]
    assert maipg.td_lambda(r, after, done, done, 0.5, 0.5).flatten().tolist() == [3.0, 2.0, 9.0]


@pytest.mark.parametrize("beta", [0.99999, 0.9])
def test_value_norm_is_that_of_mappo(beta):
    norm, rng = maipg.ValueNorm(beta), np.random.default_rng(0)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(norm.denormalize(x), 0.1 * x)
    torch.testing.assert_close(norm.normalize(x), x / 0.1)
    m = s = d = 0.0
    for k in range(6):
        sample, mask = rng.normal(5 * k, 3, (20, 4)), rng.random((20, 4)) < 0.6
        norm.update(*(torch.as_tensor(y, dtype=torch.float32) for y in (sample, mask)))
        m = beta * m + (1 - beta) * sample[mask].mean()
        s = beta * s + (1 - beta) * (sample[mask] ** 2).mean()
        d = beta * d + (1 - beta)
        mean = m / max(d, 1e-5)
        std = max(s / max(d, 1e-5) - mean**2, 0.01) ** 0.5
        torch.testing.assert_close(norm.normalize(x), (x - mean) / std, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.denormalize(x), x * std + mean, rtol=1e-4, atol=1e-4)
    norm = maipg.ValueNorm(beta)
    norm.update(torch.full((3, 2), 4.0), torch.ones(3, 2))  # no variance: the floor, 0.01
    torch.testing.assert_close(norm.denormalize(x), 0.1 * x + 4, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("kind", ["qmix", "vdn", "joint"])
def test_mixer(kind):
    torch.manual_seed(0)
    n, A, states = 3, 4, 4 * torch.randn(2, 60, 6)
    mixer = maipg.Mixer(kind, n, A, 6, 16)
    utilities = (5 * torch.randn(2, 60, n, A)).requires_grad_()
    actions = F.one_hot(torch.randint(A, (2, 60, n)), A).float().requires_grad_()
    q_tot = mixer(utilities, actions, mixer.weights(states))
    chosen = utilities.gather(-1, actions.argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(q_tot, mix(mixer, kind, states, chosen, actions))
    by_utility, by_action = torch.autograd.grad(q_tot.sum(), (utilities, actions))
    slopes = by_utility[actions > 0]
    assert slopes.abs().max() > 0.01
    if kind == "joint":
        assert slopes.min() < 0
    else:
        assert slopes.min() >= 0
        assert (by_utility[actions == 0] == 0).all()
    if kind == "vdn":
        assert (slopes == 1).all()
        torch.testing.assert_close(by_action, utilities)
        value = mixer.value(F.layer_norm(states, [6])).squeeze(-1)
        torch.testing.assert_close(q_tot, chosen.sum(-1) + value)
    else:  # the state's weights, and not only its value, count
        swapped = mixer.weights(states.flip(1))
        moved = mixer(utilities, actions, swapped) - swapped[0]
        assert not torch.allclose(moved, q_tot - mixer.weights(states)[0], atol=1e-3)


def test_recurrent_is_the_network_of_mappo():
    torch.manual_seed(0)
    wide, H, A = 7, 12, 5
    net = maipg.Recurrent(wide, H, A, 0.01)
    linear = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(H, wide), (H, H), (A, H)]
    assert all((m.bias == 0).all() for m in linear)
    torch.testing.assert_close(linear[0].weight.T @ linear[0].weight, 2 * torch.eye(wide))
    torch.testing.assert_close(linear[1].weight.T @ linear[1].weight, 2 * torch.eye(H))
    torch.testing.assert_close(linear[2].weight @ linear[2].weight.T, 1e-4 * torch.eye(A))
    for w in (net.gru.weight_ih, net.gru.weight_hh):
        torch.testing.assert_close(w.T @ w, torch.eye(H))
    obs, hidden = torch.randn(1, 2, 3, wide), torch.randn(2, 3, H)
    x = F.layer_norm(obs[0], [wide])
    for layer in linear[:2]:
        x = F.layer_norm(F.relu(x @ layer.weight.T), [H])
    i_r, i_z, i_n = (x @ net.gru.weight_ih.T).chunk(3, -1)
    h_r, h_z, h_n = (hidden @ net.gru.weight_hh.T).chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    after = (1 - z) * torch.tanh(i_n + r * h_n) + z * hidden
    out, hiddens = net(obs, hidden, torch.ones(1, 2))
    torch.testing.assert_close(hiddens[0], after)
    torch.testing.assert_close(out[0], F.layer_norm(after, [H]) @ linear[2].weight.T)


@pytest.mark.parametrize("state_dim", [0, 6])
def test_a_sequence_with_resets_equals_single_steps(state_dim):
    torch.manual_seed(0)
    net = maipg.Recurrent(7, 12, 5, 1.0, state_dim)
    obs, state, hidden = torch.randn(9, 4, 3, 7), torch.randn(9, 4, 6), torch.randn(4, 3, 12)
    keep = torch.ones(9, 4)
    keep[0, 1] = keep[4, 0] = keep[4, 2] = keep[7, 2] = 0
    optional = (state,) if state_dim else ()
    outs, hiddens = net(obs, hidden, keep, *optional)
    for k in range(4):  # each game alone, each step alone, a new hidden state where one begins
        h = hidden[k : k + 1]
        for t in range(9):
            h = h if keep[t, k] else torch.zeros_like(h)
            one = [x[t, k][None, None] for x in optional]
            out, new = net(obs[t, k][None, None], h, torch.ones(1, 1), *one)
            h = new[0]
            torch.testing.assert_close(outs[t, k], out[0, 0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(hiddens[t, k], h[0], atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- losses
def test_the_stochastic_loss_is_ppos():
    torch.manual_seed(0)
    log_ratio = (0.3 * torch.randn(10, 6, 3)).requires_grad_()
    A, alive = torch.randn(10, 6, 3), (torch.rand(10, 6, 3) < 0.7).float()
    loss = maipg.stochastic_pg_loss(log_ratio, A, alive, 0.2)
    (grad,) = torch.autograd.grad(loss, log_ratio)
    total, count = 0.0, int(alive.sum())
    for i in np.ndindex(10, 6, 3):
        r, a = float(log_ratio.detach()[i].exp()), float(A[i])
        flat = (a > 0 and r > 1.2) or (a < 0 and r < 0.8)
        gain = (1.2 if r > 1.2 else 0.8) * a if flat else r * a
        total += gain * float(alive[i])
        expected = 0.0 if flat or not alive[i] else -r * a / count
        assert float(grad[i]) == pytest.approx(expected, abs=1e-7)
    assert loss.item() == pytest.approx(-total / count, abs=1e-6)
    assert (grad[alive == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gumbel_softmax(temperature):
    count, logits = 200_000, torch.tensor([0.5, -1.0, 2.0, 0.0])
    avail = torch.tensor([True, True, False, True])
    log_pi = maipg.masked_log_softmax(logits, avail).expand(count, 4).clone().requires_grad_()
    rng = torch.Generator().manual_seed(5)
    mu = maipg.gumbel_softmax(log_pi, temperature, rng)
    hard = mu.detach().round()
    assert (hard.sum(-1) == 1).all() and hard[:, 2].sum() == 0
    torch.testing.assert_close(mu.detach(), hard, atol=1e-6, rtol=0)
    e = np.exp([0.5, -1.0, -np.inf, 0.0])
    p = e / e.sum()
    error = np.abs(hard.mean(0).numpy() - p)
    assert (error <= 5 * np.sqrt(p * (1 - p) / count)).all()
    u = torch.randn(count, 4)
    (mu * u).sum().backward()
    noise = -torch.empty(count, 4).exponential_(generator=rng.manual_seed(5)).log()
    y = ((log_pi.detach() + noise) / temperature).double()
    y = (y - y.max(-1, keepdim=True).values).exp()
    y = y / y.sum(-1, keepdim=True)
    jacobian = torch.diag_embed(y[:500]) - y[:500, :, None] * y[:500, None, :]
    expected = (jacobian @ u[:500, :, None].double()).squeeze(-1) / temperature
    torch.testing.assert_close(log_pi.grad[:500].double(), expected, atol=1e-5, rtol=1e-4)
    assert (log_pi.grad[:, 2] == 0).all()


def test_the_deterministic_gradient_of_vdn_by_hand():
    torch.manual_seed(0)
    mixer = maipg.Mixer("vdn", 2, 3, 4, 8)
    utilities, weights = torch.randn(2, 3, 2, 3), mixer.weights(torch.randn(2, 3, 4))
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    log_pi = torch.log_softmax(torch.randn(2, 3, 2, 3), -1).requires_grad_()
    rng = torch.Generator().manual_seed(2)
    mu = maipg.gumbel_softmax(log_pi, 0.5, rng)
    weights = [w.detach() for w in weights]
    loss = maipg.deterministic_pg_loss(mu, utilities, mixer, weights, valid, 0.3)
    picked = (utilities * mu.detach().round()).sum((-2, -1)) + weights[0]
    assert loss.item() == pytest.approx(-0.3 * float(picked[valid > 0].mean()), abs=1e-6)
    loss.backward()
    noise = -torch.empty_like(mu).exponential_(generator=rng.manual_seed(2)).log()
    soft = torch.softmax((log_pi.detach() + noise) / 0.5, -1)
    for i in np.ndindex(2, 3, 2):
        y, u = soft[i], utilities[i]
        jacobian = torch.diag(y) - torch.outer(y, y)
        expected = -0.3 / 5 * valid[i[:2]] * (jacobian @ u) / 0.5
        torch.testing.assert_close(log_pi.grad[i], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("q_scale", ["advantage", "raw"])
@pytest.mark.parametrize("mixer", ["qmix", "vdn", "joint"])
def test_the_gradient_is_interpolated_linearly(mixer, q_scale):
    x = play(mixer=mixer, rollouts=1, q_scale=q_scale)
    rng = torch.Generator().manual_seed(11)
    noisy = x.batch | {"log_probs": x.batch["log_probs"] + 0.2 * torch.randn(10, 9, 3)}
    first = flat_gradient(ppo_loss(x.agent, noisy, 0.2, 0.0), x.agent.policy)
    second = -flat_gradient(q_gain(x.agent, noisy, x.args, x.sigma_a, rng), x.agent.policy)
    bonus = flat_gradient(ppo_loss(x.agent, noisy, 0.2, 1.0, 0.0), x.agent.policy)
    assert min(g.norm() for g in (first, second, bonus)) > 1e-3
    for nu in (0.0, 0.3, 1.0):
        got = policy_gradient(x, batch=noisy, nu=nu, ent_coef=0.05)
        expected = (1 - nu) * first + nu * second + 0.05 * bonus
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("nu, mixer", [(0.0, "qmix"), (0.4, "vdn"), (0.4, "qmix")])
def test_dead_agents_have_no_gradient(nu, mixer):
    x = play(nu=nu, mixer=mixer)
    dead = x.batch["alive"] == 0
    assert 10 < dead.sum() < dead.numel() - 10
    obs = x.batch["obs"].clone().requires_grad_()
    rng = torch.Generator().manual_seed(0)
    inputs = x.batch | {"obs": obs}
    losses, _ = maipg.compute_losses(x.agent, inputs, x.sigma_a, rng, x.args)
    (grad,) = torch.autograd.grad(losses["policy"], obs)
    assert (grad[dead] == 0).all() and grad[~dead].abs().max() > 0
    if mixer == "vdn" or nu == 0:  # QMIX's slopes depend on all utilities, also of the dead
        changed = x.batch | {"obs": torch.where(dead.unsqueeze(-1), 3.0, x.batch["obs"])}
        a, b = policy_gradient(x), policy_gradient(x, batch=changed)
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)
        rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
        entropy = [
            maipg.compute_losses(x.agent, c, x.sigma_a, g, x.args)[1]["losses/entropy"]
            for c, g in zip((x.batch, changed), rngs)
        ]
        torch.testing.assert_close(*entropy)


# ------------------------------------------------------------------------------------------- update
def clipped(grads, limit):
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    return [g * min(1.0, limit / (float(norm) + 1e-6)) for g in grads], float(norm)


class PlainAdam:
    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.k = list(parameters), rate, 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    def step(self, loss, limit):
        grads, _ = clipped(torch.autograd.grad(loss, self.parameters), limit)
        self.k += 1
        for p, g, m, v in zip(self.parameters, grads, self.m, self.v):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            root = (v / (1 - 0.999**self.k)).sqrt() + ADAM_EPS
            p.data -= self.rate * m / (1 - 0.9**self.k) / root


@pytest.mark.parametrize("minibatches, limit, delta", [(1, 10.0, 10.0), (3, 0.05, 0.3)])
def test_nu_zero_is_plain_mappo(minibatches, limit, delta):
    settings = dict(num_minibatches=minibatches, max_grad_norm=limit, huber_delta=delta)
    x = play(nu=0.0, norm_beta=0.9, update_epochs=4, **settings)
    plain, rngs, batch = copy.deepcopy(x.agent), new_rngs(), copy.deepcopy(x.batch)
    optimizers = new_optimizers(x.agent, x.args)
    for group in optimizers.values():  # bigger steps: the clips must bite
        group.param_groups[0]["lr"] = 5e-3
    before = torch.cat([p.detach().flatten() for p in x.agent.parameters()])
    gumbel = rngs["gumbel"].get_state()
    metrics = maipg.update(x.agent, optimizers, x.batch, x.sigma_a, rngs, x.args)
    assert torch.equal(rngs["gumbel"].get_state(), gumbel)
    policy = PlainAdam(plain.policy.parameters(), 5e-3)
    critic = PlainAdam(plain.critic.parameters(), 5e-3)
    shuffle, (m, s, d) = torch.Generator().manual_seed(7), (2.0, 7.0, 1.0)
    chunks, clip_bites = batch["obs"].shape[1], 0
    for _ in range(4):
        for index in torch.randperm(chunks, generator=shuffle).split(chunks // minibatches):
            b = {k: v[:, index] for k, v in batch.items()}
            m = 0.9 * m + 0.1 * float(b["returns"].mean())
            s = 0.9 * s + 0.1 * float((b["returns"] ** 2).mean())
            d = 0.9 * d + 0.1
            targets = (b["returns"] - m / d) / (s / d - (m / d) ** 2) ** 0.5
            v, _ = plain.critic(b["obs"], b["critic_hidden"][0], b["keep"], b["state"])
            v, old = v.squeeze(-1), b["values"]
            near = torch.where((v - old).abs() < 0.2, v, old + 0.2 * torch.sign(v - old))
            far = huber(targets - near, delta) > huber(targets - v, delta)
            clip_bites += int(far.sum())
            error = torch.where(far, targets - near, targets - v)
            policy_loss = ppo_loss(plain, b, 0.2, 0.01)
            policy.step(policy_loss, limit)
            critic.step(huber(error, delta).mean(), limit)
    assert clip_bites > 0 and metrics["diagnostics/clip_fraction"] > 0
    if limit < 1:
        assert metrics["diagnostics/policy_grad_norm"] > limit
    after = torch.cat([p.detach().flatten() for p in x.agent.parameters()])
    assert (after - before).abs().max() > 1e-3
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    # steps ten times those of the paper, so ten times the tolerance of 1e-6
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("epochs", [1, 3])
def test_nu_zero_is_plain_mappo_at_the_default_step_size(epochs):
    x = play(nu=0.0, update_epochs=epochs)
    plain, batch = copy.deepcopy(x.agent), copy.deepcopy(x.batch)
    maipg.update(x.agent, new_optimizers(x.agent, x.args), x.batch, x.sigma_a, new_rngs(), x.args)
    adam = {k: PlainAdam(getattr(plain, k).parameters(), 5e-4) for k in ("policy", "critic")}
    m, s, d = 2.0, 7.0, 1.0
    for _ in range(epochs):
        m = 0.99999 * m + 1e-5 * float(batch["returns"].mean())
        s = 0.99999 * s + 1e-5 * float((batch["returns"] ** 2).mean())
        d = 0.99999 * d + 1e-5
        targets = (batch["returns"] - m / d) / (s / d - (m / d) ** 2) ** 0.5
        v, _ = plain.critic(batch["obs"], batch["critic_hidden"][0], batch["keep"], batch["state"])
        near = batch["values"] + (v.squeeze(-1) - batch["values"]).clip(-0.2, 0.2)
        errors = torch.stack([huber(targets - near, 10.0), huber(targets - v.squeeze(-1), 10.0)])
        adam["policy"].step(ppo_loss(plain, batch, 0.2, 0.01), 10.0)
        adam["critic"].step(errors.max(0).values.mean(), 10.0)
    for a, b in zip(x.agent.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_nu_zero_builds_nothing_else_and_all_nu_start_alike(ready):
    x = play(nu=0.0, rollouts=1)
    assert {name for name, _ in x.agent.named_children()} == {"policy", "critic", "value_norm"}
    assert not any("q" in k.split("/")[-1].split("_") for k in x.metrics)
    losses, _ = maipg.compute_losses(x.agent, x.batch, x.sigma_a, None, x.args)  # needs no noise
    assert set(losses) == {"policy", "critic"}
    for key, weight in x.first_weights.items():
        assert torch.equal(weight, ready.first_weights[key])
    for key, value in x.played[0].items():
        assert torch.equal(value, ready.played[0][key]), key
    assert not torch.equal(ready.played[0]["actions"], ready.played[1]["actions"])


@pytest.mark.parametrize("mixer", ["qmix", "vdn", "joint"])
def test_each_loss_reaches_its_own_network_only(mixer):
    x = play(mixer=mixer, target_tau=0.2, update_epochs=1, norm_beta=0.9)
    same, batch = copy.deepcopy(x.agent), copy.deepcopy(x.batch)
    optimizers = new_optimizers(x.agent, x.args)
    maipg.update(x.agent, optimizers, x.batch, x.sigma_a, new_rngs(), x.args)
    same.q_norm.moments.mul_(0.9)
    targets = batch["q_targets"]
    same.q_norm.moments.add_(
        0.1 * torch.stack([targets.mean(), (targets**2).mean(), targets.new_ones(())])
    )
    mean, square = same.q_norm.moments[:2] / same.q_norm.moments[2]
    utilities, _ = same.utility(
        batch["obs"], batch["utility_hidden"][0], batch["keep"], batch["state"]
    )
    chosen = (utilities * batch["actions"]).sum(-1)
    q_tot = mix(same.mixer, mixer, batch["state"], chosen, batch["actions"])
    q_loss = huber((targets - mean) / (square - mean**2).sqrt() - q_tot, 10.0).mean()
    expected = torch.autograd.grad(q_loss, [*same.utility.parameters(), *same.mixer.parameters()])
    got = [p.grad for m in (x.agent.utility, x.agent.mixer) for p in m.parameters()]
    for a, b in zip(got, clipped(expected, 10.0)[0]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    rng = torch.Generator().manual_seed(7)
    gain = q_gain(same, batch, x.args, x.sigma_a, rng)
    loss = ppo_loss(same, batch, 0.2, 0.01, 0.6) - 0.4 * gain
    expected = torch.autograd.grad(loss, list(same.policy.parameters()))
    for p, b in zip(x.agent.policy.parameters(), clipped(expected, 10.0)[0]):
        torch.testing.assert_close(p.grad, b, atol=2e-6, rtol=1e-4)
    targets = [*x.agent.target_utility.parameters(), *x.agent.target_mixer.parameters()]
    assert all(p.grad is None for p in targets)


def test_target_networks_follow_once_per_epoch():
    x = play(target_tau=0.2, num_minibatches=3)
    single, rngs, other = copy.deepcopy(x.agent), new_rngs(), new_rngs()
    start = {k: copy.deepcopy(getattr(single, f"target_{k}")) for k in ("utility", "mixer")}
    maipg.update(x.agent, new_optimizers(x.agent, x.args), x.batch, x.sigma_a, rngs, x.args)
    optimizers, args = new_optimizers(single, x.args), replace(x.args, update_epochs=1)
    for _ in range(3):
        maipg.update(single, optimizers, x.batch, x.sigma_a, other, args)
        for k, old in start.items():
            for p, new in zip(old.parameters(), getattr(single, k).parameters()):
                p.data = 0.8 * p.data + 0.2 * new.data
    for k, expected in start.items():
        target = getattr(x.agent, f"target_{k}")
        for a, b in zip(target.parameters(), expected.parameters()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert not any(map(torch.equal, target.parameters(), getattr(x.agent, k).parameters()))


@pytest.mark.parametrize("nu", [0.0, 0.4])
def test_gradient_variance_is_that_of_one_split_per_game(nu):
    x = play(nu=nu)
    states = [torch.get_rng_state(), *(g.get_state() for g in x.rngs.values())]
    got = maipg.gradient_variance(x.agent, x.batch, x.sigma_a, x.args)
    again = [torch.get_rng_state(), *(g.get_state() for g in x.rngs.values())]
    assert all(map(torch.equal, states, again))
    grads, rng = [], torch.Generator()
    for game in range(3):
        columns = [b for b in range(9) if b % 3 == game]
        b = {k: v[:, columns] for k, v in x.batch.items()}
        loss = ppo_loss(x.agent, b, 0.2, 0.01, 1 - nu)
        if nu:
            loss = loss - nu * q_gain(x.agent, b, x.args, x.sigma_a, rng)
        grads.append(flat_gradient(loss, x.agent.policy).double())
    mean = sum(grads) / 3
    spread = sum(float(((g - mean) ** 2).sum()) for g in grads) / 2  # trace of the covariance
    assert float(got) == pytest.approx(spread / 3, rel=1e-3)  # of the mean of 3 splits


# ----------------------------------------------------------------------------------------- estimate
def check_chunks(x):
    """At unchanged weights the chunks give the log-probs and values of a step-by-step pass."""
    args, b, T = x.args, x.batch, x.args.rollout_steps
    assert x.buffer["done"][3 : T - 3].any() and (b["keep"][1:] == 0).any()
    logits, _ = x.agent.policy(b["obs"], b["policy_hidden"][0], b["keep"])
    logits = logits.masked_fill(~b["avail"], -1e10)
    taken = torch.distributions.Categorical(logits=logits).log_prob(b["actions"].argmax(-1))
    torch.testing.assert_close(taken, b["log_probs"], atol=1e-6, rtol=0)
    played = (x.buffer["log_pi"][:-1] * x.buffer["actions"][:-1]).sum(-1)
    torch.testing.assert_close(time_major(taken, args), played, atol=1e-6, rtol=0)
    stepped, _ = one_by_one(x.agent.policy, x.played, T, False)
    stepped = torch.log_softmax(stepped.masked_fill(~x.buffer["avail"], -1e10), -1)
    torch.testing.assert_close(stepped, x.buffer["log_pi"], atol=2e-6, rtol=1e-5)
    values, _ = x.agent.critic(b["obs"], b["critic_hidden"][0], b["keep"], b["state"])
    torch.testing.assert_close(values.squeeze(-1), b["values"], atol=1e-6, rtol=0)
    stepped, _ = one_by_one(x.agent.critic, x.played, T, True)
    got = time_major(b["values"], args)
    torch.testing.assert_close(got, stepped[:-1].squeeze(-1), atol=2e-6, rtol=0)
    if args.nu:
        utilities, _ = x.agent.utility(b["obs"], b["utility_hidden"][0], b["keep"], b["state"])
        stepped, _ = one_by_one(x.agent.utility, x.played, T, True)
        got = time_major(utilities, args)
        torch.testing.assert_close(got, stepped[:-1], atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_chunks_repeat_the_rollout(ready):
    check_chunks(ready)


@torch.no_grad()
def test_chunks_repeat_the_rollout_of_smax(smax):
    check_chunks(play(smax(1), num_envs=2, rollout_steps=40))


@pytest.mark.parametrize("bootstrap", [False, True])
@torch.no_grad()
def test_estimate(bootstrap):
    x = play(bootstrap_time_limits=bootstrap, crashes=True)
    args, agent, buffer = x.args, x.agent, x.buffer
    T, N = args.rollout_steps, args.num_envs
    got = {k: time_major(v, args) for k, v in x.batch.items() if "hidden" not in k}
    done, truncated, broken = (buffer[k][:-1].numpy() for k in ("done", "truncated", "broken"))
    assert truncated[:-1].sum() > 2 and broken.any() and (done & ~truncated & ~broken).any()

    # crashed games: every step from the episode's first to the crash
    valid = np.ones((T, N), bool)
    for t, k in zip(*broken.nonzero()):
        begin = max((j + 1 for j in range(t) if done[j, k]), default=0)
        valid[begin : t + 1, k] = False
    assert (got["valid"].numpy() == valid).all() and 0 < valid.sum() < T * N
    alive = valid[:, :, None] & (buffer["avail"][:-1].sum(-1) > 1).numpy()
    assert (got["alive"].numpy() == alive).all()

    # values, one step at a time; after a bootstrapped time limit the old episode's last state
    out, hiddens = one_by_one(agent.critic, x.played, T, True)
    value = out.squeeze(-1) * 3**0.5 + 2  # moments 2 and 7: mean 2, variance 7 - 4
    after = value[1:].clone()
    if bootstrap:
        for t, k in zip(*truncated.nonzero()):
            last = [buffer[f"last_{key}"][t, k][None, None] for key in ("obs", "state")]
            v, _ = agent.critic(last[0], hiddens[t, k][None], torch.ones(1, 1), last[1])
            after[t, k] = v[0, 0, :, 0] * 3**0.5 + 2
    ends = done & ~truncated if bootstrap else done
    r = buffer["reward"][:-1].double().numpy()
    mixture = np.zeros((T, N, 3))
    for k, i in np.ndindex(N, 3):
        columns = r[:, k], after[:, k, i].numpy(), ends[:, k], done[:, k]
        mixture[:, k, i] = n_step_mixture(*columns, 0.99, 0.95)
    raw = mixture - value[:-1].numpy()
    np.testing.assert_allclose(got["returns"], mixture, atol=2e-5)
    t, k = np.argwhere(truncated)[0]  # one cut step by hand
    expected = r[t, k] + (0.99 * after[t, k].numpy() if bootstrap else 0)
    np.testing.assert_allclose(got["returns"][t, k], expected * np.ones(3), atol=2e-5)

    mean, std = raw[alive].mean(), raw[alive].std()
    assert float(x.sigma_a) == pytest.approx(std, rel=1e-4)
    np.testing.assert_allclose(got["advantages"], (raw - mean) / (std + 1e-5), atol=1e-4)
    assert got["advantages"].numpy()[alive].mean() == pytest.approx(0, abs=1e-5)
    assert got["advantages"].numpy()[alive].std() == pytest.approx(1, abs=1e-4)

    # targets of q_tot: the target networks at the policy's most probable available actions
    utilities, hiddens = one_by_one(agent.target_utility, x.played, T, True)
    logits, policy_hiddens = one_by_one(agent.policy, x.played, T, False)
    logits = logits.masked_fill(~buffer["avail"], -torch.inf)
    next_q = np.zeros((T, N))
    for t, k in np.ndindex(T, N):
        u, p, s = utilities[t + 1, k], logits[t + 1, k], buffer["state"][t + 1, k]
        if bootstrap and truncated[t, k]:
            s, obs = buffer["last_state"][t, k], buffer["last_obs"][t, k][None, None]
            one = torch.ones(1, 1)
            u = agent.target_utility(obs, hiddens[t, k][None], one, s[None, None])[0][0, 0]
            p = agent.policy(obs, policy_hiddens[t, k][None], one)[0][0, 0]
            p = p.masked_fill(~buffer["last_avail"][t, k], -torch.inf)
        best = p.argmax(-1)
        chosen = torch.stack([u[i, best[i]] for i in range(3)])
        next_q[t, k] = float(mix(agent.target_mixer, "qmix", s, chosen, None)) * 2 + 3
    for k in range(N):  # moments 3 and 13: mean 3, variance 4
        targets = n_step_mixture(r[:, k], next_q[:, k], ends[:, k], done[:, k], 0.99, 0.8)
        np.testing.assert_allclose(got["q_targets"][:, k], targets, atol=5e-5)


def test_broken_games_count_for_nothing():
    x = play(crashes=True)
    bad = x.batch["valid"] == 0
    assert bad.any() and not bad.all()
    spoilt = dict(x.batch)
    for key in ("returns", "advantages", "q_targets", "log_probs", "values"):
        mask = bad if x.batch[key].dim() == 2 else bad.unsqueeze(-1)
        spoilt[key] = torch.where(mask, 2.0, x.batch[key])
    agents = x.agent, copy.deepcopy(x.agent)
    for agent, batch in zip(agents, (x.batch, spoilt)):
        maipg.update(agent, new_optimizers(agent, x.args), batch, x.sigma_a, new_rngs(), x.args)
    for (name, a), b in zip(agents[0].state_dict().items(), agents[1].state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


# --------------------------------------------------------------------------------------------- SMAX
def choose(avail, rng, fight):
    """Random available actions; game 0 (if told to fight) shoots whenever it can."""
    score = torch.rand(avail.shape, generator=rng)
    if fight:
        score[0, :, 5:] += 1
    return score.masked_fill(~avail, -1).argmax(-1)


def test_smax_is_jaxmarl_step_by_step(smax):
    import jax

    env, envs = maipg.smax_engine("3m")[0], smax(4)
    assert type(env).__name__ == "HeuristicEnemySMAX" and env.attack_mode == "closest"
    rng, keys, games, episode = torch.Generator().manual_seed(0), [], [], [[], []]
    episodes = {"done": 0, "won": 0}

    def compare(seen, k, obs, game, who=""):
        own = np.stack([np.asarray(obs[name]) for name in env.agents])
        np.testing.assert_allclose(seen[0][k], np.hstack([own, np.eye(3)]), atol=1e-5)
        np.testing.assert_allclose(seen[1][k], np.tile(obs["world_state"], (3, 1)), atol=1e-5)
        avail = env.get_avail_actions(game)
        avail = np.stack([np.asarray(avail[name]) for name in env.agents])
        np.testing.assert_array_equal(seen[2][k], avail > 0)

    seen = envs.reset()
    for k in range(2):
        key, reset_key = jax.random.split(jax.random.PRNGKey(4 + 1000 * k))
        obs, game = env.reset(reset_key)
        keys.append(key)
        games.append(game)
        compare(seen, k, obs, game)
    for _ in range(90):
        actions = choose(seen[2], rng, True)
        *seen, reward, done, info = envs.step(actions)
        for k in range(2):
            keys[k], key = jax.random.split(keys[k])
            moves = {name: int(actions[k, i]) for i, name in enumerate(env.agents)}
            before = games[k]
            obs, games[k], rewards, dones, _ = env.step(key, before, moves)
            compare(seen, k, obs, games[k])
            assert float(reward[k]) == pytest.approx(float(rewards["ally_0"]), abs=1e-5)
            assert bool(done[k]) == bool(dones["__all__"])
            episode[k].append(float(rewards["ally_0"]))
            if done[k]:
                obs, last, *_ = env.step_env(jax.random.split(key)[0], before, moves)
                compare(info["final"], k, obs, last)
                units = np.asarray(last.state.unit_alive)
                won = units[:3].any() and not units[3:].any()
                assert bool(info["won"][k]) == won == (episode[k][-1] >= 1)  # the bonus
                assert bool(info["truncated"][k]) == (units[:3].any() and units[3:].any())
                assert int(info["length"][k]) == len(episode[k])
                assert float(info["return"][k]) == pytest.approx(sum(episode[k]), abs=1e-4)
                episode[k] = []
                episodes["done"] += 1
                episodes["won"] += won
        assert not info["broken"].any()
    assert episodes["done"] >= 4


def test_smax_is_seeded(smax):
    def trace(seed):
        envs, rng, rows = smax(seed), torch.Generator().manual_seed(0), []
        obs, state, avail = envs.reset()
        for _ in range(12):
            obs, state, avail, reward, *_ = envs.step(choose(avail, rng, False))
            rows.append(torch.cat([obs.flatten(1), state.flatten(1), reward[:, None]], -1))
        return torch.stack(rows)

    first, again, other = trace(1), trace(1), trace(2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[:, 0], first[:, 1])  # the games of a batch differ
