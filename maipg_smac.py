"""MAIPG on StarCraft micromanagement: Multi-Agent Interpolated Policy Gradients, in one file.

MAPPO's policy gradient rests on sampled joint actions: unbiased, but noisy. MAIPG mixes in a
second, quieter gradient that goes through a factorised critic q_tot, differentiated by the actions.
The weight nu trades bias against variance; nu = 0 is MAPPO, number for number. The policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(s, mu(s))] * q_scale               `deterministic_pg_loss`   Eq. (10)
      + ent_coef * mean[entropy]

r: probability ratio of new to old policy. A: advantage (`gae`), normalised; sigma_A is the standard
deviation divided out. mu(s): pi's probabilities, the expectation of a sampled action, or with
--mu gumbel a straight-through sample. There are two critics to take q_tot from:

    --critic paper        one utility network Q_i per agent, mixed (QMIX or VDN), regressed on
                          `td_lambda` targets; q_scale = 1 / (n sigma_A) for n live agents.
    --critic compatible   Proposition 5: q_tot is linear in the policy's own features, fitted to A
                          by least squares after each rollout; q_scale = 1 / n. No other network.

Axes: T rollout steps, N games, n agents, A actions, O observation, S state, H hidden units; L steps
in a chunk, B chunks in a minibatch. `global_step` counts environment steps: T * N for a rollout.

    python maipg_smac.py --map-name 2s3z --nu 0.4          # train
    python maipg_smac.py --resume RUN_DIR                  # go on where a run was stopped
    python benchmark/evaluate.py RUN_DIR --capture-video   # greedy win rate, and a film
"""

import collections
import contextlib
import copy
import csv
import fcntl
import functools
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------- settings
TABLE_3 = [  # of the paper: (nu, update epochs, maps that are simple, hard, super hard)
    (0.4, 5, "2m_vs_1z 2s_vs_1sc 2s3z 3m 3s_vs_3z 3s_vs_4z 3s5z 8m 1c3s5z 10m_vs_11m MMM"),
    (0.3, 10, "2c_vs_64zg 3s_vs_5z 5m_vs_6m 8m_vs_9m 25m so_many_baneling bane_vs_bane"),
    (0.3, 15, "27m_vs_30m 3s5z_vs_3s6z 6h_vs_8z corridor MMM2"),
]
OTHER_MAPS = (0.3, 10)  # of SMAX: smacv2_5_units and the like


@dataclass
class Args:
    script: ClassVar[str] = Path(__file__).stem  # the name in run folders and checkpoints

    # --- what to run
    map_name: str = "2s3z"  # SMAC map; the list is above
    backend: Literal["auto", "sc2", "smax"] = "auto"  # StarCraft II or SMAX; auto: sc2 if there
    seed: int = 1  # of weights, exploration and games
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: int = 1  # CPU threads of torch; more pay on an idle machine with wide networks only
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # run folder to go on with
    # --- MAIPG
    nu: float | None = None  # weight of the second gradient, 0 is MAPPO; None: the paper's Table 3
    critic: Literal["paper", "compatible"] = "paper"  # where the second gradient's q_tot is from
    mu: Literal["expectation", "gumbel"] = "expectation"  # the action in q_tot: pi, or a sample
    # --- MAIPG, --critic paper
    mixer: Literal["qmix", "vdn"] = "qmix"  # how q_tot is made of the utilities
    mixer_dim: int = 64  # units in the mixer and its hypernetworks
    q_scale: Literal["advantage", "raw"] = "advantage"  # unit of q_tot: 1 / (n sigma_A), or 1
    td_lambda: float = 0.8  # of the targets of q_tot
    target_tau: float = 0.05  # step of the target networks, once per epoch
    temperature: float = 1.0  # of the Gumbel-softmax
    # --- MAIPG, --critic compatible
    forgetting: float = 0.75  # weight of a rollout when the next one comes
    ridge: float = 0.001  # of the least squares, per row
    # --- MAPPO
    num_envs: int = 8  # parallel games
    rollout_steps: int = 400  # steps per game between updates
    update_epochs: int | None = None  # passes over each rollout; None: the paper's Table 3
    critic_epochs: int | None = None  # the same for V, if it is to take more; None: update_epochs
    num_minibatches: int = 1  # minibatches per epoch
    chunk_length: int = 10  # steps that gradients go back through time
    hidden_dim: int = 64  # units per layer of policy, critic and utility
    learning_rate: float = 5e-4  # Adam, of all networks
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of the advantages
    clip_eps: float = 0.2  # PPO clip, of policy and value
    ent_coef: float = 0.01  # entropy bonus
    max_grad_norm: float = 10.0  # per network
    # --- evaluation and output
    eval_every: int = 80_000  # environment steps between evaluations
    eval_episodes: int = 32  # greedy episodes per evaluation
    checkpoint_every: int = 25  # updates
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    # --- StarCraft II
    game_timeout: float = 120.0  # seconds after which a silent game has failed
    max_failures: int = 5  # failures in a row that stop the run


FRACTIONS = "nu td_lambda target_tau forgetting gamma gae_lambda clip_eps".split()
MAY_BE_ZERO = FRACTIONS + ["seed", "ridge", "ent_coef"]
EVALUATION = ["eval/win_rate", "eval/win_rate_stderr", "eval/episodic_return"]


class UsageError(Exception):
    """Something that the user can mend: one line on stderr, exit code 2, nothing written."""


class GameError(Exception):
    """StarCraft II crashed or hangs: the rollout is thrown away, and played again in new games."""


