"""QMIX (Rashid et al., 2018) on SMAC: Q-learning with a monotonic mixer, from a replay of episodes.

    loss = mean over steps of (q_tot(s, a) - y)^2,   y = r + gamma q_tot'(s', argmax_a' Q(o', a'))

with target networks q_tot' and double Q-learning: the online utilities choose a', the target ones
judge it; y = r at an episode's end. A time limit is an end like others, as in MAPPO (PyMARL goes
on there with q_tot'). Settings are EPyMARL's with PyMARL's recurrent utilities, one update per
episode; rewards are not standardised. A utility sees its agent's observation and index, not the
last action. Environments, evaluation, log and checkpoint are those of maipg_smac.py.

    python benchmark/baselines/qmix.py --map-name 2s3z
"""

import collections
import contextlib
import copy
import functools
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac as smac  # noqa: E402


@dataclass
class Args:
    script: ClassVar[str] = "qmix"
    # what to run
    map_name: str = "2s3z"  # SMAC map
    backend: Literal["auto", "sc2", "smax"] = "auto"  # StarCraft II if it is there
    seed: int = 1  # of all that is random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    threads: int = 1  # CPU threads of torch
    total_timesteps: int = 10_000_000  # environment steps
    resume: str = ""  # run folder to go on with; its replay begins empty
    # learning
    num_envs: int = 8  # parallel games
    batch_episodes: int = 32  # episodes per update; one update per finished episode
    replay_episodes: int = 5000  # episodes that are kept
    hidden_dim: int = 64  # units per layer
    mixer_dim: int = 32  # units in the mixer and its hypernetworks
    learning_rate: float = 5e-4  # of Adam
    adam_eps: float = 1e-8  # Adam's epsilon
    gamma: float = 0.99  # discount
    epsilon_start: float = 1.0  # exploration at step 0 ...
    epsilon_end: float = 0.05  # ... and after epsilon_steps
    epsilon_steps: int = 50_000  # environment steps of the linear decay
    target_every: int = 200  # updates between copies to the target networks
    max_grad_norm: float = 10.0  # per optimiser
    # evaluation and output
    eval_every: int = 80_000  # environment steps
    eval_episodes: int = 32  # greedy episodes per evaluation
    log_every: int = 2_000  # environment steps between rows of progress.csv
    checkpoint_every: int = 10  # rows of progress.csv
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    # StarCraft II
    game_timeout: float = 120.0  # seconds until a silent game has failed


FRACTIONS = ["gamma", "epsilon_start", "epsilon_end", "td_lambda"]


def resolve(args):
    """Fill in backend and device. Raises UsageError."""
    values = asdict(args)
    common = values.keys() & asdict(smac.Args()).keys()
    shared = smac.resolve(smac.Args(**{name: values[name] for name in common}))
    args.backend, args.device = shared.backend, shared.device
    for name, value in values.items():
        low, high = int(type(value) is int and name != "seed"), 1 if name in FRACTIONS else 1e9
        if type(value) in (int, float) and not low <= value <= high:
            raise smac.UsageError(f"--{name} {value}: must lie in [{low}, {high:g}]")
    if args.batch_episodes > args.replay_episodes:
        raise smac.UsageError("--replay-episodes must not be less than --batch-episodes")
    return args


# ---------- networks
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


def next_step(x):
    """x [T, ...] one step later; zeros after the last one."""
    return torch.cat([x[1:], torch.zeros_like(x[:1])])


