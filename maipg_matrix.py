"""MAIPG on matrix games: Multi-Agent Interpolated Policy Gradients, in one file.

n agents choose one of m actions each, and all receive the payoff R(a_1, ..., a_n). One state, one
step: V, Q and the policy gradient have closed forms, and everything can be checked. nu trades bias
against variance; nu = 0 is the standard policy gradient. Summed over agents, the policy ascends

    (1 - nu) * mean[min(r A, clip(r, 1 - eps, 1 + eps) A)]   `stochastic_pg_loss`      Eq. (3), (10)
      + nu   * mean[q_tot(mu)]                               `deterministic_pg_loss`   Eq. (10)

r: ratio of new to old policy. A: reward minus the batch's mean, in the unit of q_tot.
q_tot: VDN or QMIX, fitted to the rewards of the current policy's actions.
mu: a Gumbel-softmax sample; or, by --mu expectation, pi's probabilities.

    --estimator sampled   batches of joint actions, as in the other scripts
    --estimator exact     the first term is E_pi[R] itself, and q_tot is fitted to all joint
                          actions; VDN by least squares: Proposition 5 at work.

Axes: R runs (nus x games x seeds, side by side in one batch of tensors, each with parameters of its
own), B joint actions in a batch, n agents, m actions.

    python maipg_matrix.py                                    # Figure 1: random games
    python maipg_matrix.py --game table5a                     # Table 5 (c); table5b: (d)
    python maipg_matrix.py --game payoff.npy --nus 0 0.5 1    # a game of your own
"""

import csv
import json
import math
import os
import re
import string
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

# ---------- settings
# (A, A) is best; the penalties around it make both games non-monotonic.
TABLE_5 = {
    "table5a": [[2.0, -2.0, -2.0], [-2.0, 0.0, 0.0], [-2.0, 0.0, 1.0]],
    "table5b": [[2.0, -2.0, -2.0], [-2.0, 0.5, 0.0], [-2.0, 0.0, 1.0]],
}


@dataclass
class Args:
    # what to run
    game: str = "random"  # random (Figure 1), table5a, table5b, or a .npy file
    settings: tuple[str, ...] = ("2x3", "2x10", "3x5", "4x5", "5x3")  # agents x actions
    num_games: int = 100  # random games per setting, uniform in [0, 1]
    seeds: int | None = None  # per game and nu; None: 1 if random, else 10
    nus: tuple[float, ...] = tuple(k / 10 for k in range(11))  # weights; 0 is needed
    seed: int = 1  # of all that is random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    threads: int = 1  # CPU threads of torch
    out_dir: str = "runs/matrix"  # where tables and figures go
    # MAIPG
    estimator: Literal["exact", "sampled"] = "sampled"  # see above
    mixer: Literal["vdn", "qmix"] = "vdn"  # factorisation of q_tot
    mu: Literal["expectation", "gumbel"] = "gumbel"  # the action in q_tot
    mixer_dim: int = 16  # QMIX's mixing units
    # optimisation
    iterations: int = 400  # batches, or exact gradients
    batch_size: int = 32  # joint actions, and Gumbel samples
    update_epochs: int = 5  # policy steps per batch
    critic_steps: int = 15  # critic steps per batch
    clip_eps: float = 0.2  # PPO clip
    learning_rate: float = 0.05  # of Adam, policy
    critic_lr: float = 0.05  # of Adam, critic
    init_std: float = 1.0  # of the initial logits, the same for all nus


class UsageError(Exception):
    """The user can mend it: exit code 2, nothing written."""


def resolve(args):
    """Check the values, fill in device and seeds. Raises UsageError."""
    args.nus = tuple(sorted(set(args.nus)))
    if args.seeds is None:
        args.seeds = 1 if args.game == "random" else 10
    for name, value in asdict(args).items():
        # A standard error needs two games.
        low = {"seed": 0, "num_games": 2}.get(name, int(type(value) is int))
        if type(value) in (int, float) and not low <= value <= 1e9:
            raise UsageError(f"--{name} {value}: must lie in [{low}, 1e9]")
    if 0 not in args.nus or not all(0 <= nu <= 1 for nu in args.nus):
        raise UsageError("--nus must lie in [0, 1] and contain 0, to compare with")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    return args


