"""MAIPG on stateless cooperative matrix games: the whole algorithm where everything can be checked.

n agents choose one of m actions each and all receive the payoff R(a_1, ..., a_n). There is a single
state and a single step, so V, Q and the policy gradient have closed forms, and the interpolated
gradient can be compared with the truth. The policy ascends

    (1 - nu) * gradient of E_pi[R]       exact, or PPO's clipped one from samples   Eq. (3), (10)
      + nu   * gradient of q_tot(mu)     mu: a Gumbel-softmax sample, or pi itself  Eq. (10)

summed over the agents, with a factorised q_tot fitted to the rewards of the current policy: VDN or
QMIX. nu = 0 is the standard policy gradient, nu = 1 trusts the factorised critic alone.

Everything is one batch: R runs = nus x games x seeds, side by side on the first axis of every
tensor (B samples, n agents, m actions), each with parameters of its own.

    python maipg_matrix.py                                    # Figure 1: random games
    python maipg_matrix.py --game table5a                     # Table 5 (c); table5b: (d)
    python maipg_matrix.py --game payoff.npy --nus 0 0.5 1    # a game of your own
    python maipg_matrix.py --estimator exact --mixer vdn      # no sampling: Proposition 5 at work
"""

import contextlib
import csv
import io
import itertools
import json
import math
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

# ----------------------------------------------------------------------------------------- settings
TABLE_5 = {  # (A, A) is best; the penalties around it make both games non-monotonic
    "table5a": [[2.0, -2.0, -2.0], [-2.0, 0.0, 0.0], [-2.0, 0.0, 1.0]],
    "table5b": [[2.0, -2.0, -2.0], [-2.0, 0.5, 0.0], [-2.0, 0.0, 1.0]],
}


@dataclass
class Args:
    # --- what to run
    game: str = "random"  # random (Figure 1), table5a, table5b (Table 5), or a .npy file
    settings: tuple[str, ...] = ("2x3", "2x10", "3x5", "4x5", "5x3")  # agents x actions of random
    num_games: int = 100  # random games per setting, entries uniform in [0, 1]
    seeds: int | None = None  # runs per game and nu; None: 1 for random games, 10 for others
    nus: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # with 0
    seed: int = 1  # of games, initial policies and samples
    device: str = "auto"  # cpu, cuda, ...; auto: a GPU if there is one
    threads: int = 2  # CPU threads of torch
    out_dir: str = "runs/matrix"  # where tables and figures go
    # --- MAIPG
    estimator: Literal["exact", "sampled"] = "sampled"  # stochastic term: closed form, or PPO
    mixer: Literal["vdn", "qmix"] = "vdn"  # factorisation of q_tot
    deterministic: Literal["gumbel", "expectation"] = "gumbel"  # mu: a sample, or pi itself
    temperature: float = 1.0  # of the Gumbel-softmax
    mixer_dim: int = 16  # QMIX's mixing units
    # --- optimisation
    iterations: int = 400  # batches, or exact gradients
    batch_size: int = 32  # joint actions per batch, and Gumbel samples per gradient
    update_epochs: int = 5  # policy steps per batch
    critic_steps: int = 15  # critic steps per batch
    clip_eps: float = 0.2  # PPO clip
    learning_rate: float = 0.05  # Adam, policy
    critic_lr: float = 0.05  # Adam, critic
    init_std: float = 1.0  # of the initial logits, which all nus share


BOUNDS = dict.fromkeys(["temperature", "learning_rate", "critic_lr"], (1e-6, math.inf))
BOUNDS |= {"clip_eps": (0, 1), "init_std": (0, 100), "seed": (0, 2**31), "threads": (1, 1024)}
BOUNDS |= {"num_games": (2, 10**5)}  # the standard error needs two


class UsageError(Exception):
    """Something that the user can mend: one line on stderr, exit code 2, nothing written."""


