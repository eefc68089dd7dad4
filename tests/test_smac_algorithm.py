"""Every formula of maipg_smac.py against a calculation of its own: sums, closed forms, JaxMARL."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import maipg_smac as maipg

torch.set_num_threads(1)  # networks as small as these lose time to more
SETTINGS = dict(map_name="3m", backend="sc2", device="cpu", num_envs=3, rollout_steps=30)
SETTINGS |= dict(hidden_dim=12, update_epochs=3, nu=0.4)
PAPER = [dict(critic="paper", mixer=mixer) for mixer in ("qmix", "vdn")]
CRITICS = [*PAPER, dict(critic="compatible")]
SECOND = [dict(critic, mu=mu) for critic in CRITICS for mu in ("expectation", "gumbel")]
BETA = 0.9  # of the value normalisers, so that each update of them shows
MOMENTS = {"critic": (2.0, 7.0, 1.0), "q": (3.0, 13.0, 1.0)}  # of v_norm, q_norm: x, x^2 and 1


class Toy:
    """Games of random numbers, in double precision, with agents that die."""

    def __init__(self, num_envs):
        self.N = num_envs

    def random(self, *shape):
        return torch.rand(self.N, *shape, generator=self.rng, dtype=torch.float64)

    def look(self):
        avail = self.random(3, 5) < 0.7
        avail[..., 0], avail[..., 1:3] = False, True
        avail[~self.living] = torch.eye(5, dtype=torch.bool)[0]
        return 2 * self.random(3, 7) - 1, 2 * self.random(6) - 1, avail

    def reset(self, seed):
        self.rng = torch.Generator().manual_seed(seed)
        self.living = torch.ones(self.N, 3, dtype=torch.bool)
        return self.look()

    def step(self, actions):
        self.living &= self.random(3) > 0.08
        done = self.random() < 0.15
        self.living |= done.unsqueeze(-1)
        reward = 3 * self.random() + 0.1 * actions.sum(-1)
        return *self.look(), reward, done, done & (self.random() < 0.5)

    def close(self):
        """There is nothing to close."""


def noise(seed=7):
    return torch.Generator().manual_seed(seed)


def play(envs=None, rollouts=2, **settings):
    """Networks in the middle of training, and rollouts of the same weights with their batches:
    all of them in `played`, the last one also at the top level."""
    args = maipg.Args(**SETTINGS | settings)
    torch.manual_seed(3)
    envs = envs or Toy(args.num_envs)
    now = maipg.begin(envs, 5, args)
    agent = maipg.Agent(now, args).to(now["obs"].dtype)
    # No bias is zero, no gain is one, and targets differ from the networks.
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    for name, norm in [("critic", agent.v_norm), ("q", getattr(agent, "q_norm", None))]:
        if norm:
            norm.beta, plain = BETA, PlainNorm(*MOMENTS[name])
            norm.moments.copy_(torch.tensor(MOMENTS[name]))
            norm.mean.fill_(plain.mean_std()[0])
            norm.std.fill_(plain.mean_std()[1])
    rng, buffer, played = noise(), {}, []
    for _ in range(rollouts):
        maipg.rollout(agent.policy, envs, buffer, now, args.rollout_steps, rng)
        batch, metrics = maipg.estimate(agent, buffer, now, args)
        rows = {key: x.clone() for key, x in buffer.items()}
        played.append(SimpleNamespace(buffer=rows, batch=batch, metrics=metrics))
    made = dict(args=args, agent=agent, now=now, played=played)
    return SimpleNamespace(**made, **vars(played[-1]), sigma_a=metrics["diagnostics/sigma_a"])


@pytest.fixture(scope="module")
def mappo():
    return play(nu=0.0)


@pytest.fixture(scope="module", params=SECOND, ids=lambda kind: "-".join(kind.values()))
def each(request):
    """A run with each second gradient; not to be changed."""
    return play(**request.param)


def time_major(x, args):
    """[L, B, ...] -> [T, N, ...], by indices: chunk c of game k is column c * N + k."""
    N, L = args.num_envs, args.chunk_length
    rows = [[x[t % L, t // L * N + k] for k in range(N)] for t in range(args.rollout_steps)]
    return torch.stack([torch.stack(row) for row in rows])


def one_by_one(net, played, *keys):
    """Outputs and hidden states [T + 1, N, n, ...] of the last of successive rollouts, a step
    at a time from the first step of the first one."""
    obs = played[0].buffer["obs"]
    hidden, keep = obs.new_zeros(*obs.shape[1:3], net.gru.hidden_size), obs.new_ones(1, len(obs[0]))
    for b in (p.buffer for p in played):
        outs, hiddens = [], [hidden]
        for t in range(len(obs)):
            before = torch.where(b["keep"][t].view(-1, 1, 1) > 0, hiddens[-1], 0.0)
            out, after = net(b["obs"][t][None], before, keep, *[b[key][t][None] for key in keys])
            outs.append(out[0])
            hiddens.append(after[0])
        hidden = hiddens[-2]  # row T comes again
    return torch.stack(outs), torch.stack(hiddens[1:])


def inputs(b, name):
    return b["obs"], b[f"{name}_hidden"][0], b["keep"]


def probabilities(policy, b):
    """pi and log pi [L, B, n, A] of the chunks."""
    logits, _ = policy(*inputs(b, "policy"))
    pi = torch.softmax(torch.where(b["avail"], logits, -torch.inf), -1)
    return pi, torch.where(b["avail"], torch.where(b["avail"], pi, 1.0).log(), -1e10)


def ppo_terms(policy, b, eps):
    """MAPPO's gain and entropy, with where() instead of min() and clamp(); and diagnostics."""
    pi, log_pi = probabilities(policy, b)
    ratio = pi.gather(-1, b["actions"].argmax(-1, keepdim=True)).squeeze(-1) / b["log_probs"].exp()
    A, live = b["advantages"], b["alive"] > 0
    inside = torch.where(A > 0, ratio < 1 + eps, ratio > 1 - eps)
    gain = torch.where(inside, ratio * A, torch.where(A > 0, (1 + eps) * A, (1 - eps) * A))
    entropy, r = -(pi * log_pi).sum(-1)[live].mean(), ratio.detach()[live]
    kl, clipped = (r - 1 - r.log()).mean(), ((r < 1 - eps) | (r > 1 + eps)).double().mean()
    told = {"diagnostics/approx_kl": kl, "diagnostics/clip_fraction": clipped}
    return gain[live].mean(), entropy, told | {"losses/entropy": entropy}


