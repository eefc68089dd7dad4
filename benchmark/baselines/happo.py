"""HAPPO (Kuba et al., 2021) on SMAC: trust region updates, one agent after another.

Each agent has an actor of its own. In an update they come in a random order; agent i_m ascends

    mean[ M_m min(r A, clip(r, 1 - eps, 1 + eps) A) ] + ent_coef * mean[entropy],
    M_m = product over j < m of pi_new(a_j | o_j) / pi_old(a_j | o_j)

where M corrects for the agents that have changed before it, in this very update. One critic serves
all; as in the MAPPO that it is compared with, it sees the state and an agent's observation, and the
advantages are normalised once, over all live agents. All else is that of maipg_smac.py with nu = 0;
the flags of its second critic have no effect.

    python benchmark/baselines/happo.py --map-name 2s3z
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac as smac  # noqa: E402


@dataclass
class Args(smac.Args):
    script: ClassVar[str] = "happo"
    nu: tyro.conf.Fixed[float] = 0.0  # there is no q_tot to weigh


class Actors(nn.Module):
    """One policy network per agent, behind the interface of one: the agents share nothing."""

    def __init__(self, n, *shape):
        super().__init__()
        self.each = nn.ModuleList(smac.Recurrent(*shape) for _ in range(n))

    def forward(self, obs, hidden, keep):
        """obs [L, B, n, O], hidden [B, n, H], keep [L, B] -> [L, B, n, A], [L, B, n, H]."""
        agents = enumerate(self.each)
        parts = [net(obs[:, :, [i]], hidden[:, [i]], keep) for i, net in agents]
        return tuple(torch.cat(part, 2) for part in zip(*parts))


class Agent(nn.Module):
    """The actors, the critic and its normaliser."""

    second = "none"

    def __init__(self, now, args):
        super().__init__()
        (n, A), dim = now["avail"].shape[1:], args.hidden_dim
        obs_dim, state_dim = now["obs"].shape[-1], now["state"].shape[-1]
        self.policy = Actors(n, obs_dim, dim, A, 0.01)
        self.critic = smac.Recurrent(obs_dim, dim, 1, 1.0, state_dim)
        self.v_norm = smac.ValueNorm()


def actor_loss(actor, batch, i, weight, args):
    """(loss, metrics, log-probabilities of the taken actions [L, B]) of agent i.

    weight [L, B] is M: a constant, not clipped. It is not negative, so that it may multiply A.
    """
    own = lambda x: x[:, :, [i]]
    logits, _ = actor(own(batch["obs"]), batch["policy_hidden"][0][:, [i]], batch["keep"])
    log_pi = smac.masked_log_softmax(logits, own(batch["avail"]))
    log_probs, alive = (log_pi * own(batch["actions"])).sum(-1), own(batch["alive"])
    log_ratio = log_probs - own(batch["log_probs"])
    weighted = weight.unsqueeze(-1) * own(batch["advantages"])
    loss = smac.stochastic_pg_loss(log_ratio, weighted, alive, args.clip_eps)
    entropy = smac.masked_mean(-(log_pi.exp() * log_pi).sum(-1), alive)
    change = log_ratio.detach()
    outside = ((change.exp() - 1).abs() > args.clip_eps).float()
    metrics = {
        "losses/entropy": entropy.detach(),
        "diagnostics/approx_kl": smac.masked_mean(change.exp() - 1 - change, alive),
        "diagnostics/clip_fraction": smac.masked_mean(outside, alive),
    }
    return loss - args.ent_coef * entropy, metrics, log_probs.squeeze(-1)


def minibatches(batch, epochs, rngs, args):
    """`epochs` passes over the chunks of a batch, in a new order each."""
    chunks = batch["obs"].shape[1]
    for _ in range(epochs):
        order = torch.randperm(chunks, generator=rngs["shuffle"], device=args.device)
        for index in order.split(chunks // args.num_minibatches):
            whole = args.num_minibatches == 1
            yield batch if whole else {key: x[:, index] for key, x in batch.items()}


def update(agent, optimizer, batch, sigma_a, rngs, args):
    """The agents in a random order, then the critic; metrics, averaged over the steps."""
    history, actors = {}, agent.policy.each
    batch = batch | {"weight": torch.ones_like(batch["log_probs"][..., 0])}
    order = torch.randperm(len(actors), generator=rngs["shuffle"], device=args.device)
    for i in order.tolist():
        for part in minibatches(batch, args.update_epochs, rngs, args):
            loss, metrics, _ = actor_loss(actors[i], part, i, part["weight"], args)
            # The other actors have no gradient, so that Adam leaves them as they are.
            metrics |= smac.descend(agent, optimizer, {"policy": loss}, args)
            note(history, metrics)
        with torch.no_grad():  # the next agents see what this one has become
            _, _, log_probs = actor_loss(actors[i], batch, i, batch["weight"], args)
            change = (log_probs - batch["log_probs"][..., i]).exp()
            batch["weight"] = batch["weight"] * change
    for part in minibatches(batch, args.critic_epochs or args.update_epochs, rngs, args):
        losses = {"critic": smac.critic_loss(agent, part, args)}
        note(history, smac.descend(agent, optimizer, losses, args))
    metrics = {key: torch.stack(values).mean() for key, values in history.items()}
    return metrics | {"diagnostics/log_weight_std": batch["weight"].log().std()}


def note(history, metrics):
    for key, value in metrics.items():
        history.setdefault(key, []).append(value)


train = functools.partial(smac.train, agent_class=Agent, update=update)


def main(argv=None):
    """As main() of maipg_smac.py."""
    return smac.main(argv, args_class=Args, train=train)


if __name__ == "__main__":
    sys.exit(main())
