"""MAIPG on StarCraft micromanagement: Multi-Agent Interpolated Policy Gradients, in one file.

MAPPO's policy gradient rests on sampled joint actions: little bias, but noisy. MAIPG mixes in a
quieter one through a factorised critic q_tot, differentiated in the actions. nu trades bias
against variance; nu = 0 is MAPPO, and builds no q_tot. The policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(s, mu(s))] * q_scale               `deterministic_pg_loss`   Eq. (10)
      + ent_coef * mean[entropy]

r: ratio of new to old policy. A: advantage (`gae`), normalised; sigma_A: its deviation.
mu(s): pi's probabilities, the mean of a sampled action; or, by --mu gumbel, a sample.

    --critic compatible   The default, Proposition 5: q_tot is linear in the policy's own features,
                          fitted to the team's A by least squares. q_scale = 1 / live agents.
    --critic paper        Algorithm 1: utility networks, mixed by QMIX or VDN, regressed on
                          `td_lambda` targets. q_scale = 1 / (live agents * sigma_A).

Axes: T steps in a rollout, N games, n agents, A actions, O observation, S state, H hidden units;
L steps in a chunk, B chunks in a minibatch. `global_step` counts environment steps.

    python maipg_smac.py --map-name 2s3z --nu 0.4          # train
    python maipg_smac.py --resume RUN_DIR                  # go on
    python benchmark/evaluate.py RUN_DIR --capture-video   # win rate, film
"""

import contextlib
import copy
import fcntl
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ------ settings
# The paper's (nu, update epochs) for SMAC's simple, hard, super hard maps. Others: hard.
TABLE_3 = [
    (0.4, 5, "2m_vs_1z 2s_vs_1sc 2s3z 3m 3s_vs_3z 3s_vs_4z 3s5z 8m 1c3s5z 10m_vs_11m MMM"),
    (0.3, 10, "2c_vs_64zg 3s_vs_5z 5m_vs_6m 8m_vs_9m 25m so_many_baneling bane_vs_bane"),
    (0.3, 15, "27m_vs_30m 3s5z_vs_3s6z 6h_vs_8z corridor MMM2"),
]


@dataclass
class Args:
    script: ClassVar[str] = Path(__file__).stem
    map_name: str = "2s3z"  # SMAC map, see above
    backend: Literal["auto", "sc2", "smax"] = "auto"  # StarCraft II if there
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    threads: int = 1  # CPU threads of torch
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # folder to go on with
    # MAIPG
    nu: float | None = None  # 0 is MAPPO; None: as in Table 3
    critic: Literal["compatible", "paper"] | None = None  # None: paper if a mixer is named
    mu: Literal["expectation", "gumbel"] = "expectation"  # the action in q_tot
    mixer: Literal["qmix", "vdn"] | None = None  # of the paper's critic; None: qmix
    q_scale: Literal["advantage", "raw"] = "advantage"  # paper's critic: as above, or 1
    td_lambda: float = 0.8  # paper's critic: of its targets
    target_tau: float = 0.05  # paper's critic: targets' step per epoch
    forgetting: float = 0.75  # compatible: weight of earlier rollouts
    ridge: float = 0.001  # compatible: regularisation per row
    # MAPPO
    num_envs: int = 8  # parallel games
    rollout_steps: int = 400  # steps per game and update
    update_epochs: int | None = None  # passes; None: as in Table 3
    critic_epochs: int | None = None  # passes of V; None: update_epochs
    num_minibatches: int = 1  # per epoch
    chunk_length: int = 10  # steps of backpropagation
    hidden_dim: int = 64  # units per layer
    learning_rate: float = 5e-4  # of Adam
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of the advantages
    clip_eps: float = 0.2  # PPO clip, of policy and value
    ent_coef: float = 0.01  # entropy bonus
    max_grad_norm: float = 10.0  # per network
    # evaluation and output
    eval_every: int = 80_000  # environment steps
    eval_episodes: int = 32  # greedy ones, at least
    checkpoint_every: int = 25  # updates
    runs_dir: str = "runs"  # of run folders
    track: bool = False  # log to Weights & Biases too
    game_timeout: float = 120.0  # seconds until a silent game fails

    def __post_init__(self):
        self.critic = self.critic or ("paper" if self.mixer else "compatible")