def resolve(args):
    """Check the values and fill in device and seeds. Raises UsageError."""
    if args.seeds is None:
        args.seeds = 1 if args.game == "random" else 10
    for name, value in asdict(args).items():  # what BOUNDS does not name must be positive
        low, high = BOUNDS.get(name, (1, 10**6))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must lie in [{low}, {high}]")
    if not all(0 <= nu <= 1 for nu in args.nus) or 0 not in args.nus:
        raise UsageError("--nus must lie in [0, 1] and contain 0, to compare with")
    for setting in args.settings:
        match = re.fullmatch(r"(\d+)x(\d+)", setting)
        n, m = map(int, match.groups()) if match else (0, 0)
        if not (2 <= n <= 8 and m >= 2 and m**n <= 10**6):
            raise UsageError(f"--settings {setting}: AGENTSxACTIONS, like 3x5, 2 to 8 agents")
    if Path(args.out_dir).is_file():
        raise UsageError(f"--out-dir {args.out_dir} is a file")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


# ------------------------------------------------------------------------------------- environments
def load_games(args):
    """{title: payoffs [G, m, ..., m], one axis per agent}. Raises UsageError for a bad file."""
    if args.game == "random":
        rng = np.random.default_rng(args.seed)
        sizes = [tuple(map(int, setting.split("x"))) for setting in args.settings]
        draw = lambda n, m: rng.uniform(size=(args.num_games, *[m] * n))
        return {f"{n} agents, {m} actions": draw(n, m) for n, m in sizes}
    if args.game in TABLE_5:
        return {args.game: np.array([TABLE_5[args.game]])}
    path = Path(args.game)
    if path.suffix != ".npy":
        raise UsageError(f"--game {path}: random, table5a, table5b, or a file that ends in .npy")
    try:
        payoff = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--game {path}: {' '.join(str(error).split())}") from None
    if payoff.dtype.kind not in "iuf" or payoff.ndim < 2 or len(set(payoff.shape)) != 1:
        shape = f"{payoff.dtype} {payoff.shape}"
        raise UsageError(f"--game {path}: {shape} is no real (m, ..., m), one axis per agent")
    if payoff.shape[0] < 2 or payoff.ndim > 8 or not np.isfinite(payoff).all():
        raise UsageError(f"--game {path}: needs 2 actions, 2 to 8 agents, and finite entries only")
    return {path.stem: payoff[None].astype(float)}


def expected_reward(payoffs, pi):
    """E_pi[R] [R] of payoffs [R, m, ..., m] and policies [R, n, m]."""
    axes = string.ascii_lowercase[: pi.shape[1]]
    terms = ",".join(f"Z{axis}" for axis in axes)
    return torch.einsum(f"Z{axes},{terms}->Z", payoffs, *pi.unbind(1))


def individual_values(payoffs, pi):
    """E[R | a_i = k] [R, n, m]: E_pi[R] is linear in each pi_i, and this is its slope."""
    pi = pi.detach().requires_grad_()
    return torch.autograd.grad(expected_reward(payoffs, pi).sum(), pi)[0]


def rewards_of(payoffs, actions):
    """R(a) [R, B] of one-hot joint actions [R, B, n, m]."""
    index, m = actions.argmax(-1), actions.shape[-1]
    powers = m ** torch.arange(index.shape[-1] - 1, -1, -1, device=index.device)
    return payoffs.flatten(1).gather(1, (index * powers).sum(-1))


def all_joint_actions(n, m, device):
    """One-hot [m^n, n, m], in the order of a flattened payoff tensor."""
    index = torch.cartesian_prod(*[torch.arange(m, device=device)] * n)
    return F.one_hot(index, m).float()


# ----------------------------------------------------------------------------------------- networks
class Critic:
    """A factorised q_tot per run: utility tables Q_i [R, n, m], and a mixer.

    VDN adds them up. QMIX: w_2 . elu(Q w_1 + b_1) + b_2 with absolute weights, so that q_tot grows
    with every utility; there is one state, so its hypernetworks are plain parameters.
    """

    def __init__(self, runs, n, m, args, rng):
        self.kind, zeros = args.mixer, lambda *shape: torch.zeros(*shape, device=args.device)
        self.tables, self.bias, self.parameters = zeros(runs, n, m), zeros(runs), []
        if self.kind == "qmix":
            self.w_1, self.b_1 = zeros(runs, n, args.mixer_dim), zeros(runs, args.mixer_dim)
            self.w_2 = zeros(runs, args.mixer_dim)
            for weight, inputs in ((self.tables, 100), (self.w_1, n), (self.w_2, args.mixer_dim)):
                weight.normal_(generator=rng).div_(math.sqrt(inputs))
            self.parameters = [self.w_1, self.b_1, self.w_2]
        self.parameters += [self.tables, self.bias]

    def __call__(self, actions):
        """q_tot [R, B] of actions [R or 1, B, n, m]: one-hot, or relaxed."""
        chosen = (self.tables.unsqueeze(1) * actions).sum(-1)
        if self.kind == "vdn":
            return chosen.sum(-1) + self.bias.unsqueeze(-1)
        hidden = F.elu(chosen @ self.w_1.abs() + self.b_1.unsqueeze(1))
        return (hidden * self.w_2.abs().unsqueeze(1)).sum(-1) + self.bias.unsqueeze(-1)