# ---------- networks
class Critic:
    """A factorised q_tot per run: utility tables Q_i [R, n, m], and a mixer.

    VDN adds them up. QMIX: w_2 . elu(Q w_1 + b_1) + bias with absolute weights, so that q_tot grows
    with every utility; there is one state, so its hypernetworks are plain parameters.
    """

    def __init__(self, runs, n, m, args, rng):
        self.kind, dim = args.mixer, args.mixer_dim
        self.tables = torch.zeros(runs, n, m, device=args.device)
        self.bias = torch.zeros(runs, device=args.device)
        self.parameters = [self.tables, self.bias]
        if self.kind == "qmix":
            self.w_1 = self.tables.new_zeros(runs, n, dim)
            self.b_1 = self.tables.new_zeros(runs, dim)
            self.w_2 = self.tables.new_zeros(runs, dim)
            self.parameters += [self.w_1, self.b_1, self.w_2]
            for weight, inputs in [(self.tables, 100), (self.w_1, n), (self.w_2, dim)]:
                weight.normal_(generator=rng).div_(math.sqrt(inputs))

    def __call__(self, actions):
        """q_tot [R, B] of actions [R or 1, B, n, m]: one-hot, or relaxed."""
        chosen = (self.tables.unsqueeze(1) * actions).sum(-1)
        if self.kind == "vdn":
            return chosen.sum(-1) + self.bias.unsqueeze(-1)
        hidden = F.elu(chosen @ self.w_1.abs() + self.b_1.unsqueeze(1))
        return (hidden * self.w_2.abs().unsqueeze(1)).sum(-1) + self.bias.unsqueeze(-1)


# ---------- estimators and losses
def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def gumbel_max(log_pi, rng):
    """log pi plus Gumbel noise, [..., A]; its argmax is a sample of pi."""
    return log_pi - torch.empty_like(log_pi).exponential_(generator=rng).log()


def expected_reward(payoffs, pi):
    """E_pi[R] [R] of payoffs [R, m, ..., m] and policies [R, n, m]."""
    axes = string.ascii_lowercase[: pi.shape[1]]
    terms = ",".join(f"Z{axis}" for axis in axes)
    return torch.einsum(f"Z{axes},{terms}->Z", payoffs, *pi.unbind(1))


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


# ---------- rollout and targets
def rollout(log_pi, payoffs, rng, args):
    """A batch of each run's joint actions [R, B, n, m], one-hot; their log pi [R, B, n]; and the
    reward [R, B], which is the target of q_tot."""
    draws = log_pi.unsqueeze(1).expand(-1, args.batch_size, -1, -1)
    chosen = gumbel_max(draws, rng).argmax(-1)
    actions = F.one_hot(chosen, log_pi.shape[-1]).float()
    log_probs = (draws * actions).sum(-1)
    return actions, log_probs, rewards_of(payoffs, actions)


# ---------- update
def fit(critic, optimizer, actions, rewards, weights, steps):
    """Regress q_tot on the rewards [R, B], weighted; Eq. (14) with the current policy's actions."""
    for parameter in critic.parameters:
        parameter.requires_grad_()
    for _ in range(steps):
        optimizer.zero_grad()
        (weights * (critic(actions) - rewards) ** 2).sum().backward()
        optimizer.step()
    # Frozen in the policy's gradient.
    for parameter in critic.parameters:
        parameter.requires_grad_(False)


def fit_vdn_exactly(critic, payoffs, pi):
    """The weighted least-squares VDN: Q_i(k) = E[R | a_i = k] - E[R]. Eq. (16), Proposition 5."""
    # E_pi[R] is linear in each pi_i, and E[R | a_i = k] is its slope.
    slope = torch.func.grad(lambda pi: expected_reward(payoffs, pi).sum())(pi)
    critic.bias = expected_reward(payoffs, pi)
    critic.tables = slope - critic.bias[:, None, None]