EVALUATION = dict.fromkeys(["eval/win_rate", "eval/episodic_return"], math.nan)


class UsageError(Exception):
    """The user can mend it: exit code 2, nothing written."""


class GameError(Exception):
    """StarCraft II crashed or hangs."""


def resolve(args):
    """Fill in backend, device and Table 3. Raises UsageError."""
    missing = what_sc2_lacks(args.map_name)
    if args.backend == "auto":
        args.backend = "smax" if missing else "sc2"
        print(f"backend {args.backend}: {missing or 'StarCraft II is installed'}")
    if args.backend == "sc2" and missing:
        raise UsageError(f"--backend sc2: {missing}; run benchmark/install_sc2.sh")
    for name, value in asdict(args).items():
        low = 1e-9 if name == "ridge" else int(type(value) is int and name not in ["nu", "seed"])
        high = 1 if name in "nu gamma gae_lambda td_lambda target_tau forgetting".split() else 1e9
        if type(value) in (int, float) and not low <= value <= high:
            raise UsageError(f"--{name} {value}: must lie in [{low}, {high:g}]")
    nu, epochs = next((row[:2] for row in TABLE_3 if args.map_name in row[2].split()), (0.3, 10))
    args.nu = nu if args.nu is None else args.nu
    args.update_epochs = args.update_epochs or epochs
    if args.critic == "compatible" and (args.mixer, args.q_scale) != (None, "advantage"):
        raise UsageError("--mixer, --q-scale: only with --critic paper")
    chunks = args.num_envs * args.rollout_steps // args.chunk_length
    if args.rollout_steps % args.chunk_length or chunks % args.num_minibatches:
        raise UsageError("--chunk-length must divide --rollout-steps, and minibatches the chunks")
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
        self.critic = Recurrent(obs_dim, dim, 1, 1.0, state_dim)
        self.v_norm = ValueNorm()
        self.second = args.critic if args.nu > 0 else "none"
        if self.second == "paper":
            # A utility starts indifferent between actions.
            utility = Recurrent(obs_dim, dim, A, 0.01, state_dim)
            mixer = Mixer(args.mixer or "qmix", n, state_dim, dim)
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
    return now


