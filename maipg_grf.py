"""MAIPG on Google Research Football: Multi-Agent Interpolated Policy Gradients, in one file.

MAPPO's policy gradient rests on sampled joint actions: unbiased, but noisy. MAIPG mixes in a
second, quieter gradient that goes through a factorised critic q_tot, differentiated by the actions.
The weight nu trades bias against variance; nu = 0 is MAPPO, number for number. The policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(s, mu(s))] * q_scale               `deterministic_pg_loss`   Eq. (10)
      + ent_coef * mean[entropy]

r: probability ratio of new to old policy. A: advantage (`gae`), normalised; sigma_A is the standard
deviation divided out. q_tot: one utility Q_i per agent, mixed (QMIX by default), regressed on
`td_lambda` targets. mu(s): a straight-through Gumbel-softmax sample of the policy, so that q_tot
has a gradient in it. q_scale = 1 / (n sigma_A) brings q_tot to the unit of A (--q-scale advantage).

Axes: T rollout steps, N games, n agents, A actions, O observation, S state, H hidden units; L steps
in a chunk, B chunks in a minibatch. `global_step` counts environment steps: T * N for a rollout.

    python maipg_grf.py --scenario academy_3_vs_1_with_keeper    # train
    python maipg_grf.py --resume RUN_DIR                         # go on where a run was stopped
    python maipg_grf.py --evaluate RUN_DIR --capture-video       # greedy success rate, and a film
"""

import contextlib
import copy
import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.stats import binomtest
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------- settings
# Agents per scenario. Which players they steer is the engine's choice, and changes in an episode:
# it wants the one nearest to the ball among them, which can be the goalkeeper.
SCENARIOS = {
    "academy_3_vs_1_with_keeper": 3,
    "academy_run_pass_and_shoot_with_keeper": 2,
    "academy_counterattack_easy": 4,
    "academy_counterattack_hard": 4,
    "academy_corner": 10,
    "academy_empty_goal_close": 1,  # not in the paper: a quick proof that a policy learns to score
}


@dataclass
class Args:
    # --- what to run
    scenario: str = "academy_3_vs_1_with_keeper"  # one of the academy's
    seed: int = 1  # of weights, exploration and games
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: int = 2  # CPU threads of torch
    total_timesteps: int = 25_000_000  # environment steps
    resume: str = ""  # run folder to go on with
    evaluate: str = ""  # run folder whose policy is to be evaluated
    capture_video: bool = False  # with --evaluate: a gif, drawn by the engine
    # --- MAIPG
    nu: float = 0.5  # weight of the deterministic gradient, 0 is MAPPO
    mixer: Literal["qmix", "vdn", "joint"] = "qmix"  # how q_tot is made of the utilities
    q_scale: Literal["advantage", "raw"] = "advantage"  # unit of q_tot: 1 / (n sigma_A), or 1
    td_lambda: float = 0.8  # of the targets of q_tot
    target_tau: float = 0.05  # step of the target networks, once per epoch
    temperature: float = 1.0  # of the Gumbel-softmax
    mixer_dim: int = 64  # units in the mixer and its hypernetworks
    # --- MAPPO
    num_envs: int = 50  # parallel games
    num_workers: int | None = None  # processes that play them; None: one per CPU core
    rollout_steps: int = 400  # steps per game between updates
    update_epochs: int = 15  # passes over each rollout
    num_minibatches: int = 1  # minibatches per epoch
    chunk_length: int = 10  # steps that gradients go back through time
    hidden_dim: int = 64  # units per layer of policy, critic and utility
    learning_rate: float = 5e-4  # Adam, policy
    critic_lr: float = 5e-4  # Adam, critic
    q_lr: float = 5e-4  # Adam, utility and mixer
    adam_eps: float = 1e-5  # Adam's epsilon
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # of the advantages
    clip_eps: float = 0.2  # PPO clip, of policy and value
    ent_coef: float = 0.01  # entropy bonus
    max_grad_norm: float = 10.0  # per network
    huber_delta: float = 10.0  # where the value losses turn linear
    norm_beta: float = 0.99999  # memory of the value normalisers
    bootstrap_time_limits: bool = False  # count the value of the state that a time limit cuts off
    # --- evaluation and output
    eval_every: int = 400_000  # environment steps between evaluations
    eval_episodes: int = 100  # greedy episodes per evaluation
    checkpoint_every: int = 5  # updates
    grad_variance_every: int = 0  # updates between gradient variance estimates; 0: none
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    # --- worker processes
    env_timeout: float = 120.0  # seconds after which a silent worker is replaced
    max_failures: int = 5  # failures of one worker in a row that stop the run


SCRIPT = Path(__file__).stem  # the name in run folders and checkpoints
RESUMABLE = {"resume", "total_timesteps", "device", "threads", "checkpoint_every", "track"}
EVALUABLE = {"evaluate", "eval_episodes", "num_envs", "seed", "device", "threads", "capture_video"}
CHARTS = {"return": "charts/episodic_return", "length": "charts/episodic_length"}
CHARTS["won"] = "charts/win_rate"
SOMETIMES = ["eval/win_rate", "eval/win_rate_stderr", "eval/episodic_return", "variance/gradient"]
FRACTIONS = ["nu", "td_lambda", "target_tau", "gamma", "gae_lambda", "clip_eps", "norm_beta"]
BOUNDS = dict.fromkeys(FRACTIONS, (0, 1))
BOUNDS |= {"seed": (0, 10**8), "threads": (1, 1024), "ent_coef": (0, math.inf)}
BOUNDS |= {"grad_variance_every": (0, math.inf)}


class UsageError(Exception):
    """Something that the user can mend: one line on stderr, exit code 2, nothing written."""


class RunError(Exception):
    """The run cannot go on (a loss is NaN): exit code 1."""


class GameError(RunError):
    """A worker failed several times in a row: the run is saved and stops."""