def resolve(args):
    """Fill in backend, device and Table 3. Raises UsageError: what is wrong, and what is valid."""
    table = {name: row[:2] for row in TABLE_3 for name in row[2].split()}
    missing = what_sc2_lacks(args.map_name)
    if args.backend == "auto":
        args.backend = "smax" if missing else "sc2"
        print(f"backend {args.backend}: {missing or 'smac and StarCraft II are installed'}")
    maps = import_smax().smax_env.MAP_NAME_TO_SCENARIO if args.backend == "smax" else table
    if args.map_name not in maps:
        raise UsageError(f"--map-name {args.map_name}: {args.backend} has {' '.join(maps)}")
    if args.backend == "sc2" and missing:
        raise UsageError(f"--backend sc2: {missing}; run benchmark/install_sc2.sh")
    nu, epochs = table.get(args.map_name, OTHER_MAPS)
    args.nu = nu if args.nu is None else args.nu
    args.update_epochs = args.update_epochs or epochs
    args.critic_epochs = args.critic_epochs or args.update_epochs

    for name, value in asdict(args).items():
        low, high = 0 if name in MAY_BE_ZERO else 1e-12, 1 if name in FRACTIONS else math.inf
        if type(value) in (int, float) and not (low <= value <= high and value < math.inf):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
    if args.rollout_steps % args.chunk_length:
        raise UsageError("--chunk-length must divide --rollout-steps")
    chunks = args.num_envs * args.rollout_steps // args.chunk_length
    if chunks % args.num_minibatches:
        raise UsageError(f"--num-minibatches must divide the {chunks} chunks of a rollout")
    if args.track and not find_spec("wandb"):
        raise UsageError("--track needs wandb: pip install wandb")

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


# ----------------------------------------------------------------------------------------- networks
def orthogonal(layer, gain):
    """MAPPO's initialisation: orthogonal weights, zero biases."""
    for name, parameter in layer.named_parameters():
        nn.init.orthogonal_(parameter, gain) if "weight" in name else nn.init.zeros_(parameter)
    return layer


class Recurrent(nn.Module):
    """MAPPO's network: LayerNorm, two (Linear, ReLU, LayerNorm), GRU, LayerNorm, Linear head.

    The policy sees the agent's own obs; critic and utility see the global state as well.
    """

    def __init__(self, obs_dim, dim, out_dim, out_gain, state_dim=0):
        super().__init__()
        gain = math.sqrt(1 if state_dim else 2)  # the sum of two halves has the scale of one layer
        self.obs_in = nn.Sequential(
            nn.LayerNorm(obs_dim), orthogonal(nn.Linear(obs_dim, dim), gain)
        )
        if state_dim:
            self.state_in = nn.Sequential(
                nn.LayerNorm(state_dim), orthogonal(nn.Linear(state_dim, dim), gain)
            )
        second = orthogonal(nn.Linear(dim, dim), math.sqrt(2))
        self.body = nn.Sequential(
            nn.ReLU(), nn.LayerNorm(dim), second, nn.ReLU(), nn.LayerNorm(dim)
        )
        self.gru = orthogonal(nn.GRUCell(dim, dim), 1.0)
        self.norm = nn.LayerNorm(dim)
        self.head = orthogonal(nn.Linear(dim, out_dim), out_gain)

    def forward(self, obs, hidden, keep, state=None):
        """obs [L, B, n, O], hidden [B, n, H], keep [L, B] (0: an episode begins), state [L, B, S]
        -> output [L, B, n, out], hidden state after each step [L, B, n, H]."""
        x = self.obs_in(obs)
        if state is not None:
            x = x + self.state_in(state).unsqueeze(-2)  # the same for all agents: computed once
        x, hidden, hiddens = self.body(x), hidden.flatten(0, 1), []
        for x_t, keep_t in zip(x.flatten(1, 2), keep.repeat_interleave(x.shape[2], 1)):
            hidden = self.gru(x_t, hidden * keep_t.unsqueeze(-1))
            hiddens.append(hidden)
        hiddens = torch.stack(hiddens).view_as(x)
        return self.head(self.norm(hiddens)), hiddens


class Mixer(nn.Module):
    """q_tot from the utilities of the chosen actions: QMIX or VDN, with a state value in both.

    QMIX is monotonic, dq_tot/dQ_i >= 0: each agent's best action is part of the team's best one.
    """

    def __init__(self, kind, num_agents, state_dim, dim):
        super().__init__()
        self.kind, self.dim, self.norm = kind, dim, nn.LayerNorm(state_dim)
        self.value = self.hypernetwork(state_dim, 1)
        if kind == "qmix":
            self.w_1 = self.hypernetwork(state_dim, num_agents * dim)
            self.b_1 = nn.Linear(state_dim, dim)
            self.w_2 = self.hypernetwork(state_dim, dim)

    def hypernetwork(self, state_dim, out_dim):
        return nn.Sequential(
            nn.Linear(state_dim, self.dim), nn.ReLU(), nn.Linear(self.dim, out_dim)
        )

    def weights(self, state):
        """What depends on the state [..., S] alone: made once, used for several joint actions."""
        s = self.norm(state)
        if self.kind == "vdn":
            return [self.value(s).squeeze(-1)]
        w_1 = self.w_1(s).abs().unflatten(-1, (-1, self.dim))  # absolute: q_tot is monotonic
        return [self.value(s).squeeze(-1), w_1, self.b_1(s), self.w_2(s).abs()]

    def forward(self, utilities, actions, weights):
        """Utilities and one-hot actions (or probabilities), [..., n, A] -> q_tot [...]."""
        chosen = (utilities * actions).sum(-1)
        if self.kind == "vdn":
            return chosen.sum(-1) + weights[0]
        value, w_1, b_1, w_2 = weights
        hidden = F.elu((chosen.unsqueeze(-2) @ w_1).squeeze(-2) + b_1)
        return (hidden * w_2).sum(-1) + value


class FactorisedCritic(nn.Module):
    """--critic paper: q_tot(s, a) = mixer(Q_1(s, a_1), ..., Q_n(s, a_n)), Algorithm 1."""

    def __init__(self, envs, args):
        super().__init__()
        shape = (envs.obs_dim, args.hidden_dim, envs.num_actions)
        # The small last gain: a utility starts indifferent between actions.
        self.utility = Recurrent(*shape, 0.01, envs.state_dim)
        self.mixer = Mixer(args.mixer, envs.num_agents, envs.state_dim, args.mixer_dim)