@torch.no_grad()
def rollout(policy, envs, buffer, now, steps, rng=None):
    """Play T steps into the buffer, {name: [T + 1, N, ...]}; without rng greedily, no row T.

    Of each state: obs [n, O], state [S], avail [n, A], keep (0: an episode begins), policy_hidden
    [n, H] before the step, log_pi [n, A]. Of each step (none in row T): actions [n, A], one-hot;
    reward, done (victory, defeat, time limit), won, return (of the episode so far).
    """
    for t in range(steps + 1 if rng else steps):
        logits, hidden = policy(now["obs"][None], now["policy_hidden"], now["keep"][None])
        row = {key: now[key] for key in ("obs", "state", "avail", "keep", "policy_hidden")}
        row["log_pi"] = masked_log_softmax(logits[0], now["avail"])
        if t < steps:
            actions = (gumbel_max(row["log_pi"], rng) if rng else row["log_pi"]).argmax(-1)
            row["actions"] = F.one_hot(actions, logits.shape[-1]).float()
            obs, state, avail, row["reward"], row["done"], row["won"] = envs.step(actions)
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
    reward, done, pi = batch["reward"], batch["done"], batch["log_pi"].exp()
    batch["log_probs"] = (batch["log_pi"] * batch["actions"]).sum(-1)
    # The dead have only their no-op.
    alive = batch["alive"] = (batch["avail"].sum(-1) > 1).float()

    # V: GAE of all agents, normalised over the live ones.
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
        greedy = F.one_hot(buffer["log_pi"].argmax(-1), pi.shape[-1])
        next_q = agent.target_q.mixer(utilities, greedy, weights)[1:]
        next_q = next_q * agent.q_norm.std + agent.q_norm.mean
        batch["q_targets"] = td_lambda(reward, next_q, done, args.gamma, args.td_lambda)

        mixer, weights = agent.q.mixer, agent.q.mixer.weights(batch["state"])
        utilities, batch["utility_hidden"] = unroll(agent.q.utility, "utility_hidden", buffer, now)
        q = mixer(utilities[:-1], batch["actions"], weights) - mixer(utilities[:-1], pi, weights)
        q = q * agent.q_norm.std / (sigma_a + 1e-5)

    # Q of Proposition 5: least squares on the policy's last features, and 1.
    if agent.second == "compatible":
        features = F.pad(agent.policy.norm(buffer["policy_hidden"][1:]), (0, 1), value=1)
        scores = batch["actions"] - pi  # 0 for the dead
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
    logits, _ = agent.policy(obs, batch["policy_hidden"][0], keep)
    log_pi = masked_log_softmax(logits, batch["avail"])
    log_ratio = (log_pi * actions).sum(-1) - batch["log_probs"]
    policy_loss = stochastic_pg_loss(log_ratio, batch["advantages"], alive, args.clip_eps)

    # Second gradient: q_tot at mu, per live agent and in A's unit, like the first.
    mu, q_scale = log_pi.exp(), 1 / alive.sum(-1).mean()
    if args.mu == "gumbel" and args.nu > 0:
        mu = gumbel_softmax(log_pi, rng)
    if agent.second == "compatible":
        q_tot = (batch["utilities"] * mu).sum((-2, -1))
    if agent.second == "paper":
        utilities, _ = agent.q.utility(obs, batch["utility_hidden"][0], keep, state)
        weights = agent.q.mixer.weights(state)
        q_taken = agent.q.mixer(utilities, actions, weights)
        agent.q_norm.update(batch["q_targets"])
        targets = (batch["q_targets"] - agent.q_norm.mean) / agent.q_norm.std
        losses["q"] = F.huber_loss(q_taken, targets, delta=10.0)
        q_tot = agent.q.mixer(utilities.detach(), mu, [w.detach() for w in weights])
        q_tot = q_tot * agent.q_norm.std
        q_scale = 1 if args.q_scale == "raw" else q_scale / (sigma_a + 1e-5)
    if args.nu > 0:
        policy_loss = interpolate(policy_loss, deterministic_pg_loss(q_tot, q_scale), args.nu)

    # Entropy bonus, and how far the policy has moved.
    entropy = masked_mean(-(log_pi.exp() * log_pi).sum(-1), alive)
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
def with_retries(play, progress, stopped=()):
    """play(attempt), at most five times: after a GameError in new games."""
    for attempt in range(5):
        try:
            return play(attempt)
        except GameError as error:
            progress["restarts"] += 1
            if stopped or attempt == 4:
                raise
            print(f"{error}; new games begin", file=sys.stderr)


