"""MAIPG on particle worlds: Multi-Agent Interpolated Policy Gradients, in one file.

MAPPO's policy gradient rests on sampled joint actions: unbiased, but noisy. MAIPG mixes in a
second, quieter gradient that goes through a factorised critic q_tot, differentiated by the actions.
The weight nu trades bias against variance; nu = 0 is MAPPO, number for number. The policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(s, mu(s))] * q_scale               `deterministic_pg_loss`   Eq. (10)
      + ent_coef * mean[entropy]

r: probability ratio of new to old policy. A: advantage (`gae`), normalised; sigma_A is the standard
deviation divided out. q_tot: one utility Q_i per agent, mixed (QMIX by default), regressed on
`td_lambda` targets. mu(s): a straight-through Gumbel-softmax sample of a discrete policy, the mean
of a Gaussian one. q_scale = 1 / (n sigma_A) brings q_tot to the unit of A (--q-scale advantage).

Axes: T rollout steps, N worlds, n agents, A actions (d their dimensions, if they are continuous), O
observation, S state, H hidden units; L steps in a chunk, B chunks in a minibatch. `global_step`
counts environment steps: T * N for a rollout.

    python maipg_mpe.py --scenario spread                     # train
    python maipg_mpe.py --scenario line --continuous-actions  # with forces instead of moves
    python maipg_mpe.py --env-id pettingzoo.sisl.pursuit_v5   # on another PettingZoo environment
    python maipg_mpe.py --evaluate RUN_DIR --capture-video    # greedy return, and a film
"""

import contextlib
import copy
import csv
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ----------------------------------------------------------------------------------------- settings
@dataclass
class Args:
    # --- what to run
    scenario: Literal["spread", "line", "formation"] = "spread"  # task of the particle worlds
    num_agents: int = 5  # agents in the world, 2 to 10
    continuous_actions: bool = False  # forces of a Gaussian policy instead of five moves
    env_id: str = ""  # another PettingZoo parallel environment: package.module[:factory]
    seed: int = 1  # of weights, exploration and worlds
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: int = 2  # CPU threads of torch
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # run folder to go on with
    evaluate: str = ""  # run folder whose policy is to be evaluated
    capture_video: bool = False  # with --evaluate: a gif drawn by the environment's own renderer
    # --- MAIPG
    nu: float = 0.2  # weight of the deterministic gradient, 0 is MAPPO
    mixer: Literal["qmix", "vdn", "joint"] = "qmix"  # how q_tot is made of the utilities
    q_scale: Literal["advantage", "raw"] = "advantage"  # unit of q_tot: 1 / (n sigma_A), or 1
    td_lambda: float = 0.8  # of the targets of q_tot
    target_tau: float = 0.05  # step of the target networks, once per epoch
    temperature: float = 1.0  # of the Gumbel-softmax
    mixer_dim: int = 64  # units in the mixer and its hypernetworks
    # --- MAPPO
    num_envs: int = 128  # parallel worlds
    rollout_steps: int = 25  # steps per world between updates; a particle world's episode has 25
    update_epochs: int = 10  # passes over each rollout
    num_minibatches: int = 1  # minibatches per epoch
    chunk_length: int = 25  # steps that gradients go back through time
    hidden_dim: int = 64  # units per layer of policy, critic and utility
    log_std: float = -0.5  # logarithm of a Gaussian policy's first standard deviation
    learning_rate: float = 7e-4  # Adam, policy
    critic_lr: float = 7e-4  # Adam, critic
    q_lr: float = 7e-4  # Adam, utility and mixer
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
    eval_every: int = 80_000  # environment steps between evaluations
    eval_episodes: int = 128  # greedy episodes per evaluation
    checkpoint_every: int = 25  # updates
    grad_variance_every: int = 0  # updates between gradient variance estimates; 0: none
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    # --- worker processes of --env-id
    env_timeout: float = 60.0  # seconds after which a silent worker is replaced
    max_failures: int = 5  # failures of one worker in a row that stop the run


RESUMABLE = {"resume", "total_timesteps", "device", "threads", "checkpoint_every", "track"}
EVALUABLE = {"evaluate", "eval_episodes", "num_envs", "seed", "device", "threads", "capture_video"}
CHARTS = {"return": "charts/episodic_return", "length": "charts/episodic_length"}
SOMETIMES = ["eval/episodic_return", "eval/return_stderr", "variance/gradient"]
FRACTIONS = ["nu", "td_lambda", "target_tau", "gamma", "gae_lambda", "clip_eps", "norm_beta"]
BOUNDS = dict.fromkeys(FRACTIONS, (0, 1))
BOUNDS |= {"seed": (0, 10**8), "threads": (1, 1024), "ent_coef": (0, math.inf)}
BOUNDS |= {"grad_variance_every": (0, math.inf), "num_agents": (2, 10), "log_std": (-5, 2)}


