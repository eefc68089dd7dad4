"""FACMAC (Peng et al., 2021) on SMAC: an off-policy actor that follows a factorised critic.

The critic q_tot(s, a) = mixer(Q_1(o_1, a_1), ..., Q_n(o_n, a_n)) takes actions as inputs; it is
regressed on TD(lambda) targets at the target actor's greedy actions. The actor ascends

    mean over steps of q_tot(s, mu_1, ..., mu_n),   all mu_i drawn anew from the current policies

by straight-through Gumbel-softmax: the centralised gradient, and MAIPG's second term with another
Q. Settings are those published with FACMAC; replay, time limits and training loop are qmix.py's.

    python benchmark/baselines/facmac.py --map-name 2s3z
"""

import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac as smac  # noqa: E402
from benchmark.baselines import qmix  # noqa: E402


@dataclass
class Args(qmix.Args):
    script: ClassVar[str] = "facmac"
    learning_rate: float = 2.5e-3  # of Adam, actor
    critic_lr: float = 5e-4  # of Adam, utility and mixer
    adam_eps: float = 1e-7  # Adam's epsilon
    epsilon_start: float = 0.5  # share of uniform actions in the behaviour at step 0 ...
    td_lambda: float = 0.8  # of the targets of q_tot


class Utility(nn.Module):
    """Q_i(o_i, a_i) [..., n]: shared by the agents, no memory."""

    def __init__(self, obs_dim, num_actions, dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(obs_dim + num_actions, dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, 1),
        )

    def forward(self, obs, actions):
        return self.layers(torch.cat([obs, actions], -1)).squeeze(-1)


class Agent(nn.Module):
    """`policy` is the actor; critic (utility and mixer); a target copy of all three."""

    metrics = (
        "losses/q",
        "diagnostics/q_grad_norm",
        "losses/policy",
        "diagnostics/policy_grad_norm",
    )

    def __init__(self, now, args):
        super().__init__()
        self.args, (n, A) = args, now["avail"].shape[1:]
        obs_dim, state_dim = now["obs"].shape[-1], now["state"].shape[-1]
        self.policy = qmix.Recurrent(obs_dim, args.hidden_dim, A)
        self.utility = Utility(obs_dim, A, args.hidden_dim)
        self.mixer = smac.Mixer("qmix", n, state_dim, args.mixer_dim)
        nets = self.policy, self.utility, self.mixer
        self.target_policy, self.target_utility, self.target_mixer = copy.deepcopy(nets)

    def groups(self):
        """{name: (networks, Adam's learning rate)} of each optimiser."""
        critic = [self.utility, self.mixer], self.args.critic_lr
        return {"q": critic, "policy": ([self.policy], self.args.learning_rate)}

    def act(self, logits, avail, epsilon, rng):
        """Actions [N, n] drawn from (1 - epsilon) pi + epsilon * uniform over the available."""
        pi = smac.masked_log_softmax(logits, avail).exp()
        mixed = (1 - epsilon) * pi + epsilon * avail / avail.sum(-1, keepdim=True)
        return smac.gumbel_max(mixed.log(), rng).argmax(-1)

    @staticmethod
    def q_tot(utility, mixer, obs, state, actions):
        """[T, B] of one-hot (or straight-through) actions [T, B, n, A]."""
        chosen = utility(obs, actions).unsqueeze(-1)  # the mixer wants utilities times actions
        return mixer(chosen, torch.ones_like(chosen), mixer.weights(state))

    def targets(self, batch):
        """TD(lambda) targets [T, B]; batch as Replay.sample makes it."""
        obs, state, args = batch["obs"], batch["state"], self.args
        logits = qmix.whole_episodes(self.target_policy, obs, args.hidden_dim)
        greedy = smac.masked_log_softmax(logits, batch["avail"]).argmax(-1)
        actions = qmix.one_hot(greedy, logits)
        q = self.q_tot(self.target_utility, self.target_mixer, obs, state, actions)
        reward, next_q, done = batch["reward"], qmix.next_step(q), batch["done"]
        return smac.td_lambda(reward, next_q, done, args.gamma, args.td_lambda)

    def learn(self, batch, optimizers, rng):
        """One update of the critic, then one of the actor; metrics."""
        obs, state, avail, valid = (batch[key] for key in ("obs", "state", "avail", "valid"))
        with torch.no_grad():
            targets = self.targets(batch)
        actions = qmix.one_hot(batch["actions"], avail)
        q = self.q_tot(self.utility, self.mixer, obs, state, actions)
        q_loss = smac.masked_mean((q - targets) ** 2, valid)
        q_norm = qmix.descend(q_loss, optimizers["q"], self.args)
        logits = qmix.whole_episodes(self.policy, obs, self.args.hidden_dim)
        mu = smac.gumbel_softmax(smac.masked_log_softmax(logits, avail), rng)
        loss = -smac.masked_mean(self.q_tot(self.utility, self.mixer, obs, state, mu), valid)
        norm = qmix.descend(loss, optimizers["policy"], self.args)  # the critic's weights stay
        return dict(zip(self.metrics, (q_loss.detach(), q_norm, loss.detach(), norm)))

    def update_targets(self):
        for name in ("policy", "utility", "mixer"):
            getattr(self, f"target_{name}").load_state_dict(getattr(self, name).state_dict())


train = functools.partial(qmix.train, agent_class=Agent)


def main(argv=None):
    """As main() of maipg_smac.py."""
    return smac.main(argv, args_class=Args, resolve=qmix.resolve, train=train)


if __name__ == "__main__":
    sys.exit(main())