class Agent(nn.Module):
    """`policy` holds the utilities Q_i, which act greedily; the mixer; a target copy of both."""

    metrics = ("losses/q", "diagnostics/q_grad_norm", "diagnostics/q_tot")

    def __init__(self, now, args):
        super().__init__()
        self.args, (n, A) = args, now["avail"].shape[1:]
        self.policy = Recurrent(now["obs"].shape[-1], args.hidden_dim, A)
        self.mixer = smac.Mixer("qmix", n, now["state"].shape[-1], args.mixer_dim)
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
        """y [T, B] of double Q-learning; batch as by Replay.sample, utilities [T, B, n, A]."""
        judged = whole_episodes(self.target_policy, batch["obs"], self.args.hidden_dim)
        chosen = utilities.detach().masked_fill(~batch["avail"], -torch.inf).argmax(-1)
        weights = self.target_mixer.weights(batch["state"])
        q = self.target_mixer(judged, one_hot(chosen, judged), weights)
        return batch["reward"] + self.args.gamma * next_step(q) * ~batch["done"]

    def learn(self, batch, optimizers, rng):
        """One update on a batch of episodes; metrics."""
        utilities = whole_episodes(self.policy, batch["obs"], self.args.hidden_dim)
        weights = self.mixer.weights(batch["state"])
        q_tot = self.mixer(utilities, one_hot(batch["actions"], utilities), weights)
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
        raise FloatingPointError("not finite: loss or gradient")
    optimizer.step()
    return norm


# ---------- replay
class Replay:
    """The last episodes, each a dict of tensors; and those that the games are in the midst of."""

    def __init__(self, args):
        self.episodes = collections.deque(maxlen=args.replay_episodes)
        self.rng = random.Random(args.seed)
        self.drop(args.num_envs)

    def drop(self, num_envs):
        """Forget the episodes in the making: new games begin."""
        self.begun = [[] for _ in range(num_envs)]

    def add(self, seen, actions, reward, done):
        """Take over a step of N games; seen: obs, state, avail before it. What ends is stored."""
        row = {key: seen[key] for key in ("obs", "state", "avail")}
        row |= {"actions": actions, "reward": reward, "done": done}
        for k, steps in enumerate(self.begun):
            steps.append({key: x[k] for key, x in row.items()})
        for k in done.nonzero().flatten().tolist():
            steps, self.begun[k] = self.begun[k], []
            self.episodes.append({key: torch.stack([s[key] for s in steps]) for key in row})

    def sample(self, count):
        """`count` episodes, padded: obs [T, B, n, O], state [T, B, S], avail [T, B, n, A], actions
        [T, B, n], reward, done, valid (0 in the padding) [T, B]."""
        chosen = self.rng.sample(self.episodes, count)
        batch = {key: pad_sequence([e[key] for e in chosen]) for key in chosen[0]}
        length = torch.tensor([len(e["done"]) for e in chosen], device=batch["done"].device)
        time = torch.arange(len(batch["done"]), device=length.device)[:, None]
        return batch | {"valid": (time < length).float()}


# ---------- training
def epsilon_at(step, args):
    """Linear from epsilon_start to epsilon_end."""
    left = max(0.0, 1 - step / args.epsilon_steps)
    return args.epsilon_end + (args.epsilon_start - args.epsilon_end) * left


@torch.no_grad()
def play(agent, envs, replay, now, epsilon, rng):
    """One step of all games into the replay; (return, won) of the episodes that it ends."""
    out, hidden = agent.policy(now["obs"][None], now["policy_hidden"], now["keep"][None])
    actions = agent.act(out[0], now["avail"], epsilon, rng)
    obs, state, avail, reward, done, won = envs.step(actions)
    replay.add(now, actions, reward, done)
    now["return"] = now["return"] * now["keep"] + reward
    now.update(obs=obs, state=state, avail=avail, keep=1.0 - done.float())
    now["policy_hidden"] = hidden[0]
    return list(zip(now["return"][done].tolist(), won[done].tolist()))


def averages(agent, history, ended):
    """A row of metrics: means over updates and episodes, nan where there are none."""
    names = [*agent.metrics, "charts/episodic_return", "charts/win_rate"]
    metrics = dict.fromkeys([*names, *smac.EVALUATION], math.nan)
    for key in agent.metrics if history else ():
        metrics[key] = torch.stack([row[key] for row in history]).mean().item()
    return metrics | {key: sum(x) / len(x) for key, x in zip(names[-2:], zip(*ended))}


