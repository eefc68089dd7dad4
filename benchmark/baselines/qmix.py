"""QMIX (Rashid et al., 2018) on SMAC: Q-learning with a monotonic mixer, from a replay of episodes.

    loss = mean over steps of (q_tot(s, a) - y)^2,   y = r + gamma q_tot'(s', argmax_a' Q(o', a'))

with target networks q_tot' and double Q-learning: the online utilities choose a', the target ones
judge it. Settings are EPyMARL's with PyMARL's recurrent utilities, one update per episode; rewards
are not standardised. A utility sees its agent's observation and index, not the last action.

    python benchmark/baselines/qmix.py --map-name 2s3z
"""

import collections
import contextlib
import copy
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac as smac  # noqa: E402
from benchmark.baselines import run_variant  # noqa: E402


@dataclass
class Args:
    # --- what to run
    map_name: str = "2s3z"  # SMAC map
    backend: Literal["auto", "sc2", "smax"] = "auto"  # StarCraft II or SMAX; auto: sc2 if there
    seed: int = 1  # of weights, exploration and games
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: int = 2  # CPU threads of torch
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # run folder to go on with; its replay begins empty
    evaluate: str = ""  # run folder whose policy is to be evaluated
    check: bool = False  # test the backend's set-up step by step, and stop
    capture_video: bool = False  # with --evaluate: a gif (SMAX) or a replay (StarCraft II)
    # --- learning
    num_envs: int = 8  # parallel games
    batch_episodes: int = 32  # episodes per update; one update per finished episode
    replay_episodes: int = 5000  # episodes that are kept
    hidden_dim: int = 64  # units per layer
    mixer_dim: int = 32  # units in the mixer and its hypernetworks
    learning_rate: float = 5e-4  # Adam
    adam_eps: float = 1e-8  # Adam's epsilon
    gamma: float = 0.99  # discount
    epsilon_start: float = 1.0  # exploration at step 0 ...
    epsilon_end: float = 0.05  # ... and after epsilon_steps
    epsilon_steps: int = 50_000  # environment steps of the linear decay
    target_every: int = 200  # updates between copies to the target networks
    max_grad_norm: float = 10.0
    # --- evaluation and output
    eval_every: int = 80_000  # environment steps between evaluations
    eval_episodes: int = 32  # greedy episodes per evaluation
    log_every: int = 2_000  # environment steps between rows of progress.csv
    checkpoint_every: int = 10  # rows of progress.csv
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    # --- StarCraft II
    game_timeout: float = 120.0  # seconds after which a silent game is replaced
    max_failures: int = 5  # failures of one game in a row that stop the run
    backend_reason: str = field(init=False, default="")


FRACTIONS = "gamma epsilon_start epsilon_end".split()
SmacArgs, smac_resolve = smac.Args, smac.resolve  # main() puts ours in their place


def resolve(args):
    """Fill in backend and device. Raises UsageError: what is wrong, and what is valid."""
    common = {f.name for f in fields(SmacArgs) if f.init} & {f.name for f in fields(args)}
    shared = smac_resolve(SmacArgs(nu=0.0, **{name: getattr(args, name) for name in common}))
    args = copy.copy(args)
    for name in ("backend", "backend_reason", "device"):
        setattr(args, name, getattr(shared, name))
    for name, value in asdict(args).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in FRACTIONS and not 0 <= value <= 1:
            raise smac.UsageError(f"--{name.replace('_', '-')} {value}: must lie in [0, 1]")
        if number and name not in [*FRACTIONS, "seed"] and not value > 0:
            raise smac.UsageError(f"--{name.replace('_', '-')} {value}: must be positive")
    return args


# ----------------------------------------------------------------------------------------- networks
class Recurrent(nn.Module):
    """PyMARL's network: Linear, ReLU, GRU, Linear, in PyTorch's initialisation."""

    def __init__(self, obs_dim, dim, out_dim):
        super().__init__()
        self.first, self.gru = nn.Linear(obs_dim, dim), nn.GRUCell(dim, dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, obs, hidden, keep):
        """obs [T, B, n, O], hidden [B, n, H], keep [T, B] (0: an episode begins)
        -> output [T, B, n, out], hidden state after each step [T, B, n, H]."""
        x, hidden, hiddens = F.relu(self.first(obs)), hidden.flatten(0, 1), []
        for x_t, keep_t in zip(x.flatten(1, 2), keep.repeat_interleave(x.shape[2], 1)):
            hidden = self.gru(x_t, hidden * keep_t.unsqueeze(-1))
            hiddens.append(hidden)
        hiddens = torch.stack(hiddens).view_as(x)
        return self.head(hiddens), hiddens


def whole_episodes(network, obs, dim):
    """Output [T, B, n, out] of a recurrent network over episodes obs [T, B, n, O]."""
    keep = torch.ones_like(obs[:, :, 0, 0])
    keep[0] = 0.0
    return network(obs, obs.new_zeros(*obs.shape[1:3], dim), keep)[0]


def one_hot(index, like):
    return F.one_hot(index, like.shape[-1]).float()