def resolve(args):
    """Fill in device and workers. Raises UsageError: what is wrong, and what is valid."""
    args = copy.copy(args)
    if args.scenario not in SCENARIOS:
        raise UsageError(f"--scenario {args.scenario}: one of {' '.join(SCENARIOS)}")
    if not find_spec("gfootball"):
        raise UsageError("gfootball is not installed: run benchmark/install_grf.sh")
    if args.num_workers is None:
        args.num_workers = min(args.num_envs, os.cpu_count())
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in asdict(args).items():  # what BOUNDS does not name must be positive
        low, high = BOUNDS.get(name, (1 if isinstance(value, int) else 1e-12, math.inf))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
    chunks = args.num_envs * args.rollout_steps // args.chunk_length
    rules = [
        (args.norm_beta < 1, "norm-beta must be below 1"),
        (args.rollout_steps % args.chunk_length == 0, "chunk-length must divide rollout-steps"),
        (chunks % args.num_minibatches == 0, f"num-minibatches must divide the {chunks} chunks"),
        (not args.grad_variance_every or args.num_envs > 1, "grad-variance-every needs 2 games"),
        (not args.capture_video or args.evaluate, "capture-video goes with --evaluate RUN_DIR"),
        (args.num_workers <= args.num_envs, "num-workers must not exceed num-envs"),
        (not args.track or find_spec("wandb"), "track needs wandb: pip install wandb"),
        (not Path(args.runs_dir).is_file(), f"runs-dir {args.runs_dir} is a file"),
    ]
    for holds, message in rules:
        if not holds:
            raise UsageError("--" + message)
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


# ------------------------------------------------------------------------------------- environments
# N games behind one interface, tensors on the training device:
#     obs, state, avail = envs.reset()              # [N, n, O], [N, n, S], bool [N, n, A]
#     obs, state, avail, reward, done, info = envs.step(actions)     # auto-reset; reward, done [N]
# info: `return`, `length`, `won` (a goal) of the episodes that end (read them where done),
# `truncated` (by the time limit), `broken` (the worker crashed); `final`: the (obs, state, avail)
# before the reset. obs is simple115v2, whose one-hot of the active player tells an agent who it is;
# state is the same without it: one row a game, expanded over n. All actions are always available.
OBS, STATE, ACTIONS = 115, 104, 19


def import_football():
    """gfootball's modules config and football_env_core, without what gym says when imported."""
    with contextlib.redirect_stderr(io.StringIO()):
        from gfootball.env import config, football_env_core
    return config, football_env_core


class Football:
    """One game, on gfootball's engine without its wrappers, which copy and convert a lot.

    Observations and rewards are those of create_environment(representation="simple115v2",
    rewards="scoring,checkpoints"), the rewards summed over the agents and given to all of them.
    """

    def __init__(self, scenario, render=False):
        config, football_env_core = import_football()
        self.n = SCENARIOS[scenario]
        players = [f"agent:left_players={self.n}"]
        settings = {"level": scenario, "players": players, "display_game_stats": False}
        size = {"render_resolution_x": 640, "render_resolution_y": 360} if render else {}
        self.core = football_env_core.FootballEnvCore(config.Config(settings | size))
        if render:
            self.core.render(mode="rgb_array")

    def reset(self):
        """obs [n, 115]. Each episode's engine seed is drawn from Python's `random`."""
        self.core.reset()
        self.collected = [0] * self.n
        return self.look(self.core._observation)

    def look(self, raw):
        """simple115v2 [n, 115]: teams, ball, its owner, active player, game mode."""
        obs = np.zeros((self.n, OBS), np.float32)
        obs[:, :88] = -1.0  # players that the scenario does not have
        parts = ("left_team", "left_team_direction", "right_team", "right_team_direction")
        for i, name in enumerate(parts):
            values = raw[name].ravel()
            obs[:, 22 * i : 22 * i + len(values)] = values
        obs[:, 88:91], obs[:, 91:94] = raw["ball"], raw["ball_direction"]
        obs[:, 94 + raw["ball_owned_team"] + 1] = 1.0
        for i, active in enumerate(raw["left_agent_controlled_player"]):
            if active != -1:
                obs[i, 97 + active] = 1.0
        obs[:, 108 + raw["game_mode"]] = 1.0
        return obs

    def step(self, actions):
        """obs [n, 115], the team's reward, done, whether a goal was scored, by the time limit."""
        raw, score, done, _ = self.core.step(actions)
        reward = score * self.n
        for i, active in enumerate(raw["left_agent_controlled_player"]):
            if score == 1:  # a goal pays all checkpoints that are left
                reward += 0.1 * (10 - self.collected[i])
                self.collected[i] = 10
            elif raw["ball_owned_team"] == 0 and raw["ball_owned_player"] == active:
                distance = ((raw["ball"][0] - 1) ** 2 + raw["ball"][1] ** 2) ** 0.5
                while self.collected[i] < 10 and distance <= 0.99 - 0.8 / 9 * self.collected[i]:
                    reward += 0.1
                    self.collected[i] += 1
        limit = bool(done and raw["steps_left"] <= 0 and score == 0)
        return self.look(raw), reward, done, score == 1, limit


def keep_no_copies():
    """In this process: gfootball copies every observation for its dumps, which are off here."""
    _, football_env_core = import_football()
    football_env_core.copy = SimpleNamespace(deepcopy=lambda observation: observation)


