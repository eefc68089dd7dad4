"""MAIPG on particle worlds: Multi-Agent Interpolated Policy Gradients, in one file.

MAPPO's policy gradient rests on sampled joint actions: little bias, but noisy. MAIPG mixes in a
quieter one through a factorised critic q_tot, differentiated in the actions. nu trades bias
against variance; nu = 0 is MAPPO, and builds no q_tot. The policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(s, mu(s))] * q_scale               `deterministic_pg_loss`   Eq. (10)
      + ent_coef * mean[entropy]

r: ratio of new to old policy. A: advantage (`gae`), normalised; sigma_A: its deviation.
mu(s): pi's mean: its probabilities, or a Gaussian's mean; or, by --mu gumbel, a sample.

    --critic compatible   The default, Proposition 5: q_tot is linear in the policy's own features,
                          fitted to the team's A by least squares. q_scale = 1 / live agents.
                          Continuous actions: linear in a_i - mu_i as well, Proposition 6, but
                          without the slope of tanh. The deviation has no second gradient: with
                          nu = 1 only the entropy bonus moves it.
    --critic paper        Algorithm 1: utility networks, mixed by QMIX or VDN, regressed on
                          `td_lambda` targets. q_scale = 1 / (live agents * sigma_A).

Axes: T steps in a rollout, N games, n agents, A actions (or their dimensions), O observation,
S state, H hidden units; L steps in a chunk, B chunks in a minibatch. `global_step` counts
environment steps.

    python maipg_mpe.py --scenario spread                   # train
    python maipg_mpe.py --scenario line --continuous        # with forces instead of moves
    python maipg_mpe.py --env-id pettingzoo.sisl.pursuit_v5:parallel_env
    python maipg_mpe.py --resume RUN_DIR                    # go on
    python benchmark/evaluate.py RUN_DIR --capture-video    # greedy return, and a film
"""

import contextlib
import copy
import fcntl
import io
import json
import math
import os
import pkgutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.distributions import Independent, Normal, OneHotCategorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ------ settings
@dataclass
class Args:
    script: ClassVar[str] = Path(__file__).stem
    scenario: Literal["spread", "line", "formation"] = "spread"  # task of the particle worlds
    num_agents: Literal[2, 3, 4, 5, 6, 7, 8, 9, 10] = 5  # in the world
    continuous: bool = False  # actions: forces, of a Gaussian policy, instead of five moves
    env_id: str = ""  # instead: a PettingZoo parallel environment, package.module:factory
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    threads: int = 1  # CPU threads of torch
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # folder to go on with
    # MAIPG
    nu: float = 0.4  # 0 is MAPPO
    critic: Literal["compatible", "paper"] | None = None  # None: paper if a mixer is named
    mu: Literal["expectation", "gumbel"] = "expectation"  # the discrete action in q_tot
    mixer: Literal["qmix", "vdn", "joint"] | None = None  # of the paper's critic; None: qmix
    q_scale: Literal["advantage", "raw"] = "advantage"  # paper's critic: as above, or 1
    td_lambda: float = 0.8  # paper's critic: of its targets
    target_tau: float = 0.05  # paper's critic: targets' step per epoch
    forgetting: float = 0.75  # compatible: weight of earlier rollouts
    ridge: float = 0.001  # compatible: regularisation per row
    # MAPPO
    num_envs: int = 128  # parallel games
    rollout_steps: int = 25  # steps per game between updates; an episode of the worlds has 25
    update_epochs: int = 10  # passes over a rollout
    critic_epochs: int | None = None  # passes of V; None: update_epochs
    num_minibatches: int = 1  # per epoch
    chunk_length: int = 25  # steps of backpropagation
    hidden_dim: int = 64  # units per layer
    learning_rate: float = 7e-4  # of Adam
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of the advantages
    clip_eps: float = 0.2  # PPO clip, of policy and value
    ent_coef: float = 0.01  # entropy bonus
    max_grad_norm: float = 10.0  # per network
    # evaluation and output
    eval_every: int = 80_000  # environment steps
    eval_episodes: int = 128  # greedy ones, at least
    checkpoint_every: int = 25  # updates
    runs_dir: str = "runs"  # of run folders
    track: bool = False  # log to Weights & Biases too

    def __post_init__(self):
        self.critic = self.critic or ("paper" if self.mixer else "compatible")


EVALUATION = {"eval/episodic_return": math.nan}


class UsageError(Exception):
    """The user can mend it: exit code 2, nothing written."""


class EnvError(Exception):
    """A PettingZoo environment breaks the rules in the middle of a run: exit code 1."""


def resolve(args):
    """Fill in the device. Raises UsageError."""
    for name, value in asdict(args).items():
        low = 1e-9 if name == "ridge" else int(type(value) is int and name not in ["nu", "seed"])
        high = 1 if name in "nu gamma gae_lambda td_lambda target_tau forgetting".split() else 1e9
        if type(value) in (int, float) and not low <= value <= high:
            raise UsageError(f"--{name} {value}: must lie in [{low}, {high:g}]")
    if args.critic == "compatible" and (args.mixer, args.q_scale) != (None, "advantage"):
        raise UsageError("--mixer, --q-scale: only with --critic paper")
    chunks = args.num_envs * args.rollout_steps // args.chunk_length
    if args.rollout_steps % args.chunk_length or chunks % args.num_minibatches:
        raise UsageError("--chunk-length must divide --rollout-steps, and minibatches the chunks")
    if args.continuous and args.mu == "gumbel":
        raise UsageError("--mu gumbel: a sample of discrete actions, not of --continuous ones")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    return args


# ------ networks
def orthogonal(layer, gain=1.0):
    """MAPPO's initialisation: orthogonal weights, zero biases."""
    for x in layer.parameters():
        nn.init.orthogonal_(x, gain) if x.dim() > 1 else nn.init.zeros_(x)
    return layer