class UsageError(Exception):
    """Something that the user can mend: one line on stderr, exit code 2, nothing written."""


class RunError(Exception):
    """The run cannot go on (a loss is NaN): exit code 1."""


class GameError(RunError):
    """An environment's worker failed several times in a row: the run is saved and stops."""


def resolve(args):
    """Fill in the device. Raises UsageError: what is wrong, and what is valid."""
    args = copy.copy(args)
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
        (not args.grad_variance_every or args.num_envs > 1, "grad-variance-every needs 2 worlds"),
        (not args.capture_video or args.evaluate, "capture-video goes with --evaluate RUN_DIR"),
        (not (args.capture_video and args.env_id), "capture-video draws particle worlds only"),
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
# Both kinds are a batch of N games behind one interface, tensors on the training device:
#     obs, state, avail = envs.reset()              # [N, n, O], [N, n, S], bool [N, n, A]
#     obs, state, avail, reward, done, info = envs.step(actions)     # auto-reset; reward, done [N]
# info: `return`, `length` of the episodes that end (read them where done), `truncated` (by the time
# limit), `broken` (the worker crashed); `final`: the (obs, state, avail) before the reset.
# obs ends with the agent's index, one-hot: agents share their parameters. state is the same for all
# agents: one row a game in memory, expanded over n. reward is the mean of the agents' rewards.
RADIUS = {"spread": 0.15, "line": 0.03, "formation": 0.05}  # task: of an agent


def subset_layers(n, device):
    """For k = 1 .. n: [subsets of k targets without one, that one], index tensors [C(n, k) * k].

    The subsets of k - 1 targets are numbered in the order of itertools.combinations.
    """
    layers, before = [], {(): 0}
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        rest = [[before[tuple(x for x in s if x != last)] for last in s] for s in subsets]
        layers.append([torch.tensor(x, device=device).flatten() for x in (rest, subsets)])
        before = {s: k for k, s in enumerate(subsets)}
    return layers


def assigned_distances(distances, layers, limit):
    """Sum over agents [N] of min(distance, limit) in the assignment with the least total distance.

    distances [N, n, n]: agent by target. Exact: the best way to send the first k agents to a set of
    k targets is a best way for k - 1 of them plus one step (dynamic programming over subsets).
    """
    distances = distances.permute(1, 2, 0).contiguous()  # worlds last: they lie side by side
    capped = distances.clamp(max=limit)
    total = sums = distances.new_zeros(1, distances.shape[-1])
    for k, (rest, last) in enumerate(layers):
        choices = total.index_select(0, rest) + distances[k].index_select(0, last)
        total, best = choices.unflatten(0, (-1, k + 1)).min(1)  # [C(n, k + 1), k + 1, N] -> [., N]
        choices = sums.index_select(0, rest) + capped[k].index_select(0, last)
        sums = choices.unflatten(0, (-1, k + 1)).gather(1, best.unsqueeze(1)).squeeze(1)
    return sums[0]