def play_football(pipe, scenario, shared, rows, seed):
    """A worker with its share of the games; on a fault it says why, and ends."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    try:
        random.seed(seed)  # gfootball draws the engine's seeds from it, one for each episode
        keep_no_copies()
        shared = {key: value.numpy() for key, value in shared.items()}
        games, totals = [Football(scenario) for _ in rows], np.zeros((len(rows), 2))
        for k, game in zip(rows, games):
            shared["obs"][k] = game.reset()
        pipe.send("done")
        while pipe.recv() == "step":
            for game, total, k in zip(games, totals, rows):
                obs, reward, done, won, limit = game.step(shared["actions"][k].tolist())
                total += reward, 1
                shared["last_obs"][k], shared["reward"][k], shared["done"][k] = obs, reward, done
                shared["won"][k], shared["truncated"][k] = won, limit
                shared["return"][k], shared["length"][k] = total
                if done:
                    obs = game.reset()
                    total[:] = 0.0
                shared["obs"][k] = obs
            pipe.send("done")
    except EOFError:
        pass  # the trainer closed the pipe: the normal end
    except BaseException as fault:
        with contextlib.suppress(OSError):
            pipe.send(" ".join(f"{type(fault).__name__}: {fault}".split()))


class FootballEnvs:
    """N games in worker processes over shared memory."""

    num_actions, obs_dim, state_dim = ACTIONS, OBS, STATE

    def __init__(self, args, seed):
        self.args, self.seed, self.device = args, seed, torch.device(args.device)
        self.num_agents = n = SCENARIOS[args.scenario]
        count = args.num_envs
        self.shared = {"actions": torch.zeros(count, n, dtype=torch.long)}
        self.shared |= {key: torch.zeros(count, n, OBS) for key in ("obs", "last_obs")}
        for key in ("reward", "return", "length"):
            self.shared[key] = torch.zeros(count)
        for key in ("done", "won", "truncated"):
            self.shared[key] = torch.zeros(count, dtype=torch.bool)
        for tensor in self.shared.values():
            tensor.share_memory_()
        self.avail = torch.ones(count, n, ACTIONS, dtype=torch.bool, device=self.device)
        workers = min(args.num_workers, count)
        self.rows = [range(count)[w::workers] for w in range(workers)]
        self.workers, self.pipes, self.restarts = {}, {}, 0
        self.launches, self.failures = [0] * workers, [0] * workers
        try:
            for w in range(workers):
                self._start(w)
            for w in range(workers):
                self._receive(w)
        except BaseException:
            self.close()
            raise

    def _start(self, w):
        """A new process for the games of worker w, with a seed of its own."""
        context = torch.multiprocessing.get_context("spawn")
        self.pipes[w], theirs = context.Pipe()
        seed = self.seed + 1000 * w + 100_003 * self.launches[w]
        config = (theirs, self.args.scenario, self.shared, self.rows[w], seed)
        self.workers[w] = context.Process(target=play_football, args=config, daemon=True)
        self.workers[w].start()
        theirs.close()
        self.launches[w] += 1

    def _answer(self, w):
        """What worker w sends, or what is wrong with it."""
        try:
            if self.pipes[w].poll(self.args.env_timeout):
                return self.pipes[w].recv()
            return f"no answer within {self.args.env_timeout:g} s"
        except (EOFError, OSError):
            return "its process ended"

    def _receive(self, w):
        """Wait for worker w; whether it had to be replaced, its episodes being lost."""
        broken = False
        while (answer := self._answer(w)) != "done":
            broken, self.restarts, self.failures[w] = True, self.restarts + 1, self.failures[w] + 1
            self._stop(w)
            if self.failures[w] >= self.args.max_failures:
                raise GameError(f"worker {w} failed {self.failures[w]} times in a row: {answer}")
            print(f"worker {w} is replaced: {answer}", file=sys.stderr, flush=True)
            self._start(w)
        if not broken and self.shared["done"][list(self.rows[w])].any():  # an episode to its end
            self.failures[w] = 0
        return broken

    def _stop(self, w):
        self.pipes[w].close()
        self.workers[w].kill()
        self.workers[w].join()

    def _view(self, prefix=""):
        obs = self.shared[prefix + "obs"].to(self.device, copy=True)
        state = torch.cat([obs[:, 0, :97], obs[:, 0, 108:]], -1)  # without the active player
        return obs, state.unsqueeze(1).expand(-1, self.num_agents, -1), self.avail

    def reset(self):
        """The first observations. To be called once: every episode's end begins the next."""
        return self._view()

    def step(self, actions):
        self.shared["actions"].copy_(actions)
        for w in self.pipes:
            with contextlib.suppress(OSError):  # a worker that is gone shows in _receive
                self.pipes[w].send("step")
        broken = torch.zeros(self.args.num_envs, dtype=torch.bool)
        for w in self.pipes:
            if self._receive(w):
                broken[list(self.rows[w])] = True
        keys = ("reward", "return", "length", "won", "truncated")
        info = {key: self.shared[key].clone() for key in keys}
        info |= {"broken": broken, "done": self.shared["done"] | broken}
        info = {key: value.to(self.device) for key, value in info.items()}
        reward, done = info.pop("reward"), info.pop("done")
        return *self._view(), reward, done, info | {"final": self._view("last_")}

    def state_dict(self):
        """A running game cannot be stored: resumed runs begin new episodes."""
        return {"restarts": self.restarts}

    def load_state_dict(self, state):
        self.restarts += state["restarts"]

    def close(self):
        """End all workers; nothing outlives this call."""
        for w in self.workers:
            self._stop(w)


def make_envs(args, seed=None):
    """The games of resolved args; seed None: those of the training, which are announced."""
    if seed is None:
        where = f"{args.num_workers} worker processes, device {args.device}"
        print(f"{args.scenario}: {SCENARIOS[args.scenario]} agents, {where}", flush=True)
    return FootballEnvs(args, args.seed if seed is None else seed)


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
        first = lambda width: [nn.LayerNorm(width), orthogonal(nn.Linear(width, dim), gain)]
        self.obs_in = nn.Sequential(*first(obs_dim))
        self.state_in = nn.Sequential(*first(state_dim)) if state_dim else None
        second = orthogonal(nn.Linear(dim, dim), math.sqrt(2))
        self.body = nn.Sequential(
            nn.ReLU(), nn.LayerNorm(dim), second, nn.ReLU(), nn.LayerNorm(dim)
        )
        self.gru = orthogonal(nn.GRUCell(dim, dim), 1.0)
        self.head = nn.Sequential(nn.LayerNorm(dim), orthogonal(nn.Linear(dim, out_dim), out_gain))

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
        return self.head(hiddens), hiddens