class CompatibleCritic(nn.Module):
    """--critic compatible: q_tot(s, a) = w . x(s, a), with x the gradient of log pi by its head.

    With h_i the policy's last features, x = sum_i h_i (x) (onehot(a_i) - pi_i): by Proposition 5,
    the w that minimises E[(A - w . x)^2] gives the true policy gradient. Older rollouts fade:

        G <- rho G + x^T x,   b <- rho b + x^T A,   w = (G + ridge * rows * I)^-1 b
    """

    def __init__(self, num_features, num_actions, forgetting, ridge):
        super().__init__()
        self.forgetting, self.ridge = forgetting, ridge
        size = num_features * num_actions
        self.register_buffer("gram", torch.zeros(size, size))
        self.register_buffer("moment", torch.zeros(size))
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("weights", torch.zeros(num_features, num_actions))

    def fit(self, features, scores, advantages):
        """features h [T, N, n, F], scores onehot(a) - pi [T, N, n, A], advantages [T, N]."""
        x = (features.transpose(-1, -2) @ scores).flatten(2).flatten(0, 1)
        self.gram.mul_(self.forgetting).addmm_(x.T, x)
        self.moment.mul_(self.forgetting).add_(x.T @ advantages.flatten())
        self.rows.mul_(self.forgetting).add_(len(x))
        gram = self.gram.double()
        gram.diagonal().add_(self.ridge * self.rows)
        solution = torch.linalg.solve(gram, self.moment.double())
        self.weights.copy_(solution.view_as(self.weights))

    def forward(self, features):
        """Utilities u_i(s, .) [..., n, A] of features [..., n, F]."""
        return features @ self.weights