def fit(critic, optimizer, actions, rewards, weights, steps):
    """Regress q_tot on the rewards [R, B], weighted; Eq. (14) with the current policy's actions."""
    for parameter in critic.parameters:
        parameter.requires_grad_()
    for _ in range(steps):
        optimizer.zero_grad()
        (weights * (critic(actions) - rewards) ** 2).sum().backward()
        optimizer.step()
    for parameter in critic.parameters:  # frozen in the policy's gradient
        parameter.requires_grad_(False)


def fit_vdn_exactly(critic, payoffs, pi):
    """The weighted least-squares VDN: Q_i(k) = E[R | a_i = k] - E[R]. Eq. (16), Proposition 5."""
    critic.bias = expected_reward(payoffs, pi)
    critic.tables = individual_values(payoffs, pi) - critic.bias[:, None, None]


# --------------------------------------------------------------------------- estimators and losses
def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def gumbel_max(log_pi, rng):
    """log pi plus Gumbel noise, [..., A]; its argmax is a sample of pi."""
    return log_pi - torch.empty_like(log_pi).exponential_(generator=rng).log()


def stochastic_pg_loss(log_ratio, advantages, alive, clip_eps):
    """PPO's clipped loss, Eq. (3): minus the mean over live agents. All [L, B, n]."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), alive)


def gumbel_softmax(log_pi, temperature, rng):
    """Straight-through sample [..., A]: one-hot forward, the softmax's gradient backward."""
    soft = torch.softmax(gumbel_max(log_pi, rng) / temperature, -1)
    return F.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft


def interpolate(stochastic, deterministic, nu):
    """Eq. (10)."""
    return (1 - nu) * stochastic + nu * deterministic


def deterministic_term(critic, log_pi, args, rng):
    """Second term of Eq. (10), as a loss per run: minus the mean of q_tot(mu). log_pi [R, n, m]."""
    if args.deterministic == "expectation":
        return -critic(log_pi.exp().unsqueeze(1)).squeeze(1)
    draws = log_pi.unsqueeze(1).expand(-1, args.batch_size, -1, -1)
    return -critic(gumbel_softmax(draws, args.temperature, rng)).mean(1)


def sampled_term(log_pi, actions, old_log_prob, advantages, args):
    """First term of Eq. (10), as a loss per run [R]; summed over the agents, as the second one is.

    log_pi [R, n, m], actions [R, B, n, m], old_log_prob [R, B, n], advantages [R, B].
    """
    log_ratio = (log_pi.unsqueeze(1) * actions).sum(-1) - old_log_prob
    advantages = advantages.unsqueeze(-1).expand_as(log_ratio)
    loss = torch.vmap(lambda *run: stochastic_pg_loss(*run, args.clip_eps))
    return loss(log_ratio, advantages, torch.ones_like(log_ratio)) * log_pi.shape[1]


# ----------------------------------------------------------------------------------------- training
def exact_iteration(logits, optimizer, critic, critic_optimizer, payoffs, nu, joint, args, rng):
    """One step on the true policy gradient and a critic fitted to all joint actions."""
    log_pi = logits.detach().log_softmax(-1)
    if args.mixer == "vdn":
        fit_vdn_exactly(critic, payoffs, log_pi.exp())
    else:
        probability = torch.einsum("bnm,znm->zb", joint, log_pi).exp()
        flat = payoffs.flatten(1)
        fit(critic, critic_optimizer, joint[None], flat, probability, args.critic_steps)
    log_pi = logits.log_softmax(-1)
    stochastic = -expected_reward(payoffs, log_pi.exp())
    optimizer.zero_grad()
    interpolate(stochastic, deterministic_term(critic, log_pi, args, rng), nu).sum().backward()
    optimizer.step()