class Mixer(nn.Module):
    """q_tot from the utilities of the chosen actions: QMIX, VDN, or Q(s, a_1 ... a_n) unfactorised.

    QMIX is monotonic, dq_tot/dQ_i >= 0: each agent's best action is part of the team's best one.
    """

    def __init__(self, kind, num_agents, num_actions, state_dim, dim):
        super().__init__()
        hyper = lambda out: nn.Sequential(nn.Linear(state_dim, dim), nn.ReLU(), nn.Linear(dim, out))
        self.kind, self.dim, self.norm, self.value = kind, dim, nn.LayerNorm(state_dim), hyper(1)
        if kind == "qmix":
            self.w_1, self.b_1 = hyper(num_agents * dim), nn.Linear(state_dim, dim)
            self.w_2 = hyper(dim)
        elif kind == "joint":
            self.state_in = nn.Linear(state_dim, dim)
            self.joint_in = nn.Linear(num_agents * (num_actions + 1), dim)
            self.out = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def weights(self, state):
        """What depends on the state [..., S] alone: made once, used for several joint actions."""
        s = self.norm(state)
        weights = [self.value(s).squeeze(-1)]
        if self.kind == "qmix":  # absolute weights make it monotonic
            w_1 = self.w_1(s).abs().unflatten(-1, (-1, self.dim))
            weights += [w_1, self.b_1(s), self.w_2(s).abs()]
        return weights + ([self.state_in(s)] if self.kind == "joint" else [])

    def forward(self, utilities, actions, weights):
        """Utilities and one-hot (or straight-through) actions, [..., n, A] -> q_tot [...]."""
        chosen = (utilities * actions).sum(-1)
        if self.kind == "vdn":
            return chosen.sum(-1) + weights[0]
        if self.kind == "joint":
            joint = torch.cat([actions.flatten(-2), chosen], -1)
            return self.out(self.joint_in(joint) + weights[1]).squeeze(-1) + weights[0]
        value, w_1, b_1, w_2 = weights
        return (F.elu((chosen.unsqueeze(-2) @ w_1).squeeze(-2) + b_1) * w_2).sum(-1) + value


class ValueNorm(nn.Module):
    """Running, debiased mean and variance of a value network's targets (MAPPO's ValueNorm)."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta
        self.register_buffer("moments", torch.zeros(3))  # of x, x^2 and 1: the last one debiases

    def update(self, x, mask):
        new = torch.stack([masked_mean(x, mask), masked_mean(x * x, mask), mask.new_ones(())])
        self.moments.lerp_(new, 1 - self.beta)

    def scale(self):
        """(mean, std), 0 and 0.1 before the first update."""
        mean, square = self.moments[:2] / self.moments[2].clamp(min=1e-5)
        return mean, (square - mean * mean).clamp(min=0.01).sqrt()

    def normalize(self, x):
        mean, std = self.scale()
        return (x - mean) / std

    def denormalize(self, x):
        mean, std = self.scale()
        return x * std + mean


class Agent(nn.Module):
    """All networks and normalisers. Policy and critic come first: every nu starts from the same."""

    def __init__(self, envs, args):
        super().__init__()
        n, num_actions, dim = envs.num_agents, envs.num_actions, args.hidden_dim
        self.policy = Recurrent(envs.obs_dim, dim, num_actions, 0.01)
        self.critic = Recurrent(envs.obs_dim, dim, 1, 1.0, envs.state_dim)
        self.value_norm = ValueNorm(args.norm_beta)
        if args.nu > 0:  # the small last gain: a utility starts indifferent between actions
            self.utility = Recurrent(envs.obs_dim, dim, num_actions, 0.01, envs.state_dim)
            self.mixer = Mixer(args.mixer, n, num_actions, envs.state_dim, args.mixer_dim)
            self.target_utility, self.target_mixer = copy.deepcopy((self.utility, self.mixer))
            self.q_norm = ValueNorm(args.norm_beta)


# --------------------------------------------------------------------------- estimators and losses
def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_var(x, mask):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask).clamp(min=1e-12)


def masked_log_softmax(logits, avail):
    """log pi [..., A]; as in MAPPO, an action that is not available has the logit -1e10."""
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


def gae(rewards, values, next_values, terminated, done, gamma, lam):
    """Generalised advantage estimation: A-hat of Eq. (10).

    rewards, terminated, done [T, N]; values, next_values [T, N, n] in units of the reward. Ends cut
    the sum (`done`) and, unless they are a time limit to bootstrap, the next value (`terminated`).
    """
    delta = rewards.unsqueeze(-1) + gamma * next_values * ~terminated.unsqueeze(-1) - values
    return backward_sum(delta, gamma * lam * ~done.unsqueeze(-1))


def td_lambda(rewards, next_q, terminated, done, gamma, lam):
    """TD(lambda) targets of q_tot, all [T, N]; next_q_t = target_q_tot(s_{t+1}, mu(s_{t+1})).

    G_t = r_t + gamma ((1 - lambda) next_q_t + lambda G_{t+1}); r_t + gamma next_q_t where cut off.
    """
    trace = lam * ~done
    trace[-1] = 0.0  # nothing to sum up after the rollout's last step
    return backward_sum(rewards + gamma * (1 - trace) * next_q * ~terminated, gamma * trace)


def stochastic_pg_loss(log_ratio, advantages, alive, clip_eps):
    """PPO's clipped loss, Eq. (3): minus the mean over live agents. All [L, B, n]."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), alive)


def gumbel_softmax(log_pi, temperature, rng):
    """Straight-through sample [..., A]: one-hot forward, the softmax's gradient backward."""
    soft = torch.softmax(gumbel_max(log_pi, rng) / temperature, -1)
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft


def deterministic_pg_loss(mu, utilities, mixer, weights, valid, q_scale):
    """Second term of Eq. (10): minus the mean over steps of q_tot(s, mu(s)) * q_scale.

    mu, utilities [L, B, n, A], valid [L, B]. Utilities and weights come detached, and the caller
    differentiates with respect to the policy alone: only mu carries a gradient.
    """
    return -masked_mean(mixer(utilities, mu, weights), valid) * q_scale


def interpolate(stochastic, deterministic, nu):
    """Eq. (10)."""
    return (1 - nu) * stochastic + nu * deterministic


def value_loss(values, targets, mask, delta, old_values=None, clip_eps=None):
    """Huber loss in normalised units; given old values, clipped around them as in MAPPO."""
    loss = F.huber_loss(values, targets, reduction="none", delta=delta)
    if old_values is not None:
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        loss = torch.max(loss, F.huber_loss(clipped, targets, reduction="none", delta=delta))
    return masked_mean(loss, mask)