class PlainNorm:
    """MAPPO's ValueNorm: running mean and deviation, debiased."""

    def __init__(self, mean=0.0, square=0.0, weight=0.0, beta=BETA):
        self.m, self.s, self.d, self.beta = mean, square, weight, beta

    def mean_std(self):
        mean = self.m / max(self.d, 1e-5)
        return mean, max(self.s / max(self.d, 1e-5) - mean**2, 0.01) ** 0.5

    def update(self, y):
        self.m = self.beta * self.m + (1 - self.beta) * float(y.mean())
        self.s = self.beta * self.s + (1 - self.beta) * float((y * y).mean())
        self.d = self.beta * self.d + (1 - self.beta)
        return self.mean_std()


def mix(mixer, state, chosen):
    """q_tot of the utilities `chosen` [..., n], from the formulas and the mixer's layers."""
    s = F.layer_norm(state, state.shape[-1:], mixer.norm.weight, mixer.norm.bias)
    value = mixer.value(s)[..., 0]
    if mixer.kind == "vdn":
        return sum(chosen[..., i] for i in range(chosen.shape[-1])) + value
    w_1 = mixer.w_1(s).abs().view(*chosen.shape, -1)
    x = sum(chosen[..., i, None] * w_1[..., i, :] for i in range(chosen.shape[-1])) + mixer.b_1(s)
    x = torch.where(x > 0, x, torch.exp(x) - 1)
    return (x * mixer.w_2(s).abs()).sum(-1) + value


def utilities_of(agent, b):
    """Q_i(s, .) [L, B, n, A], and q_tot as a function of those chosen [L, B, n]."""
    if agent.second == "compatible":
        return b["utilities"], lambda chosen: chosen.sum(-1)
    u, _ = agent.q.utility(*inputs(b, "utility"), b["state"])
    return u.detach(), lambda chosen: mix(agent.q.mixer, b["state"], chosen).detach()


def second_scale(b, args, sigma_a, q_std):
    """q_scale in the unit of q_tot. Steps per live agent-step are 1 / mean number of live ones."""
    per_agent = b["alive"][..., 0].numel() / b["alive"].sum()
    if args.critic == "compatible":
        return per_agent
    return q_std * (1 if args.q_scale == "raw" else per_agent / (sigma_a + 1e-5))


def second_gain(agent, b, args, rng):
    """mean over steps of q_tot(s, mu(s)), of which only the first order in each Q_i has a
    gradient: its slopes by differences, the straight-through sample by softmax's Jacobian."""
    u, q_tot = utilities_of(agent, b)
    pi, log_pi = probabilities(agent.policy, b)
    chosen = by_policy = (u * pi).sum(-1)
    if args.mu == "gumbel":
        y = (log_pi - torch.empty_like(log_pi).exponential_(generator=rng).log()).detach()
        hard, y = F.one_hot(y.argmax(-1), y.shape[-1]), torch.softmax(y, -1)
        chosen = (u * hard).sum(-1)
        jacobian = torch.diag_embed(y) - y.unsqueeze(-1) * y.unsqueeze(-2)
        by_policy = ((jacobian @ u.unsqueeze(-1)).squeeze(-1) * log_pi).sum(-1)
    chosen, h, gain = chosen.detach(), 1e-5, 0.0
    for i in range(u.shape[2]):
        step = h * torch.eye(u.shape[2], dtype=u.dtype)[i]
        slope = (q_tot(chosen + step) - q_tot(chosen - step)) / (2 * h)
        gain = gain + (slope * by_policy[..., i]).mean()
    return gain - gain.detach() + q_tot(chosen).mean()


