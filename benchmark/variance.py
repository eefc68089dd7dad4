"""How q_tot changes the policy's gradient, at the fixed policy of a saved run of maipg_smac.py.

    python benchmark/variance.py RUN_DIR [RUN_DIR ...] [--cosine]

Fresh rollouts are played, on which nothing is trained. A: the team's normalised advantage.

    r_var_pi   Var(A - Qc) / Var(A), Qc = q_tot(s, a) - q_tot(s, pi): below 1, Qc tells part of A
    r_var_v    Var(A - (q_tot(s, a) - V(s))) / Var(A)   (paper critic, the only one with a value)
    corr       of A and Qc; slope: Cov(A, Qc) / Var(Qc), below 1 where Qc is too large
    trace      of the covariance of a rollout's policy gradient, entropy bonus included, from one
               disjoint split per game, relative to nu = 0
    cosine     of one rollout's gradients, without the entropy bonus, with a reference: PPO's own
               (nu = 0), the second one (nu = 1), interpolated ones. The reference is the mean of
               PPO's gradient (at the policy itself nothing is clipped) over many rollouts, with V
               refitted to them; the cosine of its halves says how far it can be trusted.
"""

import contextlib
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maipg_smac as smac  # noqa: E402
from benchmark import evaluate  # noqa: E402

MUS = ["expectation", "gumbel"]


# ---------- what is measured
@torch.no_grad()
def control_variate(agent, batch, sigma_a):
    """{r_var_pi, r_var_v, corr, slope} of chunks [L, B, ...]; the agent has not seen them."""
    obs, state, keep, alive = (batch[key] for key in ("obs", "state", "keep", "alive"))
    actions, living = batch["actions"], alive.sum(-1).clamp(min=1)
    logits, hiddens = agent.policy(obs, batch["policy_hidden"][0], keep)
    pi = smac.masked_log_softmax(logits, batch["avail"]).exp()
    team = (batch["advantages"] * alive).sum(-1) / living
    ratio = lambda x: ((team - x).var() / team.var()).item()
    result, unit = {}, sigma_a + 1e-5
    if agent.second == "compatible":
        features = F.pad(agent.policy.norm(hiddens), (0, 1), value=1)
        scores = (actions - pi) * alive.unsqueeze(-1)
        qc = (features @ agent.compatible.weights * scores).sum((-2, -1))
    else:
        utilities, _ = agent.q.utility(obs, batch["utility_hidden"][0], keep, state)
        weights = agent.q.mixer.weights(state)
        q, q_pi = (agent.q.mixer(utilities, x, weights) * agent.q_norm.std for x in (actions, pi))
        values = batch["values"] * agent.v_norm.std + agent.v_norm.mean
        v = (values * alive).sum(-1) / living
        qc = (q - q_pi) / unit
        result["r_var_v"] = ratio((q - v) / unit)  # the mean of Q is a constant
    cov = torch.cov(torch.stack([team.flatten(), qc.flatten()]))
    result["corr"] = (cov[0, 1] / (cov[0, 0] * cov[1, 1]).sqrt()).item()
    return {"r_var_pi": ratio(qc)} | result | {"slope": (cov[0, 1] / cov[1, 1]).item()}


def gradient(agent, batch, sigma_a, rng, args):
    """The policy's gradient of its loss on chunks [L, B, ...], flat."""
    losses, _ = smac.policy_losses(agent, batch, sigma_a, rng, args)
    parameters = list(agent.policy.parameters())
    grads = torch.autograd.grad(losses["policy"], parameters, materialize_grads=True)
    return torch.cat([x.flatten() for x in grads])


def trace(agent, batch, sigma_a, rng, args):
    """Trace of the covariance of the batch's gradient, the mean over its games'."""
    games = range(args.num_envs)
    splits = [{key: x[:, k :: args.num_envs] for key, x in batch.items()} for k in games]
    grads = [gradient(agent, split, sigma_a, rng, args) for split in splits]
    return (torch.stack(grads).var(0).sum() / args.num_envs).item()


def cosine(x, y):
    return torch.cosine_similarity(x, y, 0).item()


def reference(agent, buffers, now, args, sweeps):
    """PPO's gradients [rollouts, parameters] with V refitted to the rollouts, one step of Adam on
    each in every sweep; and sigma_A, with V as it was and refitted."""
    fitted, grads, sigmas = copy.deepcopy(agent), [], []
    fitted.second, args = "none", replace(args, nu=0.0, ent_coef=0.0)
    optimizer = torch.optim.Adam(fitted.critic.parameters(), args.learning_rate, eps=1e-5)
    for sweep in tqdm(range(sweeps + 1), desc="V is refitted", disable=None):
        hidden = dict(now)
        for buffer in buffers:
            batch, metrics = smac.estimate(fitted, buffer, hidden, args)
            sigmas.append(metrics["diagnostics/sigma_a"])
            if sweep == sweeps:
                grads.append(gradient(fitted, batch, sigmas[-1], None, args))
                continue
            losses = {"critic": smac.critic_loss(fitted, batch, args)}
            smac.descend(fitted, optimizer, losses, args)
    count, sigmas = len(buffers), torch.stack(sigmas)
    return torch.stack(grads), (sigmas[:count].mean(), sigmas[-count:].mean())