# ------------------------------------------------------------------------------ rollout and targets
@torch.no_grad()
def rollout(policy, envs, buffer, now, rng, args):
    """Play T steps of the stochastic policy into the buffer; returns the seconds in the games.

    `now`, updated here, is what outlives a rollout: obs [N, n, O], state [N, S], avail [N, n, A],
    keep [N] (0 where an episode begins), and the hidden state [N, n, H] of each network.
    """
    seconds, hidden = 0.0, now["policy_hidden"]
    for t in range(args.rollout_steps + 1):
        logits, hiddens = policy(now["obs"][None], hidden, now["keep"][None])
        row = {key: now[key] for key in ("obs", "state", "avail", "keep")}
        row["log_pi"] = masked_log_softmax(logits[0], now["avail"])
        if t < args.rollout_steps:  # of the state after the last step only obs and log_pi count
            actions, hidden = gumbel_max(row["log_pi"], rng).argmax(-1), hiddens[0]
            start = time.perf_counter()
            obs, state, avail, reward, done, info = envs.step(actions)
            seconds += time.perf_counter() - start
            now |= {"obs": obs, "state": state[:, 0], "avail": avail, "keep": 1.0 - done.float()}
            last_obs, last_state, last_avail = info.pop("final")
            row |= info | {"policy_hidden": hidden, "reward": reward, "done": done}
            row["actions"] = F.one_hot(actions, logits.shape[-1]).float()
            if args.bootstrap_time_limits:
                row |= {"last_obs": last_obs, "last_avail": last_avail}
                row["last_state"] = last_state[:, 0]
        for key, value in row.items():
            if key not in buffer:  # allocated in the first rollout, then used again
                buffer[key] = value.new_zeros(args.rollout_steps + 1, *value.shape)
            buffer[key][t] = value
    return seconds


def unroll(network, hidden, buffer, cut):
    """A critic over a whole rollout in one pass: (output before each step, output after it
    [T, N, n, out], hidden states). After a time limit that is bootstrapped (`cut`) comes the last
    state of the old episode, not the first of the new one."""
    out, hiddens = network(buffer["obs"], hidden, buffer["keep"], buffer["state"])
    after = out[1:].clone()
    if cut:
        obs, state = buffer["last_obs"][cut][None], buffer["last_state"][cut][None]
        after[cut] = network(obs, hiddens[cut], obs.new_ones(obs.shape[:2]), state)[0][0]
    return out[:-1], after, hiddens


def estimate_v(agent, batch, buffer, now, ends, args):
    """Put values, returns, advantages [T, N, n] into the batch; metrics and V's hidden states."""
    out, after, hiddens = unroll(agent.critic, now["critic_hidden"], buffer, ends[2])
    values, next_values = (agent.value_norm.denormalize(x.squeeze(-1)) for x in (out, after))
    advantages = gae(batch["reward"], values, next_values, *ends[:2], args.gamma, args.gae_lambda)
    mean, variance = (f(advantages, batch["alive"]) for f in (masked_mean, masked_var))
    sigma_a = variance.sqrt()
    batch |= {"values": out.squeeze(-1), "returns": advantages + values}
    batch["advantages"] = (advantages - mean) / (sigma_a + 1e-5)
    explained = 1 - variance / masked_var(batch["returns"], batch["alive"])
    metrics = {"diagnostics/sigma_a": sigma_a, "diagnostics/explained_variance_v": explained}
    return metrics, {"critic_hidden": hiddens}, advantages


def estimate_q(agent, batch, raw_advantages, buffer, now, ends, rng, args, samples=8):
    """Put the targets of q_tot [T, N] into the batch; metrics and hidden states.

    `variance/*` compare q_tot with the advantage on data that no network has been trained on, with
    Qc = q_tot(s, a) - E_{a' ~ pi} q_tot(s, a'), the expectation over `samples` joint actions.
    """
    utilities, _, hiddens = unroll(agent.utility, now["utility_hidden"], buffer, None)
    _, after, target_hiddens = unroll(agent.target_utility, now["target_hidden"], buffer, ends[2])
    log_pi, next_state = buffer["log_pi"][1:].clone(), buffer["state"][1:].clone()
    if cut := ends[2]:
        obs, next_state[cut] = buffer["last_obs"][cut][None], buffer["last_state"][cut]
        logits, _ = agent.policy(obs, buffer["policy_hidden"][cut], obs.new_ones(obs.shape[:2]))
        log_pi[cut] = masked_log_softmax(logits[0], buffer["last_avail"][cut])
    greedy = lambda x: F.one_hot(x.argmax(-1), x.shape[-1]).float()
    next_q = agent.target_mixer(after, greedy(log_pi), agent.target_mixer.weights(next_state))
    next_q = agent.q_norm.denormalize(next_q)  # of mu(s') = argmax pi, Section 2.1
    targets = td_lambda(batch["reward"], next_q, *ends[:2], args.gamma, args.td_lambda)
    batch["q_targets"] = targets

    weights, log_pi = agent.mixer.weights(batch["state"]), buffer["log_pi"][:-1]
    q_tot = lambda actions: agent.q_norm.denormalize(agent.mixer(utilities, actions, weights))
    q = q_tot(batch["actions"])
    qc = q - sum(q_tot(greedy(gumbel_max(log_pi, rng))) for _ in range(samples)) / samples
    a, v = raw_advantages.mean(-1), (batch["returns"] - raw_advantages).mean(-1)
    var = functools.partial(masked_var, mask=batch["valid"])
    return {
        "diagnostics/explained_variance_q": 1 - var(targets - q) / var(targets),
        "variance/r_var_pi": var(a - qc) / var(a),
        "variance/r_var_v": var(a - (q - v)) / var(a),
        "variance/corr": (var(a + qc) - var(a - qc)) / (4 * (var(a) * var(qc)).sqrt()),
    }, {"utility_hidden": hiddens, "target_hidden": target_hiddens}