def sampled_iteration(logits, optimizer, critic, critic_optimizer, payoffs, nu, args, rng):
    """One batch of joint actions: fit the critic to it, then `update_epochs` policy steps."""
    old = logits.detach().log_softmax(-1)
    draws = old.unsqueeze(1).expand(-1, args.batch_size, -1, -1)
    actions = F.one_hot(gumbel_max(draws, rng).argmax(-1), old.shape[-1]).float()
    rewards = rewards_of(payoffs, actions)
    advantages = rewards - rewards.mean(1, keepdim=True)  # not normalised: q_tot has the same unit
    old_log_prob = (draws * actions).sum(-1)
    equal = torch.full_like(rewards, 1 / args.batch_size)
    fit(critic, critic_optimizer, actions, rewards, equal, args.critic_steps)
    for _ in range(args.update_epochs):
        log_pi = logits.log_softmax(-1)
        stochastic = sampled_term(log_pi, actions, old_log_prob, advantages, args)
        optimizer.zero_grad()
        interpolate(stochastic, deterministic_term(critic, log_pi, args, rng), nu).sum().backward()
        optimizer.step()


def train(payoffs, args):
    """Train every (nu, game, seed) at once on payoffs [G, m, ..., m].

    Returns, each [nus, G, seeds]: the expected reward of the final policy, the payoff of its most
    probable joint action, and whether every agent has settled on an action (probability > 0.99).
    """
    games, n, m = len(payoffs), payoffs.ndim - 1, payoffs.shape[-1]
    rng = torch.Generator(args.device).manual_seed(args.seed)
    shape = (len(args.nus), games, args.seeds)
    payoffs = torch.as_tensor(payoffs, dtype=torch.float32, device=args.device)[None, :, None]
    payoffs = payoffs.expand(*shape, *[m] * n).flatten(0, 2)
    start = torch.empty(games, args.seeds, n, m, device=args.device).normal_(generator=rng)
    logits = (start * args.init_std).expand(*shape, n, m).flatten(0, 2).clone().requires_grad_()
    nu = torch.tensor(args.nus, device=args.device)[:, None, None].expand(shape).flatten()

    critic = Critic(len(nu), n, m, args, rng)
    optimizer = torch.optim.Adam([logits], args.learning_rate)
    critic_optimizer = torch.optim.Adam(critic.parameters, args.critic_lr)
    joint = all_joint_actions(n, m, args.device) if args.estimator == "exact" else None
    parts = (logits, optimizer, critic, critic_optimizer, payoffs, nu)
    for _ in range(args.iterations):
        if args.estimator == "exact":
            exact_iteration(*parts, joint, args, rng)
        else:
            sampled_iteration(*parts, args, rng)
    pi = logits.detach().softmax(-1)
    greedy = F.one_hot(pi.argmax(-1), m).float()
    settled = pi.amax(-1).amin(-1) > 0.99
    results = (expected_reward(payoffs, pi), expected_reward(payoffs, greedy), settled.float())
    return [x.view(shape).cpu().numpy() for x in results]


# --------------------------------------------------------------------------------- figure and table
def relative_bias(rewards, optimum):
    """eta(nu) = (R(0) - R(nu)) / R(0), its standard error over games, and eta of the optimum.

    rewards [nus, G, seeds], nu = 0 first; optimum [G]. R averages games and seeds (Section 5.1). As
    printed, eta > 0 says that nu does WORSE than nu = 0; the paper's words say the opposite, and
    fit -eta, the relative gain: both are reported.
    """
    per_game = rewards.mean(-1)
    base = per_game[0].mean()
    eta = (base - per_game.mean(1)) / base
    error = (per_game[0] - per_game).std(1, ddof=1) / math.sqrt(len(optimum)) / base
    return eta, error, (base - optimum.mean()) / base