class Agent(nn.Module):
    """`policy` holds the utilities Q_i, which act greedily; the mixer; a target copy of both."""

    metrics = ("losses/q", "diagnostics/q_grad_norm", "diagnostics/q_tot")

    def __init__(self, envs, args):
        super().__init__()
        self.args, n = args, envs.num_agents
        self.policy = Recurrent(envs.obs_dim, args.hidden_dim, envs.num_actions)
        self.mixer = smac.Mixer("qmix", n, envs.num_actions, envs.state_dim, args.mixer_dim)
        self.target_policy, self.target_mixer = copy.deepcopy((self.policy, self.mixer))

    def groups(self):
        """{name: (networks, Adam's learning rate)} of each optimiser."""
        return {"q": ([self.policy, self.mixer], self.args.learning_rate)}

    def act(self, utilities, avail, epsilon, rng):
        """Epsilon-greedy actions [N, n] of utilities and avail [N, n, A]."""
        noise = torch.empty_like(utilities).exponential_(generator=rng)
        uniform = noise.masked_fill(~avail, -1.0).argmax(-1)
        greedy = utilities.masked_fill(~avail, -torch.inf).argmax(-1)
        explore = torch.empty_like(noise[..., 0]).uniform_(generator=rng) < epsilon
        return torch.where(explore, uniform, greedy)

    def targets(self, batch, utilities):
        """y [T, B] of double Q-learning; batch as `sample` makes it, utilities [T + 1, B, n, A]."""
        later = whole_episodes(self.target_policy, batch["obs"], self.args.hidden_dim)[1:]
        chosen = utilities.detach()[1:].masked_fill(~batch["avail"][1:], -torch.inf).argmax(-1)
        weights = self.target_mixer.weights(batch["state"][1:])
        next_q = self.target_mixer(later, one_hot(chosen, later), weights)
        return batch["reward"] + self.args.gamma * next_q * ~batch["terminated"]

    def learn(self, batch, optimizers, rng):
        """One update on a batch of episodes; metrics."""
        utilities = whole_episodes(self.policy, batch["obs"], self.args.hidden_dim)
        weights = self.mixer.weights(batch["state"][:-1])
        q_tot = self.mixer(utilities[:-1], one_hot(batch["actions"], utilities), weights)
        with torch.no_grad():
            targets = self.targets(batch, utilities)
        loss = smac.masked_mean((q_tot - targets) ** 2, batch["valid"])
        norm = descend(loss, optimizers["q"], self.args)
        mean = smac.masked_mean(q_tot.detach(), batch["valid"])
        return dict(zip(self.metrics, (loss.detach(), norm, mean)))

    def update_targets(self):
        self.target_policy.load_state_dict(self.policy.state_dict())
        self.target_mixer.load_state_dict(self.mixer.state_dict())