@torch.no_grad()
def estimate(agent, buffer, now, rng, args):
    """A rollout's advantages, targets and diagnostics, before anything is trained on it.

    Returns metrics and the batch in chunks [L, B, ...], with the hidden states [1, B, n, H] that
    they begin with. `now` takes over the last hidden states, for the next rollout.
    """
    keys = ["obs", "state", "avail", "keep", "actions", "log_pi", "reward"]
    batch = {key: buffer[key][:-1] for key in keys}
    done, limit = buffer["done"][:-1], buffer["truncated"][:-1] & args.bootstrap_time_limits
    cut = limit.nonzero(as_tuple=True) if args.bootstrap_time_limits else None
    ends = (done & ~limit, done, cut)  # by default a time limit is an end like others, as in MAPPO
    # The unfinished episode of a crashed game does not count: every step that leads to the crash.
    batch["valid"] = 1 - backward_sum(buffer["broken"][:-1].float(), (~done).float())
    choice = batch["avail"].sum(-1) > 1  # a dead agent has only its no-op
    batch["alive"] = choice * batch["valid"].unsqueeze(-1)
    metrics, hiddens, raw = estimate_v(agent, batch, buffer, now, ends, args)
    hiddens["policy_hidden"] = buffer["policy_hidden"]
    if args.nu > 0:
        q_metrics, q_hiddens = estimate_q(agent, batch, raw, buffer, now, ends, rng, args)
        metrics, hiddens = metrics | q_metrics, hiddens | q_hiddens
    # The critic's loss counts the dead too, as MAPPO's SMAC scripts do.
    batch["counted"] = batch["valid"].unsqueeze(-1).expand_as(batch["values"])
    batch["log_probs"] = (batch.pop("log_pi") * batch["actions"]).sum(-1)
    del batch["reward"]
    chunk = lambda x: x.unflatten(0, (-1, args.chunk_length)).transpose(0, 1).flatten(1, 2)
    batch = {key: chunk(x) for key, x in batch.items()}  # all agents of a game stay together
    for key, hidden in hiddens.items():
        before = torch.cat([now[key][None], hidden[: args.rollout_steps - 1]])
        batch[key] = before[:: args.chunk_length].flatten(0, 1)[None]
        now[key] = hidden[args.rollout_steps - 1].clone()
    return batch, metrics


# ------------------------------------------------------------------------------------------- update
def compute_losses(agent, batch, sigma_a, rng, args):
    """({network: loss}, metrics) of chunks [L, B, ...]."""
    obs, state, keep, actions = (batch[key] for key in ("obs", "state", "keep", "actions"))
    alive, valid, losses = batch["alive"], batch["valid"], {}
    logits, _ = agent.policy(obs, batch["policy_hidden"][0], keep)
    log_pi = masked_log_softmax(logits, batch["avail"])
    log_ratio = (log_pi * actions).sum(-1) - batch["log_probs"]
    objective = stochastic_pg_loss(log_ratio, batch["advantages"], alive, args.clip_eps)
    if args.nu > 0:
        utilities, _ = agent.utility(obs, batch["utility_hidden"][0], keep, state)
        weights = agent.mixer.weights(state)
        q_tot = agent.mixer(utilities, actions, weights)
        targets = agent.q_norm.normalize(batch["q_targets"])
        losses["q"] = value_loss(q_tot, targets, valid, args.huber_delta)
        q_scale = agent.q_norm.scale()[1]  # the mixer's output is in units of this
        if args.q_scale == "advantage":
            q_scale = q_scale / (alive.shape[-1] * (sigma_a + 1e-5))
        mu, frozen = gumbel_softmax(log_pi, args.temperature, rng), [w.detach() for w in weights]
        second = deterministic_pg_loss(mu, utilities.detach(), agent.mixer, frozen, valid, q_scale)
        objective = interpolate(objective, second, args.nu)
    entropy = masked_mean(-(log_pi.exp() * log_pi).sum(-1), alive)
    losses["policy"] = objective - args.ent_coef * entropy
    values, _ = agent.critic(obs, batch["critic_hidden"][0], keep, state)
    targets = agent.value_norm.normalize(batch["returns"])
    old = (batch["values"], args.clip_eps)
    counted = batch["counted"]  # with the dead: see `estimate`
    losses["critic"] = value_loss(values.squeeze(-1), targets, counted, args.huber_delta, *old)
    change = log_ratio.detach()
    outside = ((change.exp() - 1).abs() > args.clip_eps).float()
    metrics = {"losses/entropy": entropy.detach()}
    metrics["diagnostics/approx_kl"] = masked_mean(change.exp() - 1 - change, alive)
    metrics["diagnostics/clip_fraction"] = masked_mean(outside, alive)
    return losses, metrics


def gradient_variance(agent, batch, sigma_a, args):
    """Trace of the covariance of the batch's policy gradient, from one disjoint split per game."""
    rng, grads = torch.Generator(args.device), []  # its own: the training's noise stays the same
    for game in range(args.num_envs):
        split = {key: x[:, game :: args.num_envs] for key, x in batch.items()}
        loss = compute_losses(agent, split, sigma_a, rng, args)[0]["policy"]
        grads.append(torch.autograd.grad(loss, list(agent.policy.parameters())))
    grads = torch.stack([torch.cat([x.flatten() for x in grad]) for grad in grads])
    return grads.var(0).sum() / args.num_envs