class ParticleEnvs:
    """N particle worlds as one batch of tensors: mpe2 1.1.1's simple_spread_v3, simple_line_v1 and
    simple_formation_v1, step for step.

    Discrete actions are one-hot [N, n, 5] (stay, left, right, down, up), continuous ones a force
    [N, n, 2], clipped to [-1, 1]. All worlds begin and end their episodes of 25 steps together.
    """

    dt, damping, strength, length = 0.1, 0.25, 5.0, 25
    contact_force, contact_margin = 100.0, 1e-3
    stored = ("pos", "vel", "landmarks", "total", "steps")

    def __init__(self, args, seed):
        self.args, self.task, self.restarts = args, args.scenario, 0
        self.num_agents = n = args.num_agents
        self.rng = torch.Generator(args.device).manual_seed(seed)
        tensor = functools.partial(torch.tensor, device=args.device)
        self.moves = tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
        self.num_actions = 2 if args.continuous_actions else 5
        self.others = tensor([[j for j in range(n) if j != i] for i in range(n)])
        self.layers = subset_layers(n, args.device)
        self.num_landmarks = {"spread": n, "line": 2, "formation": 1}[self.task]
        # What a spread agent hears is always 0: mpe2's agents have a voice, and are silent.
        silence = 2 * (n - 1) if self.task == "spread" else 0
        seen = self.num_landmarks + (n - 1 if self.task == "spread" else 0)
        self.raw_dim = 4 + 2 * seen + silence
        self.obs_dim, self.state_dim = self.raw_dim + n, n * self.raw_dim
        tail = torch.cat([torch.zeros(n, silence), torch.eye(n)], -1).to(args.device)
        self.tail = tail.expand(args.num_envs, -1, -1)
        self.avail = torch.ones(args.num_envs, n, self.num_actions, dtype=torch.bool)
        self.avail = self.avail.to(args.device)
        self.spacing = torch.arange(n, device=args.device)
        self.oneself = torch.eye(n, device=args.device)

    def _uniform(self, low, high, *shape):
        return torch.empty(*shape, device=self.args.device).uniform_(low, high, generator=self.rng)

    def _begin(self):
        """New episodes: agents at rest anywhere in the square, landmarks as the task has it."""
        worlds = self.args.num_envs
        self.steps, self.total = 0, torch.zeros(worlds, device=self.args.device)
        self.pos = self._uniform(-1, 1, worlds, self.num_agents, 2)
        self.vel = torch.zeros_like(self.pos)
        half = {"spread": 1.0, "line": 0.25, "formation": 0.5}[self.task]
        self.landmarks = self._uniform(-half, half, worlds, self.num_landmarks, 2)
        if self.task == "line":  # the second one is 1.25 from the first: turned by 5 degrees until
            start = self._uniform(0, 2 * math.pi, worlds, 1)  # it lies in the square
            angle = start + torch.arange(72, device=self.args.device) * math.radians(5)
            ends = torch.stack([angle.cos(), angle.sin()], -1) * 1.25 + self.landmarks[:, :1]
            first = (ends.abs() < 1).all(-1).float().argmax(-1)  # argmax: the first of equals
            self.landmarks[:, 1] = ends[torch.arange(worlds), first]
        self._measure()

    def _measure(self):
        """What reward, observation and next step need of the positions, once."""
        self.apart = self.pos.unsqueeze(2) - self.pos.unsqueeze(1)  # [N, n, n, 2]
        self.gap = self.apart.norm(dim=-1)
        self.to_landmarks = self.landmarks.unsqueeze(1) - self.pos.unsqueeze(2)

    def _reward(self):
        """mpe2's reward, averaged over the agents, [N]."""
        if self.task == "spread":  # half for covering the landmarks, half for not colliding
            covering = -self.to_landmarks.norm(dim=-1).amin(1).sum(-1)
            touching = (self.gap < 2 * RADIUS["spread"]).sum((1, 2)) - self.num_agents
            return 0.5 * covering - 0.5 * touching / self.num_agents
        if self.task == "line":  # evenly spaced from landmark to landmark
            first, second = self.landmarks.unsqueeze(2).unbind(1)  # [N, 1, 2]
            spacing = self.spacing.unsqueeze(-1) / (self.num_agents - 1)
            targets = first + (second - first) * spacing
        else:  # evenly around the landmark, from the smallest angle at which an agent stands
            x, y = (self.pos - self.landmarks).unbind(-1)
            first = torch.atan2(y, x).remainder(2 * math.pi).amin(1, keepdim=True)
            angle = first + self.spacing * (2 * math.pi / self.num_agents)  # [N, n]
            targets = torch.stack([angle.cos(), angle.sin()], -1) * 0.5 + self.landmarks
        distances = (self.pos.unsqueeze(2) - targets.unsqueeze(1)).norm(dim=-1)
        return -assigned_distances(distances, self.layers, 2.0) / self.num_agents

    def _view(self):
        """obs, state, avail: velocity and position, then what is seen relative to the agent."""
        parts = [self.vel, self.pos, self.to_landmarks.flatten(2)]
        if self.task == "spread":
            parts.append((self.pos[:, self.others] - self.pos.unsqueeze(2)).flatten(2))
        obs = torch.cat([*parts, self.tail], -1)
        # MPE has no state of its own: MAPPO concatenates what all agents observe.
        state = obs[..., : self.raw_dim].flatten(1).unsqueeze(1).expand(-1, self.num_agents, -1)
        return obs, state, self.avail

    def reset(self):
        self._begin()
        return self._view()

    def step(self, actions):
        force = actions.clamp(-1, 1) if self.args.continuous_actions else actions @ self.moves
        # Softly rigid discs: a contact force that grows with the penetration; none on oneself.
        margin, touch = self.contact_margin, 2 * RADIUS[self.task]
        depth = F.softplus((touch - self.gap) / margin) * margin
        push = (self.contact_force * depth / (self.gap + self.oneself)).unsqueeze(-1) * self.apart
        self.pos = self.pos + self.vel * self.dt  # with the velocity before this step's forces
        force = force * self.strength + push.sum(2)
        self.vel = self.vel * (1 - self.damping) + force * self.dt
        self.steps += 1
        self._measure()
        reward = self._reward()
        self.total = self.total + reward
        over = self.steps == self.length
        done = torch.full_like(reward, over, dtype=torch.bool)
        final = self._view()
        info = {"return": self.total, "length": torch.full_like(reward, self.steps)}
        info |= {"truncated": done, "broken": torch.zeros_like(done), "final": final}
        return *(self.reset() if over else final), reward, done, info

    def state_dict(self):
        return {name: getattr(self, name) for name in self.stored} | {"rng": self.rng.get_state()}

    def load_state_dict(self, state):
        for name in self.stored:
            value = state[name]
            setattr(self, name, value.to(self.args.device) if torch.is_tensor(value) else value)
        self.rng.set_state(state["rng"])
        self._measure()

    def close(self):
        """Nothing to do: there are no processes."""