def figure_1(results, args, folder):
    """figure1.csv and figure1.png from {title: (rewards, greedy, settled, optimum)}; the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, size = [], len(results)
    figure, axes = plt.subplots(1, size, figsize=(3.3 * size, 3.2), squeeze=False)
    for axis, (title, (rewards, greedy, settled, optimum)) in zip(axes[0], results.items()):
        eta, error, best = relative_bias(rewards, optimum)
        for k, nu in enumerate(args.nus):
            row = {"game": title, "nu": nu, "eta_percent": 100 * eta[k]}
            row |= {"stderr_percent": 100 * error[k], "relative_gain_percent": -100 * eta[k]}
            row |= {"optimum_gain_percent": -100 * best, "mean_reward": rewards[k].mean()}
            row |= {"greedy_reward": greedy[k].mean(), "settled": settled[k].mean()}
            rows.append(row | {"games": rewards.shape[1], "seeds": rewards.shape[2]})
        axis.axhline(0, color="grey", lw=0.8)
        axis.axhline(-100 * best, color="#D55E00", ls="--", label="optimum")
        axis.errorbar(args.nus, -100 * eta, 100 * error, marker="o", ms=3, capsize=2)
        axis.set(title=title, xlabel="nu")
    axes[0][0].set_ylabel("relative gain over nu = 0, %\n(-eta as printed; up is better)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "figure1.png", dpi=130)
    write_csv(folder / "figure1.csv", rows)
    line = "{game}  nu {nu:.1f}  eta {eta_percent:+.2f}% +- {stderr_percent:.2f}  (optimum "
    line += "{optimum_gain_percent:.2f}% above nu = 0)  settled {settled:.2f}"
    return "\n".join(line.format(**row) for row in rows)


def table_5(title, greedy, args, folder):
    """TITLE.csv and the text of Table 5: the final payoff of each nu and seed, [nus, 1, seeds]."""
    rows = []
    values = sorted(set(np.round(greedy, 4).ravel().tolist()), reverse=True)
    for nu, payoffs in zip(args.nus, np.round(greedy[:, 0], 4)):
        error = payoffs.std(ddof=1) / math.sqrt(len(payoffs)) if len(payoffs) > 1 else math.nan
        row = {"nu": nu} | {f"seed_{k + 1}": x for k, x in enumerate(payoffs.tolist())}
        row |= {"mean": payoffs.mean(), "stderr": error}
        rows.append(row | {f"count_{x:g}": int((payoffs == x).sum()) for x in values})
    write_csv(folder / f"{title}.csv", rows)
    counts = [f"{f'#{x:g}':>5}" for x in values]
    lines = [title, "nu   payoff of each seed | mean  stderr | counts: " + "".join(counts)]
    for row in rows:
        each = " ".join(f"{x:5g}" for key, x in row.items() if key.startswith("seed_"))
        count = "".join(f"{x:5d}" for key, x in row.items() if key.startswith("count_"))
        lines.append(f"{row['nu']:.1f}  {each} | {row['mean']:5.2f} {row['stderr']:5.2f} |{count}")
    return "\n".join(lines)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# --------------------------------------------------------------------------------------------- main
def parse(argv):
    """Resolved Args of a command line. Raises UsageError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = tyro.cli(Args, args=argv, description=__doc__)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        lines = [line.strip(" │|") for line in said.getvalue().splitlines()]  # tyro draws a frame
        is_rule = lambda line: re.fullmatch("[-─]{9,}", line)
        message = itertools.dropwhile(is_rule, lines[1:])
        message = itertools.takewhile(lambda line: not is_rule(line), message)
        raise UsageError(" ".join(" ".join(message).split())) from None
    args.nus = tuple(sorted(set(args.nus)))
    return resolve(args)


def run(args):
    """Train on the games of args and write tables and figure; the text that is printed."""
    games, results, start = load_games(args), {}, time.perf_counter()
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for title, payoffs in games.items():
        optimum = payoffs.reshape(len(payoffs), -1).max(1)
        results[title] = (*train(payoffs, args), optimum)
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if args.game == "random":
        text = figure_1(results, args, folder)
    else:
        ((title, (_, greedy, _, _)),) = results.items()
        text = table_5(title, greedy, args, folder)
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    (folder / "args.json").write_text(json.dumps(asdict(args) | seconds, indent=2) + "\n")
    return text


def main(argv=None):
    """Run a command line. The exit code: 0 done, 1 failed, 2 bad input."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.threads)
        print(run(args))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