def sampled_term(log_pi, actions, old_log_probs, advantages, args):
    """First term of Eq. (10), a loss per run [R]. log_pi [R, n, m], advantages [R, B]."""
    log_ratio = (log_pi.unsqueeze(1) * actions).sum(-1) - old_log_probs
    advantages = advantages.unsqueeze(-1).expand_as(log_ratio)
    loss = torch.vmap(lambda *run: stochastic_pg_loss(*run, args.clip_eps))
    # The sum over agents, as in the second term.
    return loss(log_ratio, advantages, torch.ones_like(log_ratio)) * log_pi.shape[1]


def deterministic_term(critic, log_pi, args, rng):
    """Second term of Eq. (10), a loss per run [R]. log_pi [R, n, m]."""
    mu = log_pi.exp().unsqueeze(1)
    if args.mu == "gumbel":
        mu = gumbel_softmax(log_pi.unsqueeze(1).expand(-1, args.batch_size, -1, -1), rng)
    return torch.vmap(lambda q_tot: deterministic_pg_loss(q_tot, 1.0))(critic(mu))


def update(logits, optimizer, critic, critic_optimizer, payoffs, nu, rng, args):
    """Fit the critics to their policies, then take the policy steps of a batch. nu [R]."""
    old = logits.detach().log_softmax(-1)
    exact = args.estimator == "exact"

    # The critic comes first: a stale one costs reward.
    if exact and args.mixer == "vdn":
        fit_vdn_exactly(critic, payoffs, old.exp())
    elif exact:
        joint = all_joint_actions(*old.shape[1:], args.device)
        p = torch.einsum("bnm,znm->zb", joint, old).exp()
        fit(critic, critic_optimizer, joint[None], payoffs.flatten(1), p, args.critic_steps)
    else:
        actions, log_probs, rewards = rollout(old, payoffs, rng, args)
        # The mean holds the sample itself: the gradient is (1 - 1 / B) of the exact one.
        advantages = rewards - rewards.mean(1, keepdim=True)
        fit(critic, critic_optimizer, actions, rewards, 1 / args.batch_size, args.critic_steps)

    for _ in range(1 if exact else args.update_epochs):
        log_pi = logits.log_softmax(-1)
        if exact:
            stochastic = -expected_reward(payoffs, log_pi.exp())
        else:
            stochastic = sampled_term(log_pi, actions, log_probs, advantages, args)
        deterministic = deterministic_term(critic, log_pi, args, rng)
        optimizer.zero_grad()
        interpolate(stochastic, deterministic, nu).sum().backward()
        optimizer.step()


# ---------- training
def train(payoffs, args):
    """Train every (nu, game, seed) at once on payoffs [G, m, ..., m].

    Returns, each [nus, G, seeds]: the expected reward of the final policy, the payoff of its most
    probable joint action, and whether every agent has settled on an action (probability > 0.99).
    """
    n, m = payoffs.ndim - 1, payoffs.shape[-1]
    shape = (len(args.nus), len(payoffs), args.seeds)
    rng = torch.Generator(args.device).manual_seed(args.seed)
    start = torch.empty(*shape[1:], n, m, device=args.device).normal_(generator=rng)
    logits = (start * args.init_std).repeat(len(args.nus), 1, 1, 1, 1).flatten(0, 2)
    nu = torch.tensor(args.nus, device=args.device)[:, None, None].expand(shape).flatten()
    payoffs = torch.as_tensor(payoffs, dtype=torch.float32, device=args.device)
    payoffs = payoffs.unsqueeze(1).expand(*shape, *[m] * n).flatten(0, 2)

    critic = Critic(len(nu), n, m, args, rng)
    optimizer = torch.optim.Adam([logits.requires_grad_()], args.learning_rate)
    critic_optimizer = torch.optim.Adam(critic.parameters, args.critic_lr)
    for _ in tqdm(range(args.iterations), disable=None, leave=False):
        update(logits, optimizer, critic, critic_optimizer, payoffs, nu, rng, args)
    if not logits.isfinite().all():
        raise FloatingPointError("a policy is not finite: lower the learning rates")

    pi = logits.detach().softmax(-1)
    greedy = F.one_hot(pi.argmax(-1), m).float()
    settled = (pi.amax(-1).amin(-1) > 0.99).float()
    results = [expected_reward(payoffs, pi), expected_reward(payoffs, greedy), settled]
    return [x.view(shape).cpu().numpy() for x in results]