def to_mpe2(action, continuous):
    """An agent's action in mpe2's convention: the number of a move; or a force [2] as the five
    shares of (stay, left, right, down, up), in [0, 1]."""
    if not continuous:
        return int(action.argmax())
    x, y = action.clamp(-1, 1).tolist()
    return np.array([0, max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)], dtype=np.float32)


@contextlib.contextmanager
def foreign_code(env_id):
    """Whatever a user's environment raises is told in one line, a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--env-id {env_id}: {fault}") from None


def open_pettingzoo(env_id):
    """A new environment `package.module:function`, a function of no arguments that returns a
    PettingZoo parallel environment; the function defaults to parallel_env. Raises UsageError."""
    module, _, function = env_id.partition(":")
    with foreign_code(env_id):
        return getattr(importlib.import_module(module), function or "parallel_env")()


def pettingzoo_spaces(env, args):
    """(n, observation width, A or d) of an environment. Raises UsageError if it does not fit."""
    from gymnasium.spaces import Box, Dict, Discrete, flatdim

    def refuse(text):
        raise UsageError(f"--env-id {args.env_id}: {text}")

    if not getattr(env, "possible_agents", None):
        refuse("not a PettingZoo parallel environment with a list of possible_agents")
    spaces = [(env.observation_space(a), env.action_space(a)) for a in env.possible_agents]
    if any(pair != spaces[0] for pair in spaces):
        refuse("the agents' spaces differ, and agents share their networks here")
    seen, action = spaces[0]
    if isinstance(seen, Dict):  # with a mask of the actions that are available
        if set(seen) != {"observation", "action_mask"}:
            refuse(f"observations {seen}: a Dict must have observation and action_mask")
        seen = seen["observation"]
    if not isinstance(seen, (Box, Discrete)):
        refuse(f"observations {seen} are neither Box nor Discrete")
    if args.continuous_actions:
        if not isinstance(action, Box) or not action.is_bounded():
            refuse(f"actions {action} are no bounded Box: leave out --continuous-actions")
    elif not isinstance(action, Discrete):
        refuse(f"actions {action} are not Discrete: a Box needs --continuous-actions")
    return len(spaces), flatdim(seen), flatdim(action)


class PettingZooGame:
    """One environment in a worker, which puts what it shows into row k of the shared tensors."""

    def __init__(self, args, shared, k, seed):
        self.env, self.args = open_pettingzoo(args.env_id), args
        self.rows = {key: value[k].numpy() for key, value in shared.items()}
        self.agents, self.seed = list(self.env.possible_agents), seed

    def begin(self):
        seen, _ = self.env.reset(seed=self.seed)
        self.seed, self.total, self.length = None, 0.0, 0  # seeded once, as Gymnasium asks for
        self.show(seen, "")

    def show(self, seen, prefix):
        """Agents that have left see nothing and can do nothing but action 0, like dead ones."""
        from gymnasium.spaces import flatten

        rows, space = self.rows, self.env.observation_space(self.agents[0])
        obs, avail = rows[prefix + "obs"], rows[prefix + "avail"]
        obs[:], avail[:] = 0.0, False
        for i, agent in enumerate(self.agents):
            if agent not in seen:
                avail[i, 0] = not self.args.continuous_actions
            elif isinstance(seen[agent], dict):
                obs[i] = flatten(space["observation"], seen[agent]["observation"])
                avail[i] = seen[agent]["action_mask"]
            else:
                obs[i], avail[i] = flatten(space, seen[agent]), True
        rows[prefix + "state"][:] = pettingzoo_state(self.env, obs)

    def step(self):
        actions, rows = {}, self.rows
        for i, agent in enumerate(self.agents):
            if agent in self.env.agents:
                space, action = self.env.action_space(agent), rows["actions"][i]
                if self.args.continuous_actions:  # from [-1, 1] to the bounds of the space
                    share = (action.clip(-1, 1).reshape(space.shape) + 1) / 2
                    action = space.low + share * (space.high - space.low)
                    actions[agent] = action.astype(space.dtype)
                else:
                    actions[agent] = int(space.start + action.argmax())
        seen, rewards, terminated, truncated, _ = self.env.step(actions)
        reward = sum(rewards.values()) / len(self.agents)
        self.total, self.length = self.total + reward, self.length + 1
        over = not self.env.agents or all(terminated[a] or truncated[a] for a in terminated)
        left = {a: x for a, x in seen.items() if not (terminated[a] or truncated[a]) or over}
        self.show(left, "last_")
        outcome = {"reward": reward, "return": self.total, "length": self.length, "done": over}
        outcome["truncated"] = over and any(truncated.values())
        for key, value in outcome.items():
            rows[key][...] = value
        if over:
            self.begin()
        else:
            self.show(left, "")


def pettingzoo_state(env, obs):
    """The environment's global state, or all agents' observations where it has none."""
    try:
        return np.asarray(env.state(), np.float32).ravel()
    except (NotImplementedError, AttributeError):
        return obs.ravel()


def play_pettingzoo(pipe, args, shared, rows, seeds):
    """A worker with its share of the environments; on a fault it says why, and ends."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    torch.set_num_threads(1)
    try:
        games = [PettingZooGame(args, shared, k, seed) for k, seed in zip(rows, seeds)]
        for game in games:
            game.begin()
        pipe.send("done")
        while pipe.recv() == "step":
            for game in games:
                game.step()
            pipe.send("done")
    except EOFError:
        pass  # the trainer closed the pipe: the normal end
    except BaseException as fault:
        with contextlib.suppress(OSError):
            pipe.send(" ".join(f"{type(fault).__name__}: {fault}".split()))