def gradient(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def losses_of(x, batch=None, **settings):
    """The script's losses of policy and q, with a copy of x's networks."""
    agent, args = copy.deepcopy(x.agent), replace(x.args, **settings)
    losses, _ = maipg.policy_losses(agent, batch or x.batch, x.sigma_a, noise(), args)
    return losses, agent


def term(x, nu, batch=None, **settings):
    """Gradient of the first (nu = 0) or the second term (nu = 1) of the policy's objective."""
    losses, agent = losses_of(x, batch, nu=nu, ent_coef=0.0, **settings)
    return -gradient(losses["policy"], agent.policy)


# ---------- normaliser and networks
@pytest.mark.parametrize("beta", [0.99999, 0.9])
def test_value_norm_is_that_of_mappo(beta):
    norm, plain, rng = maipg.ValueNorm(), PlainNorm(beta=beta), np.random.default_rng(0)
    assert norm.beta == 0.99999 and (norm.mean, norm.std) == tuple(
        map(torch.tensor, plain.mean_std())
    )
    norm.beta = beta
    for k in range(6):  # at first without any variance: the floor
        sample = rng.normal(5 * k + 4, 3 * (k > 0), (20, 4))
        norm.update(torch.as_tensor(sample, dtype=torch.float32))
        expected = plain.update(sample)
        assert (norm.mean.item(), norm.std.item()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("state_dim", [0, 6])
def test_recurrent_is_the_network_of_mappo(state_dim):
    torch.manual_seed(0)
    S, H = state_dim, 12
    net = maipg.Recurrent(7, H, 5, 0.01, S)
    gains = [(net.obs_in[1].weight, 1 if S else 2), (net.body[2].weight, 2)]
    gains += [(net.gru.weight_ih, 1), (net.gru.weight_hh, 1), (net.head.weight.T, 0.0001)]
    gains += [(net.state_in[1].weight, 1)] if S else []
    for w, square in gains:
        assert_close(w.T @ w, square * torch.eye(w.shape[1]))
    assert all((p == 0).all() for name, p in net.named_parameters() if "bias" in name)

    obs, hidden, state = torch.randn(1, 2, 3, 7), torch.randn(2, 3, H), torch.randn(1, 2, S)
    x = F.layer_norm(obs[0], [7]) @ gains[0][0].T
    if S:
        x = x + (F.layer_norm(state[0], [S]) @ gains[-1][0].T)[:, None]
    x = F.layer_norm(F.relu(x), [H])
    x = F.layer_norm(F.relu(x @ gains[1][0].T), [H])
    i_r, i_z, i_n = (x @ net.gru.weight_ih.T).chunk(3, -1)
    h_r, h_z, h_n = (hidden @ net.gru.weight_hh.T).chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    after = (1 - z) * torch.tanh(i_n + r * h_n) + z * hidden
    out, hiddens = net(obs, hidden, torch.ones(1, 2), *([state] if S else []))
    assert_close(hiddens[0], after)
    assert_close(out[0], F.layer_norm(after, [H]) @ net.head.weight.T)


# ---------- the second gradient
@pytest.mark.parametrize("q_scale", ["advantage", "raw"])
def test_second_gradient(each, q_scale):
    """Expectation: the exact gradient of E_{a ~ pi}[q_tot(s, a)], with QMIX its first order.
    Gumbel: the straight-through estimate with the same noise."""
    agent, b, args, std = each.agent, each.batch, replace(each.args, q_scale=q_scale), None
    if args.critic == "paper":
        _, std = PlainNorm(*MOMENTS["q"]).update(b["q_targets"])
    scale = second_scale(b, args, each.sigma_a, std)
    got = term(each, 1.0, q_scale=q_scale)
    expected = gradient(second_gain(agent, b, args, noise()) * scale, agent.policy)
    assert expected.norm() > 1e-3
    assert_close(got, expected, atol=1e-8, rtol=1e-6)
    if args.mu == "gumbel":
        return
    (u, q_tot), (pi, _), total = utilities_of(agent, b), probabilities(agent.policy, b), 0.0
    for joint in itertools.product(range(5), repeat=3):
        chosen, chance = (torch.stack([x[..., i, joint[i]] for i in range(3)], -1) for x in (u, pi))
        total = total + (chance.prod(-1) * q_tot(chosen)).mean()
    exact = gradient(total * scale, agent.policy)
    linear = args.critic == "compatible" or args.mixer == "vdn"
    assert torch.allclose(got, exact, atol=1e-9, rtol=1e-9) == linear
    assert torch.cosine_similarity(got, exact, 0) > 0.95


def test_each_loss_reaches_its_own_network_only(each):
    losses, agent = losses_of(each)
    losses["critic"] = maipg.critic_loss(agent, each.batch, each.args)
    assert set(losses) == {"policy", "critic"} | {"q"} & set(dict(agent.named_children()))
    names, parameters = zip(*agent.named_parameters())
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        reached = {key.split(".")[0] for key, g in zip(names, grads) if g is not None}
        assert reached == {name}


def test_dead_agents_have_no_gradient(each):
    dead = each.batch["alive"] == 0
    assert 10 < dead.sum() < dead.numel() - 10
    for nu in (0.0, 0.4, 1.0):
        obs = each.batch["obs"].clone().requires_grad_()
        losses, _ = losses_of(each, each.batch | {"obs": obs}, nu=nu, ent_coef=0.5 * (nu == 0.4))
        (grad,) = torch.autograd.grad(losses["policy"], obs)
        assert (grad[dead] == 0).all() and (grad[~dead] != 0).any()


@pytest.mark.parametrize("kind", CRITICS[1:], ids=lambda kind: kind["critic"])
def test_more_dead_agents_change_neither_term(kind):
    """Both terms are means over live agents: nu means the same, whoever has died."""
    x, dead = play(**kind), 4
    torch.manual_seed(1)
    (*_, n, A), more = x.batch["actions"].shape, {}
    for key, y in x.batch.items():
        if y.shape[2:3] == (n,):
            ghosts = torch.randn(*y.shape[:2], dead, *y.shape[3:]).to(y.dtype)
            more[key] = torch.cat([y, ghosts], 2)
    more["alive"][:, :, n:], no_op = 0.0, torch.eye(A)[0]
    more["actions"][:, :, n:], more["avail"][:, :, n:] = no_op, no_op > 0
    for nu in (0.0, 1.0):
        assert_close(term(x, nu), term(x, nu, x.batch | more))


# ---------- the compatible critic
def rows_of(features, scores):
    """x = sum_i h_i (x) score_i of each step, as rows of numpy."""
    h, s = (np.asarray(y).reshape(-1, *y.shape[-2:]) for y in (features, scores))
    return np.stack([sum(np.outer(*pair).ravel() for pair in zip(*step)) for step in zip(h, s)])


def test_compatible_critic_is_least_squares():
    torch.manual_seed(0)
    critic = maipg.CompatibleCritic(4, 3, forgetting=0.0, ridge=0.0).double()
    for _ in range(2):  # only the last rollout counts
        h, s, y = (torch.randn(10, 5, *shape).double() for shape in [(2, 4), (2, 3), ()])
        critic.fit(h, s, y)
    expected, _, rank, _ = np.linalg.lstsq(rows_of(h, s), y.flatten().numpy(), rcond=None)
    assert rank == 12
    np.testing.assert_allclose(critic.weights.flatten(), expected, atol=1e-9)


@torch.no_grad()
def test_compatible_critic_over_rollouts():
    """Weights, utilities and diagnostics of three rollouts, from sums over all of them."""
    rho, ridge = 0.6, 0.02
    x = play(critic="compatible", rollouts=3, forgetting=rho, ridge=ridge)
    past, weights = [], np.zeros((13, 5))
    for k, p in enumerate(x.played):
        b = {key: y[:-1] for key, y in p.buffer.items()}
        live = b["avail"].sum(-1, keepdim=True) > 1
        assert live.any() and not live.all()
        _, hiddens = one_by_one(x.agent.policy, x.played[: k + 1])
        h = torch.cat([x.agent.policy.norm(hiddens[:-1]), torch.ones(30, 3, 3, 1).double()], -1)
        h = torch.where(live, h, 0.0)  # the dead have no part in x, in A or in the utilities
        rows = rows_of(h, b["actions"] - b["log_pi"].exp())
        A = torch.where(live[..., 0], time_major(p.batch["advantages"], x.args), torch.nan)
        A = A.nanmean(-1).nan_to_num().flatten().numpy()

        # What the weights from before this rollout tell of it: at first, nothing.
        q = rows @ weights.ravel()
        slope, corr = np.cov(A, q, ddof=0)[0, 1] / (q.var() or 1), 0.0
        if k:
            corr = np.corrcoef(A, q)[0, 1]
        assert (slope == 0) == (k == 0)
        assert p.metrics["variance/slope"].item() == pytest.approx(slope, abs=1e-7)
        assert p.metrics["variance/corr"].item() == pytest.approx(corr, abs=1e-7)

        past = [(rho * G, rho * moment) for G, moment in past]
        past.append((rows.T @ rows + ridge * 90 * np.eye(65), rows.T @ A))
        weights = np.linalg.solve(*(sum(parts) for parts in zip(*past))).reshape(13, 5)
        utilities = time_major(p.batch["utilities"], x.args)
        np.testing.assert_allclose(utilities, h @ torch.from_numpy(weights), atol=1e-8)
        assert utilities.abs().max() > 0.01
    np.testing.assert_allclose(x.agent.compatible.weights, weights, atol=1e-8)


@pytest.mark.parametrize("nu", [0.0, 1.0])
def test_proposition_5(nu):
    """Where each joint action comes as often as under pi, the utilities fitted to A give the true
    gradient of E_pi[A] by the policy's head, and so does PPO's term, at the same scale.

    Three states, three agents, and a reward for each state and joint action, which no sum of
    the agents' own could be. In the last state the third agent is dead."""
    rng = noise()
    obs, state, table = (
        torch.randn(3, *shape, generator=rng, dtype=torch.float64)
        for shape in [(3, 7), (6,), (3, 3, 3)]
    )
    masks = ["111 101 011", "011 111 110", "101 111 100"]
    avail = torch.tensor([[[c == "1" for c in mask] for mask in row.split()] for row in masks])
    pi = avail * torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    pi = pi / pi.sum(-1, keepdim=True)  # 1/2, 1/4, 1/3 or 2/3, in each state others
    states, actions = [], []
    for s, *joint in itertools.product(range(3), repeat=4):
        times = 144 * pi[s, range(3), joint].prod().item()
        assert times == pytest.approx(round(times))
        states += [s] * round(times)
        actions += [joint] * round(times)
    assert len(states) == 3 * 144

    args = dict(critic="compatible", ridge=1e-9, ent_coef=0.0, num_envs=1, rollout_steps=432)
    args = maipg.Args(**SETTINGS | args | dict(chunk_length=12, nu=0.5))
    zeros, keep = obs.new_zeros(3, 3, 12), obs.new_zeros(1, 3)
    now = {"obs": obs, "state": state, "avail": avail, "critic_hidden": zeros[:1]}
    torch.manual_seed(0)
    agent = maipg.Agent(now, args).double()
    agent.policy.head.weight.data.zero_()
    agent.policy.head.bias.data = torch.tensor([2.0, 1, 1]).double().log()
    # Every step is an episode of its own; row t + 1 has the hidden state after step t.
    (logits,), (hidden,) = agent.policy(obs[None], zeros, keep)
    rows, joint = [*states, 0], torch.tensor([*actions, [0, 0, 0]])
    buffer = {"obs": obs[rows], "state": state[rows], "avail": avail[rows]}
    buffer |= {"policy_hidden": hidden[[0, *states]], "log_pi": pi[rows].log().clamp(min=-1e10)}
    buffer |= {"actions": F.one_hot(joint, 3).double(), "reward": table[(rows, *joint.T)]}
    buffer |= {"done": torch.ones(433) > 0, "keep": torch.zeros(433)}
    buffer = {key: y.detach().unsqueeze(1) for key, y in buffer.items()}
    batch, metrics = maipg.estimate(agent, buffer, now, args)

    sigma_a, args = metrics["diagnostics/sigma_a"], replace(args, nu=nu)
    losses, _ = maipg.policy_losses(agent, batch, sigma_a, None, args)
    got = -gradient(losses["policy"], agent.policy.head)
    pi = torch.softmax(logits.masked_fill(~avail, -torch.inf), -1)
    value = torch.einsum("sa,sb,sc,sabc->s", *pi.unbind(1), table).mean()
    live = 8 / 3  # agents in a mean step
    expected = gradient(value / (sigma_a + 1e-5) / live, agent.policy.head)
    assert expected.abs().max() > 0.01
    assert_close(got, expected, atol=1e-7, rtol=1e-6)


def test_compatible_builds_no_other_critic():
    x, other = play(critic="compatible"), play(critic="compatible", rollouts=1)
    assert {n for n, _ in x.agent.named_children()} == {"policy", "critic", "v_norm", "compatible"}
    assert not {"q_targets", "utility_hidden"} & set(x.batch)
    # Its state is the agent's: another one goes on where this one is.
    assert not torch.equal(other.agent.compatible.weights, x.agent.compatible.weights)
    other.agent.load_state_dict(x.agent.state_dict())
    for agent in (x.agent, other.agent):
        maipg.estimate(agent, x.buffer, dict(x.now), x.args)
    for name in ("gram", "moment", "weights"):
        assert f"compatible.{name}" in x.agent.state_dict()
        assert torch.equal(*(getattr(agent.compatible, name) for agent in (x.agent, other.agent)))


# ---------- update
def huber(error):
    return torch.where(error.abs() <= 10, error**2 / 2, 10 * (error.abs() - 5))


class PlainAdam:
    """Adam with eps 1e-5, after clipping the gradient's norm."""

    def __init__(self, network, rate):
        self.parameters, self.rate, self.k = list(network.parameters()), rate, 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    def step(self, loss, limit):
        grads = torch.autograd.grad(loss, self.parameters)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        self.k += 1
        for p, g, m, v in zip(self.parameters, grads, self.m, self.v):
            g = g * min(1.0, limit / (float(norm) + 1e-6))
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            root = (v / (1 - 0.999**self.k)).sqrt() + 1e-5
            p.data -= self.rate * m / (1 - 0.9**self.k) / root
        return norm


def plain_critic_loss(critic, b, norm, bites):
    mean, std = norm.update(b["returns"])
    v, old = critic(*inputs(b, "critic"), b["state"])[0][..., 0], b["values"]
    near = torch.where((v - old).abs() < 0.2, v, old + 0.2 * torch.sign(v - old))
    error, error_near = ((b["returns"] - mean) / std - x for x in (v, near))
    worse = huber(error_near) > huber(error)
    bites += torch.stack([worse.sum(), (error.abs() > 10).sum()])
    return torch.where(worse, huber(error_near), huber(error)).mean()


def plain_policy_losses(agent, b, sigma_a, args, norm, rng):
    gain, entropy, told = ppo_terms(agent.policy, b, args.clip_eps)
    if agent.second == "none":
        return {"policy": -gain - args.ent_coef * entropy}, told
    losses, std = {}, None
    if agent.second == "paper":
        mean, std = norm.update(b["q_targets"])
        u, _ = agent.q.utility(*inputs(b, "utility"), b["state"])
        chosen = u.gather(-1, b["actions"].argmax(-1, keepdim=True)).squeeze(-1)
        q_tot = mix(agent.q.mixer, b["state"], chosen)
        losses["q"] = huber((b["q_targets"] - mean) / std - q_tot).mean()
    second = second_gain(agent, b, args, rng) * second_scale(b, args, sigma_a, std)
    losses["policy"] = -(1 - args.nu) * gain - args.nu * second - args.ent_coef * entropy
    return losses, told


def plain_update(agent, batch, sigma_a, args):
    """`update` with an Adam for each network and every loss from its formula: metrics of each
    minibatch, and how often the clip and the Huber loss of V bite."""
    names = ["policy", "critic"] + ["q"] * (agent.second == "paper")
    adam = {name: PlainAdam(getattr(agent, name), args.learning_rate) for name in names}
    norms, bites, history = {name: PlainNorm(*x) for name, x in MOMENTS.items()}, torch.zeros(2), {}
    gumbel, shuffle, chunks = noise(), noise(), batch["obs"].shape[1]
    critic_epochs = args.critic_epochs or args.update_epochs
    for epoch in range(max(args.update_epochs, critic_epochs)):
        order = torch.randperm(chunks, generator=shuffle)
        if args.num_minibatches == 1:
            order = torch.arange(chunks)  # all of them, as they are
        for index in order.view(args.num_minibatches, -1):
            b, losses, told = {k: v[:, index] for k, v in batch.items()}, {}, {}
            if epoch < args.update_epochs:
                losses, told = plain_policy_losses(agent, b, sigma_a, args, norms["q"], gumbel)
            if epoch < critic_epochs:
                losses["critic"] = plain_critic_loss(agent.critic, b, norms["critic"], bites)
            for name, loss in losses.items():
                told[f"losses/{name}"] = loss
                told[f"diagnostics/{name}_grad_norm"] = adam[name].step(loss, args.max_grad_norm)
            for key, value in told.items():
                history.setdefault(key, []).append(value.item())
        if agent.second == "paper" and epoch < args.update_epochs:
            for target, new in zip(agent.target_q.parameters(), agent.q.parameters()):
                target.data = (1 - args.target_tau) * target.data + args.target_tau * new.data
    return history, bites


def scripts_update(x, **settings):
    """The script's update of a copy of x's agent: the agent, metrics, random streams."""
    agent, args = copy.deepcopy(x.agent), replace(x.args, **settings)
    rngs = {name: noise() for name in ("gumbel", "shuffle")}
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    return agent, maipg.update(agent, optimizer, x.batch, x.sigma_a, rngs, args), rngs


def check_update(x, **settings):
    """The script's update against the plain one: all weights, and all metrics."""
    got, metrics, _ = scripts_update(x, **settings)
    plain = copy.deepcopy(x.agent)
    history, bites = plain_update(plain, x.batch, x.sigma_a, replace(x.args, **settings))
    for (name, a), b in zip(got.named_parameters(), plain.parameters(), strict=True):
        assert_close(a, b, atol=1e-6, rtol=0, msg=name)
        assert (a - x.agent.get_parameter(name)).abs().max() > 1e-5
    assert set(metrics) == set(history)
    for key, values in history.items():
        assert metrics[key].item() == pytest.approx(np.mean(values), abs=1e-6), key
    return history, bites


MANY = dict(num_minibatches=3, max_grad_norm=0.05)


@pytest.mark.parametrize("plan", [{}, MANY, MANY | {"critic_epochs": 7}, {"critic_epochs": 2}])
def test_nu_zero_is_plain_mappo(mappo, plan):
    # Big steps, and one return far off: all clips must bite.
    x = SimpleNamespace(**vars(mappo) | {"batch": copy.deepcopy(mappo.batch)})
    x.batch["returns"][3, 2, 0] += 1000
    history, bites = check_update(x, update_epochs=4, learning_rate=5e-3, **plan)
    assert bites.min() > 0 and max(history["diagnostics/clip_fraction"]) > 0
    if plan.get("max_grad_norm"):
        assert max(history["diagnostics/policy_grad_norm"]) > 0.05


def test_update_of_maipg(each):
    """Algorithm 1 and the compatible critic: the weights of all networks, and the targets'."""
    plan = dict(update_epochs=2, num_minibatches=3, target_tau=0.2, critic_epochs=3)
    check_update(each, **plan)
    check_update(each, update_epochs=1, learning_rate=1e-3, q_scale="raw")


def test_nu_zero_builds_nothing_else_and_draws_no_noise(mappo):
    assert {n for n, _ in mappo.agent.named_children()} == {"policy", "critic", "v_norm"}
    names = [key for keys in (mappo.batch, mappo.metrics) for key in keys]
    assert not [x for x in names if x.startswith(("q_", "utilit", "variance"))]
    plan = dict(update_epochs=4, num_minibatches=3, mu="gumbel")
    (agent, _, rngs), (same, *_), (more, *_) = (
        scripts_update(mappo, **plan, critic_epochs=epochs) for epochs in (None, 4, 6)
    )
    assert torch.equal(rngs["gumbel"].get_state(), noise().get_state())
    # V's own number of epochs: the same is the same, more of them change V alone.
    assert all(map(torch.equal, agent.parameters(), same.parameters()))
    assert all(map(torch.equal, agent.policy.parameters(), more.policy.parameters()))
    assert not any(map(torch.equal, agent.critic.parameters(), more.critic.parameters()))


def first_update(folder, **settings):
    """What `train` hands over to its first update, and the random streams after it."""
    seen = {}

    def agent_class(now, args):
        return maipg.Agent(now, args).double()

    def update(agent, optimizer, batch, sigma_a, rngs, args):
        seen.update(policy=copy.deepcopy(agent.policy.state_dict()), batch=dict(batch))
        seen.update(critic=copy.deepcopy(agent.critic.state_dict()), optimizer=optimizer)
        metrics = maipg.update(agent, optimizer, batch, sigma_a, rngs, args)
        seen["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        seen["seeds"] = {rng.initial_seed() for rng in rngs.values()}
        return metrics

    args = maipg.Args(
        **SETTINGS | settings, total_timesteps=90, eval_episodes=3, runs_dir=str(folder)
    )
    maipg.train(args, Toy(3), agent_class=agent_class, update=update)
    return seen


def test_all_nu_and_critics_start_alike(tmp_path):
    """The same weights, first rollout and random streams, whatever q_tot is."""
    mappo = first_update(tmp_path / "mappo", nu=0.0)
    (group,) = mappo["optimizer"].param_groups
    assert (group["lr"], group["eps"], group["betas"]) == (5e-4, 1e-5, (0.9, 0.999))
    assert len(mappo["seeds"]) == 3
    for k, settings in enumerate([*SECOND, {"nu": 1.0}]):
        other = first_update(tmp_path / str(k), **settings)
        del other["rngs"]["gumbel"]
        for part in ("policy", "critic", "batch"):
            assert all(torch.equal(x, other[part][key]) for key, x in mappo[part].items())
        assert all(torch.equal(x, mappo["rngs"][name]) for name, x in other["rngs"].items())


# ---------- rollout and estimate
def n_step_mixture(r, boot, done, gamma, lam):
    """lambda-return of each step of one sequence, a sum over all its n-step returns."""
    out = []
    for t in range(len(r)):
        last = next((j for j in range(t, len(r)) if done[j]), len(r) - 1)
        total, rewards = 0.0, 0.0
        for j in range(t, last + 1):
            rewards += gamma ** (j - t) * r[j]
            n_step = rewards + (0 if done[j] else gamma ** (j - t + 1) * boot[j])
            total += n_step * lam ** (j - t) * (1 if j == last else 1 - lam)
        out.append(total)
    return np.array(out)


@torch.no_grad()
def check_rollouts(x):
    """Actions are samples of pi, and at unchanged weights the chunks of a batch give the same as
    single steps do. What the networks put out, step by step: {network: [T + 1, N, n, ...]}."""
    args, b, rng, total = x.args, x.batch, noise(), 0.0
    assert x.buffer["done"][3:-3].any() and (b["keep"][1:] == 0).any()
    near = dict(atol=2e-6, rtol=1e-5)
    logits, hiddens = one_by_one(x.agent.policy, x.played)
    logits = logits.masked_fill(~x.buffer["avail"], -torch.inf)
    log_pi = logits.log_softmax(-1)
    assert_close(x.buffer["log_pi"].clamp(min=-1e9), log_pi.clamp(min=-1e9), **near)
    assert_close(x.buffer["policy_hidden"][1:], hiddens[:-1], **near)
    chunks, taken = probabilities(x.agent.policy, b)[1], x.buffer["actions"][:-1].argmax(-1, True)
    chunks = (chunks * b["actions"]).sum(-1)
    assert_close(chunks, b["log_probs"], **near)
    assert_close(time_major(chunks, args), log_pi.gather(-1, taken)[..., 0], **near)
    stepped = {"policy": logits}
    for name in ["critic"] + ["utility"] * (x.agent.second == "paper"):
        net = x.agent.critic if name == "critic" else x.agent.q.utility
        stepped[name], _ = one_by_one(net, x.played, "state")
        chunks, _ = net(*inputs(b, name), b["state"])
        assert_close(time_major(chunks, args), stepped[name][:-1], **near)
    assert_close(time_major(b["values"], args), stepped["critic"][:-1, ..., 0], **near)

    for rows in (p.buffer for p in x.played):
        for t in range(args.rollout_steps):
            # Of exponential clocks of rates pi, action a is the first with probability pi(a).
            clocks = torch.empty_like(log_pi[0]).exponential_(generator=rng)
            first = (clocks / rows["log_pi"][t].exp()).argmin(-1)
            assert torch.equal(rows["actions"][t], F.one_hot(first, clocks.shape[-1]).float())
            # The return of the episode so far, over the rollouts.
            total = rows["reward"][t] + rows["keep"][t] * total
            assert_close(rows["return"][t], total)
    return stepped


@torch.no_grad()
def test_rollout_and_estimate(each):
    x, args, agent, T, N = each, each.args, each.agent, 30, 3
    stepped = check_rollouts(x)
    got = {k: time_major(v, args) for k, v in x.batch.items() if "hidden" not in k}
    buffer, state, done = x.buffer, x.buffer["state"], x.buffer["done"][:-1].numpy()
    r, alive = buffer["reward"][:-1].numpy(), (buffer["avail"][:-1].sum(-1) > 1).numpy()
    assert (got["alive"].numpy() == alive).all() and 0.1 < alive.mean() < 0.9

    # V, and its returns as mixtures of n-step returns.
    mean, std = PlainNorm(*MOMENTS["critic"]).mean_std()
    value = stepped["critic"][..., 0].numpy() * std + mean
    mixture = np.zeros((T, N, 3))
    for k, i in np.ndindex(N, 3):
        mixture[:, k, i] = n_step_mixture(r[:, k], value[1:, k, i], done[:, k], 0.99, 0.95)
    near = dict(rtol=1e-6, atol=1e-6)  # the script's gamma is a float32
    np.testing.assert_allclose(got["returns"], mixture, **near)
    raw = mixture - value[:-1]
    mean, std = raw[alive].mean(), raw[alive].std()
    assert x.sigma_a.item() == pytest.approx(std, rel=1e-6)
    A = (raw - mean) / (std + 1e-5)
    np.testing.assert_allclose(got["advantages"], A, **near)
    if args.critic == "compatible":
        return

    # Targets of q_tot: the target networks at the policy's most probable available actions.
    mean, q_std = PlainNorm(*MOMENTS["q"]).mean_std()
    utilities, _ = one_by_one(agent.target_q.utility, x.played, "state")
    chosen = utilities.gather(-1, stepped["policy"].argmax(-1, keepdim=True)).squeeze(-1)
    next_q = (mix(agent.target_q.mixer, state, chosen)[1:] * q_std + mean).numpy()
    for k in range(N):
        targets = n_step_mixture(r[:, k], next_q[:, k], done[:, k], 0.99, 0.8)
        np.testing.assert_allclose(got["q_targets"][:, k], targets, **near)

    # q_tot(s, a) - q_tot(s, pi) in A's unit, and the mean advantage of the live agents.
    pi, actions = stepped["policy"].softmax(-1), buffer["actions"]
    of_a, of_pi = (
        mix(agent.q.mixer, state, (stepped["utility"] * p).sum(-1))[:-1] for p in (actions, pi)
    )
    q = ((of_a - of_pi) * q_std / (std + 1e-5)).flatten().numpy()
    A = (np.where(alive, A, 0).sum(-1) / alive.sum(-1).clip(1)).flatten()
    cov, corr = np.cov(A, q), np.corrcoef(A, q)[0, 1]
    assert x.metrics["variance/slope"].item() == pytest.approx(cov[0, 1] / cov[1, 1], rel=1e-5)
    assert x.metrics["variance/corr"].item() == pytest.approx(corr, rel=1e-5)


# ---------- SMAX
@pytest.fixture(scope="module")
def smax():
    return maipg.SMAXEnvs(maipg.Args(**SETTINGS | dict(num_envs=2)))


def test_chunks_repeat_the_rollout_of_smax(smax):
    check_rollouts(play(smax, num_envs=2, rollout_steps=40))


def test_smax_compiles_once(smax):
    """Games that have just begun, and those that go on, have the same types."""
    for seed in (0, 1):
        avail = smax.reset(seed)[2]
        for _ in range(2):
            avail = smax.step(avail.int().argmax(-1))[2]
    assert smax._reset._cache_size() == smax._step._cache_size() == 1


def test_smax_is_jaxmarl_step_by_step(smax):
    import jax
    from jaxmarl.environments import smax as jaxmarl

    env = jaxmarl.HeuristicEnemySMAX(scenario=jaxmarl.map_name_to_scenario("3m"))
    rng, episodes = noise(0), {True: 0, False: 0}

    def compare(seen, k, obs, game):
        own, avail = (
            np.stack([np.asarray(x[name]) for name in env.agents])
            for x in (obs, env.get_avail_actions(game))
        )
        np.testing.assert_allclose(seen[0][k], np.hstack([own, np.eye(3)]), atol=1e-5)
        np.testing.assert_allclose(seen[1][k], obs["world_state"], atol=1e-5)
        np.testing.assert_array_equal(seen[2][k], avail > 0)
        alive = np.asarray(game.state.unit_alive[:3])
        assert ((seen[2][k].sum(-1) > 1).numpy() == alive).all()
        assert (seen[0][k][~alive, :-3] == 0).all()

    seen, keys, games = smax.reset(4), [], []
    for k in range(2):
        key, reset_key = jax.random.split(jax.random.PRNGKey(4 + 1000 * k))
        obs, game = env.reset(reset_key)
        keys.append(key)
        games.append(game)
        compare(seen, k, obs, game)
    for _ in range(100):
        # Random moves; game 0 goes east, and all shoot at the first enemy whom they can.
        score = torch.rand(seen[2].shape, generator=rng)
        score[0, :, 1] += 0.5
        score[0, :, 5:] += torch.tensor([3.0, 2.0, 1.0])
        actions = score.masked_fill(~seen[2], -1).argmax(-1)
        *seen, reward, done, won = smax.step(actions)
        for k in range(2):
            keys[k], key = jax.random.split(keys[k])
            step_key, reset_key = jax.random.split(key)  # as in JaxMARL's own step()
            moves = {name: int(actions[k, i]) for i, name in enumerate(env.agents)}
            obs, games[k], rewards, dones, _ = env.step_env(step_key, games[k], moves)
            assert float(reward[k]) == pytest.approx(float(rewards["ally_0"]), abs=1e-5)
            assert bool(done[k]) == bool(dones["__all__"])
            units = np.asarray(games[k].state.unit_alive)
            victory = bool(done[k] and units[:3].any() and not units[3:].any())
            assert bool(won[k]) == victory
            if done[k]:
                episodes[victory] += 1
                obs, games[k] = env.reset(reset_key)
            compare(seen, k, obs, games[k])
    assert min(episodes.values()) > 0


def test_smax_is_seeded_and_a_copy_has_games_of_its_own(smax):
    def trace(envs, seed):
        rng, rows = noise(0), []
        _, _, avail = envs.reset(seed)
        for _ in range(12):
            score = torch.rand(avail.shape, generator=rng).masked_fill(~avail, -1)
            obs, state, avail, reward, *_ = envs.step(score.argmax(-1))
            rows.append(torch.cat([obs.flatten(1), state, reward[:, None]], -1))
        return torch.stack(rows)

    first, games = trace(smax, 1), smax.state_dict()
    other, again = trace(copy.copy(smax), 2), trace(copy.copy(smax), 1)
    assert all(map(torch.equal, games, smax.state_dict()))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert not torch.allclose(first[:, 0], first[:, 1])  # the games of a batch differ