class ValueNorm(nn.Module):
    """Running, debiased mean and variance of a value network's targets (MAPPO's ValueNorm)."""

    def __init__(self, beta=0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("moments", torch.zeros(3))  # of x, x^2 and 1: the last one debiases

    def update(self, x):
        new = torch.stack([x.mean(), (x * x).mean(), x.new_ones(())])
        self.moments.lerp_(new, 1 - self.beta)

    def mean_and_std(self):
        mean, square = self.moments[:2] / self.moments[2].clamp(min=1e-5)
        return mean, (square - mean * mean).clamp(min=0.01).sqrt()

    def normalize(self, x):
        mean, std = self.mean_and_std()
        return (x - mean) / std

    def denormalize(self, x):
        mean, std = self.mean_and_std()
        return x * std + mean


class Agent(nn.Module):
    """All networks and normalisers. Policy and critic come first: every nu starts from the same."""

    def __init__(self, envs, args):
        super().__init__()
        dim = args.hidden_dim
        self.policy = Recurrent(envs.obs_dim, dim, envs.num_actions, 0.01)
        self.critic = Recurrent(envs.obs_dim, dim, 1, 1.0, envs.state_dim)
        self.value_norm = ValueNorm()
        self.second = args.critic if args.nu > 0 else "none"  # what the second gradient is from
        if self.second == "paper":
            self.q = FactorisedCritic(envs, args)
            self.target_q = copy.deepcopy(self.q)
            self.q_norm = ValueNorm()
        if self.second == "compatible":
            shape = (dim + 1, envs.num_actions)
            self.compatible = CompatibleCritic(*shape, args.forgetting, args.ridge)


# --------------------------------------------------------------------------- estimators and losses
def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_log_softmax(logits, avail):
    """log pi [..., A]; as in MAPPO, an action that is not available has the logit -1e10."""
    return torch.log_softmax(logits.masked_fill(~avail, -1e10), -1)


def one_hot_argmax(x):
    return F.one_hot(x.argmax(-1), x.shape[-1]).float()


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
    """Generalised advantage estimation: A-hat of Eq. (10).

    rewards, done [T, N]; values [T + 1, N, n] in units of the reward. The end of an episode cuts
    the sum, also at the time limit, as in MAPPO.
    """
    keep = (~done).float().unsqueeze(-1)
    delta = rewards.unsqueeze(-1) + gamma * keep * values[1:] - values[:-1]
    return backward_sum(delta, gamma * lam * keep)


def td_lambda(rewards, next_q, done, gamma, lam):
    """TD(lambda) targets of q_tot, all [T, N]; next_q_t = target_q_tot(s_{t+1}, mu(s_{t+1})).

    G_t = r_t + gamma ((1 - lambda) next_q_t + lambda G_{t+1}); r_t at the end of an episode.
    """
    keep = (~done).float()
    trace = torch.full_like(keep, lam)
    trace[-1] = 0.0  # nothing to sum up after the rollout's last step
    return backward_sum(rewards + gamma * keep * (1 - trace) * next_q, gamma * keep * trace)


def stochastic_pg_loss(log_ratio, advantages, alive, clip_eps):
    """PPO's clipped loss, Eq. (3): minus the mean over live agents. All [L, B, n]."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), alive)


def gumbel_softmax(log_pi, temperature, rng):
    """Straight-through sample [..., A]: one-hot forward, the softmax's gradient backward."""
    soft = torch.softmax(gumbel_max(log_pi, rng) / temperature, -1)
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft


def deterministic_pg_loss(q_tot, q_scale):
    """Second term of Eq. (10): minus the mean over steps of q_tot(s, mu(s)) [L, B], in A's unit.

    Only mu carries a gradient: q_tot is made of detached utilities and weights.
    """
    return -q_tot.mean() * q_scale


def interpolate(stochastic, deterministic, nu):
    """Eq. (10)."""
    return (1 - nu) * stochastic + nu * deterministic


def value_loss(values, targets, old_values=None, clip_eps=None):
    """Huber loss in normalised units; given old values, clipped around them as in MAPPO."""
    loss = F.huber_loss(values, targets, reduction="none", delta=10.0)
    if old_values is not None:
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        loss = torch.max(loss, F.huber_loss(clipped, targets, reduction="none", delta=10.0))
    return loss.mean()


# ------------------------------------------------------------------------------ rollout and targets
def make_buffer(envs, args):
    """A rollout's storage. Row T holds the state after the last step, for the bootstrap."""
    zeros = functools.partial(torch.zeros, device=args.device)
    T, N, n, A = args.rollout_steps, args.num_envs, envs.num_agents, envs.num_actions
    return {
        "obs": zeros(T + 1, N, n, envs.obs_dim),
        "state": zeros(T + 1, N, envs.state_dim),
        "avail": zeros(T + 1, N, n, A, dtype=torch.bool),
        "keep": zeros(T + 1, N),  # 0 where an episode begins
        "policy_hidden": zeros(T + 1, N, n, args.hidden_dim),  # before the step
        "log_pi": zeros(T + 1, N, n, A),
        "actions": zeros(T, N, n, A),  # one-hot
        "reward": zeros(T, N),
        "done": zeros(T, N, dtype=torch.bool),  # by victory, defeat or time limit
        "won": zeros(T, N, dtype=torch.bool),
        "return": zeros(T, N),  # of the episode so far
    }


def begin(envs, args):
    """What outlives a rollout: what is seen now, and the hidden state of each network."""
    obs, state, avail = envs.reset()
    zeros = obs.new_zeros(args.num_envs)
    now = {"obs": obs, "state": state, "avail": avail, "keep": zeros, "return": zeros}
    for name in ["policy", "critic", "utility", "target"]:
        now[f"{name}_hidden"] = obs.new_zeros(*obs.shape[:2], args.hidden_dim)
    return now


@torch.no_grad()
def rollout(policy, envs, buffer, now, rng, args):
    """Play T steps of the stochastic policy into the buffer; `now` is updated."""
    for t in range(args.rollout_steps + 1):
        logits, hidden = policy(now["obs"][None], now["policy_hidden"], now["keep"][None])
        log_pi = masked_log_softmax(logits[0], now["avail"])
        buffer["log_pi"][t] = log_pi
        for key in ["obs", "state", "avail", "keep", "policy_hidden"]:
            buffer[key][t] = now[key]
        if t == args.rollout_steps:  # the next rollout takes this step
            return

        actions = gumbel_max(log_pi, rng).argmax(-1)
        obs, state, avail, reward, done, won = envs.step(actions)
        now["return"] = now["return"] * now["keep"] + reward
        buffer["actions"][t] = F.one_hot(actions, log_pi.shape[-1])
        buffer["reward"][t], buffer["return"][t] = reward, now["return"]
        buffer["done"][t], buffer["won"][t] = done, won
        now.update(obs=obs, state=state, avail=avail, keep=1.0 - done.float())
        now["policy_hidden"] = hidden[0]


def unroll(network, name, buffer, now):
    """A critic over a whole rollout in one pass: its outputs [T + 1, N, n, out], and its hidden
    states before each step [T, N, n, H]. `now` takes over the last one."""
    out, after = network(buffer["obs"], now[name], buffer["keep"], buffer["state"])
    before = torch.cat([now[name][None], after[:-2]])
    now[name] = after[-2].clone()
    return out, before


def corr_and_slope(advantages, q):
    """corr(A, Qc) and the slope of A's regression on Qc, of steps [T, N]; 0 where Qc = 0."""
    a, q = advantages - advantages.mean(), q - q.mean()
    covariance, variance = (a * q).mean(), (q * q).mean()
    corr = covariance / (variance * (a * a).mean()).sqrt().clamp(min=1e-8)
    return {"variance/corr": corr, "variance/slope": covariance / variance.clamp(min=1e-8)}


@torch.no_grad()
def estimate(agent, buffer, now, args):
    """Advantages and targets of a rollout, before anything is trained on it.

    Returns the batch in chunks [L, B, ...], with the hidden states [1, B, n, H] that they begin
    with; sigma_A; and metrics, which compare q_tot with A by weights that have not seen this A.
    """
    T, reward, done = args.rollout_steps, buffer["reward"], buffer["done"]
    batch = {key: buffer[key][:T] for key in ["obs", "state", "avail", "keep", "policy_hidden"]}
    batch["actions"], pi = buffer["actions"], buffer["log_pi"][:T].exp()
    batch["log_probs"] = (buffer["log_pi"][:T] * batch["actions"]).sum(-1)
    alive = batch["alive"] = (batch["avail"].sum(-1) > 1).float()  # the dead have only their no-op

    # V: GAE of all agents, normalised over the live ones.
    out, batch["critic_hidden"] = unroll(agent.critic, "critic_hidden", buffer, now)
    batch["values"] = out[:T].squeeze(-1)
    values = agent.value_norm.denormalize(out.squeeze(-1))
    advantages = gae(reward, values, done, args.gamma, args.gae_lambda)
    batch["returns"] = advantages + values[:T]
    mean = masked_mean(advantages, alive)
    sigma_a = masked_mean((advantages - mean) ** 2, alive).sqrt()
    batch["advantages"] = (advantages - mean) / (sigma_a + 1e-5)
    team = (batch["advantages"] * alive).sum(-1) / alive.sum(-1).clamp(min=1)
    metrics = {"diagnostics/sigma_a": sigma_a}

    # Q of Algorithm 1: TD(lambda) targets, with mu(s') = argmax pi of Section 2.1.
    if agent.second == "paper":
        utilities, batch["utility_hidden"] = unroll(agent.q.utility, "utility_hidden", buffer, now)
        next_utilities, _ = unroll(agent.target_q.utility, "target_hidden", buffer, now)
        weights = agent.target_q.mixer.weights(buffer["state"])
        next_q = agent.target_q.mixer(next_utilities, one_hot_argmax(buffer["log_pi"]), weights)
        next_q = agent.q_norm.denormalize(next_q[1:])
        batch["q_targets"] = td_lambda(reward, next_q, done, args.gamma, args.td_lambda)
        weights = agent.q.mixer.weights(batch["state"])
        q = agent.q.mixer(utilities[:T], batch["actions"], weights)
        centred_q = (q - agent.q.mixer(utilities[:T], pi, weights)) * agent.q_norm.mean_and_std()[1]
        metrics |= corr_and_slope(team, centred_q / (sigma_a + 1e-5))

    # Q of Proposition 5: a least squares fit to A, on the features that the policy has acted on.
    if agent.second == "compatible":
        features = F.pad(agent.policy.norm(buffer["policy_hidden"][1:]), (0, 1), value=1.0)
        scores = (batch["actions"] - pi) * alive.unsqueeze(-1)
        metrics |= corr_and_slope(team, (agent.compatible(features) * scores).sum((-2, -1)))
        agent.compatible.fit(features, scores, team)
        batch["utilities"] = agent.compatible(features) * alive.unsqueeze(-1)

    for key, x in batch.items():  # [T, N, ...] -> [L, B, ...]; all agents of a game stay together
        x = x.unflatten(0, (-1, args.chunk_length)).transpose(0, 1).flatten(1, 2)
        batch[key] = x[:1] if key.endswith("_hidden") else x
    return batch, sigma_a, metrics


# ------------------------------------------------------------------------------------------- update
def policy_losses(agent, batch, sigma_a, rng, args):
    """({network: loss} of policy and q, metrics) of chunks [L, B, ...]."""
    obs, state, keep, actions = (batch[key] for key in ("obs", "state", "keep", "actions"))
    alive, losses = batch["alive"], {}

    # First gradient: PPO.
    logits, _ = agent.policy(obs, batch["policy_hidden"][0], keep)
    log_pi = masked_log_softmax(logits, batch["avail"])
    log_ratio = (log_pi * actions).sum(-1) - batch["log_probs"]
    policy_loss = stochastic_pg_loss(log_ratio, batch["advantages"], alive, args.clip_eps)

    # Second gradient: both terms are per live agent and in the unit of the normalised advantage.
    if agent.second != "none":
        expected = args.mu == "expectation"
        mu = log_pi.exp() if expected else gumbel_softmax(log_pi, args.temperature, rng)
        q_scale = 1 / alive.sum(-1).mean()
    if agent.second == "compatible":
        q_tot = (batch["utilities"] * mu).sum((-2, -1))
    if agent.second == "paper":
        mean, std = agent.q_norm.mean_and_std()  # the mixer's output is in units of std
        utilities, _ = agent.q.utility(obs, batch["utility_hidden"][0], keep, state)
        weights = agent.q.mixer.weights(state)
        q_taken = agent.q.mixer(utilities, actions, weights)
        losses["q"] = value_loss(q_taken, (batch["q_targets"] - mean) / std)
        q_tot = agent.q.mixer(utilities.detach(), mu, [w.detach() for w in weights])
        q_scale = std if args.q_scale == "raw" else q_scale * std / (sigma_a + 1e-5)
    if agent.second != "none":
        policy_loss = interpolate(policy_loss, deterministic_pg_loss(q_tot, q_scale), args.nu)

    # Entropy bonus, and how far the policy has moved.
    entropy = masked_mean(-(log_pi.exp() * log_pi).sum(-1), alive)
    losses["policy"] = policy_loss - args.ent_coef * entropy
    log_ratio, entropy = log_ratio.detach(), entropy.detach()
    clipped = ((log_ratio.exp() - 1).abs() > args.clip_eps).float()
    return losses, {
        "losses/entropy": entropy,
        "diagnostics/approx_kl": masked_mean(log_ratio.exp() - 1 - log_ratio, alive),
        "diagnostics/clip_fraction": masked_mean(clipped, alive),
    }


def critic_loss(agent, batch, args):
    """MAPPO's loss of V. It counts the dead too, as MAPPO's SMAC scripts do."""
    hidden = batch["critic_hidden"][0]
    values, _ = agent.critic(batch["obs"], hidden, batch["keep"], batch["state"])
    targets = agent.value_norm.normalize(batch["returns"])
    return value_loss(values.squeeze(-1), targets, batch["values"], args.clip_eps)


def descend(agent, optimizers, losses, args):
    """A step of Adam for each {network: loss}; metrics. FloatingPointError before it is harmful."""
    metrics = {}
    for name, loss in losses.items():
        parameters = list(getattr(agent, name).parameters())
        optimizers[name].zero_grad()
        loss.backward(inputs=parameters)  # the policy's loss leaves utility and mixer alone
        norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        metrics[f"losses/{name}"] = loss.detach()
        metrics[f"diagnostics/{name}_grad_norm"] = norm
    if not torch.stack(list(metrics.values())).isfinite().all():
        raise FloatingPointError(
            f"not finite: {[k for k, x in metrics.items() if not x.isfinite()]}"
        )
    for name in losses:
        optimizers[name].step()
    return metrics


def update(agent, optimizers, batch, sigma_a, rngs, args):
    """`update_epochs` passes over the batch; returns metrics, averaged over the minibatches."""
    chunks, history = batch["obs"].shape[1], collections.defaultdict(list)
    for epoch in range(max(args.update_epochs, args.critic_epochs)):
        order = torch.randperm(chunks, generator=rngs["shuffle"], device=args.device)
        for index in order.split(chunks // args.num_minibatches):
            part = batch
            if args.num_minibatches > 1:
                part = {key: x[:, index] for key, x in batch.items()}
            losses, metrics = {}, {}
            if epoch < args.update_epochs:
                if agent.second == "paper":
                    agent.q_norm.update(part["q_targets"])
                losses, metrics = policy_losses(agent, part, sigma_a, rngs["gumbel"], args)
            if epoch < args.critic_epochs:
                agent.value_norm.update(part["returns"])
                losses["critic"] = critic_loss(agent, part, args)
            metrics |= descend(agent, optimizers, losses, args)
            for key, value in metrics.items():
                history[key].append(value)
        if agent.second == "paper" and epoch < args.update_epochs:
            for target, new in zip(agent.target_q.parameters(), agent.q.parameters()):
                target.data.lerp_(new.data, args.target_tau)
    return {key: torch.stack(values).mean() for key, values in history.items()}


# ----------------------------------------------------------------------------------------- training
@contextlib.contextmanager
def stop_signals():
    """Yields a list: the signals that ask for a checkpoint and a clean end. A second exits."""
    stopped = []

    def stop(signum, frame):
        if stopped:
            sys.exit(128 + signum)
        stopped.append(signum)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this update, with a checkpoint; again: at once\n")

    signums = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signums.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield stopped
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(args, envs, agent_class=Agent, update=update):
    """Train until total_timesteps or a signal; go on with args.resume. Returns the exit code."""
    torch.manual_seed(args.seed)
    try:
        agent, buffer = agent_class(envs, args).to(args.device), make_buffer(envs, args)
    except RuntimeError as error:  # torch's allocator
        raise UsageError(f"too large: {str(error).splitlines()[0]}") from None
    optimizers = {}
    for name in ["policy", "critic", "q"]:
        if hasattr(agent, name):
            parameters = getattr(agent, name).parameters()
            optimizers[name] = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5)
    # Separate random streams: runs that differ only in nu meet the same exploration noise.
    rngs = {}
    for k, name in enumerate(["explore", "gumbel", "shuffle"]):
        rngs[name] = torch.Generator(args.device).manual_seed(args.seed + 10**9 * k)
    now, progress = begin(envs, args), {"step": 0, "updates": 0, "restarts": 0}

    folder = Path(args.resume) if args.resume else new_folder(args)
    log = Log(folder, args)
    if args.resume:
        saved = load_checkpoint(folder, type(args))
        agent.load_state_dict(saved["agent"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved[name])
        if saved["args"]["device"] == args.device:  # a GPU's streams are not those of a CPU
            for name, rng in rngs.items():
                rng.set_state(saved["rngs"][name])
        if args.backend == "smax":  # games of StarCraft II cannot be stored: new ones begin
            envs.load_state_dict(saved["games"])
            now = {key: x.to(args.device) for key, x in saved["now"].items()}
        progress = saved["progress"]
        log.go_on(progress["step"], saved["csv_size"])

    def save():
        parts = {name: part.state_dict() for name, part in {"agent": agent, **optimizers}.items()}
        parts["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        parts["games"] = envs.state_dict() if args.backend == "smax" else None
        parts |= {"now": now, "progress": progress, "csv_size": log.csv.tell()}
        write_checkpoint(folder, args, parts)

    batch_steps, failures = args.num_envs * args.rollout_steps, 0
    with stop_signals() as stopped, contextlib.closing(log):
        try:
            while progress["step"] < args.total_timesteps and not stopped:
                start = time.perf_counter()
                try:
                    if failures:
                        envs.restart(args.seed + 100_003 * progress["restarts"])
                        now = begin(envs, args)
                    rollout(agent.policy, envs, buffer, now, rngs["explore"], args)
                    failures = 0
                except GameError as error:
                    failures, progress["restarts"] = failures + 1, progress["restarts"] + 1
                    if failures == args.max_failures:
                        raise
                    print(f"{error}; the rollout is played again in new games", file=sys.stderr)
                    continue
                middle = time.perf_counter()
                batch, sigma_a, metrics = estimate(agent, buffer, now, args)
                metrics |= update(agent, optimizers, batch, sigma_a, rngs, args)
                metrics["charts/episodic_return"] = buffer["return"][buffer["done"]].mean()
                metrics["charts/win_rate"] = buffer["won"][buffer["done"]].float().mean()
                values = torch.stack(list(metrics.values())).tolist()  # read back once
                metrics = dict(zip(metrics, values)) | {"charts/env_restarts": progress["restarts"]}
                metrics["charts/SPS"] = batch_steps / (time.perf_counter() - start)
                metrics["time/rollout"] = middle - start
                metrics["time/update"] = time.perf_counter() - middle
                progress["step"] += batch_steps
                progress["updates"] += 1
                last = progress["step"] >= args.total_timesteps
                if last or progress["step"] % args.eval_every < batch_steps:
                    metrics |= evaluate_anew(agent.policy, args, progress["step"], log, stopped)
                log.write(progress["step"], metrics)
                if last or stopped or progress["updates"] % args.checkpoint_every == 0:
                    save()
        except Exception as error:  # whatever ends the run: keep what was learned, if it is sound
            if not isinstance(error, FloatingPointError):
                save()
            raise
    if stopped:
        print(f"stopped at step {progress['step']:,}; --resume {folder} goes on")
    return 128 + stopped[0] if stopped else 0


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy, envs, args, stopped=()):
    """SMAC's protocol: win rate over greedy episodes, each by its own flag.

    Every game plays its share of the episodes: the first to end would favour the short ones.
    """
    obs, _, avail = envs.reset()
    games = len(obs)
    share = (args.eval_episodes - 1 - torch.arange(games, device=obs.device)) // games + 1
    hidden, keep = obs.new_zeros(*obs.shape[:2], args.hidden_dim), obs.new_zeros(games)
    total, played, wins, returns = keep.clone(), torch.zeros_like(share), [], []
    while (played < share).any() and not stopped:
        logits, hiddens = policy(obs[None], hidden, keep[None])
        actions = masked_log_softmax(logits[0], avail).argmax(-1)
        obs, _, avail, reward, done, won = envs.step(actions)
        total = total * keep + reward
        hidden, keep = hiddens[0], 1.0 - done.float()
        counted = done & (played < share)
        played += counted
        wins += won[counted].tolist()
        returns += total[counted].tolist()
    if stopped:
        return {}
    rate = float(np.mean(wins))
    return {
        "eval/win_rate": rate,
        "eval/win_rate_stderr": math.sqrt(rate * (1 - rate) / len(wins)),
        "eval/episodic_return": float(np.mean(returns)),
    }


def evaluate_anew(policy, args, step, log, stopped):
    """`evaluate` in games of its own, with other seeds than the training's at every step."""
    log.bar.set_postfix_str("evaluating")
    seed = 10**9 + (7919 * args.seed + step // args.eval_every) % 10**9
    for attempt in range(1, args.max_failures + 1):
        try:
            with contextlib.closing(make_envs(args, seed + attempt)) as games:
                return evaluate(policy, games, args, stopped)
        except GameError as error:
            if attempt == args.max_failures:
                raise
            print(f"{error}; the evaluation begins anew in new games", file=sys.stderr)


# ------------------------------------------------------------------------------- log and checkpoint
def new_folder(args):
    """Make a run's folder: RUNS_DIR/<map>__<script>__nu<nu>__<mixer>__s<seed>__<time>."""
    name = f"{args.backend}-{args.map_name}__{args.script}__nu{args.nu:g}"
    if args.nu > 0:
        name += f"__{args.mixer if args.critic == 'paper' else args.critic}"
    name += f"__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.runs_dir, name)
    folder.mkdir(parents=True)
    return folder


def write_checkpoint(folder, args, parts):
    """Replace checkpoint.pt by a whole one: a crash or a full disk leaves the old one."""
    content, temporary = io.BytesIO(), folder / "checkpoint.tmp"
    torch.save(parts | {"script": args.script, "args": asdict(args)}, content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "checkpoint.pt")
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder, args_class=Args):
    """A run folder's checkpoint, on the CPU. UsageError if it is missing, damaged or foreign."""
    path = Path(folder, "checkpoint.pt")
    try:
        if zipfile.ZipFile(path).testzip():  # torch writes checksums, but does not read them
            raise ValueError("its checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != args_class.script:
            raise ValueError(f"it was written by {checkpoint['script']}")
        args_class(**checkpoint["args"])
        return checkpoint
    except Exception as error:  # torch.load raises many kinds
        reason = " ".join(str(error).split())[:200]
        message = f"{path} is no checkpoint of this version of {args_class.script}: {reason}"
        raise UsageError(message) from None


class Log:
    """TensorBoard, progress.csv, a progress bar on a terminal; elsewhere a line every 30 s."""

    def __init__(self, folder, args):
        self.csv, self.said = open(folder / "progress.csv", "a", newline=""), time.monotonic()
        try:
            fcntl.flock(self.csv, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is in use by another process") from None
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        print(f"run folder {folder}", flush=True)
        if args.track:
            import wandb

            settings = {"config": asdict(args), "resume": "allow", "sync_tensorboard": True}
            wandb.init(project="maipg", id=folder.name, **settings)
        self.writer = SummaryWriter(folder)
        rows = [f"|{name}|{value}|\n" for name, value in asdict(args).items()]
        self.writer.add_text("hyper-parameters", "|argument|value|\n|-|-|\n" + "".join(rows))
        self.bar = tqdm(total=args.total_timesteps, unit="step", disable=None)

    def go_on(self, step, csv_size):
        """Resume at a checkpoint: what was written after it will come again."""
        self.csv.truncate(csv_size)
        self.writer.close()
        self.writer = SummaryWriter(self.writer.log_dir, purge_step=step + 1)
        self.bar.initial = self.bar.n = step

    def write(self, step, metrics):
        """One row of scalars, under the same names everywhere; step in environment steps."""
        row = {"global_step": step} | metrics | {k: metrics.get(k, math.nan) for k in EVALUATION}
        table = csv.DictWriter(self.csv, row)
        if not self.csv.tell():
            table.writeheader()
        table.writerow(row)
        self.csv.flush()
        for key, value in metrics.items():
            if not math.isnan(value):  # no episode has ended
                self.writer.add_scalar(key, value, step)
        text = "return {charts/episodic_return:.2f}, win rate {charts/win_rate:.2f}"
        text = (text + ", {charts/SPS:.0f} steps/s").format_map(metrics)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said > 30:
            left = (self.bar.total - step) / metrics["charts/SPS"] / 60
            print(f"step {step:,}: {text}, {left:.0f} min left", flush=True)
            self.said = time.monotonic()

    def close(self):
        self.bar.close()
        self.writer.close()
        self.csv.close()


# ------------------------------------------------------------------------------------- environments
# Both backends are a batch of N games behind one interface, tensors on the training device:
#     obs, state, avail = envs.reset()             # [N, n, O], [N, S], bool [N, n, A]
#     obs, state, avail, reward, done, won = envs.step(actions)      # the last three [N]
# A game whose episode is done begins the next one at once. obs ends with the agent's index; a dead
# agent sees nothing else and has only its no-op.
def make_envs(args, seed):
    return (SC2Envs if args.backend == "sc2" else SMAXEnvs)(args, seed)


def import_smax():
    """jaxmarl.environments.smax, without what jaxmarl prints when it is imported."""
    if not find_spec("jaxmarl"):
        raise UsageError("SMAX needs jaxmarl: pip install -r requirements.txt")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory to torch
    with contextlib.redirect_stdout(None):
        from jaxmarl.environments import smax
    return smax


@functools.lru_cache  # one compilation for training and evaluation
def smax_engine(map_name):
    """(env, reset, step) of JaxMARL's HeuristicEnemySMAX, jitted over a batch of games."""
    print("compiling SMAX (some 20 s, the first time)", flush=True)
    smax = import_smax()
    import jax
    import jax.numpy as jnp

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "maipg").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    rules = dict(see_enemy_actions=True, walls_cause_death=True, attack_mode="closest")
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(map_name), **rules)
    n = env.num_agents

    def look(obs, game):
        own = jnp.stack([obs[name] for name in env.agents])
        avail = env.get_avail_actions(game)
        avail = jnp.stack([avail[name] for name in env.agents])
        return jnp.concatenate([own, jnp.eye(n)], -1), obs["world_state"], avail

    def reset(seed):
        key, reset_key = jax.random.split(jax.random.PRNGKey(seed))
        obs, game = env.reset(reset_key)  # strong types, or the second step would compile once more
        game = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), game)
        return (key, game), look(obs, game)

    def step(state, actions):
        key, step_key = jax.random.split(state[0])
        actions = dict(zip(env.agents, actions))
        obs, game, reward, done, _ = env.step(step_key, state[1], actions)  # with auto-reset
        reward = reward[env.agents[0]]  # shared by the agents; 1 and more only for a victory
        return (key, game), (*look(obs, game), reward, done["__all__"], reward >= 1.0)

    return env, jax.jit(jax.vmap(reset)), jax.jit(jax.vmap(step))