# ---------- one run
def restore(run_dir, own):
    """(resolved args, games, what they show now, agent) of a saved run."""
    saved = evaluate.load_run(run_dir)
    if saved["script"] != "maipg_smac":
        raise smac.UsageError(f"{run_dir} is of {saved['script']}: only maipg_smac has a q_tot")
    args = smac.resolve(smac.Args(**saved["args"] | {"device": own.device}))
    if args.num_envs < 2:
        raise smac.UsageError(f"{run_dir} has one game: a variance needs two")
    torch.set_num_threads(args.threads)
    envs = smac.SC2Envs(args) if args.backend == "sc2" else smac.SMAXEnvs(args)
    now = smac.begin(envs, 2 * 10**9 + own.seed, args)
    agent = smac.Agent(now, args).to(args.device)
    agent.load_state_dict(saved["agent"])
    return args, envs, now, agent


def play(agent, envs, now, rng, args, count, what):
    """`count` fresh rollouts: (buffer, batch, sigma_A, a copy of the agent for the update)."""
    for _ in tqdm(range(count), desc=what, disable=None):
        # estimate() fits the compatible critic, and policy_losses() moves q_norm.
        buffer, used = {}, copy.deepcopy(agent)
        smac.rollout(agent.policy, envs, buffer, now, args.rollout_steps, rng)
        batch, metrics = smac.estimate(used, buffer, now, args)
        yield buffer, batch, metrics["diagnostics/sigma_a"], used


def study(run_dir, own):
    """Measure a run, and print its tables."""
    args, envs, now, agent = restore(run_dir, own)
    rngs = [torch.Generator(args.device).manual_seed(own.seed + 10**9 * k) for k in range(2)]
    nus = [nu for nu in own.nus if nu > 0] if agent.second != "none" else []
    settings = [(0.0, args.mu), *((nu, mu) for mu in MUS for nu in nus)]
    alone = [(1.0, mu) for mu in MUS if nus and 1.0 not in nus]
    control, traces, cosines = [], {}, {}
    with contextlib.closing(envs):
        if own.cosine:
            start = dict(now)
            many = play(agent, envs, now, rngs[0], args, own.reference_rollouts, "reference")
            buffers = [buffer for buffer, *_ in many]
            grads, sigmas = reference(agent, buffers, start, args, own.sweeps)
            aim, halves = grads.mean(0), (grads[::2].mean(0), grads[1::2].mean(0))
        fresh = play(agent, envs, now, rngs[0], args, own.rollouts, "rollouts")
        for _, batch, sigma_a, used in fresh:
            if agent.second != "none":
                control.append(control_variate(agent, batch, sigma_a))
            for nu, mu in settings:
                one = trace(used, batch, sigma_a, rngs[1], replace(args, nu=nu, mu=mu))
                traces.setdefault((nu, mu), []).append(one)
            for nu, mu in settings + alone if own.cosine else []:
                bare = replace(args, nu=nu, mu=mu, ent_coef=0.0)
                one = gradient(used, batch, sigma_a, rngs[1], bare)
                cosines.setdefault((nu, mu), []).append(cosine(one, aim))

    steps = args.num_envs * args.rollout_steps
    print(f"{run_dir}\n{args.map_name}, nu {args.nu:g}, critic {agent.second}: ", end="")
    print(f"{own.rollouts} rollouts of {steps:,} steps")
    for name in control[0] if control else []:
        values = torch.tensor([row[name] for row in control])
        print(f"  {name:9} {values.mean():7.4f}   (each: {values.min():.4f} to {values.max():.4f})")
    base = sum(traces[settings[0]])
    print_table("trace / that of nu = 0", {k: sum(x) / base for k, x in traces.items()})
    if own.cosine:
        print(f"  sigma_A {sigmas[0]:.4f}, with V refitted {sigmas[1]:.4f}; ", end="")
        print(f"cosine of the reference's halves {cosine(*halves):.3f}")
        means = {key: sum(x) / len(x) for key, x in cosines.items()}
        print_table("cosine with the reference", means)


def print_table(title, cells):
    """{(nu, mu): number}, a row per mu; nu = 0 has none."""
    nus = list(dict.fromkeys(nu for nu, _ in cells))
    print(f"  {title}\n  {'nu':>12}", *(f"{nu:7g}" for nu in nus))
    first = next(iter(cells.values()))
    for mu in MUS if len(cells) > 1 else [""]:
        row = [cells.get((nu, mu), first) for nu in nus]
        print(f"  {mu:>12}", *(f"{x:7.3f}" for x in row))


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # of maipg_smac.py
    nus: tuple[float, ...] = (0.0, 0.3, 0.5)  # 0 is always there
    rollouts: int = 4  # that are measured
    cosine: bool = False  # also compare directions with a reference
    reference_rollouts: int = 20  # whose mean is the reference
    sweeps: int = 20  # over them, to refit V
    seed: int = 1  # of games and noise
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one


def main(argv=None):
    """Run a command line; the exit code: 1 failed, 2 bad input."""
    own = tyro.cli(Args, args=argv, description=__doc__)
    try:
        counts = own.rollouts, own.reference_rollouts - 1, own.sweeps, len(own.run_dirs)
        if min(counts) < 1 or not 0 <= own.seed <= 10**8:
            raise smac.UsageError("give a run folder, positive counts, and a --seed below 10^8")
        if not all(0 <= nu <= 1 for nu in own.nus):
            raise smac.UsageError("--nus must lie in [0, 1]")
        for run_dir in own.run_dirs:
            study(run_dir, own)
        return 0
    except (smac.UsageError, smac.GameError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, smac.UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
