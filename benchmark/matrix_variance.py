"""Variance of the interpolated gradient on matrix games, at a fixed policy.

    python benchmark/matrix_variance.py [--out-dir benchmark/results/matrix]

For random games with entries uniform in [0, 1] and a random policy, critics (VDN, QMIX, and an
unfactorised MLP) are fitted to a number of samples of that policy. Then:

* variance.csv: the trace of the covariance of the gradient estimate (a batch of joint actions for
  the first term, as many Gumbel samples for the second), relative to nu = 0, against nu; with the
  critic frozen, and with a critic that was fitted to the very same batch.
* r_var.csv: R_Var = Var(A - Qc) / Var(A) with Qc = q_tot(a) - E_pi q_tot, exact over all joint
  actions, against the number of samples that the critic was fitted to. Below 1 it helps.
* variance.png: both.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import maipg_matrix as maipg  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STYLES = {
    "vdn": ("#0072B2", "o", "-"),
    "qmix": ("#009E73", "s", "--"),
    "joint": ("#D55E00", "^", ":"),
}


@dataclass
class Study:
    setting: str = "3x5"  # agents x actions
    num_games: int = 10  # random games, each with a random policy
    replicates: int = 100  # gradient estimates per game
    batch_size: int = 128  # joint actions per estimate
    samples: tuple[int, ...] = (32, 128, 512, 2048, 8192)  # that critics are fitted to
    frozen_samples: int = 2048  # for the variance against nu
    nus: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    fit_steps: int = 300  # Adam steps of a critic
    critic_lr: float = 0.02  # of those steps
    seed: int = 1
    threads: int = 2
    out_dir: str = "benchmark/results/matrix"


class JointCritic:
    """An unfactorised q_tot(a_1, ..., a_n) per run: an MLP with two layers of 64 units."""

    def __init__(self, runs, n, m, rng):
        sizes = [(n * m, 64), (64, 64), (64, 1)]
        draw = lambda rows, columns: torch.randn(runs, rows, columns, generator=rng)
        self.weights = [draw(*size) / math.sqrt(size[0]) for size in sizes]
        self.biases = [torch.zeros(runs, 1, columns) for _, columns in sizes]
        self.parameters = self.weights + self.biases

    def __call__(self, actions):
        """q_tot [R, B] of actions [R, B, n, m]."""
        x = actions.flatten(2)
        for weight, bias in zip(self.weights[:2], self.biases[:2]):
            x = torch.relu(x @ weight + bias)
        return (x @ self.weights[2] + self.biases[2]).squeeze(-1)


def make_critic(kind, runs, n, m, rng):
    if kind == "joint":
        return JointCritic(runs, n, m, rng)
    return maipg.Critic(runs, n, m, maipg.Args(mixer=kind, device="cpu"), rng)


def sample(payoffs, log_pi, count, rng):
    """(actions [R, count, n, m], rewards [R, count]) of the policies."""
    draws = log_pi.unsqueeze(1).expand(-1, count, -1, -1)
    actions = F.one_hot(maipg.gumbel_max(draws, rng).argmax(-1), log_pi.shape[-1]).float()
    return actions, maipg.rewards_of(payoffs, actions)


def fitted(kind, payoffs, log_pi, count, study, rng):
    """A critic per run, fitted to `count` samples of its policy."""
    critic = make_critic(kind, *log_pi.shape, rng)
    actions, rewards = sample(payoffs, log_pi, count, rng)
    fit(critic, actions, rewards, study)
    return critic


def fit(critic, actions, rewards, study):
    optimizer = torch.optim.Adam(critic.parameters, study.critic_lr)
    weights = torch.full_like(rewards, 1 / rewards.shape[1])
    maipg.fit(critic, optimizer, actions, rewards, weights, study.fit_steps)


def repeat(critic, times):
    """The same critics, each for `times` consecutive runs."""
    for name, value in vars(critic).items():
        if isinstance(value, torch.Tensor):
            setattr(critic, name, value.repeat_interleave(times, 0))
        elif name in ("weights", "biases"):
            setattr(critic, name, [x.repeat_interleave(times, 0) for x in value])
    return critic


def relative_trace(critic, payoffs, logits, actions, rewards, study, rng):
    """Trace of the gradient's covariance over the replicates, relative to nu = 0, [G, nus]."""
    logits = logits.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    args = maipg.Args(batch_size=study.batch_size, device="cpu")
    old = (log_pi.detach().unsqueeze(1) * actions).sum(-1)
    advantages = rewards - maipg.expected_reward(payoffs, log_pi.exp()).detach().unsqueeze(-1)
    terms = maipg.sampled_term(log_pi, actions, old, advantages, args)
    first = torch.autograd.grad(terms.sum(), logits, retain_graph=True)[0]
    terms = maipg.deterministic_term(critic, log_pi, args, rng)
    second = torch.autograd.grad(terms.sum(), logits)[0]
    traces = []
    for nu in study.nus:
        gradient = maipg.interpolate(first, second, nu)
        traces.append(gradient.view(study.num_games, study.replicates, -1).var(1).sum(-1))
    return torch.stack(traces, 1) / traces[0].unsqueeze(1)