class SMAXEnvs:
    """N games of SMAX in one jitted call a step; JAX and torch share the tensors (DLPack)."""

    def __init__(self, args, seed):
        env, self._reset, self._step = smax_engine(args.map_name)
        import jax

        self.jax, self.device = jax, torch.device(args.device)
        self.num_agents, self.num_actions = env.num_agents, env.num_ally_actions
        self.obs_dim, self.state_dim = env.obs_size + env.num_agents, env.state_size
        shared = self.device.type == "cuda" and jax.default_backend() == "gpu"
        self.jax_device = jax.devices("gpu" if shared else "cpu")[0]
        self.seeds = np.arange(args.num_envs, dtype=np.int32) * 1000 + seed
        _, _, avail = self.reset()
        self.step(avail.int().argmax(-1))  # compiles

    def _to_torch(self, arrays):
        tensors = [torch.from_dlpack(x.block_until_ready()).to(self.device) for x in arrays]
        tensors[2] = tensors[2] > 0  # avail
        return tensors

    def reset(self):
        self.games, seen = self._reset(self.jax.device_put(self.seeds, self.jax_device))
        return self._to_torch(seen)

    def step(self, actions):
        actions = actions.int() if self.jax_device.platform == "gpu" else actions.int().cpu()
        self.games, seen = self._step(self.games, self.jax.dlpack.from_dlpack(actions))
        return self._to_torch(seen)

    def state_dict(self):
        leaves = self.jax.tree.leaves(self.games)
        return {str(k): torch.from_numpy(np.array(x)) for k, x in enumerate(leaves)}

    def load_state_dict(self, state):
        leaves = [self.jax.device_put(x.numpy(), self.jax_device) for x in state.values()]
        self.games = self.jax.tree.unflatten(self.jax.tree.structure(self.games), leaves)

    def close(self):
        """Nothing to do: there are no processes."""


