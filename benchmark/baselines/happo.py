"""HAPPO (Kuba et al., 2021) on SMAC or football: trust region updates, one agent after another.

Each agent has an actor of its own. In an update they come in a random order; agent i_m ascends

    mean[ M_m min(r A, clip(r, 1 - eps, 1 + eps) A) ] + ent_coef * mean[entropy],
    M_m = product over j < m of pi_new(a_j | o_j) / pi_old(a_j | o_j)

where M corrects for the agents that have changed before it, in this very update. One critic serves
all; as in the MAPPO that it is compared with, it sees the state and an agent's observation, and the
advantages are normalised once, over all live agents. All else is that of maipg_smac.py with nu = 0.

    python benchmark/baselines/happo.py --map-name 2s3z
    python benchmark/baselines/happo.py --env grf --scenario academy_3_vs_1_with_keeper
"""

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import maipg_smac  # noqa: E402
from benchmark.baselines import run_variant  # noqa: E402


class Actors(nn.Module):
    """One policy network per agent, behind the interface of one: the agents share nothing."""

    def __init__(self, n, *shape):
        super().__init__()
        self.each = nn.ModuleList(maipg_smac.Recurrent(*shape) for _ in range(n))

    def forward(self, obs, hidden, keep):
        """obs [L, B, n, O], hidden [B, n, H], keep [L, B] -> [L, B, n, A], [L, B, n, H]."""
        agents = enumerate(self.each)
        parts = [net(obs[:, :, [i]], hidden[:, [i]], keep) for i, net in agents]
        return tuple(torch.cat(part, 2) for part in zip(*parts))


class Agent(nn.Module):
    """The actors, the critic and its normaliser."""

    def __init__(self, envs, args):
        super().__init__()
        dim = args.hidden_dim
        self.policy = Actors(envs.num_agents, envs.obs_dim, dim, envs.num_actions, 0.01)
        self.critic = maipg_smac.Recurrent(envs.obs_dim, dim, 1, 1.0, envs.state_dim)
        self.value_norm = maipg_smac.ValueNorm(args.norm_beta)


def actor_loss(actor, batch, i, weight, args):
    """(loss, metrics, log-probabilities of the taken actions [L, B]) of agent i.

    weight [L, B] is M: a constant, not clipped. It is not negative, so that it may multiply A.
    """
    own = lambda x: x[:, :, [i]]
    logits, _ = actor(own(batch["obs"]), batch["policy_hidden"][0][:, [i]], batch["keep"])
    log_pi = maipg_smac.masked_log_softmax(logits, own(batch["avail"]))
    log_probs, alive = (log_pi * own(batch["actions"])).sum(-1), own(batch["alive"])
    log_ratio = log_probs - own(batch["log_probs"])
    weighted = weight.unsqueeze(-1) * own(batch["advantages"])
    loss = maipg_smac.stochastic_pg_loss(log_ratio, weighted, alive, args.clip_eps)
    entropy = maipg_smac.masked_mean(-(log_pi.exp() * log_pi).sum(-1), alive)
    change = log_ratio.detach()
    outside = ((change.exp() - 1).abs() > args.clip_eps).float()
    metrics = {"losses/entropy": entropy.detach()}
    metrics["diagnostics/approx_kl"] = maipg_smac.masked_mean(change.exp() - 1 - change, alive)
    metrics["diagnostics/clip_fraction"] = maipg_smac.masked_mean(outside, alive)
    return loss - args.ent_coef * entropy, metrics, log_probs.squeeze(-1)


def critic_loss(agent, batch, args):
    """MAPPO's value loss: clipped, Huber, in normalised units."""
    hidden = batch["critic_hidden"][0]
    values, _ = agent.critic(batch["obs"], hidden, batch["keep"], batch["state"])
    targets, old = agent.value_norm.normalize(batch["returns"]), (batch["values"], args.clip_eps)
    counted = batch["counted"]
    return maipg_smac.value_loss(values.squeeze(-1), targets, counted, args.huber_delta, *old)