def update(agent, optimizers, batch, sigma_a, rngs, args):
    """`update_epochs` passes over the batch; returns metrics, averaged over the minibatches."""
    chunks, history = batch["obs"].shape[1], []
    for _ in range(args.update_epochs):
        order = torch.randperm(chunks, generator=rngs["shuffle"], device=args.device)
        for index in order.split(chunks // args.num_minibatches):
            part = batch
            if args.num_minibatches > 1:
                part = {key: x[:, index] for key, x in batch.items()}
            agent.value_norm.update(part["returns"], part["counted"])
            if args.nu > 0:
                agent.q_norm.update(part["q_targets"], part["valid"])
            losses, metrics = compute_losses(agent, part, sigma_a, rngs["gumbel"], args)
            for name, loss in losses.items():
                parameters = optimizers[name].param_groups[0]["params"]
                optimizers[name].zero_grad()
                loss.backward(inputs=parameters)  # the policy's loss leaves utility and mixer alone
                norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                metrics |= {f"losses/{name}": loss.detach(), f"diagnostics/{name}_grad_norm": norm}
            history.append(torch.stack(list(metrics.values())))
            if not history[-1].isfinite().all():  # before the weights are touched
                raise RunError(f"not finite: {[k for k, x in metrics.items() if not x.isfinite()]}")
            for optimizer in optimizers.values():
                optimizer.step()
        if args.nu > 0:
            for name in ("utility", "mixer"):
                targets = getattr(agent, f"target_{name}").parameters()
                for target, new in zip(targets, getattr(agent, name).parameters()):
                    target.data.lerp_(new.data, args.target_tau)
    return dict(zip(metrics, torch.stack(history).mean(0)))


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy, envs, args):
    """Success rate of greedy episodes: those in which a goal is scored; in games of their own.

    Every game plays its share of the episodes: the first to end would favour the short ones.
    """
    obs, _, avail = envs.reset()
    games = len(obs)
    share = [args.eval_episodes // games + (k < args.eval_episodes % games) for k in range(games)]
    hidden, keep = obs.new_zeros(*obs.shape[:2], args.hidden_dim), obs.new_zeros(games)
    won, returns = [], []
    while any(share):
        logits, hiddens = policy(obs[None], hidden, keep[None])
        actions = masked_log_softmax(logits[0], avail).argmax(-1)
        obs, _, avail, _, done, info = envs.step(actions)
        hidden, keep = hiddens[0], 1.0 - done.float()
        for k in (done & ~info["broken"]).nonzero().flatten().tolist():
            if share[k]:
                share[k] -= 1
                won.append(info["won"][k].item())
                returns.append(info["return"][k].item())
    rate = float(np.mean(won))
    error = math.sqrt(rate * (1 - rate) / args.eval_episodes)
    result = {"eval/win_rate": rate, "eval/win_rate_stderr": error}
    return result | {"eval/episodic_return": float(np.mean(returns))}


@torch.no_grad()
def save_film(policy, args):
    """film.gif of a greedy episode, drawn by the engine; its return."""
    from PIL import Image

    game, total, done, frames = Football(args.scenario, render=True), 0.0, False, []
    random.seed(args.seed)
    obs, hidden = game.reset(), torch.zeros(1, game.n, args.hidden_dim, device=args.device)
    while not done:
        frames.append(Image.fromarray(game.core._observation["frame"]))
        keep = hidden.new_full((1, 1), float(len(frames) > 1))
        logits, hiddens = policy(torch.from_numpy(obs).to(args.device)[None, None], hidden, keep)
        obs, reward, done, *_ = game.step(logits[0, 0].argmax(-1).tolist())
        hidden, total = hiddens[0], total + reward
    path = Path(args.evaluate, "film.gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
    return total


def evaluation_games(args, step):
    """Games with seeds of their own for each evaluation (--evaluate: step 0), above training's."""
    seed = 10**9 + (7919 * args.seed + step // args.eval_every) % 10**9
    return contextlib.closing(make_envs(args, seed))


# ------------------------------------------------------------------------------- checkpoint and log
@contextlib.contextmanager
def replacing(path):
    """A file that takes `path` once it is whole: a crash or a full disk leaves the old one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(folder):
    """A run folder's checkpoint, on the CPU. UsageError if it is missing, damaged or foreign."""
    path = Path(folder, "checkpoint.pt")
    try:
        checkpoint, names = torch.load(path, map_location="cpu", weights_only=True), asdict(Args())
        foreign = not isinstance(checkpoint, dict) or checkpoint["script"] != SCRIPT
        if not foreign and checkpoint["args"].keys() == names.keys():
            return checkpoint
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except Exception:  # torch.load raises many kinds
        pass
    raise UsageError(f"{path} is damaged, or not a checkpoint of this version of {SCRIPT}.py")


class Log:
    """TensorBoard, progress.csv, and a progress bar; off a terminal, a line every 30 s."""

    def __init__(self, folder, args, step):
        self.path, self.said = folder / "progress.csv", 0.0
        if step:  # resumed: rows after the checkpoint will come again, and one may be torn
            head, *rows = self.path.read_bytes().splitlines(keepends=True)
            with replacing(self.path) as file:
                whole = [row for row in rows if row.endswith(b"\n")]
                file.writelines([head] + [r for r in whole if int(r.split(b",")[0]) <= step])
        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
        self.wandb = None
        if args.track:
            import wandb

            config = {"id": folder.name, "resume": "allow", "config": asdict(args)}
            self.wandb = wandb.init(project="maipg", **config)

    def write(self, step, metrics):
        """One row of scalars, under the same names everywhere; step in environment steps."""
        row = {"global_step": step} | dict.fromkeys(SOMETIMES, "") | metrics
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        numbers = [metrics[f"charts/{key}"] for key in ("episodic_return", "win_rate", "SPS")]
        text = "return {:.2f}, win rate {:.2f}, {:.0f} steps/s".format(*numbers)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said > 30:
            left = (self.bar.total - step) / metrics["charts/SPS"] / 60
            print(f"step {step:,}: {text}, {left:.0f} min left", flush=True)
            self.said = time.monotonic()

    def close(self):
        self.bar.close()
        self.writer.close()


# ----------------------------------------------------------------------------------------- training
@contextlib.contextmanager
def stop_signals():
    """SIGINT and SIGTERM ask for a checkpoint and a clean end; a second one ends at once."""
    caught = []

    def handle(signum, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    old = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def new_folder(parent, name):
    """Make PARENT/NAME__<time>, with a number where a run of this second has it already."""
    name += time.strftime("__%Y%m%d-%H%M%S")
    for k in itertools.count():
        folder = Path(parent, f"{name}-{k}" if k else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def run_name(args):
    """What the run folder is called, before the time."""
    return f"{args.scenario}__{SCRIPT}__nu{args.nu:g}__{args.mixer}__s{args.seed}"


@contextlib.contextmanager
def saved_on(error, save):
    """Keep what has been learned when the games fail."""
    try:
        yield
    except error:
        save()
        raise


def train(args, envs):
    """Train until total_timesteps or a signal; go on with args.resume. Returns the exit code."""
    torch.manual_seed(args.seed)
    agent = Agent(envs, args).to(args.device)
    rates = {"policy": args.learning_rate, "critic": args.critic_lr}
    trained = {"policy": [agent.policy], "critic": [agent.critic]}
    if args.nu > 0:
        rates["q"], trained["q"] = args.q_lr, [agent.utility, agent.mixer]
    parameters = {name: nn.ModuleList(modules).parameters() for name, modules in trained.items()}
    adam = functools.partial(torch.optim.Adam, eps=args.adam_eps)
    optimizers = {name: adam(parameters[name], lr) for name, lr in rates.items()}
    # Separate random streams: runs that differ only in nu meet the same exploration noise.
    rngs = {}
    for k, name in enumerate(["explore", "gumbel", "shuffle", "diagnose"]):
        rngs[name] = torch.Generator(args.device).manual_seed(args.seed + 10**9 * k)
    obs, state, avail = envs.reset()
    now = {"obs": obs, "state": state[:, 0], "avail": avail, "keep": obs.new_zeros(args.num_envs)}
    for name in ["policy", "critic", "utility", "target"][: 4 if args.nu > 0 else 2]:
        now[f"{name}_hidden"] = obs.new_zeros(*obs.shape[:2], args.hidden_dim)
    done = {"step": 0, "updates": 0, "seconds": 0.0, "evaluations": []}
    stateful = {"agent": agent, "envs": envs, **optimizers}

    if args.resume:
        folder, saved = Path(args.resume), load_checkpoint(args.resume)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        for name, rng in rngs.items():
            rng.set_state(saved["rngs"][name])
        done = saved["done"]
    else:
        folder = new_folder(args.runs_dir, run_name(args))
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    print(f"run folder {folder}", flush=True)

    def save():
        parts = {name: part.state_dict() for name, part in stateful.items()}
        parts["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        parts |= {"script": SCRIPT, "args": asdict(args), "now": now, "done": done}
        with replacing(folder / "checkpoint.pt") as file:
            torch.save(parts, file)

    buffer, batch_steps = {}, args.num_envs * args.rollout_steps
    log = Log(folder, args, done["step"])
    with stop_signals() as caught, contextlib.closing(log), saved_on(GameError, save):
        while done["step"] < args.total_timesteps and not caught:
            start = time.perf_counter()
            game_seconds = rollout(agent.policy, envs, buffer, now, rngs["explore"], args)
            middle = time.perf_counter()
            batch, metrics = estimate(agent, buffer, now, rngs["diagnose"], args)
            sigma_a = metrics["diagnostics/sigma_a"]
            if args.grad_variance_every and done["updates"] % args.grad_variance_every == 0:
                metrics["variance/gradient"] = gradient_variance(agent, batch, sigma_a, args)
            metrics |= update(agent, optimizers, batch, sigma_a, rngs, args)
            over = buffer["done"][:-1] & ~buffer["broken"][:-1]
            for key in ("return", "length", "won"):  # of the sampled actions; nan: no episode ended
                metrics[CHARTS[key]] = buffer[key][:-1][over].float().mean()
            values = torch.stack(list(metrics.values())).tolist()  # read back from the device, once
            metrics = dict(zip(metrics, values))
            seconds, rollout_seconds = time.perf_counter() - start, middle - start
            metrics |= {"charts/SPS": batch_steps / seconds, "charts/env_restarts": envs.restarts}
            metrics["time/env"] = game_seconds / seconds
            metrics["time/update"] = 1 - rollout_seconds / seconds
            metrics["time/policy"] = (rollout_seconds - game_seconds) / seconds
            done["step"] += batch_steps
            done["updates"] += 1
            done["seconds"] += seconds
            last = done["step"] >= args.total_timesteps
            if last or done["step"] % args.eval_every < batch_steps:
                with evaluation_games(args, done["step"]) as games:
                    evaluation = evaluate(agent.policy, games, args)
                done["evaluations"].append({"global_step": done["step"], **evaluation})
                metrics |= evaluation
            log.write(done["step"], metrics)
            if last or caught or done["updates"] % args.checkpoint_every == 0:
                save()
    if caught:
        print(f"stopped by signal {caught[0]} at step {done['step']:,}; --resume {folder} goes on")
        return 128 + caught[0]
    final = [evaluation["eval/win_rate"] for evaluation in done["evaluations"][-10:]]
    rate = float(np.mean(final)) if final else None
    result = {"final_win_rate": rate, "averaged_evaluations": len(final), **done}
    with replacing(folder / "result.json") as file:
        file.write(json.dumps(result | {"args": asdict(args)}, indent=2).encode())
    print(f"win rate {rate}, the mean of the last {len(final)} evaluations")
    return 0


# --------------------------------------------------------------------------------------------- main
def report(args):
    """--evaluate: the greedy success rate of a policy with its 95% interval; the exit code."""
    saved = load_checkpoint(args.evaluate)["agent"]
    with evaluation_games(args, 0) as games:
        agent = Agent(games, args).to(args.device)
        agent.load_state_dict(saved)
        result = evaluate(agent.policy, games, args)
    rate, count = result["eval/win_rate"], args.eval_episodes
    interval = binomtest(round(rate * count), count).proportion_ci(method="wilson")
    text = f"success rate {rate:.3f}, 95% interval [{interval.low:.3f}, {interval.high:.3f}]"
    text += f", return {result['eval/episodic_return']:.2f}, {count} greedy episodes"
    print(f"{args.scenario}: {text}")
    if args.capture_video:
        print(f"film of an episode with return {save_film(agent.policy, args):.2f}")
    return 0


def parse(argv):
    """Resolved Args of a command line; --resume and --evaluate take defaults from their folder."""
    default, said = Args(), io.StringIO()
    words = [part for word in argv for part in word.split("=", 1)]
    for flag in ("--resume", "--evaluate"):
        if flag in words[:-1]:
            saved = load_checkpoint(words[words.index(flag) + 1])["args"] | {"resume": ""}
            default = Args(**{f.name: saved[f.name] for f in fields(Args) if f.init})
    try:
        with contextlib.redirect_stderr(said):
            args = tyro.cli(Args, args=argv, default=default, description=__doc__)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines()]  # tyro draws a frame
        is_rule = lambda line: re.fullmatch("[-─]{9,}", line)
        message = itertools.dropwhile(is_rule, lines[1:])
        message = itertools.takewhile(lambda line: not is_rule(line), message)
        raise UsageError(" ".join(" ".join(message).split())) from None
    kept = RESUMABLE if args.resume else EVALUABLE if args.evaluate else asdict(args)
    for name, value in asdict(args).items():
        if name not in kept and value != getattr(default, name):
            doing = "resumed" if args.resume else "evaluated"
            raise UsageError(f"--{name.replace('_', '-')} cannot change when a run is {doing}")
    return resolve(args)


def main(argv=None):
    """Run a command line. The exit code: 0 done, 1 failed, 2 bad input, 128 + n signal n."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.threads)
        if args.evaluate:
            return report(args)
        with contextlib.closing(make_envs(args)) as envs:
            return train(args, envs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