def play_sc2(pipe, map_name, seed, folder):
    """One game in a process of its own: sends what is seen and happened, receives actions.

    Any fault is sent instead, and SC2Envs ends the process. reset() is called once per episode:
    twice would corrupt it, and before the first one has ended also shrink all rewards.
    """
    os.setsid()  # a process group, so that worker and game can be killed together
    tempfile.tempdir = folder

    def end_with_parent():  # a trainer that is killed has no time to close its games
        multiprocessing.parent_process().join()
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        from smac.env import StarCraft2Env

        env = StarCraft2Env(map_name, seed=seed)
        env.reset()
        reward, done, won = 0.0, False, False
        while True:
            obs = np.stack(env.get_obs()).astype(np.float32)
            state = env.get_state().astype(np.float32)
            avail = np.array(env.get_avail_actions(), dtype=bool)
            if avail[:, 0].all():  # after a crash: the dead units of the last episode
                raise RuntimeError("the game did not restart")
            pipe.send((obs, state, avail, np.float32(reward), done, won))
            reward, done, info = env.step(pipe.recv())
            if not info:  # smac's answer to a crash: (0, True, {})
                raise RuntimeError("the game crashed")
            won = info["battle_won"]
            if done:
                env.reset()
    except Exception as fault:
        pipe.send(" ".join(f"{type(fault).__name__}: {fault}".split()))