class Recurrent(nn.Module):
    """MAPPO's network: LayerNorm, two (Linear, ReLU, LayerNorm), GRU, LayerNorm, Linear.
    The policy sees the agent's own obs; critic and utility see the state as well."""

    def __init__(self, obs_dim, dim, out_dim, out_gain, state_dim=0):
        super().__init__()
        # With a state, two halves make up one layer.
        gain = math.sqrt(1 if state_dim else 2)
        self.obs_in = nn.Sequential(nn.LayerNorm(obs_dim), nn.Linear(obs_dim, dim))
        orthogonal(self.obs_in[1], gain)
        if state_dim:
            self.state_in = nn.Sequential(nn.LayerNorm(state_dim), nn.Linear(state_dim, dim))
            orthogonal(self.state_in[1], gain)
        layer = orthogonal(nn.Linear(dim, dim), math.sqrt(2))
        self.body = nn.Sequential(nn.ReLU(), nn.LayerNorm(dim), layer, nn.ReLU(), nn.LayerNorm(dim))
        self.gru = orthogonal(nn.GRUCell(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.head = orthogonal(nn.Linear(dim, out_dim), out_gain)

    def forward(self, obs, hidden, keep, state=None):
        """obs [L, B, n, O], hidden [B, n, H], keep [L, B] (0: an episode begins), state [L, B, S]
        -> output [L, B, n, out], hidden state after each step [L, B, n, H]."""
        x = self.obs_in(obs)
        if state is not None:
            x = x + self.state_in(state).unsqueeze(-2)
        x, hidden, hiddens = self.body(x), hidden.flatten(0, 1), []
        for x_t, keep_t in zip(x.flatten(1, 2), keep.repeat_interleave(x.shape[2], 1)):
            hidden = self.gru(x_t, hidden * keep_t.unsqueeze(-1))
            hiddens.append(hidden)
        hiddens = torch.stack(hiddens).view_as(x)
        return self.head(self.norm(hiddens)), hiddens


class StateCritic(Recurrent):
    """V(s) of the state alone, which holds all observations: one row a game, as n = 1."""

    def forward(self, obs, hidden, keep, state):
        """hidden [B, 1, H], state [L, B, S] -> V [L, B, 1, 1], hidden states [L, B, 1, H]."""
        return super().forward(state.unsqueeze(-2), hidden, keep)


class Mixer(nn.Module):
    """q_tot from the utilities of the chosen actions, by QMIX or VDN, plus a state value.
    Monotonic, dq_tot/dQ_i >= 0: each agent's best action is part of the team's best."""

    def __init__(self, kind, num_agents, state_dim, dim):
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(state_dim)
        self.value = hypernetwork(state_dim, dim, 1)
        if kind == "qmix":
            self.w_1 = hypernetwork(state_dim, dim, num_agents * dim)
            self.b_1 = nn.Linear(state_dim, dim)
            self.w_2 = hypernetwork(state_dim, dim, dim)

    def weights(self, state):
        """What q_tot takes from the state [..., S], once for all actions."""
        s = self.norm(state)
        value = self.value(s).squeeze(-1)
        if self.kind == "vdn":
            return [value]
        return [value, self.w_1(s).abs(), self.b_1(s), self.w_2(s).abs()]

    def forward(self, utilities, actions, weights):
        """utilities, actions (or probabilities) [..., n, A] -> q_tot [...]."""
        chosen = (utilities * actions).sum(-1)
        if self.kind == "vdn":
            return chosen.sum(-1) + weights[0]
        value, w_1, b_1, w_2 = weights
        mixed = chosen.unsqueeze(-2) @ w_1.unflatten(-1, (chosen.shape[-1], -1))
        return (F.elu(mixed.squeeze(-2) + b_1) * w_2).sum(-1) + value


def hypernetwork(state_dim, dim, out_dim):
    return nn.Sequential(nn.Linear(state_dim, dim), nn.ReLU(), nn.Linear(dim, out_dim))


class JointMixer(nn.Module):
    """Q(s, a_1, ..., a_n), unfactorised, with which Fig. 2 compares."""

    def __init__(self, num_agents, num_actions, state_dim, dim):
        super().__init__()
        self.norm = nn.LayerNorm(state_dim)
        inputs = hypernetwork(state_dim + num_agents * (num_actions + 1), dim, dim)
        self.q = nn.Sequential(inputs, nn.ReLU(), nn.Linear(dim, 1))

    def weights(self, state):
        return [self.norm(state)]

    def forward(self, utilities, actions, weights):
        """utilities, actions [..., n, A] -> q_tot [...]."""
        inputs = [*weights, actions.flatten(-2), (utilities * actions).sum(-1)]
        return self.q(torch.cat(inputs, -1)).squeeze(-1)


class ContinuousMixer(nn.Module):
    """A mixer of continuous actions: Q_i(s, a_i) = <utility_i(s) [H], embedding(a_i) [H]>."""

    def __init__(self, mixer, num_actions, dim):
        super().__init__()
        self.mixer = mixer
        self.embed = nn.Sequential(nn.Linear(num_actions, dim), nn.ELU(), nn.Linear(dim, dim))

    def weights(self, state):
        return self.mixer.weights(state)

    def forward(self, utilities, actions, weights):
        """utilities [..., n, H], actions [..., n, A] -> q_tot [...]."""
        # Beyond the bounds the environment clips them.
        return self.mixer(utilities, self.embed(actions.clamp(-1, 1)), weights)


class CompatibleCritic(nn.Module):
    """q_tot = w . x with x = sum_i h_i ⊗ (onehot(a_i) - pi_i), h_i the policy's features and 1.

    x is the gradient of log pi in the policy's head: by Proposition 5, the w that minimises
    E[(A - w . x)^2] gives the head its true gradient. Old rollouts fade. Utilities are w^T h_i.

        G <- rho G + sum x x^T + ridge * rows * I,   b <- rho b + sum A x,   w = G^-1 b
    """

    def __init__(self, num_features, num_actions, forgetting, ridge):
        super().__init__()
        self.forgetting, self.ridge, size = forgetting, ridge, num_features * num_actions
        self.register_buffer("gram", torch.zeros(size, size))
        self.register_buffer("moment", torch.zeros(size))
        self.register_buffer("weights", torch.zeros(num_features, num_actions))

    def fit(self, features, scores, advantages):
        """features h [T, N, n, F], scores onehot(a) - pi [T, N, n, A], advantages [T, N]."""
        x = (features.mT @ scores).flatten(2).flatten(0, 1)
        self.gram.mul_(self.forgetting).addmm_(x.T, x)
        self.gram.diagonal().add_(self.ridge * len(x))
        self.moment.mul_(self.forgetting).add_(x.T @ advantages.flatten())
        self.weights.view(-1).copy_(torch.linalg.solve(self.gram.double(), self.moment.double()))


class ValueNorm(nn.Module):
    """MAPPO's ValueNorm: running, debiased mean and deviation of value targets."""

    def __init__(self, beta=0.99999):
        super().__init__()
        self.beta = beta
        # Of x, x^2, and 1 to debias.
        self.register_buffer("moments", torch.zeros(3))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(0.1))

    def update(self, x):
        new = torch.stack([x.mean(), (x * x).mean(), x.new_ones(())])
        self.moments.lerp_(new, 1 - self.beta)
        mean, square = self.moments[:2] / self.moments[2]
        self.mean.copy_(mean)
        self.std.copy_((square - mean * mean).clamp(min=0.01).sqrt())


class Agent(nn.Module):
    """Policy and critic come first, so that every nu starts from the same."""

    def __init__(self, now, args):
        super().__init__()
        (n, A), dim = now["avail"].shape[1:], args.hidden_dim
        obs_dim, state_dim = now["obs"].shape[-1], now["state"].shape[-1]
        self.policy = Recurrent(obs_dim, dim, A, 0.01)
        if args.continuous:
            # MAPPO's begins at 0, and its mean has no tanh.
            self.policy.log_std = nn.Parameter(torch.full((A,), -0.5))
        self.critic = StateCritic(state_dim, dim, 1, 1.0)
        self.v_norm = ValueNorm()
        self.second = args.critic if args.nu > 0 else "none"
        if self.second == "paper":
            # A utility starts indifferent between actions.
            width = dim if args.continuous else A
            utility = Recurrent(obs_dim, dim, width, 0.01, state_dim)
            mixer = Mixer(args.mixer or "qmix", n, state_dim, dim)
            if args.mixer == "joint":
                mixer = JointMixer(n, width, state_dim, dim)
            if args.continuous:
                mixer = ContinuousMixer(mixer, A, dim)
            self.q = nn.ModuleDict({"utility": utility, "mixer": mixer})
            self.target_q, self.q_norm = copy.deepcopy(self.q), ValueNorm()
        if self.second == "compatible":
            self.compatible = CompatibleCritic(dim + 1, A, args.forgetting, args.ridge)


# ------ estimators and losses
def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_log_softmax(logits, avail):
    """log pi [..., A]; as in MAPPO, unavailable actions have the logit -1e10."""
    return torch.log_softmax(logits.masked_fill(~avail, -1e10), -1)


def gumbel_max(log_pi, rng):
    """log pi plus Gumbel noise, [..., A]; its argmax is a sample of pi."""
    return log_pi - torch.empty_like(log_pi).exponential_(generator=rng).log()


def distribution(policy, out, avail):
    """pi [..., n] from the policy's output [..., n, A]: of one-hot actions, or a Gaussian."""
    if hasattr(policy, "log_std"):
        # Who has left has no mean to learn.
        pi = Normal(out.tanh() * avail, policy.log_std.exp(), validate_args=False)
        return Independent(pi, 1)
    return OneHotCategorical(logits=masked_log_softmax(out, avail), validate_args=False)


def sample(pi, rng):
    """Actions of pi, [..., A]."""
    if isinstance(pi, OneHotCategorical):
        return F.one_hot(gumbel_max(pi.logits, rng).argmax(-1), pi.logits.shape[-1]).float()
    return pi.mean + pi.stddev * torch.empty_like(pi.mean).normal_(generator=rng)


def backward_sum(delta, decay):
    """x_t = delta_t + decay_t * x_{t+1} along the first axis, with x_T = 0."""
    out, x = torch.empty_like(delta), 0.0
    for t in reversed(range(len(delta))):
        out[t] = x = delta[t] + decay[t] * x
    return out


def gae(rewards, values, done, gamma, lam):
    """Generalised advantage estimation [T, N, n], A-hat of Eq. (10): rewards, done [T, N]; values
    [T + 1, N, n] in the reward's unit. The time limit is an end like others, as in MAPPO."""
    goes_on = (~done).float().unsqueeze(-1)
    delta = rewards.unsqueeze(-1) + gamma * goes_on * values[1:] - values[:-1]
    return backward_sum(delta, gamma * lam * goes_on)


def td_lambda(rewards, next_q, done, gamma, lam):
    """TD(lambda) targets of q_tot, all [T, N]; next_q_t = target_q_tot(s_{t+1}, argmax pi).

    G_t = r_t + gamma ((1 - lambda) next_q_t + lambda G_{t+1}); r_t at the end of an episode.
    """
    decay = gamma * (~done).float()
    trace = torch.full_like(decay, lam)
    trace[-1] = 0.0  # the rollout ends
    return backward_sum(rewards + decay * (1 - trace) * next_q, decay * trace)


def stochastic_pg_loss(log_ratio, advantages, alive, clip_eps):
    """PPO's clipped loss, Eq. (3): minus the mean over live agents. All [L, B, n]."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), alive)


def gumbel_softmax(log_pi, rng):
    """Straight-through sample [..., A]: one-hot forward, softmax's gradient backward."""
    soft = torch.softmax(gumbel_max(log_pi, rng), -1)
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft


def deterministic_pg_loss(q_tot, q_scale):
    """Second term of Eq. (10): minus the mean over steps of q_tot(s, mu(s)) [L, B]; q_scale makes
    its unit that of A. The caller detaches utilities and mixer: only mu has a gradient."""
    return -q_tot.mean() * q_scale


def interpolate(stochastic, deterministic, nu):
    """Eq. (10)."""
    return (1 - nu) * stochastic + nu * deterministic


def value_loss(values, targets, old_values, clip_eps):
    """MAPPO's Huber loss: the worse of V and V clipped around its old value."""
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    losses = [F.huber_loss(v, targets, reduction="none", delta=10.0) for v in (values, clipped)]
    return torch.max(*losses).mean()


# ------ rollout and targets
def begin(envs, seed, args):
    """New games: what is seen now, and each network's hidden state."""
    obs, state, avail = envs.reset(seed)
    zeros = obs.new_zeros(args.num_envs)
    now = {"obs": obs, "state": state, "avail": avail, "keep": zeros, "return": zeros}
    for name in ["policy", "critic", "utility", "target"]:
        now[f"{name}_hidden"] = obs.new_zeros(*obs.shape[:2], args.hidden_dim)
    now["critic_hidden"] = now["critic_hidden"][:, :1]  # see StateCritic
    return now


@torch.no_grad()
def rollout(policy, envs, buffer, now, steps, rng=None):
    """Play T steps into the buffer, {name: [T + 1, N, ...]}; without rng greedily, no row T.

    Of each state: obs [n, O], state [S], avail [n, A], keep (0: an episode begins), policy_hidden
    [n, H] before the step, mean and mode of pi [n, A]. Of each step (none in row T): actions
    [n, A], log_probs [n]; reward, done (the time limit), return (of the episode so far).
    """
    for t in range(steps + 1 if rng else steps):
        out, hidden = policy(now["obs"][None], now["policy_hidden"], now["keep"][None])
        row = {key: now[key] for key in ("obs", "state", "avail", "keep", "policy_hidden")}
        pi = distribution(policy, out[0], now["avail"])
        row["mean"], row["mode"] = pi.mean, pi.mode
        if t < steps:
            actions = row["actions"] = sample(pi, rng) if rng else pi.mode
            row["log_probs"] = pi.log_prob(actions)
            obs, state, avail, row["reward"], row["done"] = envs.step(actions)
            row["return"] = now["return"] = now["return"] * now["keep"] + row["reward"]
            now.update(obs=obs, state=state, avail=avail, keep=1.0 - row["done"].float())
            now["policy_hidden"] = hidden[0]
        for key, value in row.items():
            if key not in buffer:
                buffer[key] = value.new_zeros(steps + 1, *value.shape)
            buffer[key][t] = value


def unroll(network, name, buffer, now):
    """A critic over a rollout in one pass: outputs [T + 1, N, n, out], and hidden states before
    each step [T, N, n, H]. `now` takes over that before row T, which is the next row 0."""
    out, after = network(buffer["obs"], now[name], buffer["keep"], buffer["state"])
    before = torch.cat([now[name][None], after[:-2]])
    now[name] = after[-2].clone()
    return out, before


@torch.no_grad()
def estimate(agent, buffer, now, args):
    """Advantages and targets of a rollout, before anything is trained on it: the batch in chunks
    [L, B, ...], with the hidden states [1, B, n, H] that they begin with; and metrics."""
    batch = {key: x[:-1] for key, x in buffer.items()}
    reward, done, pi = batch["reward"], batch["done"], batch["mean"]
    # Who has left has only action 0, or, of continuous ones, none.
    alive = batch["alive"] = (batch["avail"].sum(-1) > 1 - args.continuous).float()

    # V: GAE, normalised over the live agents.
    values, batch["critic_hidden"] = unroll(agent.critic, "critic_hidden", buffer, now)
    batch["values"] = values[:-1].squeeze(-1)
    values = values.squeeze(-1) * agent.v_norm.std + agent.v_norm.mean
    advantages = gae(reward, values, done, args.gamma, args.gae_lambda)
    batch["returns"] = advantages + values[:-1]
    mean = masked_mean(advantages, alive)
    sigma_a = masked_mean((advantages - mean) ** 2, alive).sqrt()
    batch["advantages"] = (advantages - mean) / (sigma_a + 1e-5)
    team = (batch["advantages"] * alive).sum(-1) / alive.sum(-1).clamp(min=1)

    # Q of Algorithm 1: TD(lambda) targets at argmax pi, which Section 2.1 calls mu.
    if agent.second == "paper":
        utilities, _ = unroll(agent.target_q.utility, "target_hidden", buffer, now)
        weights = agent.target_q.mixer.weights(buffer["state"])
        next_q = agent.target_q.mixer(utilities, buffer["mode"], weights)[1:]
        next_q = next_q * agent.q_norm.std + agent.q_norm.mean
        batch["q_targets"] = td_lambda(reward, next_q, done, args.gamma, args.td_lambda)

        mixer, weights = agent.q.mixer, agent.q.mixer.weights(batch["state"])
        utilities, batch["utility_hidden"] = unroll(agent.q.utility, "utility_hidden", buffer, now)
        q = mixer(utilities[:-1], batch["actions"], weights) - mixer(utilities[:-1], pi, weights)
        q = q * agent.q_norm.std / (sigma_a + 1e-5)

    # Q of Proposition 5: least squares on the policy's last features, and 1.
    if agent.second == "compatible":
        features = F.pad(agent.policy.norm(buffer["policy_hidden"][1:]), (0, 1), value=1)
        scores = (batch["actions"] - pi) * alive.unsqueeze(-1)
        q = (features @ agent.compatible.weights * scores).sum((-2, -1))
        agent.compatible.fit(features, scores, team)
        batch["utilities"] = features @ agent.compatible.weights * alive.unsqueeze(-1)

    # How well q_tot(s, a) - q_tot(s, pi), fitted earlier, predicts A; the ideal slope is 1.
    metrics = {"diagnostics/sigma_a": sigma_a}
    if agent.second != "none":
        cov = torch.cov(torch.stack([team.flatten(), q.flatten()]))
        metrics["variance/slope"] = cov[0, 1] / cov[1, 1].clamp(min=1e-9)
        metrics["variance/corr"] = cov[0, 1] / (cov[0, 0] * cov[1, 1]).sqrt().clamp(min=1e-9)

    # [T, N, ...] -> [L, B, ...]; all agents of a game stay together.
    for key, x in batch.items():
        x = x.unflatten(0, (-1, args.chunk_length)).transpose(0, 1).flatten(1, 2)
        batch[key] = x[:1] if key.endswith("_hidden") else x
    return batch, metrics


# ------ update
def policy_losses(agent, batch, sigma_a, rng, args):
    """({network: loss} of policy and q, metrics) of chunks [L, B, ...]. Updates q_norm."""
    obs, state, keep = batch["obs"], batch["state"], batch["keep"]
    actions, alive, losses = batch["actions"], batch["alive"], {}

    # First gradient: PPO.
    out, _ = agent.policy(obs, batch["policy_hidden"][0], keep)
    pi = distribution(agent.policy, out, batch["avail"])
    log_ratio = pi.log_prob(actions) - batch["log_probs"]
    policy_loss = stochastic_pg_loss(log_ratio, batch["advantages"], alive, args.clip_eps)

    # Second gradient: q_tot at mu, per live agent and in A's unit, like the first.
    mu, q_scale = pi.mean, 1 / alive.sum(-1).mean()
    if args.mu == "gumbel" and args.nu > 0:
        mu = gumbel_softmax(pi.logits, rng)
    if agent.second == "compatible":
        q_tot = (batch["utilities"] * mu).sum((-2, -1))
    if agent.second == "paper":
        utilities, _ = agent.q.utility(obs, batch["utility_hidden"][0], keep, state)
        weights = agent.q.mixer.weights(state)
        q_taken = agent.q.mixer(utilities, actions, weights)
        agent.q_norm.update(batch["q_targets"])
        targets = (batch["q_targets"] - agent.q_norm.mean) / agent.q_norm.std
        losses["q"] = F.huber_loss(q_taken, targets, delta=10.0)
        agent.q.requires_grad_(False)
        q_tot = agent.q.mixer(utilities.detach(), mu, [w.detach() for w in weights])
        agent.q.requires_grad_(True)
        q_tot = q_tot * agent.q_norm.std
        q_scale = 1 if args.q_scale == "raw" else q_scale / (sigma_a + 1e-5)
    if args.nu > 0:
        policy_loss = interpolate(policy_loss, deterministic_pg_loss(q_tot, q_scale), args.nu)

    # Entropy bonus, and how far the policy has moved.
    entropy = masked_mean(pi.entropy(), alive)
    losses["policy"] = policy_loss - args.ent_coef * entropy
    log_ratio = log_ratio.detach()
    clipped = ((log_ratio.exp() - 1).abs() > args.clip_eps).float()
    return losses, {
        "losses/entropy": entropy.detach(),
        "diagnostics/approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, alive),
        "diagnostics/clip_fraction": masked_mean(clipped, alive),
    }


def critic_loss(agent, batch, args):
    """Loss of V. It counts the dead too, as in MAPPO's SMAC scripts. Updates v_norm."""
    values, _ = agent.critic(batch["obs"], batch["critic_hidden"][0], batch["keep"], batch["state"])
    agent.v_norm.update(batch["returns"])
    targets = (batch["returns"] - agent.v_norm.mean) / agent.v_norm.std
    return value_loss(values.squeeze(-1), targets, batch["values"], args.clip_eps)


def update(agent, optimizer, batch, sigma_a, rngs, args):
    """Passes over the batch; metrics, averaged over them."""
    chunks, history = batch["obs"].shape[1], {}
    critic_epochs = args.critic_epochs or args.update_epochs
    for epoch in range(max(args.update_epochs, critic_epochs)):
        order = torch.randperm(chunks, generator=rngs["shuffle"], device=args.device)
        for index in order.split(chunks // args.num_minibatches):
            part, losses, metrics = batch, {}, {}
            if args.num_minibatches > 1:
                part = {key: x[:, index] for key, x in batch.items()}
            if epoch < args.update_epochs:
                losses, metrics = policy_losses(agent, part, sigma_a, rngs["gumbel"], args)
            if epoch < critic_epochs:
                losses["critic"] = critic_loss(agent, part, args)
            metrics |= descend(agent, optimizer, losses, args)
            for key, value in metrics.items():
                history.setdefault(key, []).append(value)
        if agent.second == "paper" and epoch < args.update_epochs:
            for target, new in zip(agent.target_q.parameters(), agent.q.parameters()):
                target.data.lerp_(new.data, args.target_tau)
    return {key: torch.stack(values).mean() for key, values in history.items()}


def descend(agent, optimizer, losses, args):
    """A step of Adam on {network: loss}; metrics. Stops at NaN, before the step."""
    optimizer.zero_grad()
    sum(losses.values()).backward()
    metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
    for name in losses:
        norm = nn.utils.clip_grad_norm_(getattr(agent, name).parameters(), args.max_grad_norm)
        metrics[f"diagnostics/{name}_grad_norm"] = norm
    if not torch.stack(list(metrics.values())).isfinite().all():
        raise FloatingPointError(f"not finite: {metrics}")
    optimizer.step()
    return metrics


# ------ training
def train(args, envs, stopped=(), agent_class=Agent, update=update):
    """Train until total_timesteps, or a signal in `stopped`."""
    saved = load_checkpoint(args.resume, type(args)) if args.resume else {}
    progress = saved.get("progress", {"step": 0, "csv_size": 0})
    torch.manual_seed(args.seed)
    # Unless stored, games have new episodes.
    now, buffer, rngs = begin(envs, args.seed + progress["step"], args), {}, {}
    agent = agent_class(now, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    # Runs of any nu explore alike. The worlds draw from the seed itself.
    for k, name in enumerate(["explore", "gumbel", "shuffle"], 1):
        rngs[name] = torch.Generator(args.device).manual_seed(args.seed + 10**9 * k)

    if args.resume:
        folder = Path(args.resume)
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        for name, rng in rngs.items():
            rng.set_state(saved["rngs"][name])
        if progress["step"] >= args.total_timesteps:
            print("done, until --total-timesteps is raised")
        if not args.env_id:
            envs.load_state_dict(saved["games"])
            now = {key: x.to(args.device) for key, x in saved["now"].items()}
    else:
        second = {"none": "", "paper": f"__{args.mixer or 'qmix'}", "compatible": "__compatible"}
        task = args.env_id.replace(":", "-") or f"{args.scenario}-{args.num_agents}"
        name = f"{task}__{args.script}__nu{args.nu:g}{second[agent.second]}"
        folder = Path(args.runs_dir, f"{name}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
        folder.mkdir(parents=True)
    log = Log(folder, args, progress["step"], progress["csv_size"])

    def save():
        progress["csv_size"] = log.csv.tell()
        parts = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        parts["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        parts["games"] = None if args.env_id else envs.state_dict()
        write_checkpoint(folder, args, parts | {"now": now, "progress": progress})

    def report(step, metrics):
        try:
            if step >= args.total_timesteps or step % args.eval_every < batch_steps:
                log.bar.set_postfix_str("evaluating")
                seed = 10**9 + args.seed + step
                with contextlib.closing(copy.copy(envs)) as games:
                    metrics |= {} if stopped else evaluate(agent.policy, games, seed, args, stopped)
        finally:
            log.write(step, metrics)

    batch_steps = args.num_envs * args.rollout_steps
    with log.writer, log.bar:
        try:
            while progress["step"] < args.total_timesteps and not stopped:
                start = time.perf_counter()
                rollout(agent.policy, envs, buffer, now, args.rollout_steps, rngs["explore"])
                batch, metrics = estimate(agent, buffer, now, args)
                sigma_a = metrics["diagnostics/sigma_a"]
                metrics |= update(agent, optimizer, batch, sigma_a, rngs, args)
                metrics["charts/episodic_return"] = buffer["return"][buffer["done"]].mean()
                metrics = {key: x.item() for key, x in metrics.items()} | EVALUATION
                metrics["charts/SPS"] = batch_steps / (time.perf_counter() - start)
                progress["step"] += batch_steps
                report(progress["step"], metrics)
                if progress["step"] // batch_steps % args.checkpoint_every == 0:
                    save()
        finally:
            # Whatever else ends a run: save.
            if not isinstance(sys.exception(), FloatingPointError | SystemExit):
                save()
    if stopped:
        print(f"stopped at step {progress['step']:,}; --resume {folder} goes on")


# ------ evaluation
def evaluate(policy, envs, seed, args, stopped=()):
    """Mean return of greedy episodes. All games play as many: those that end first are
    short."""
    now, share = begin(envs, seed, args), math.ceil(args.eval_episodes / args.num_envs)
    played, buffer, returns = now["keep"], {}, []
    while (played < share).any() and not stopped:
        rollout(policy, envs, buffer, now, 1)
        number = played + buffer["done"].cumsum(0)
        returns += buffer["return"][buffer["done"] & (number <= share)].tolist()
        played = number[-1]
    return {} if stopped else dict(zip(EVALUATION, [np.mean(returns)]))


# ------ log and checkpoint
class Log:
    """TensorBoard, progress.csv, a progress bar (elsewhere a line per 30 s)."""

    def __init__(self, folder, args, step, csv_size):
        self.csv = open(folder / "progress.csv", "a", buffering=1)
        try:
            fcntl.flock(self.csv, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is in use") from None
        # Later rows will come again.
        self.csv.seek(self.csv.truncate(min(csv_size, self.csv.tell())))
        text = json.dumps(asdict(args), indent=2)
        (folder / "args.json").write_text(text)
        if args.track:
            import wandb

            config = {"config": asdict(args), "resume": "allow", "sync_tensorboard": True}
            wandb.init(project="maipg", id=folder.name, **config)
        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        self.writer.add_text("hyper-parameters", f"```\n{text}\n```")
        print(f"on {args.device}: run folder {folder}", flush=True)
        often, end = (0.1, "") if sys.stderr.isatty() else (30, "\n")
        style = {"miniters": 1, "mininterval": often, "bar_format": "{l_bar}{bar:9}{r_bar}" + end}
        self.bar = tqdm(total=args.total_timesteps, initial=step, **style)

    def write(self, step, metrics):
        """One row of scalars."""
        if not self.csv.tell():
            self.csv.write(",".join(["global_step", *metrics]) + "\n")
        self.csv.write(",".join(map(str, [step, *metrics.values()])) + "\n")
        for key, value in metrics.items():
            if not math.isnan(value):
                self.writer.add_scalar(key, value, step)
        text = "return {charts/episodic_return:.2f}"
        self.bar.set_postfix_str(text.format_map(metrics), refresh=False)
        self.bar.update(step - self.bar.n)


def write_checkpoint(folder, args, parts):
    """Replace checkpoint.pt: a crash or a full disk leaves the old one."""
    content = io.BytesIO()
    torch.save(parts | {"script": args.script, "args": asdict(args)}, content)
    (folder / "checkpoint.tmp").write_bytes(content.getbuffer())
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")


def load_checkpoint(folder, args_class=Args):
    """A run folder's checkpoint. UsageError if it is missing, damaged or foreign."""
    path = Path(folder, "checkpoint.pt")
    try:
        # torch reads no checksums.
        damaged = zipfile.ZipFile(path).testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or checkpoint["script"] != args_class.script:
            raise ValueError("damaged, or of another script")
        args_class(**checkpoint["args"])
        return checkpoint
    except Exception as error:
        raise UsageError(f"{path} is no checkpoint of {args_class.script}: {error!r:.99}") from None


# ------ environments
# N games; tensors on the training device:
#     obs, state, avail = envs.reset(seed)  # new games: [N, n, O], [N, S], bool [N, n, A]
#     obs, state, avail, reward, done = envs.step(actions)  # [N, n, A]; the last two [N]
# After an episode the next one has begun. obs ends with the agent's index; the reward is the mean
# over agents. A copy of envs, once reset, has its own games.
RADIUS = {"spread": 0.15, "line": 0.03, "formation": 0.05}  # of an agent


def assigned_distances(distances, limit):
    """Sum over agents [N] of min(distance, limit) in the assignment of least total distance, found
    as mpe2 does. distances [N, n, n], agent by target."""
    best = [linear_sum_assignment(x)[1] for x in distances.cpu().numpy()]
    targets = torch.tensor(np.array(best), device=distances.device).unsqueeze(-1)
    return distances.take_along_dim(targets, 2).clamp(max=limit).sum((1, 2))


class ParticleEnvs:
    """mpe2 1.1.1's simple_spread_v3, simple_line_v1 and simple_formation_v1, step for step: N
    worlds in one batch of tensors. They begin and end their episodes together.

    Actions are one-hot (stay, left, right, down, up), or forces, A = 2, clipped to [-1, 1].
    """

    length, dt, contact_margin = 25, 0.1, 1e-3

    def __init__(self, args):
        self.args, self.task, self.n = args, args.scenario, args.num_agents
        self.num_landmarks = {"spread": self.n, "line": 2, "formation": 1}[self.task]
        self.index = torch.eye(self.n, device=args.device)
        self.others = (1 - self.index).nonzero()[:, 1].view(self.n, -1)
        self.moves = torch.tensor([[0.0, 0.0], [-1, 0], [1, 0], [0, -1], [0, 1]]).to(args.device)
        self.avail = self.index.new_ones(args.num_envs, self.n, 2 if args.continuous else 5).bool()

    def reset(self, seed):
        self.rng = torch.Generator(self.args.device).manual_seed(seed)
        return self._begin()

    def _uniform(self, half, *shape):
        x = self.index.new_empty(self.args.num_envs, *shape)
        return x.uniform_(-half, half, generator=self.rng)

    def _begin(self):
        """New episodes: agents at rest anywhere in the square, landmarks as the task has it."""
        self.steps, self.pos = 0, self._uniform(1.0, self.n, 2)
        self.vel = torch.zeros_like(self.pos)
        half = {"spread": 1.0, "line": 0.25, "formation": 0.5}[self.task]
        self.landmarks = self._uniform(half, self.num_landmarks, 2)
        if self.task == "line":
            # The second, 1.25 from the first, is turned by 5 degrees until it is in the square.
            turns = torch.arange(72, device=self.args.device) * math.radians(5)
            angle = self._uniform(math.pi, 1) + math.pi + turns
            ends = torch.stack([angle.cos(), angle.sin()], -1) * 1.25 + self.landmarks[:, :1]
            first = (ends.abs() < 1).all(-1).float().argmax(-1)
            self.landmarks[:, 1] = ends[torch.arange(len(ends)), first]
        return self._look()

    def _look(self):
        """obs, state, avail: velocity and position, then what is seen relative to the agent."""
        pos = self.pos.unsqueeze(2)
        seen = [self.vel, self.pos, (self.landmarks.unsqueeze(1) - pos).flatten(2)]
        if self.task == "spread":
            others = (self.pos[:, self.others] - pos).flatten(2)
            # mpe2's agents have voices, and are silent.
            seen += [others, torch.zeros_like(others)]
        obs = torch.cat(seen, -1)
        # MPE has no state of its own: MAPPO concatenates what all agents observe.
        index = self.index.expand(len(obs), -1, -1)
        return torch.cat([obs, index], -1), obs.flatten(1), self.avail

    def step(self, actions):
        force = actions.clamp(-1, 1) if self.args.continuous else actions @ self.moves
        # Softly rigid discs: a contact force that grows with the penetration; none on oneself.
        apart = self.pos.unsqueeze(2) - self.pos.unsqueeze(1)
        gap, touch = apart.norm(dim=-1), 2 * RADIUS[self.task]
        depth = F.softplus((touch - gap) / self.contact_margin) * self.contact_margin
        push = (100.0 * depth / (gap + self.index)).unsqueeze(-1) * apart
        # As in mpe2, the old velocity moves the agents; forces change the next one.
        self.pos = self.pos + self.vel * self.dt
        self.vel = 0.75 * self.vel + (5.0 * force + push.sum(2)) * self.dt
        self.steps += 1
        reward, over = self._reward(), self.steps == self.length
        done = torch.full_like(reward, over, dtype=torch.bool)
        return *(self._begin() if over else self._look()), reward, done

    def _reward(self):
        """mpe2's reward, averaged over the agents, [N]."""
        pos = self.pos.unsqueeze(2)
        order = torch.arange(self.n, device=pos.device)
        if self.task == "spread":
            # Half for covering the landmarks, half for not colliding.
            covering = (pos - self.landmarks.unsqueeze(1)).norm(dim=-1).amin(1).sum(-1)
            gap = (pos - self.pos.unsqueeze(1)).norm(dim=-1)
            touching = (gap < 2 * RADIUS["spread"]).sum((1, 2)) - self.n
            return -0.5 * covering - 0.5 * touching / self.n
        if self.task == "line":
            # Evenly spaced from landmark to landmark.
            first, second = self.landmarks.unsqueeze(2).unbind(1)
            targets = first + (second - first) * (order.unsqueeze(-1) / (self.n - 1))
        else:
            # Evenly around the landmark, from the smallest angle at which an agent stands.
            x, y = (self.pos - self.landmarks).unbind(-1)
            first = torch.atan2(y, x).remainder(2 * math.pi).amin(1, keepdim=True)
            angle = first + order * (2 * math.pi / self.n)
            targets = torch.stack([angle.cos(), angle.sin()], -1) * 0.5 + self.landmarks
        distances = (pos - targets.unsqueeze(1)).norm(dim=-1)
        return -assigned_distances(distances, 2.0) / self.n

    def state_dict(self):
        return [self.pos, self.vel, self.landmarks, self.steps, self.rng.get_state()]

    def load_state_dict(self, saved):
        *worlds, self.steps, rng = saved
        self.pos, self.vel, self.landmarks = (x.to(self.args.device) for x in worlds)
        self.rng.set_state(rng)

    def close(self):
        """There is nothing to close."""


class PettingZooEnvs:
    """N copies of a cooperative PettingZoo parallel environment, stepped one after the other. Who
    has left an episode sees nothing, and has only action 0. Continuous actions are mapped from
    [-1, 1] to the bounds of their space. What the environment raises is not caught."""

    fault = UsageError

    def __init__(self, args):
        from gymnasium import spaces
        from pettingzoo import AECEnv, ParallelEnv

        self.args, self.spaces, self.games = args, spaces, []
        try:
            self.make = pkgutil.resolve_name(args.env_id)
        except (AttributeError, ImportError, ValueError) as error:
            raise UsageError(f"--env-id {args.env_id}: {error}") from None
        self.require(callable(self.make), "no function; package.module:function is meant")
        env = self.make()
        self.require(isinstance(env, ParallelEnv), "makes no PettingZoo parallel environment")
        self.agents = env.possible_agents
        pairs = [(env.observation_space(a), env.action_space(a)) for a in self.agents]
        self.require(all(x == pairs[0] for x in pairs), "the spaces of its agents differ")
        self.seen, self.action = pairs[0]
        if isinstance(self.seen, spaces.Dict):
            self.seen = self.seen.get("observation")
        fits = isinstance(self.seen, (spaces.Box, spaces.Discrete))
        self.require(fits, f"observations {pairs[0][0]}: Box, Discrete, or one with action_mask")
        bounded = isinstance(self.action, spaces.Box) and self.action.is_bounded()
        fits = bounded if args.continuous else isinstance(self.action, spaces.Discrete)
        self.require(fits, f"actions {self.action}: Discrete, or --continuous and a bounded Box")
        # These two only raise.
        self.has_state = type(env.unwrapped).state not in [AECEnv.state, ParallelEnv.state]
        # What who has left sees and can do.
        index = np.eye(len(self.agents), dtype=np.float32)
        self.obs = np.pad(index, ((0, 0), (spaces.flatdim(self.seen), 0)))
        self.avail = np.full((len(index), spaces.flatdim(self.action)), False)
        self.avail[:, 0] = not args.continuous
        env.close()

    def require(self, holds, text):
        if not holds:
            raise self.fault(f"--env-id {self.args.env_id}: {text}")

    def reset(self, seed):
        self.games = [self.make() for _ in range(self.args.num_envs)]
        seen = [game.reset(seed=seed + 1000 * k)[0] for k, game in enumerate(self.games)]
        return self._tensors(map(self._look, self.games, seen))

    def step(self, actions):
        # Broken rules are bad input at the start, later they end a run.
        self.fault, rows = EnvError, []
        actions = actions.cpu().numpy()
        if self.args.continuous:
            low, high = self.action.low.ravel(), self.action.high.ravel()
            actions = (low + (actions + 1) / 2 * (high - low)).clip(low, high)
        for game, row in zip(self.games, actions):
            chosen = zip(self.agents, (self.spaces.unflatten(self.action, x) for x in row))
            chosen = {agent: x for agent, x in chosen if agent in game.agents}
            seen, rewards, terminated, truncated, _ = game.step(chosen)
            done = not game.agents or all(terminated[a] or truncated[a] for a in terminated)
            if done:
                seen, _ = game.reset()
            reward = np.float32(sum(rewards.values()) / len(self.agents))
            rows.append((*self._look(game, seen), reward, done))
        return self._tensors(rows)

    def _look(self, game, seen):
        """obs [n, O], state [S], avail [n, A] of a game."""
        self.require(game.agents, "an episode has no agents")
        obs, avail, n = self.obs.copy(), self.avail.copy(), len(self.agents)
        for i, agent in enumerate(self.agents):
            if agent in game.agents:
                x, mask = seen.get(agent), True
                if isinstance(x, dict):
                    x, mask = x.get("observation"), x.get("action_mask")
                fits = np.shape(x) == self.seen.shape and np.shape(mask) in [(), avail[i].shape]
                self.require(fits, f"{agent}'s observation or mask has a wrong shape")
                obs[i, :-n], avail[i] = self.spaces.flatten(self.seen, x), mask
        state = np.float32(game.state()) if self.has_state else obs[:, :-n]
        return obs, state.ravel(), avail

    def _tensors(self, rows):
        """Rows of games as tensors, if they are sound."""
        obs, state, avail, *others = arrays = [np.stack(x) for x in zip(*rows)]
        for x in (obs, state, *others):
            self.require(np.isfinite(x).all(), "an observation, state or reward is not finite")
        self.require(self.args.continuous or avail.any(-1).all(), "a mask leaves no action")
        return [torch.as_tensor(x).to(self.args.device) for x in arrays]

    def close(self):
        for game in self.games:
            game.close()


# ------ main
def parse(argv, args_class=Args):
    """Args of a command line; --resume takes most of them from its folder."""
    args = tyro.cli(args_class, args=argv, description=__doc__)
    if args.resume:
        saved = args_class(**load_checkpoint(args.resume, args_class)["args"])
        # Code is imported at the user's word, never at a file's.
        if saved.env_id != args.env_id:
            raise UsageError(f"--resume: this run needs --env-id {saved.env_id!r} again")
        args = tyro.cli(args_class, args=argv, default=saved)
        for name in asdict(args).keys() - {"resume", "total_timesteps", "threads"}:
            if getattr(args, name) != getattr(saved, name):
                raise UsageError(f"--{name} cannot change when a run is resumed")
    return args


def main(argv=None, args_class=Args, resolve=resolve, train=train):
    """Run a command line; the exit code: 1 failed, 2 bad input, 128 + n signal n."""
    stopped = []

    def stop(signum, frame):
        if stopped:
            sys.exit(128 + signum)
        stopped.append(signum)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this update; again: at once\n")

    try:
        args = resolve(parse(argv, args_class))
        torch.set_num_threads(args.threads)
        for signum in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
            if signal.getsignal(signum) != signal.SIG_IGN:  # by nohup
                signal.signal(signum, stop)
        envs_class = PettingZooEnvs if args.env_id else ParticleEnvs
        with contextlib.closing(envs_class(args)) as envs:
            train(args, envs, stopped)
        return 128 + stopped[0] if stopped else 0
    except (UsageError, EnvError, FloatingPointError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