def descend(loss, optimizer, args):
    """One step of an optimiser on its own parameters; the gradient's norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):  # before the weights are touched
        raise smac.RunError("not finite: loss or gradient")
    optimizer.step()
    return norm


# ------------------------------------------------------------------------------------------- replay
class Replay:
    """The last episodes, each a dict of tensors; and those that the games are in the midst of."""

    def __init__(self, args):
        self.episodes = collections.deque(maxlen=args.replay_episodes)
        self.begun = [[] for _ in range(args.num_envs)]
        self.rng = random.Random(args.seed)

    def add(self, before, actions, reward, done, info):
        """Take over a step of N games; before: (obs, state, avail). Ended episodes are stored."""
        view = lambda obs, state, avail: {"obs": obs, "state": state[:, 0], "avail": avail}
        row = view(*before) | {"actions": actions, "reward": reward}
        row["terminated"] = done & ~info["truncated"]  # PyMARL bootstraps time limits
        for k, steps in enumerate(self.begun):
            steps.append({key: x[k] for key, x in row.items()})
        for k in done.nonzero().flatten().tolist():
            steps, self.begun[k] = self.begun[k], []
            if not info["broken"][k]:
                episode = {key: [step[key] for step in steps] for key in row}
                for key, x in view(*info["final"]).items():
                    episode[key].append(x[k])
                self.episodes.append({key: torch.stack(x) for key, x in episode.items()})

    def sample(self, count):
        """`count` episodes, padded: obs, state, avail [T + 1, B, ...], actions [T, B, n], reward,
        terminated, done, and valid (0 in the padding) [T, B]."""
        chosen = self.rng.sample(self.episodes, count)
        batch = {key: pad_sequence([e[key] for e in chosen]) for key in chosen[0]}
        length = torch.tensor([len(e["reward"]) for e in chosen], device=batch["reward"].device)
        time_left = length - torch.arange(len(batch["reward"]), device=length.device)[:, None]
        return batch | {"valid": (time_left > 0).float(), "done": time_left <= 1}


# ----------------------------------------------------------------------------------------- training
def run_name(args):
    return f"{args.backend}-{args.map_name}__{smac.SCRIPT}__s{args.seed}"


def train(args, envs):
    """Train until total_timesteps or a signal; go on with args.resume. Returns the exit code."""
    torch.manual_seed(args.seed)
    agent = smac.Agent(envs, args).to(args.device)
    optimizers = {}
    for name, (networks, rate) in agent.groups().items():
        parameters = nn.ModuleList(networks).parameters()
        optimizers[name] = torch.optim.Adam(parameters, rate, eps=args.adam_eps)
    rng, replay = torch.Generator(args.device).manual_seed(args.seed), Replay(args)
    seen = obs, _, avail = envs.reset()
    hidden, keep = obs.new_zeros(*obs.shape[:2], args.hidden_dim), obs.new_zeros(args.num_envs)
    done = {"step": 0, "updates": 0, "seconds": 0.0, "evaluations": []}
    stateful = {"agent": agent, **optimizers}
    if args.resume:
        folder, saved = Path(args.resume), smac.load_checkpoint(args.resume)
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        rng.set_state(saved["rng"])
        done = saved["done"]
    else:
        folder = smac.new_folder(args.runs_dir, smac.run_name(args))
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
    print(f"run folder {folder}", flush=True)

    def save():
        parts = {name: part.state_dict() for name, part in stateful.items()}
        parts |= {"script": smac.SCRIPT, "args": asdict(args), "done": done, "rng": rng.get_state()}
        with smac.replacing(folder / "checkpoint.pt") as file:
            torch.save(parts, file)

    log, rows = smac.Log(folder, args, done["step"]), 0
    kept = collections.deque(maxlen=100)  # return, length, won of the last episodes
    context = smac.stop_signals(), contextlib.closing(log), smac.saved_on(smac.GameError, save)
    with context[0] as caught, context[1], context[2]:
        while done["step"] < args.total_timesteps and not caught:
            start, history, times = time.perf_counter(), [], collections.Counter()
            first = done["step"]
            while done["step"] - first < args.log_every and done["step"] < args.total_timesteps:
                share = max(0.0, 1 - done["step"] / args.epsilon_steps)
                epsilon = args.epsilon_end + (args.epsilon_start - args.epsilon_end) * share
                with torch.no_grad():
                    out, hiddens = agent.policy(obs[None], hidden, keep[None])
                    actions = agent.act(out[0], avail, epsilon, rng)
                before, clock = seen, time.perf_counter()
                *seen, reward, over, info = envs.step(actions)
                times["env"] += time.perf_counter() - clock
                (obs, _, avail), hidden, keep = seen, hiddens[0], 1.0 - over.float()
                replay.add(before, actions, reward, over, info)
                done["step"] += args.num_envs
                for k in (over & ~info["broken"]).nonzero().flatten().tolist():
                    kept.append([info[key][k].item() for key in ("return", "length", "won")])
                    if len(replay.episodes) < args.batch_episodes:
                        continue
                    clock = time.perf_counter()
                    history.append(agent.learn(replay.sample(args.batch_episodes), optimizers, rng))
                    done["updates"] += 1
                    if done["updates"] % args.target_every == 0:
                        agent.update_targets()
                    times["update"] += time.perf_counter() - clock
            seconds = time.perf_counter() - start
            done["seconds"] += seconds
            names = ("charts/episodic_return", "charts/episodic_length", "charts/win_rate")
            metrics = dict.fromkeys(agent.metrics, float("nan"))  # before the first update
            for key in agent.metrics if history else ():
                metrics[key] = torch.stack([row[key] for row in history]).mean().item()
            metrics |= dict(zip(names, np.mean(kept, 0) if kept else [float("nan")] * 3))
            metrics |= {"charts/SPS": (done["step"] - first) / seconds, "charts/epsilon": epsilon}
            metrics |= {"charts/env_restarts": envs.restarts}
            metrics |= {f"time/{name}": times[name] / seconds for name in ("env", "update")}
            last = done["step"] >= args.total_timesteps
            if last or done["step"] // args.eval_every > first // args.eval_every:
                with smac.evaluation_games(args, done["step"]) as games:
                    evaluation = smac.evaluate(agent.policy, games, args)
                done["evaluations"].append({"global_step": done["step"], **evaluation})
                metrics |= evaluation
            log.write(done["step"], metrics)
            rows += 1
            if last or caught or rows % args.checkpoint_every == 0:
                save()
    if caught:
        print(f"stopped by signal {caught[0]} at step {done['step']:,}; --resume {folder} goes on")
        return 128 + caught[0]
    final = [evaluation["eval/win_rate"] for evaluation in done["evaluations"][-10:]]
    result = {"final_win_rate": float(np.mean(final)), "averaged_evaluations": len(final), **done}
    with smac.replacing(folder / "result.json") as file:
        file.write(json.dumps(result | {"args": asdict(args)}, indent=2).encode())
    print(f"win rate {result['final_win_rate']}, the mean of the last {len(final)} evaluations")
    return 0


def main(argv=None, name="qmix", doc=__doc__, **parts):
    """As main() of maipg_smac.py."""
    parts = {"Args": Args, "Agent": Agent, "resolve": resolve, "__doc__": doc} | parts
    return run_variant("maipg_smac", name, argv, train=train, run_name=run_name, **parts)


if __name__ == "__main__":
    sys.exit(main())