class SC2Envs:
    """N games of StarCraft II through oxwhirl's smac, one spawned process each."""

    def __init__(self, args, seed):
        self.args, self.device = args, torch.device(args.device)
        self.restart(seed)
        obs, state, avail = self.first
        _, self.num_agents, self.num_actions = avail.shape
        self.obs_dim, self.state_dim = obs.shape[-1], state.shape[-1]

    def restart(self, seed):
        """End all games, if there are any, and begin new ones."""
        self.close()
        self.folder = tempfile.mkdtemp(prefix="maipg-")  # the games' own temporary files
        context = multiprocessing.get_context("spawn")  # a forked worker would not end its game
        for k in range(self.args.num_envs):
            ours, theirs = context.Pipe()
            config = (theirs, self.args.map_name, seed + 1000 * k, self.folder)
            self.workers.append(context.Process(target=play_sc2, args=config, daemon=True))
            self.workers[k].start()
            self.pipes.append(ours)
            theirs.close()
        try:
            self.first = self._receive(max(self.args.game_timeout, 300.0))[:3]  # a launch is slow
        except BaseException:
            self.close()
            raise

    def _receive(self, timeout):
        """obs, state, avail, reward, done, won of all games. GameError: one has failed."""
        rows = []
        for k, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv() if pipe.poll(timeout) else f"no answer within {timeout:g} s"
            except (EOFError, OSError):
                answer = "its process ended"
            if isinstance(answer, str):
                raise GameError(f"game {k}: {answer}")
            rows.append(answer)
        obs, *others = (torch.as_tensor(np.stack(x)).to(self.device) for x in zip(*rows))
        index = torch.eye(obs.shape[1], device=self.device).expand(len(obs), -1, -1)
        return torch.cat([obs, index], -1), *others

    def reset(self):
        """The first observations. To be called once: every game begins its episodes by itself."""
        return self.first

    def step(self, actions):
        for pipe, row in zip(self.pipes, actions.tolist()):
            with contextlib.suppress(OSError):  # a process that is gone shows in _receive
                pipe.send(row)
        return self._receive(self.args.game_timeout)

    def close(self):
        """End every worker and its game; nothing outlives this call."""
        for worker in getattr(self, "workers", []):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.kill()
            worker.join()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.workers, self.pipes = [], []


