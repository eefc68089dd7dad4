"""maipg_smac.py whose `compatible` critic is fitted otherwise: what the study tried.

    --second-lambda 0.8   to GAE(0.8); PPO's own advantages stay GAE(0.95)
    --network fresh       a network of one hidden layer on the policy's features, for each rollout
                          a new one, in place of the least squares; `warm`: it is trained further
    --network samples     nothing is fitted: u_i(a) = 1[a = a_i] A_i / pi(a_i), so that the second
                          gradient is PPO's own without its clip: a control, without a critic

The network is fitted to the normalised advantages of the last `window` rollouts, like the least
squares: it minimises E[(A - sum_i (u_i(a_i) - E_pi[u_i]))^2], by `fit_steps` steps of Adam over a
rollout each. A resumed run begins with an empty window.

    python benchmark/baselines/fitted.py --map-name 2s3z --nu 0.4 --network fresh
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac as smac  # noqa: E402


@dataclass
class Args(smac.Args):
    script: ClassVar[str] = "fitted"
    second_lambda: float = 0.95  # of the advantages that the utilities are fitted to
    network: Literal["none", "fresh", "warm", "samples"] = "none"  # none: least squares
    window: int = 4  # rollouts that the network is fitted to
    fit_steps: int = 40  # of Adam, per rollout
    fit_rate: float = 5e-4  # its learning rate


class Utilities(nn.Sequential):
    """u(h) [..., A] of features h [..., F], written h @ utilities, as with a matrix of weights."""

    def __init__(self, num_features, num_actions, hidden=64):
        last = nn.Linear(hidden, num_actions)
        super().__init__(nn.Linear(num_features, hidden), nn.ELU(), last)
        nn.init.orthogonal_(last.weight, 0.01)
        nn.init.zeros_(last.bias)

    __rmatmul__ = nn.Sequential.__call__


class FittedNetwork(nn.Module):
    """Has the place of CompatibleCritic: `weights` makes utilities of features, `fit` fits it."""

    args = Args()

    def __init__(self, num_features, num_actions, forgetting, ridge):
        super().__init__()
        self.shape, self.window = (num_features, num_actions), []
        self.weights = Utilities(*self.shape)

    @torch.enable_grad()
    def fit(self, features, scores, advantages):
        """features h [T, N, n, F], scores onehot(a) - pi [T, N, n, A], advantages [T, N]."""
        self.window = [*self.window, (features, scores, advantages)][-self.args.window :]
        if self.args.network == "fresh":
            self.weights = Utilities(*self.shape).to(features.device)
        optimizer = torch.optim.Adam(self.weights.parameters(), self.args.fit_rate)
        for step in range(self.args.fit_steps):
            h, x, y = self.window[step % len(self.window)]
            loss = ((y - (h @ self.weights * x).sum((-2, -1))) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()


class NoFit(nn.Module):
    """The sampled advantages themselves; they have the place of CompatibleCritic."""

    def __init__(self, num_features, num_actions, forgetting, ridge):
        super().__init__()
        self.utilities = 0.0

    weights = property(lambda self: self)
    __rmatmul__ = lambda self, features: self.utilities

    def fit(self, features, scores, advantages):
        """scores onehot(a) - pi [T, N, n, A], advantages of each agent [T, N, n]."""
        taken = F.one_hot(scores.argmax(-1), scores.shape[-1])
        self.utilities = taken * advantages.unsqueeze(-1) / (1 - scores)


def resolve(args):
    """As smac.resolve."""
    if args.second_lambda > 1:
        raise smac.UsageError(f"--second-lambda {args.second_lambda}: must lie in [0, 1]")
    return smac.resolve(args)


def train(args, envs, stopped=()):
    """smac.train with this critic; it keeps GAE(second_lambda) of each rollout for its fit."""
    gae, second = smac.gae, {}

    def gae_twice(rewards, values, done, gamma, lam):
        second["advantages"] = gae(rewards, values, done, gamma, args.second_lambda)
        return gae(rewards, values, done, gamma, lam)

    critics = {"none": smac.CompatibleCritic, "samples": NoFit}

    class Critic(critics.get(args.network, FittedNetwork)):
        def fit(self, features, scores, advantages):
            a, alive = second["advantages"], (scores != 0).any(-1).float()  # the dead cannot choose
            mean = smac.masked_mean(a, alive)
            a = (a - mean) / (smac.masked_mean((a - mean) ** 2, alive).sqrt() + 1e-5)
            team = (a * alive).sum(-1) / alive.sum(-1).clamp(min=1)
            super().fit(features, scores, a if args.network == "samples" else team)

    Critic.args = args
    with mock.patch.multiple(smac, gae=gae_twice, CompatibleCritic=Critic):
        smac.train(args, envs, stopped)


def main(argv=None):
    """As main() of maipg_smac.py."""
    return smac.main(argv, Args, resolve, train)


if __name__ == "__main__":
    sys.exit(main())