def train(args, envs, stopped=(), agent_class=Agent):
    """Train until total_timesteps, or until there is a signal in `stopped`."""
    torch.manual_seed(args.seed)
    saved, progress = {}, {"step": 0, "updates": 0, "rows": 0, "restarts": 0, "csv_size": 0}
    if args.resume:
        saved = smac.load_checkpoint(args.resume, type(args))
        progress = saved["progress"]
    # A resumed run begins new games: not those of its start.
    now = smac.begin(envs, args.seed + progress["step"], args)
    agent = agent_class(now, args).to(args.device)
    optimizers = {}
    for name, (networks, rate) in agent.groups().items():
        parameters = nn.ModuleList(networks).parameters()
        optimizers[name] = torch.optim.Adam(parameters, rate, eps=args.adam_eps)
    rng, replay = torch.Generator(args.device).manual_seed(args.seed), Replay(args)
    ended = collections.deque(maxlen=100)  # (return, won) of the last episodes

    if args.resume:
        folder = Path(args.resume)
        agent.load_state_dict(saved["agent"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        rng.set_state(saved["rng"])
    else:
        name = f"{args.backend}-{args.map_name}__{args.script}__s{args.seed}"
        folder = Path(args.runs_dir, f"{name}__{time.strftime('%Y%m%d-%H%M%S')}")
        folder.mkdir(parents=True)
    log = smac.Log(folder, args, progress["step"], progress["csv_size"])

    def save():
        progress["csv_size"] = log.csv.tell()
        states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        parts = {"agent": agent.state_dict(), "optimizers": states, "rng": rng.get_state()}
        smac.write_checkpoint(folder, args, parts | {"progress": progress})

    def gather(end, attempt):
        """Play until an episode has ended, or until step `end`; how many have ended. When a game
        fails, the episodes in the making are thrown away, and new games begin."""
        if attempt:
            now.update(smac.begin(envs, args.seed + 100_003 * progress["restarts"], args))
            replay.drop(args.num_envs)
        over = []
        while progress["step"] < end and not over:
            epsilon = epsilon_at(progress["step"], args)
            over = play(agent, envs, replay, now, epsilon, rng)
            progress["step"] += args.num_envs
        ended.extend(over)
        return len(over)

    def judge(attempt):
        seed = 10**9 + args.seed + progress["step"] + attempt
        with contextlib.closing(copy.copy(envs)) as games:
            return smac.evaluate(agent.policy, games, seed, args, stopped)

    def learn():
        metrics = agent.learn(replay.sample(args.batch_episodes), optimizers, rng)
        progress["updates"] += 1
        if progress["updates"] % args.target_every == 0:
            agent.update_targets()
        return metrics

    with log.writer, log.bar:
        try:
            while progress["step"] < args.total_timesteps and not stopped:
                start, first, history = time.perf_counter(), progress["step"], []
                end = min(first + args.log_every, args.total_timesteps)
                while progress["step"] < end and not stopped:
                    episodes = smac.with_retries(functools.partial(gather, end), progress, stopped)
                    if len(replay.episodes) >= args.batch_episodes:
                        history += [learn() for _ in range(episodes)]
                seconds, step = time.perf_counter() - start, progress["step"]
                metrics = averages(agent, history, ended)
                metrics["charts/env_restarts"] = progress["restarts"]
                metrics["charts/epsilon"] = epsilon_at(step, args)
                metrics["charts/SPS"] = (step - first) / seconds
                due = step // args.eval_every > first // args.eval_every
                if due or step >= args.total_timesteps:
                    log.bar.set_postfix_str("evaluating")
                    metrics |= {} if stopped else smac.with_retries(judge, progress, stopped)
                log.write(step, metrics)
                progress["rows"] += 1
                if progress["rows"] % args.checkpoint_every == 0:
                    save()
        finally:
            # Whatever else ends a run: save.
            if not isinstance(sys.exception(), FloatingPointError | SystemExit):
                save()
    if stopped:
        print(f"stopped at step {progress['step']:,}; --resume {folder} goes on")


def main(argv=None):
    """As main() of maipg_smac.py."""
    return smac.main(argv, args_class=Args, resolve=resolve, train=train)


if __name__ == "__main__":
    sys.exit(main())