# ---------- evaluation
def relative_gain(rewards, optimum):
    """eta(nu) = (R(nu) - R(0)) / R(0), its standard error over games, and eta of the optimum.

    rewards [nus, G, seeds], nu = 0 first; optimum [G]. R averages games and seeds (Section 5.1).
    eta > 0: more reward than nu = 0, as in the paper's words; its formula has the other sign.
    """
    per_game = rewards.mean(-1)
    base = per_game[0].mean()
    eta = (per_game.mean(1) - base) / base
    error = (per_game - per_game[0]).std(1, ddof=1) / math.sqrt(len(optimum)) / base
    return eta, error, (optimum.mean() - base) / base


def figure_1(results, args, folder):
    """Write figure1.csv and .png of {title: (rewards, greedy, settled, optimum)}, and print."""
    from matplotlib.figure import Figure

    rows, size = [], len(results)
    figure = Figure((3.3 * size, 3.2), 130, layout="tight")
    axes = figure.subplots(1, size, squeeze=False)[0]
    for axis, (title, (rewards, greedy, settled, optimum)) in zip(axes, results.items()):
        eta, error, best = relative_gain(rewards, optimum)
        for k, nu in enumerate(args.nus):
            row = {"game": title, "nu": nu, "relative_gain_percent": 100 * eta[k]}
            row |= {"stderr_percent": 100 * error[k], "optimum_gain_percent": 100 * best}
            row |= {"mean_reward": rewards[k].mean(), "greedy_reward": greedy[k].mean()}
            rows.append(row | {"settled": settled[k].mean(), "games": len(optimum)})
        axis.axhline(0, color="grey", lw=0.8)
        axis.axhline(100 * best, color="#D55E00", ls="--", label="optimum")
        axis.errorbar(args.nus, 100 * eta, 100 * error, marker="o", ms=3, capsize=2)
        axis.set(title=title, xlabel="nu")
    axes[0].set_ylabel("eta: relative gain over nu = 0, %")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "figure1.png")
    write_csv(folder / "figure1.csv", rows)
    print("eta(nu) = (R(nu) - R(0)) / R(0): above 0 is better than nu = 0")
    line = "{game}  nu {nu:g}  eta {relative_gain_percent:+.2f}% +- {stderr_percent:.2f}"
    line += "  (optimum {optimum_gain_percent:+.2f}%)  settled {settled:.2f}"
    print("\n".join(line.format_map(row) for row in rows))
    return ["figure1.csv", "figure1.png"]


def table_5(title, greedy, args, folder):
    """Write TITLE.csv, and print: the final payoff of each nu and seed, [nus, 1, seeds]."""
    # By way of text: 0.1, not 0.10000000149.
    greedy, rows = greedy[:, 0].astype(str).astype(float), []
    values = sorted(set(greedy.flatten().tolist()), reverse=True)
    head = "".join(f"{f'#{x:g}':>5}" for x in values)
    print(f"{title}\nnu   payoff of each seed | mean  stderr | counts: {head}")
    for nu, payoffs in zip(args.nus, greedy.tolist()):
        error = np.std(payoffs) / math.sqrt(args.seeds - 1) if args.seeds > 1 else math.nan
        row = {"nu": nu} | {f"seed_{k + 1}": x for k, x in enumerate(payoffs)}
        row |= {"mean": np.mean(payoffs), "stderr": error}
        rows.append(row | {f"count_{x:.8g}": payoffs.count(x) for x in values})
        each = " ".join(f"{x:5g}" for x in payoffs)
        count = "".join(f"{payoffs.count(x):5d}" for x in values)
        print(f"{nu:<4g} {each} | {row['mean']:5.2f} {error:5.2f} |{count}")
    write_csv(folder / f"{title}.csv", rows)
    return [f"{title}.csv"]


# ---------- log
def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---------- environments
def rewards_of(payoffs, actions):
    """R(a) [R, B] of one-hot joint actions [R, B, n, m]."""
    index, m = actions.argmax(-1), actions.shape[-1]
    powers = m ** torch.arange(index.shape[-1] - 1, -1, -1, device=index.device)
    return payoffs.flatten(1).gather(1, (index * powers).sum(-1))