class PettingZooEnvs:
    """N copies of a PettingZoo parallel environment in worker processes over shared memory."""

    def __init__(self, args, seed):
        self.args, self.seed, self.device = args, seed, torch.device(args.device)
        env = open_pettingzoo(args.env_id)
        with foreign_code(args.env_id):
            self.num_agents, width, self.num_actions = pettingzoo_spaces(env, args)
            env.reset(seed=seed)
            state = pettingzoo_state(env, np.zeros((self.num_agents, width), np.float32))
            env.close()
        self.obs_dim, self.state_dim = width + self.num_agents, len(state)
        count, n, actions = args.num_envs, self.num_agents, self.num_actions
        self.shared = {"actions": torch.zeros(count, n, actions)}
        for prefix in ("", "last_"):
            self.shared[prefix + "obs"] = torch.zeros(count, n, width)
            self.shared[prefix + "state"] = torch.zeros(count, len(state))
            self.shared[prefix + "avail"] = torch.zeros(count, n, actions, dtype=torch.bool)
        for key in ("reward", "return", "length"):
            self.shared[key] = torch.zeros(count)
        for key in ("done", "truncated"):
            self.shared[key] = torch.zeros(count, dtype=torch.bool)
        for tensor in self.shared.values():
            tensor.share_memory_()
        parts = min(count, os.cpu_count())
        self.rows = [range(count)[w::parts] for w in range(parts)]
        self.workers, self.pipes, self.restarts = {}, {}, 0
        self.launches, self.failures = [0] * parts, [0] * parts
        try:
            for w in range(parts):
                self._start(w)
            for w in range(parts):
                self._receive(w)
        except BaseException:
            self.close()
            raise

    def _start(self, w):
        """A new process for the environments of worker w, with seeds of their own."""
        context = torch.multiprocessing.get_context("spawn")
        self.pipes[w], theirs = context.Pipe()
        seeds = [self.seed + 1000 * k + 100_003 * self.launches[w] for k in self.rows[w]]
        config = (theirs, self.args, self.shared, self.rows[w], seeds)
        self.workers[w] = context.Process(target=play_pettingzoo, args=config, daemon=True)
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
        obs, state, avail = (self.shared[prefix + key] for key in ("obs", "state", "avail"))
        n = self.num_agents
        obs = torch.cat([obs, torch.eye(n).expand(len(obs), n, n)], -1).to(self.device)
        state = state.to(self.device, copy=True).unsqueeze(1).expand(-1, n, -1)
        return obs, state, avail.to(self.device, copy=True)

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
        out = {key: self.shared[key].clone() for key in ("reward", "return", "length", "truncated")}
        out |= {"broken": broken, "done": self.shared["done"] | broken}
        info = {key: value.to(self.device) for key, value in out.items()}
        reward, done = info.pop("reward"), info.pop("done")
        return *self._view(), reward, done, info | {"final": self._view("last_")}

    def state_dict(self):
        """A foreign environment cannot be stored: resumed runs begin new episodes."""
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
        kind = f"PettingZoo's {args.env_id}" if args.env_id else f"batched {args.scenario}"
        print(f"environment {kind}, device {args.device}", flush=True)
    envs = PettingZooEnvs if args.env_id else ParticleEnvs
    return envs(args, args.seed if seed is None else seed)


# ----------------------------------------------------------------------------------------- networks
def orthogonal(layer, gain):
    """MAPPO's initialisation: orthogonal weights, zero biases."""
    for name, parameter in layer.named_parameters():
        nn.init.orthogonal_(parameter, gain) if "weight" in name else nn.init.zeros_(parameter)
    return layer