def step(optimizer, network, loss, name, args):
    """One step of Adam on one network; metrics. Parameters without a gradient stay as they are."""
    optimizer.zero_grad()  # sets gradients to None, which Adam skips: the other actors
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise maipg_smac.RunError(f"not finite: {name}")
    optimizer.step()
    return {f"losses/{name}": loss.detach(), f"diagnostics/{name}_grad_norm": norm}


def minibatches(batch, rngs, args):
    """`update_epochs` passes over the chunks of a batch, in a new order each."""
    chunks = batch["obs"].shape[1]
    for _ in range(args.update_epochs):
        order = torch.randperm(chunks, generator=rngs["shuffle"], device=args.device)
        for index in order.split(chunks // args.num_minibatches):
            whole = args.num_minibatches == 1
            yield batch if whole else {key: x[:, index] for key, x in batch.items()}


def update(agent, optimizers, batch, sigma_a, rngs, args):
    """The agents in a random order, then the critic; returns metrics, averaged over the steps."""
    history, critic_history = [], []
    batch = batch | {"weight": torch.ones_like(batch["log_probs"][..., 0])}
    for i in torch.randperm(len(agent.policy.each), generator=rngs["shuffle"]).tolist():
        actor = agent.policy.each[i]
        for part in minibatches(batch, rngs, args):
            loss, metrics, _ = actor_loss(actor, part, i, part["weight"], args)
            metrics |= step(optimizers["policy"], actor, loss, "policy", args)
            history.append(torch.stack(list(metrics.values())))
        with torch.no_grad():  # the next agents see what this one has become
            _, _, log_probs = actor_loss(actor, batch, i, batch["weight"], args)
            change = (log_probs - batch["log_probs"][..., i]).exp()
            batch["weight"] = batch["weight"] * change
    for part in minibatches(batch, rngs, args):
        agent.value_norm.update(part["returns"], part["counted"])
        loss = critic_loss(agent, part, args)
        critic_metrics = step(optimizers["critic"], agent.critic, loss, "critic", args)
        critic_history.append(torch.stack(list(critic_metrics.values())))
    metrics = dict(zip(metrics, torch.stack(history).mean(0)))
    metrics |= dict(zip(critic_metrics, torch.stack(critic_history).mean(0)))
    return metrics | {"diagnostics/log_weight_std": batch["weight"].log().std()}


def arguments(script, env):
    """The Args of a script for HAPPO, which has no nu."""

    @dataclass
    class Args(script.Args):
        baseline_of: str = field(init=False, default=env)  # recorded in args.json
        nu: float = 0.0  # there is no q_tot to weigh

    return Args


def run_name(args):
    place = f"{args.backend}-{args.map_name}" if args.baseline_of == "smac" else args.scenario
    return f"{place}__happo__s{args.seed}"


def main(argv=None):
    """As main() of the script; --env smac or grf, which a run folder knows by itself."""
    words, env = list(sys.argv[1:] if argv is None else argv), "smac"
    if "--env" in words[:-1]:
        place = words.index("--env")
        env = words[place + 1]
        del words[place : place + 2]
    for flag in ("--resume", "--evaluate"):
        if flag in words[:-1]:
            saved = Path(words[words.index(flag) + 1], "args.json")
            env = json.loads(saved.read_text()).get("baseline_of", env) if saved.exists() else env
    if env not in ("smac", "grf"):
        print(f"error: --env {env}: smac or grf", file=sys.stderr)
        return 2
    parts = {"Agent": Agent, "update": update, "run_name": run_name, "__doc__": __doc__}
    script = importlib.import_module(f"maipg_{env}")
    parts["BOUNDS"] = script.BOUNDS | {"nu": (0, 0)}
    return run_variant(script.__name__, "happo", words, Args=arguments(script, env), **parts)


if __name__ == "__main__":
    sys.exit(main())