def all_joint_actions(n, m, device):
    """One-hot [m^n, n, m], in the order of a flattened payoff tensor."""
    index = torch.cartesian_prod(*[torch.arange(m, device=device)] * n)
    return F.one_hot(index, m).float()


def load_games(args):
    """{title: payoffs [G, m, ..., m], one axis per agent}. Raises UsageError."""
    if args.game != "random":
        known = args.game in TABLE_5
        payoffs = np.array([TABLE_5[args.game]]) if known else load_game(args.game)
        check_memory(payoffs.shape, args)
        return {Path(args.game).stem: payoffs}
    games, rng = {}, np.random.default_rng(args.seed)
    for setting in args.settings or [""]:
        match = re.fullmatch(r"([2-8])x(\d{1,4})", setting)
        n, m = map(int, match.groups()) if match else (0, 0)
        if m < 2 or m**n > 10**6:
            raise UsageError(f"--settings {setting!r}: AGENTSxACTIONS, like 3x5, 2 to 8 agents")
        shape = (args.num_games, *[m] * n)
        check_memory(shape, args)
        games[f"{n} agents, {m} actions"] = rng.uniform(size=shape)
    return games


def load_game(path):
    """Payoffs [1, m, ..., m] of a .npy file. Raises UsageError."""
    try:
        payoffs = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        why = repr(str(error)[:99])
        raise UsageError(f"--game {path}: not random, table5a, table5b or .npy: {why}") from None
    shape, kind = payoffs.shape, payoffs.dtype.kind
    if kind not in "iuf" or len(set(shape)) != 1 or not 2 <= len(shape) <= 8 or shape[0] < 2:
        valid = "numbers in (m, ..., m), m > 1, one axis for each of 2 to 8 agents"
        raise UsageError(f"--game {path}: {payoffs.dtype} {shape}, not {valid}")
    # Adam's steps do not grow with the payoffs: the critic could not follow.
    if not ((-100 <= payoffs) & (payoffs <= 100)).all():
        raise UsageError(f"--game {path}: entries must be finite, and lie in [-100, 100]")
    return payoffs[None].astype(float)


def check_memory(shape, args):
    """UsageError if runs on payoffs [G, m, ..., m] need more memory than there is."""
    runs = shape[0] * args.seeds * len(args.nus)
    width, samples = (len(shape) - 1) * shape[1], 4 * args.batch_size
    if args.mixer == "qmix":
        width += args.mixer_dim
        samples += math.prod(shape[1:]) * (args.estimator == "exact")
    # Bytes, as measured; QMIX's are half as many.
    needed = runs * (5 * math.prod(shape[1:]) + 10 * samples * width)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.device == "cuda":
        _, memory = torch.cuda.mem_get_info()
    if needed > memory:
        size = f"{needed / 1e9:,.0f} GB of memory, there are {memory / 1e9:.0f}"
        raise UsageError(f"{runs:,} runs need {size}")


# ---------- main
def run(args):
    """Train on the games of args, write tables and figure, say where."""
    games, results = load_games(args), {}
    start, folder = time.perf_counter(), Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for title, payoffs in games.items():
        optimum = payoffs.reshape(len(payoffs), -1).max(1)
        results[title] = (*train(payoffs, args), optimum)
        seconds = time.perf_counter() - start
        print(f"{title}: {seconds:.0f} s", file=sys.stderr, flush=True)
    if args.game == "random":
        files = figure_1(results, args, folder)
    else:
        files = table_5(title, results[title][1], args, folder)
    text = json.dumps(asdict(args) | {"seconds": round(seconds, 3)}, indent=2)
    (folder / "args.json").write_text(text + "\n")
    print(f"written to {folder}: {', '.join(files)}, args.json")


def main(argv=None):
    """Run a command line; the exit code: 1 not finite, 2 bad input or files, 130 Ctrl-C."""
    try:
        args = resolve(tyro.cli(Args, args=argv, description=__doc__))
        torch.set_num_threads(args.threads)
        run(args)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UsageError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


if __name__ == "__main__":
    sys.exit(main())