class Recurrent(nn.Module):
    """MAPPO's network: LayerNorm, two (Linear, ReLU, LayerNorm), GRU, LayerNorm, Linear head.

    The policy sees the agent's own obs, the utility the global state as well.
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


class StateCritic(Recurrent):
    """V(s) of the state alone, which all agents share: one row a game, as of a single agent."""

    def forward(self, obs, hidden, keep, state):
        """hidden [B, 1, H], state [L, B, S] -> values [L, B, 1, 1], hidden states [L, B, 1, H]."""
        return super().forward(state.unsqueeze(-2), hidden, keep)


class ContinuousMixer(Mixer):
    """q_tot of continuous actions: Q_i(s, a_i) = <utility_i(s), embedding(a_i)>, then as above."""

    def __init__(self, kind, num_agents, action_dim, state_dim, dim, width):
        super().__init__(kind, num_agents, width, state_dim, dim)
        layers = nn.Linear(action_dim, dim), nn.ELU(), nn.Linear(dim, width)
        self.embed = nn.Sequential(*layers)

    def forward(self, utilities, actions, weights):
        """Utilities [..., n, width], actions [..., n, d] -> q_tot [...]."""
        actions = self.embed(actions.clamp(-1, 1))  # beyond, the environment clips them
        return super().forward(utilities, actions, weights)


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
        if args.continuous_actions:
            self.policy.log_std = nn.Parameter(torch.full((num_actions,), args.log_std))
        self.critic = StateCritic(envs.state_dim, dim, 1, 1.0)
        self.value_norm = ValueNorm(args.norm_beta)
        if args.nu > 0:  # the small last gain: a utility starts indifferent between actions
            width = dim if args.continuous_actions else num_actions
            self.utility = Recurrent(envs.obs_dim, dim, width, 0.01, envs.state_dim)
            sizes = (n, num_actions, envs.state_dim, args.mixer_dim)
            if args.continuous_actions:
                self.mixer = ContinuousMixer(args.mixer, *sizes, width)
            else:
                self.mixer = Mixer(args.mixer, *sizes)
            self.target_utility, self.target_mixer = copy.deepcopy((self.utility, self.mixer))
            self.q_norm = ValueNorm(args.norm_beta)


# ----------------------------------------------------------------------------------------- policies
# pi stands for the parameters of a policy: log pi [..., A] of discrete actions, which are one-hot
# vectors; or the mean [..., d] of a Gaussian, in (-1, 1), with a standard deviation `log_std` [d].
def distribution(policy, out, avail):
    """(pi, log_std or None) from the output of the policy network."""
    log_std = getattr(policy, "log_std", None)
    return (masked_log_softmax(out, avail) if log_std is None else out.tanh()), log_std


def sample(pi, log_std, rng):
    """Actions of pi, [..., A or d]. A Gaussian's may lie outside [-1, 1]: environments clip."""
    if log_std is None:
        return F.one_hot(gumbel_max(pi, rng).argmax(-1), pi.shape[-1]).float()
    return pi + log_std.exp() * torch.empty_like(pi).normal_(generator=rng)


def log_prob(pi, log_std, actions):
    """log pi(a_i) [...] of each agent's action."""
    if log_std is None:
        return (pi * actions).sum(-1)
    return torch.distributions.Normal(pi, log_std.exp()).log_prob(actions).sum(-1)


def entropy_of(pi, log_std):
    """The entropy [...] of each agent's policy."""
    if log_std is None:
        return -(pi.exp() * pi).sum(-1)
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(pi.shape[:-1])


def greedy(pi, log_std):
    """mu(s) without a gradient: the most probable actions [..., A or d]."""
    return F.one_hot(pi.argmax(-1), pi.shape[-1]).float() if log_std is None else pi