def r_var(critic, payoffs, log_pi):
    """Var(A - Qc) / Var(A) [G] under the policies, by enumeration."""
    n, m = log_pi.shape[1:]
    joint = maipg.all_joint_actions(n, m, "cpu")[None].expand(len(log_pi), -1, -1, -1)
    p = torch.einsum("zbnm,znm->zb", joint, log_pi).exp()
    variance = lambda x: (p * (x - (p * x).sum(1, keepdim=True)) ** 2).sum(1)
    rewards = payoffs.flatten(1)
    return variance(rewards - critic(joint)) / variance(rewards)


def row(values, **key):
    error = values.std().item() / math.sqrt(len(values))
    return key | {"mean": values.mean().item(), "stderr": error, "games": len(values)}


def draw(variance, r_vars, path):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
    panels = [("frozen", "critic frozen"), ("same batch", "critic fitted to the same batch")]
    for axis, (critic, title) in zip(axes, panels):
        for kind, (colour, marker, line) in STYLES.items():
            part = [r for r in variance if (r["mixer"], r["critic"]) == (kind, critic)]
            values = [[r[key] for r in part] for key in ("nu", "mean", "stderr")]
            style = {"color": colour, "marker": marker, "ls": line, "ms": 4, "capsize": 2}
            axis.errorbar(*values, label=kind, **style)
        nus = torch.linspace(0, 1, 50)
        axis.plot(nus, (1 - nus) ** 2, color="grey", lw=1, label="(1 - nu)^2")
        axis.set(title=title, xlabel="nu", ylim=(0, None))
    axes[0].set_ylabel("variance of the gradient / that at nu = 0")
    for kind, (colour, marker, line) in STYLES.items():
        part = [r for r in r_vars if r["mixer"] == kind]
        values = [[r[key] for r in part] for key in ("samples", "mean", "stderr")]
        style = {"color": colour, "marker": marker, "ls": line, "ms": 4, "capsize": 2}
        axes[2].errorbar(*values, label=kind, **style)
    axes[2].axhline(1, color="grey", lw=1)
    axes[2].set(title="control variate", xlabel="samples fitted to", ylabel="R_Var", xscale="log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(study):
    torch.set_num_threads(study.threads)
    start, rng = time.perf_counter(), torch.Generator().manual_seed(study.seed)
    n, m = map(int, study.setting.split("x"))
    games, times = study.num_games, study.replicates
    payoffs = torch.rand(games, *[m] * n, generator=rng)
    logits = torch.randn(games, n, m, generator=rng)
    log_pi = logits.log_softmax(-1)
    many, many_logits = (x.repeat_interleave(times, 0) for x in (payoffs, logits))
    actions, rewards = sample(many, many_logits.log_softmax(-1), study.batch_size, rng)
    variance, r_vars = [], []
    for kind in STYLES:
        frozen = fitted(kind, payoffs, log_pi, study.frozen_samples, study, rng)
        own = make_critic(kind, games * times, n, m, rng)
        fit(own, actions, rewards, study)
        for name, critic in (("frozen", repeat(frozen, times)), ("same batch", own)):
            traces = relative_trace(critic, many, many_logits, actions, rewards, study, rng)
            for nu, values in zip(study.nus, traces.unbind(1)):
                variance.append(row(values, mixer=kind, critic=name, nu=nu))
        for count in study.samples:
            critic = fitted(kind, payoffs, log_pi, count, study, rng)
            r_vars.append(row(r_var(critic, payoffs, log_pi), mixer=kind, samples=count))
    folder = Path(study.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    maipg.write_csv(folder / "variance.csv", variance)
    maipg.write_csv(folder / "r_var.csv", r_vars)
    draw(variance, r_vars, folder / "variance.png")
    print(f"{time.perf_counter() - start:.0f} s, see {folder}")


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