def what_sc2_lacks(map_name):
    """What is missing to play a map on StarCraft II, or an empty string."""
    spec = find_spec("smac")
    home = Path(os.environ.get("SC2PATH", "~/StarCraftII")).expanduser()
    if not spec or not any(Path(p, "env").is_dir() for p in spec.submodule_search_locations or []):
        return "oxwhirl's smac is not installed (PyPI's smac is another project)"
    if not any(home.glob("Versions/Base*/SC2_x64")):
        return f"no StarCraft II in {home} (SC2PATH)"
    if not (home / f"Maps/SMAC_Maps/{map_name}.SC2Map").is_file():
        return f"no map {map_name} in {home}/Maps/SMAC_Maps"
    return ""


# --------------------------------------------------------------------------------------------- main
def parse(argv, args_class=Args):
    """Args of a command line; --resume takes all but a few of them from its folder."""
    maps = "".join(f"\n    nu {nu}, {epochs:2d} epochs: {names}" for nu, epochs, names in TABLE_3)
    text = f"{__doc__}\nMaps, with the paper's settings (Table 3):\n{maps}"
    args = tyro.cli(args_class, args=argv, description=text)
    if args.resume:
        saved = args_class(**load_checkpoint(args.resume, args_class)["args"])
        args = tyro.cli(args_class, args=argv, default=saved)
        for name in asdict(args).keys() - {"resume", "total_timesteps", "device", "threads"}:
            if getattr(args, name) != getattr(saved, name):
                raise UsageError(f"--{name.replace('_', '-')} cannot change when a run is resumed")
    return args


def main(argv=None, args_class=Args, resolve=resolve, train=train):
    """Run a command line. The exit code: 0 done, 1 failed, 2 bad input, 128 + n signal n."""
    try:
        args = resolve(parse(argv, args_class))
        torch.set_num_threads(args.threads)
        with contextlib.closing(make_envs(args, args.seed)) as envs:
            return train(args, envs)
    except (UsageError, GameError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