def train(args, envs, stopped=(), agent_class=Agent, update=update):
    """Train until total_timesteps, or a signal in `stopped`."""
    saved = load_checkpoint(args.resume, type(args)) if args.resume else {}
    progress = saved.get("progress", {"step": 0, "restarts": 0, "csv_size": 0})
    torch.manual_seed(args.seed)
    # Unless stored, games have new episodes.
    now, buffer, rngs = begin(envs, args.seed + progress["step"], args), {}, {}
    agent = agent_class(now, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    # Runs of any nu explore alike.
    for k, name in enumerate(["explore", "gumbel", "shuffle"]):
        rngs[name] = torch.Generator(args.device).manual_seed(args.seed + 10**9 * k)

    if args.resume:
        folder = Path(args.resume)
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        for name, rng in rngs.items():
            rng.set_state(saved["rngs"][name])
        if progress["step"] >= args.total_timesteps:
            print("done, until --total-timesteps is raised")
        if args.backend == "smax":
            envs.load_state_dict(saved["games"])
            now = {key: x.to(args.device) for key, x in saved["now"].items()}
    else:
        second = {"none": "", "paper": f"__{args.mixer or 'qmix'}", "compatible": "__compatible"}
        name = f"{args.backend}-{args.map_name}__{args.script}__nu{args.nu:g}{second[agent.second]}"
        folder = Path(args.runs_dir, f"{name}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
        folder.mkdir(parents=True)
    log = Log(folder, args, progress["step"], progress["csv_size"])

    def save():
        progress["csv_size"] = log.csv.tell()
        parts = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        parts["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        parts["games"] = envs.state_dict() if args.backend == "smax" else None
        write_checkpoint(folder, args, parts | {"now": now, "progress": progress})

    def play(attempt):
        if attempt:
            now.update(begin(envs, args.seed + 100_003 * progress["restarts"], args))
        rollout(agent.policy, envs, buffer, now, args.rollout_steps, rngs["explore"])

    def judge(attempt):
        seed = 10**9 + args.seed + progress["step"] + attempt
        with contextlib.closing(copy.copy(envs)) as games:
            return evaluate(agent.policy, games, seed, args, stopped)

    def report(step, metrics):
        try:
            if step >= args.total_timesteps or step % args.eval_every < batch_steps:
                log.bar.set_postfix_str("evaluating")
                metrics |= {} if stopped else with_retries(judge, progress, stopped)
        finally:
            metrics["charts/env_restarts"] = progress["restarts"]
            log.write(step, metrics)

    batch_steps = args.num_envs * args.rollout_steps
    with log.writer, log.bar:
        try:
            while progress["step"] < args.total_timesteps and not stopped:
                start = time.perf_counter()
                with_retries(play, progress, stopped)
                batch, metrics = estimate(agent, buffer, now, args)
                sigma_a = metrics["diagnostics/sigma_a"]
                metrics |= update(agent, optimizer, batch, sigma_a, rngs, args)
                metrics["charts/episodic_return"] = buffer["return"][buffer["done"]].mean()
                metrics["charts/win_rate"] = buffer["won"][buffer["done"]].float().mean()
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
    """SMAC's protocol: win rate over greedy episodes. All games play as many: those that end
    first are short."""
    now, share = begin(envs, seed, args), math.ceil(args.eval_episodes / args.num_envs)
    played, buffer, wins, returns = now["keep"], {}, [], []
    while (played < share).any() and not stopped:
        rollout(policy, envs, buffer, now, 1)
        number = played + buffer["done"].cumsum(0)
        counted = buffer["done"] & (number <= share)
        wins += buffer["won"][counted].tolist()
        returns += buffer["return"][counted].tolist()
        played = number[-1]
    return {} if stopped else dict(zip(EVALUATION, (np.mean(wins), np.mean(returns))))


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
        text = "return {charts/episodic_return:.2f}, win rate {charts/win_rate:.2f}"
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
#     obs, state, avail, reward, done, won = envs.step(actions)  # the last three [N]
# After an episode the next one has begun. obs ends with the agent's index; a dead agent sees
# nothing else, and has only its no-op. A copy of envs, once reset, has its own games.
class SMAXEnvs:
    """JaxMARL's HeuristicEnemySMAX with its auto-reset: N games in one jitted call."""

    def __init__(self, args):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/maipg"))

        # Empty packages: JaxMARL's environments take 4 s.
        for name in ["jaxmarl", "jaxmarl.environments"]:
            if spec := find_spec(name):
                sys.modules.setdefault(name, module_from_spec(spec))
        from jaxmarl.environments import smax

        maps = smax.smax_env.MAP_NAME_TO_SCENARIO
        if args.map_name not in maps:
            raise UsageError(f"--map-name {args.map_name}: one of {' '.join(maps)}")
        print(f"compiling SMAX for {jax.default_backend()}", flush=True)
        env = smax.HeuristicEnemySMAX(scenario=maps[args.map_name])

        def look(obs, game):
            stack = lambda x: jax.numpy.stack([x[name] for name in env.agents])
            own = jax.numpy.concatenate([stack(obs), np.eye(env.num_agents)], -1)
            return own, obs["world_state"], stack(env.get_avail_actions(game)) > 0

        def reset(seed):
            key, reset_key = jax.random.split(jax.random.PRNGKey(seed))
            obs, game = env.reset(reset_key)
            # Strong types, or step compiles twice.
            game = jax.tree.map(lambda x: x.astype(x.dtype), game)
            return (key, game), look(obs, game)

        def step(state, moves):
            key, step_key = jax.random.split(state[0])
            obs, game, reward, done, _ = env.step(step_key, state[1], dict(zip(env.agents, moves)))
            # 1 and more only for a victory.
            reward = reward[env.agents[0]]
            return (key, game), (*look(obs, game), reward, done["__all__"], reward >= 1.0)

        self._reset, self._step = jax.jit(jax.vmap(reset)), jax.jit(jax.vmap(step))
        self.jax, self.args = jax, args
        self.step(self.reset(0)[2].int().argmax(-1))  # compiles

    def reset(self, seed):
        self.games, seen = self._reset(seed + 1000 * np.arange(self.args.num_envs))
        return self._torch(seen)

    def step(self, actions):
        self.games, seen = self._step(self.games, actions.int().cpu().numpy())
        return self._torch(seen)

    def _torch(self, arrays):
        return [torch.from_dlpack(x.block_until_ready()).to(self.args.device) for x in arrays]

    def state_dict(self):
        return [torch.from_numpy(np.array(x)) for x in self.jax.tree.leaves(self.games)]

    def load_state_dict(self, state):
        leaves = [self.jax.device_put(x.numpy()) for x in state]
        self.games = self.jax.tree.unflatten(self.jax.tree.structure(self.games), leaves)

    def close(self):
        """No processes."""


def play_sc2(pipe, map_name, seed):
    """One game in a process of its own, which ends on any fault. smac's reset() is called once
    an episode: a second one breaks it."""
    os.setsid()  # a group, to be killed
    from smac.env import StarCraft2Env

    env, reward, done, won = StarCraft2Env(map_name, seed=seed), 0.0, True, False
    # The trainer has hung up.
    with contextlib.closing(env), contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            if done:
                env.reset()
            obs, state = np.float32(env.get_obs()), np.float32(env.get_state())
            avail = np.array(env.get_avail_actions()) > 0
            # All dead: no new game.
            if avail[:, 0].all():
                raise RuntimeError("the game did not restart")
            pipe.send((obs, state, avail, np.float32(reward), done, won))
            reward, done, info = env.step(pipe.recv())
            # smac's answer to a crash: (0, True, {}).
            if not info:
                raise RuntimeError("the game crashed")
            won = info["battle_won"]


class SC2Envs:
    """StarCraft II by oxwhirl's smac, a spawned process per game."""

    def __init__(self, args):
        self.args, self.workers = args, {}

    def reset(self, seed):
        self.workers = {}
        context = multiprocessing.get_context("spawn")
        for k in range(self.args.num_envs):
            pipe, theirs = context.Pipe()
            config = (theirs, self.args.map_name, seed + 1000 * k)
            self.workers[pipe] = context.Process(target=play_sc2, args=config)
            self.workers[pipe].start()
            theirs.close()
        return self._receive(timeout=300.0)[:3]

    def step(self, actions):
        for pipe, row in zip(self.workers, actions.tolist()):
            with contextlib.suppress(OSError):
                pipe.send(row)
        return self._receive(self.args.game_timeout)

    def _receive(self, timeout):
        """What all games send, as tensors. GameError: one has failed."""
        rows = []
        for k, pipe in enumerate(self.workers):
            try:
                if not pipe.poll(timeout):
                    raise TimeoutError(f"silent for {timeout:g} s")
                rows.append(pipe.recv())
            except (EOFError, OSError) as error:
                self.close()
                raise GameError(f"game {k}: {str(error) or 'its process ended'}") from None
        obs, *others = (torch.as_tensor(np.stack(x)).to(self.args.device) for x in zip(*rows))
        index = torch.eye(obs.shape[1], device=obs.device).expand(len(obs), -1, -1)
        return torch.cat([obs, index], -1), *others

    def close(self):
        """Workers end with their pipes; what they leave is killed."""
        for pipe in self.workers:
            pipe.close()
        for worker in self.workers.values():
            worker.join(timeout=10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def what_sc2_lacks(map_name):
    """What is missing to play the map."""
    home = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
    smac = find_spec("smac")
    if not smac or not Path(smac.submodule_search_locations[0], "env").is_dir():
        return "oxwhirl's smac is not installed (PyPI's smac is another project)"
    if not (home / f"Maps/SMAC_Maps/{map_name}.SC2Map").is_file():
        return f"no StarCraft II with the map {map_name} in {home} (SC2PATH)"
    return ""


# ------ main
def parse(argv, args_class=Args):
    """Args of a command line; --resume takes most of them from its folder."""
    maps = [f"\n\nnu {nu} and {epochs} epochs on {names}" for nu, epochs, names in TABLE_3]
    args = tyro.cli(args_class, args=argv, description=__doc__ + "".join(maps))
    if args.resume:
        saved = args_class(**load_checkpoint(args.resume, args_class)["args"])
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
        with contextlib.closing((SC2Envs if args.backend == "sc2" else SMAXEnvs)(args)) as envs:
            train(args, envs, stopped)
        return 128 + stopped[0] if stopped else 0
    except (UsageError, GameError, FloatingPointError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
