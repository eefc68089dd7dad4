"""Variance of the interpolated gradient on matrix games, at a fixed policy.

    python benchmark/matrix_variance.py --out-dir runs/matrix_variance

For random games of 3 agents with 5 actions, entries uniform in [0, 1], and a random policy each;
critics (VDN, QMIX, and an unfactorised MLP) are fitted to samples of that policy. Mean and standard
error over games:

* variance.csv: the trace of the covariance of the gradient estimate (a batch of joint actions for
  the first term, as many Gumbel samples for the second), relative to nu = 0, against nu; with a
  critic that is frozen, fitted to 2048 other samples, and with one that was fitted to the very
  same batch.
* r_var.csv: R_Var = Var(A - Qc) / Var(A) with Qc = q_tot(a) - E_pi q_tot, exact over all joint
  actions, against the number of samples that the critic was fitted to. Below 1 it helps.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maipg_matrix as maipg  # noqa: E402

SETTINGS = {"batch_size": 128, "critic_lr": 0.02, "device": "cpu"}
SAMPLES = (32, 128, 512, 2048, 8192)  # that critics are fitted to


@dataclass
class Args:
    num_games: int = 10  # random games, each with a random policy
    seeds: int = 100  # gradient estimates per game, two or more
    nus: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # weights; 0 is needed
    critic_steps: int = 300  # of Adam, for a critic
    seed: int = 1  # of all that is random
    threads: int = 1  # CPU threads of torch
    out_dir: str = "runs/matrix_variance"  # where the tables go


class JointCritic:
    """An unfactorised q_tot(a_1, ..., a_n) per run: an MLP with two layers of 64 units."""

    def __init__(self, runs, n, m, args, rng):
        self.parameters = []
        for inputs, outputs in [(n * m, 64), (64, 64), (64, 1)]:
            weight = torch.randn(runs, inputs, outputs, generator=rng) / inputs**0.5
            self.parameters += [weight, torch.zeros(runs, 1, outputs)]

    def __call__(self, actions):
        """q_tot [R, B] of actions [R or 1, B, n, m]."""
        w_1, b_1, w_2, b_2, w_3, b_3 = self.parameters
        x = torch.relu(actions.flatten(2) @ w_1 + b_1)
        return (torch.relu(x @ w_2 + b_2) @ w_3 + b_3).squeeze(-1)


def fitted(kind, shape, samples, args, rng):
    """A critic per run, fitted to what rollout() gives; shape: runs, n, m."""
    actions, _, rewards = samples
    make = JointCritic if kind == "joint" else maipg.Critic
    critic = make(*shape, replace(args, mixer=kind), rng)
    optimizer = torch.optim.Adam(critic.parameters, args.critic_lr)
    maipg.fit(critic, optimizer, actions, rewards, 1 / actions.shape[1], args.critic_steps)
    return critic


def r_var(critic, payoffs, log_pi):
    """Var(A - Qc) / Var(A) [G] under the policies, by enumeration."""
    joint = maipg.all_joint_actions(*log_pi.shape[1:], "cpu")
    p = torch.einsum("bnm,znm->zb", joint, log_pi).exp()
    variance = lambda x: (p * (x - (p * x).sum(1, keepdim=True)) ** 2).sum(1)
    rewards = payoffs.flatten(1)
    return variance(rewards - critic(joint[None])) / variance(rewards)


def relative_traces(payoffs, logits, frozen, args, rng):
    """Rows (mixer, critic, nu, trace of the gradient's covariance / that of nu = 0) per game."""
    old, grads, nus = logits.detach().log_softmax(-1), {}, torch.tensor(args.nus)[:, None, None]
    value = maipg.expected_reward(payoffs, old.exp()).unsqueeze(-1)
    gradient = lambda loss: torch.autograd.grad(loss.sum(), logits)[0].flatten(1)
    for _ in tqdm(range(args.seeds), disable=None):
        actions, log_probs, rewards = batch = maipg.rollout(old, payoffs, rng, args)
        terms = logits.log_softmax(-1), actions, log_probs, rewards - value, args
        first = gradient(maipg.sampled_term(*terms))
        for kind, critic in frozen.items():
            fresh = fitted(kind, logits.shape, batch, args, rng)
            for name, x in (("frozen", critic), ("same batch", fresh)):
                second = gradient(maipg.deterministic_term(x, logits.log_softmax(-1), args, rng))
                grads.setdefault((kind, name), []).append(maipg.interpolate(first, second, nus))
    rows = []
    for key, x in grads.items():
        traces = torch.stack(x).var(0).sum(-1)
        for nu, values in zip(args.nus, traces / traces[0]):
            rows += [(*key, nu, value) for value in values.tolist()]
    return rows


def write(path, rows, *names):
    """Mean and standard error over the games of rows (*names, value)."""
    groups = pd.DataFrame(rows, columns=[*names, "value"]).groupby([*names], sort=False)["value"]
    groups.agg(mean="mean", stderr="sem", games="size").to_csv(path)


def main(argv=None):
    """Run a command line; the exit code: 2 bad input."""
    own = tyro.cli(Args, args=argv, description=__doc__)
    try:
        args = maipg.resolve(maipg.Args(**asdict(own), **SETTINGS))
        if args.seeds < 2:
            raise maipg.UsageError("--seeds: a variance needs two")
        Path(own.out_dir).mkdir(parents=True, exist_ok=True)
    except (maipg.UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    rng, frozen, r_vars = torch.Generator().manual_seed(args.seed), {}, []
    payoffs = torch.rand(args.num_games, 5, 5, 5, generator=rng)
    logits = torch.randn(args.num_games, 3, 5, generator=rng).requires_grad_()
    log_pi = logits.detach().log_softmax(-1)
    for kind in ("vdn", "qmix", "joint"):
        for count in SAMPLES:
            many = maipg.rollout(log_pi, payoffs, rng, replace(args, batch_size=count))
            critic = fitted(kind, log_pi.shape, many, args, rng)
            r_vars += [(kind, count, x) for x in r_var(critic, payoffs, log_pi).tolist()]
            frozen |= {kind: critic} if count == 2048 else {}
    rows = relative_traces(payoffs, logits, frozen, args, rng)
    write(f"{own.out_dir}/variance.csv", rows, "mixer", "critic", "nu")
    write(f"{own.out_dir}/r_var.csv", r_vars, "mixer", "samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