def deterministic(pi, log_std, temperature, rng):
    """mu(s) of Eq. (10) with its gradient: a Gumbel-softmax sample, or the Gaussian's mean."""
    return gumbel_softmax(pi, temperature, rng) if log_std is None else pi


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
        out, hiddens = policy(now["obs"][None], hidden, now["keep"][None])
        row = {key: now[key] for key in ("obs", "state", "avail", "keep")}
        row["pi"], log_std = distribution(policy, out[0], now["avail"])
        if t < args.rollout_steps:  # of the state after the last step only obs and pi count
            actions, hidden = sample(row["pi"], log_std, rng), hiddens[0]
            start = time.perf_counter()
            obs, state, avail, reward, done, info = envs.step(actions)
            seconds += time.perf_counter() - start
            now |= {"obs": obs, "state": state[:, 0], "avail": avail, "keep": 1.0 - done.float()}
            last_obs, last_state, last_avail = info.pop("final")
            row |= info | {"policy_hidden": hidden, "reward": reward, "done": done}
            row["actions"] = actions
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
    pi, next_state = buffer["pi"][1:].clone(), buffer["state"][1:].clone()
    if cut := ends[2]:
        obs, next_state[cut] = buffer["last_obs"][cut][None], buffer["last_state"][cut]
        out, _ = agent.policy(obs, buffer["policy_hidden"][cut], obs.new_ones(obs.shape[:2]))
        pi[cut] = distribution(agent.policy, out[0], buffer["last_avail"][cut])[0]
    log_std = getattr(agent.policy, "log_std", None)
    weights = agent.target_mixer.weights(next_state)
    next_q = agent.target_mixer(after, greedy(pi, log_std), weights)
    next_q = agent.q_norm.denormalize(next_q)  # of mu(s') = argmax pi, Section 2.1
    targets = td_lambda(batch["reward"], next_q, *ends[:2], args.gamma, args.td_lambda)
    batch["q_targets"] = targets

    weights, pi = agent.mixer.weights(batch["state"]), buffer["pi"][:-1]
    q_tot = lambda actions: agent.q_norm.denormalize(agent.mixer(utilities, actions, weights))
    q = q_tot(batch["actions"])
    qc = q - sum(q_tot(sample(pi, log_std, rng)) for _ in range(samples)) / samples
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
    keys = ["obs", "state", "avail", "keep", "actions", "pi", "reward"]
    batch = {key: buffer[key][:-1] for key in keys}
    done, limit = buffer["done"][:-1], buffer["truncated"][:-1] & args.bootstrap_time_limits
    cut = limit.nonzero(as_tuple=True) if args.bootstrap_time_limits else None
    ends = (done & ~limit, done, cut)  # by default a time limit is an end like others, as in MAPPO
    # The unfinished episode of a crashed game does not count: every step that leads to the crash.
    batch["valid"] = 1 - backward_sum(buffer["broken"][:-1].float(), (~done).float())
    choice = batch["avail"].all(-1) | (batch["avail"].sum(-1) > 1)  # an agent that left has none
    batch["alive"] = choice * batch["valid"].unsqueeze(-1)
    metrics, hiddens, raw = estimate_v(agent, batch, buffer, now, ends, args)
    hiddens["policy_hidden"] = buffer["policy_hidden"]
    if args.nu > 0:
        q_metrics, q_hiddens = estimate_q(agent, batch, raw, buffer, now, ends, rng, args)
        metrics, hiddens = metrics | q_metrics, hiddens | q_hiddens
    batch["counted"] = batch["valid"].unsqueeze(-1).expand_as(batch["values"])
    log_std = getattr(agent.policy, "log_std", None)
    batch["log_probs"] = log_prob(batch.pop("pi"), log_std, batch["actions"])
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
    out, _ = agent.policy(obs, batch["policy_hidden"][0], keep)
    pi, log_std = distribution(agent.policy, out, batch["avail"])
    log_ratio = log_prob(pi, log_std, actions) - batch["log_probs"]
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
        mu = deterministic(pi, log_std, args.temperature, rng)
        frozen = [w.detach() for w in weights]
        second = deterministic_pg_loss(mu, utilities.detach(), agent.mixer, frozen, valid, q_scale)
        objective = interpolate(objective, second, args.nu)
    entropy = masked_mean(entropy_of(pi, log_std), alive)
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
    """Mean return of the greedy policy over whole episodes, in worlds of their own.

    Every world plays its share of the episodes: the first to end would favour the short ones.
    """
    obs, _, avail = envs.reset()
    games = len(obs)
    share = [args.eval_episodes // games + (k < args.eval_episodes % games) for k in range(games)]
    hidden, keep = obs.new_zeros(*obs.shape[:2], args.hidden_dim), obs.new_zeros(games)
    returns = []
    while any(share):
        out, hiddens = policy(obs[None], hidden, keep[None])
        actions = greedy(*distribution(policy, out[0], avail))
        obs, _, avail, _, done, info = envs.step(actions)
        hidden, keep = hiddens[0], 1.0 - done.float()
        for k in (done & ~info["broken"]).nonzero().flatten().tolist():
            if share[k]:
                share[k] -= 1
                returns.append(info["return"][k].item())
    error = float(np.std(returns, ddof=1)) / math.sqrt(len(returns)) if len(returns) > 1 else 0.0
    return {"eval/episodic_return": float(np.mean(returns)), "eval/return_stderr": error}


def mpe2_env(args, render_mode=None):
    """The world of args in the mpe2 package itself."""
    name = {"spread": "spread_v3", "line": "line_v1", "formation": "formation_v1"}[args.scenario]
    make = importlib.import_module(f"mpe2.simple_{name}").parallel_env
    rules = {"N": args.num_agents, "max_cycles": ParticleEnvs.length, "render_mode": render_mode}
    return make(**rules, continuous_actions=args.continuous_actions)


@torch.no_grad()
def play_mpe2(policy, env, args, seed):
    """A greedy episode in mpe2's own environment: (return of the team, frames if it draws any)."""
    seen, _ = env.reset(seed=seed)
    index = torch.eye(args.num_agents, device=args.device)
    avail = index.new_ones(args.num_agents, 2 if args.continuous_actions else 5).bool()
    hidden, keep = index.new_zeros(1, args.num_agents, args.hidden_dim), index.new_zeros(1, 1)
    total, frames = 0.0, []
    while env.agents:
        obs = torch.as_tensor(np.stack(list(seen.values())), device=args.device)
        out, hiddens = policy(torch.cat([obs, index], -1)[None, None], hidden, keep)
        hidden, keep = hiddens[0], index.new_ones(1, 1)
        actions = greedy(*distribution(policy, out[0, 0], avail))
        moves = [to_mpe2(action, args.continuous_actions) for action in actions.cpu()]
        seen, rewards, *_ = env.step(dict(zip(env.agents, moves)))
        total += sum(rewards.values()) / args.num_agents
        frames += [env.render()] if env.render_mode else []
    return total, frames


def save_film(policy, args):
    """film.gif of a greedy episode, played and drawn by mpe2; its return."""
    from PIL import Image

    env = mpe2_env(args, "rgb_array")
    total, frames = play_mpe2(policy, env, args, args.seed)
    env.close()
    first, *others = [Image.fromarray(frame).resize((350, 350)) for frame in frames]
    path = Path(args.evaluate, "film.gif")
    first.save(path, save_all=True, append_images=others, duration=100, loop=0)
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
        foreign = not isinstance(checkpoint, dict) or checkpoint["script"] != "maipg_mpe"
        if not foreign and checkpoint["args"].keys() == names.keys():
            return checkpoint
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except Exception:  # torch.load raises many kinds
        pass
    raise UsageError(f"{path} is damaged, or not a checkpoint of this version of maipg_mpe.py")


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
        numbers = [metrics[f"charts/{key}"] for key in ("episodic_return", "SPS")]
        text = "return {:.2f}, {:.0f} steps/s".format(*numbers)
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
        agents = 1 if name == "critic" else envs.num_agents
        now[f"{name}_hidden"] = obs.new_zeros(args.num_envs, agents, args.hidden_dim)
    done = {"step": 0, "updates": 0, "seconds": 0.0, "evaluations": []}
    stateful = {"agent": agent, "envs": envs, **optimizers}

    if args.resume:
        folder, saved = Path(args.resume), load_checkpoint(args.resume)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        for name, rng in rngs.items():
            rng.set_state(saved["rngs"][name])
        done = saved["done"]
        if not args.env_id:  # a foreign environment's games cannot be stored: new ones begin
            now = {key: x.to(args.device) for key, x in saved["now"].items()}
    else:
        name = re.sub("[^0-9A-Za-z]+", "-", args.env_id) or f"{args.scenario}-{args.num_agents}"
        name += f"__maipg_mpe__nu{args.nu:g}__{args.mixer}"
        folder = new_folder(args.runs_dir, f"{name}__s{args.seed}")
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    print(f"run folder {folder}", flush=True)

    def save():
        parts = {name: part.state_dict() for name, part in stateful.items()}
        parts["rngs"] = {name: rng.get_state() for name, rng in rngs.items()}
        parts |= {"script": "maipg_mpe", "args": asdict(args), "now": now, "done": done}
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
            for key in ("return", "length"):  # of the sampled actions; nan: no episode ended
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
    final = [evaluation["eval/episodic_return"] for evaluation in done["evaluations"][-10:]]
    mean = float(np.mean(final)) if final else None
    result = {"final_return": mean, "averaged_evaluations": len(final), **done}
    with replacing(folder / "result.json") as file:
        file.write(json.dumps(result | {"args": asdict(args)}, indent=2).encode())
    print(f"return {mean}, the mean of the last {len(final)} evaluations")
    return 0


# --------------------------------------------------------------------------------------------- main
def report(args):
    """--evaluate: the greedy return of a run's policy with its 95% interval; the exit code."""
    saved = load_checkpoint(args.evaluate)["agent"]
    with evaluation_games(args, 0) as games:
        agent = Agent(games, args).to(args.device)
        agent.load_state_dict(saved)
        result = evaluate(agent.policy, games, args)
    mean, error = result["eval/episodic_return"], result["eval/return_stderr"]
    text = f"return {mean:.2f}, 95% interval [{mean - 1.96 * error:.2f}, {mean + 1.96 * error:.2f}]"
    print(f"{args.env_id or args.scenario}: {text}, {args.eval_episodes} greedy episodes")
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
