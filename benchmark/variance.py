"""What q_tot does to the policy's gradient, and whether it ranks actions, at saved policies.

    python benchmark/variance.py RUN_DIR [RUN_DIR ...] [--cosine] [--truth] [--out FILE.csv]
    python benchmark/variance.py --games 10 --rollouts 100

For runs of maipg_smac.py and of maipg_mpe.py's particle worlds. Fresh rollouts are played, on which
nothing is trained. A: the team's normalised advantage, by GAE. +- is a standard error.

    r_var_pi   Var(A - Qc) / Var(A), Qc = q_tot(s, a) - q_tot(s, pi): below 1, Qc tells part of A
    r_var_v    Var(A - (q_tot(s, a) - V(s))) / Var(A)   (paper critic, the only one with a value)
    corr       of A and Qc; slope: Cov(A, Qc) / Var(Qc), below 1 where Qc is too large
    trace      of the covariance of a rollout's policy gradient (the mean of its games', without
               entropy bonus), from one disjoint split per game; relative to nu = 0
    --cosine   of these gradients with a reference: nu = 0 is PPO's own, nu = 1 the second one. The
               reference is the mean of PPO's gradient (at the policy itself nothing is clipped)
               over many rollouts, with V refitted to them; the cosine of its halves (halves) says
               how far it can be trusted.
    --truth    In copies of the worlds at one step of each rollout, each action a of each agent i
               is played, and then the policy to the end of the episode, with the same noise for
               all of them. A_i(a): the mean return less its mean over pi_i. Mean over pi:
               reliability     true variance of A_i / all of it, by halves of the copies
               q_true          corr of A_i and dq_tot/dpi_i(a), for VDN agent i's utility; the
                               compatible critic has seen the rollout, as when it trains
               gae_true        corr of A_i and A
               ceiling         the largest corr (A and Qc): were Qc the joint action's advantage
               ceiling_sum     the same of a sum of utilities: were Qc the sum of A_i
               The copies' noise is taken out of the last four: over the copies' mean itself, the
               correlations are smaller by the root of reliability. nan: nothing but noise.
    --games    So many random matrix games of 3 agents with 5 actions, each with a random policy
               and critics (VDN, QMIX, an unfactorised network) that are fitted to samples of it:
               r_var_pi over all joint actions, by the number of samples; trace, over --rollouts of
               128 joint actions, with a critic that is frozen (2,048 other samples) and with one
               that is fitted to the very rollout. Means over games.
"""

import contextlib
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pandas as pd
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maipg_matrix as matrix  # noqa: E402
import maipg_mpe as mpe  # noqa: E402
import maipg_smac as smac  # noqa: E402
from benchmark import evaluate  # noqa: E402

SAMPLES = (32, 128, 512, 2048, 8192)  # that critics of matrix games are fitted to


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # of maipg_smac.py or maipg_mpe.py
    nus: tuple[float, ...] = (0.0, 0.3, 0.5, 1.0)  # on the same rollouts
    rollouts: int = 4  # that are measured
    cosine: bool = False  # also compare directions with a reference
    reference_rollouts: int = 20  # whose mean is the reference
    sweeps: int = 20  # over them, to refit V
    truth: bool = False  # also compare with true advantages (particle worlds)
    copies: int = 8  # of each world and action, for the truth
    games: int = 0  # random matrix games, with runs or without
    out: Path | None = None  # table of all figures, .csv
    seed: int = 1  # of games and noise
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one


# ---------- a saved run
def load(run_dir, own):
    """A run folder's script, Args and checkpoint. UsageError: it cannot be measured."""
    saved = evaluate.load_run(run_dir)
    script = {"maipg_smac": smac, "maipg_mpe": mpe}.get(saved["script"])
    if not script:
        raise smac.UsageError(f"{run_dir} is of {saved['script']}, not of maipg_smac or maipg_mpe")
    args = script.resolve(script.Args(**saved["args"] | {"device": own.device}))
    if script is mpe and args.env_id or own.truth and (script is smac or args.continuous):
        raise smac.UsageError(f"{run_dir} is not of particle worlds (--truth: with moves)")
    if args.num_envs < 2:
        raise smac.UsageError(f"{run_dir} has one game: a variance needs two")
    return SimpleNamespace(script=script, args=args, saved=saved)


def restore(run, seed):
    """New games of a loaded run: envs, what they show now, and its agent."""
    torch.set_num_threads(run.args.threads)
    _, envs_class, *_ = evaluate.games_of(run.args)
    run.envs = envs_class(run.args)
    run.now = run.script.begin(run.envs, 2 * 10**9 + seed, run.args)
    run.agent = run.script.Agent(run.now, run.args).to(run.args.device)
    run.agent.load_state_dict(run.saved["agent"])


def play(run, rng, count, what):
    """`count` fresh rollouts: (buffer, batch, metrics, a copy of the agent for the update)."""
    for _ in tqdm(range(count), desc=what, disable=None):
        # estimate() fits the compatible critic; policy_losses() would move q_norm.
        buffer, used, args = {}, copy.deepcopy(run.agent), run.args
        if used.second == "paper":
            used.q_norm.beta = 1.0
        run.script.rollout(used.policy, run.envs, buffer, run.now, args.rollout_steps, rng)
        yield buffer, *run.script.estimate(used, buffer, run.now, args), used


# ---------- variance
def team_mean(x, alive):
    """The mean over live agents, [L, B]."""
    return (x * alive).sum(-1) / alive.sum(-1).clamp(min=1)


def q_tot(agent, batch):
    """q_tot as a function of actions [L, B, n, A], but for a constant. Paper: in the reward's unit;
    compatible: in that of A, fitted to this rollout too, as for the update."""
    if agent.second == "compatible":
        return lambda actions: (batch["utilities"] * actions).sum((-2, -1))
    obs, state, keep = batch["obs"], batch["state"], batch["keep"]
    utilities, _ = agent.q.utility(obs, batch["utility_hidden"][0], keep, state)
    weights = agent.q.mixer.weights(state)
    return lambda actions: agent.q.mixer(utilities, actions, weights) * agent.q_norm.std


@torch.no_grad()
def control_variate(agent, batch, metrics):
    """{figure: number} of a rollout that the agent has not seen."""
    corr, slope = metrics["variance/corr"], metrics["variance/slope"]
    ratio = corr / slope  # of the deviations of Qc and A
    figures = {"r_var_pi": 1 - 2 * corr * ratio + ratio**2, "corr": corr, "slope": slope}
    if agent.second == "paper":
        # The means of Q and V are constants.
        team, v = (team_mean(batch[key], batch["alive"]) for key in ("advantages", "values"))
        rest = q_tot(agent, batch)(batch["actions"]) - v * agent.v_norm.std
        rest = team - rest / (metrics["diagnostics/sigma_a"] + 1e-5)
        figures["r_var_v"] = rest.var() / team.var()
    return {(name, "", ""): x for name, x in figures.items()}


def gradients(run, agent, batch, metrics, parts, rng=None, **changes):
    """The policy's gradients [parts, parameters] on disjoint splits, without entropy bonus."""
    args, rows = replace(run.args, ent_coef=0.0, **changes), []
    parameters, sigma_a = list(agent.policy.parameters()), metrics["diagnostics/sigma_a"]
    for k in range(parts):
        split = {key: x[:, k::parts] for key, x in batch.items()}
        losses, _ = run.script.policy_losses(agent, split, sigma_a, rng, args)
        grads = torch.autograd.grad(losses["policy"], parameters, materialize_grads=True)
        rows.append(torch.cat([x.flatten() for x in grads]))
    return torch.stack(rows)


def mixtures(run, played, rng, nus, aim):
    """{figure: number} of interpolated gradients, which are linear in nu: Eq. (10)."""
    _, *batch, used = played
    part = lambda **changes: gradients(run, used, *batch, run.args.num_envs, rng, **changes)
    first, figures = part(nu=0.0), {}
    mus = ["expectation"] if hasattr(used.policy, "log_std") else ["expectation", "gumbel"]
    for mu in mus if used.second != "none" else [""]:
        second = part(nu=1.0, mu=mu) if mu else first
        for nu in nus if mu else [0.0]:
            grads = first.lerp(second, nu)
            figures["trace", nu, mu] = grads.var(0).sum() / first.var(0).sum()
            if aim is not None:
                figures["cosine", nu, mu] = torch.cosine_similarity(grads.mean(0), aim, 0)
    return figures


def reference(run, rng, count, sweeps):
    """PPO's gradients [rollouts, parameters] with V refitted to the rollouts, by a step of Adam on
    each in every sweep."""
    now, fitted = dict(run.now), copy.deepcopy(run.agent)
    fitted.second = "none"
    optimizer = torch.optim.Adam(fitted.critic.parameters(), run.args.learning_rate, eps=1e-5)
    buffers = [buffer for buffer, *_ in play(run, rng, count, "reference")]
    batches = lambda hidden: [run.script.estimate(fitted, x, hidden, run.args) for x in buffers]
    for _ in tqdm(range(sweeps), desc="V is refitted", disable=None):
        for batch, _ in batches(dict(now)):
            losses = {"critic": run.script.critic_loss(fitted, batch, run.args)}
            run.script.descend(fitted, optimizer, losses, run.args)
    return torch.cat([gradients(run, fitted, *x, 1, nu=0.0) for x in batches(now)])


# ---------- truth
def world_at(envs, buffer, t):
    """The particle worlds' state before step t of the rollout that they have just played."""
    obs, ago = buffer["obs"][t], len(buffer["obs"]) - 1 - t
    vel, pos = obs[..., :2], obs[..., 2:4]
    # Landmarks are seen relative to the agent.
    landmarks = obs[:, 0, 4 : 4 + 2 * envs.num_landmarks].unflatten(-1, (-1, 2)) + pos[:, :1]
    return [pos, vel, landmarks], (envs.steps - ago) % envs.length


def play_on(policy, envs, obs, hidden, keep, choice, rng):
    """Discounted returns [N] to the end of the episode. choice [..., n, A]: the first actions, one-
    hot, of those agents for whom it is not empty; all else is the policy's."""
    forced, total, discount, done = choice.sum(-1, keepdim=True) > 0, 0.0, 1.0, keep > 1
    while not done.all():
        out, hidden = policy(obs[None], hidden, keep[None])
        actions = mpe.sample(mpe.distribution(policy, out[0], envs.avail), rng)
        obs, _, _, reward, done = envs.step(torch.where(forced, choice, actions))
        total, discount = total + discount * reward, discount * envs.args.gamma
        hidden, keep, forced = hidden[0], torch.ones_like(keep), torch.zeros_like(forced)
    return total


@torch.no_grad()
def true_advantages(run, buffer, t, copies, rng):
    """Advantages at step t, by halves of the copies, in the reward's unit: of each agent's actions
    [2, N, n, A], and of the joint action that was played [2, N]."""
    N, n, A = buffer["avail"].shape[1:]
    envs = mpe.ParticleEnvs(replace(run.args, num_envs=N * copies))
    envs.reset(0)  # load_state_dict() needs its generator
    many = lambda x: torch.cat([x] * copies)
    seen = [many(buffer[key][t]) for key in ("obs", "policy_hidden", "keep")]
    (world, steps), noise, returns = world_at(run.envs, buffer, t), rng.get_state(), []
    single = torch.eye(n * A).to(seen[0]).view(-1, n, A)
    for choice in tqdm([*single, many(buffer["actions"][t])], "truth", leave=False, disable=None):
        envs.load_state_dict([*map(many, world), steps, noise])
        rng.set_state(noise)  # the same for all
        total = play_on(run.agent.policy, envs, *seen, choice, rng)
        returns.append(total.view(2, -1, N).mean(1))
    own = torch.stack(returns[:-1], -1).unflatten(-1, (n, A))
    values = (buffer["mean"][t] * own).sum(-1, keepdim=True)
    return own - values, returns[-1] - values.mean((-2, -1))


def ranking(run, played, t, copies, rng):
    """{figure: (xy, xx, yy) [3, N]} for correlation(): sums over agents of means over pi."""
    buffer, batch, metrics, used = played
    L, N, pi = run.args.chunk_length, run.args.num_envs, buffer["mean"][t]
    at = lambda x: x[t % L].unflatten(0, (-1, N))[t // L]
    over_pi = lambda x: (pi * x).sum((-2, -1))
    own, joint = true_advantages(run, buffer, t, copies, rng)
    gae = at(team_mean(batch["advantages"], batch["alive"])) * metrics["diagnostics/sigma_a"]
    mean, true, both = own.mean(0), over_pi(own.prod(0)), joint.prod(0)
    noisy, taken = over_pi(mean**2), (buffer["actions"][t] * mean).sum((-2, -1))
    figures = {"reliability": (true, noisy, noisy), "ceiling": (both, gae**2, both)}
    figures["ceiling_sum"] = true, gae**2, true
    figures["gae_true"] = gae * taken, gae**2 * pi.shape[1], true
    if used.second != "none":
        mu = batch["mean"].clone().requires_grad_()
        q = at(torch.autograd.grad(q_tot(used, batch)(mu).sum(), mu)[0])
        q = q - (pi * q).sum(-1, keepdim=True)
        figures["q_true"] = over_pi(q * mean), over_pi(q**2), true
    return {(name, "", ""): torch.stack(x) for name, x in figures.items()}


def correlation(products):
    """(xy / root of xx yy of their sums over points, its jackknife error); products [3, P]."""
    total = products.double().sum(1, keepdim=True)
    ratio = lambda xy, xx, yy: xy / (xx * yy).sqrt()
    without = ratio(*(total - products))
    error = (without.var(correction=0) * (len(without) - 1)).sqrt()
    return ratio(*total).item(), error.item()


# ---------- matrix games
class JointCritic:
    """An unfactorised q_tot(a_1, ..., a_n) per game: an MLP with two layers of 64 units."""

    def __init__(self, games, n, m, args, rng):
        self.parameters = []
        for inputs, outputs in [(n * m, 64), (64, 64), (64, 1)]:
            weight = torch.randn(games, inputs, outputs, generator=rng) / inputs**0.5
            self.parameters += [weight, torch.zeros(games, 1, outputs)]

    def __call__(self, actions):
        """q_tot [G, B] of actions [G or 1, B, n, m]."""
        w_1, b_1, w_2, b_2, w_3, b_3 = self.parameters
        x = torch.relu(actions.flatten(2) @ w_1 + b_1)
        return (torch.relu(x @ w_2 + b_2) @ w_3 + b_3).squeeze(-1)


def fitted(kind, shape, samples, args, rng):
    """A critic per game, fitted to what maipg_matrix.rollout() gives; shape: games, n, m."""
    actions, _, rewards = samples
    make = JointCritic if kind == "joint" else matrix.Critic
    critic = make(*shape, replace(args, mixer=kind), rng)
    optimizer = torch.optim.Adam(critic.parameters, args.critic_lr)
    matrix.fit(critic, optimizer, actions, rewards, 1 / actions.shape[1], args.critic_steps)
    return critic


def exact_r_var(critic, payoffs, log_pi):
    """Var(A - Qc) / Var(A) [G] under the policies, by enumeration."""
    joint = matrix.all_joint_actions(*log_pi.shape[1:], "cpu")
    p = torch.einsum("bnm,znm->zb", joint, log_pi).exp()
    variance = lambda x: (p * (x - (p * x).sum(1, keepdim=True)) ** 2).sum(1)
    rewards = payoffs.flatten(1)
    return variance(rewards - critic(joint[None])) / variance(rewards)


def traces(payoffs, logits, frozen, own, args, rng):
    """{figure: [G]}: the gradient's trace, relative to nu = 0, with frozen and fresh critics."""
    old, grads, figures = logits.detach().log_softmax(-1), {}, {}
    value = matrix.expected_reward(payoffs, old.exp()).unsqueeze(-1)
    gradient = lambda loss: torch.autograd.grad(loss.sum(), logits)[0].flatten(1)
    for _ in tqdm(range(own.rollouts), desc="batches", disable=None):
        actions, log_probs, rewards = batch = matrix.rollout(old, payoffs, rng, args)
        terms = logits.log_softmax(-1), actions, log_probs, rewards - value, args
        first = gradient(matrix.sampled_term(*terms))
        for kind, critic in frozen.items():
            fresh = fitted(kind, logits.shape, batch, args, rng)
            for name, x in (("frozen", critic), ("same batch", fresh)):
                second = gradient(matrix.deterministic_term(x, logits.log_softmax(-1), args, rng))
                grads.setdefault(f"trace, {kind} {name}", []).append((first, second))
    for name, pairs in grads.items():
        first, second = map(torch.stack, zip(*pairs))
        for nu in own.nus:
            trace = first.lerp(second, nu).var(0).sum(-1)
            figures[name, nu, args.mu] = trace / first.var(0).sum(-1)
    return figures


def study_games(own):
    """Random games' table of figures."""
    args = matrix.Args(device="cpu", batch_size=128, critic_lr=0.02, critic_steps=300)
    torch.set_num_threads(args.threads)
    rng, frozen, figures = torch.Generator().manual_seed(own.seed), {}, {}
    payoffs = torch.rand(own.games, 5, 5, 5, generator=rng)
    logits = torch.randn(own.games, 3, 5, generator=rng).requires_grad_()
    log_pi = logits.detach().log_softmax(-1)
    for kind in ("vdn", "qmix", "joint"):
        for count in SAMPLES:
            many = matrix.rollout(log_pi, payoffs, rng, replace(args, batch_size=count))
            critic = fitted(kind, log_pi.shape, many, args, rng)
            figures[f"r_var_pi, {kind} {count}", "", ""] = exact_r_var(critic, payoffs, log_pi)
            frozen |= {kind: critic} if count == 2048 else {}
    return table_of(figures | traces(payoffs, logits, frozen, own, args, rng))


# ---------- main
def table_of(figures):
    """A row per figure, whose numbers [P] are averaged; of products [3, P], the correlation()."""
    rows = []
    for key, x in figures.items():
        # The mean of numbers is their correlation() with ones.
        x = x if x.dim() > 1 else torch.stack([x, torch.ones_like(x), torch.ones_like(x)])
        rows.append([*key, *correlation(x)])
    return pd.DataFrame(rows, columns=["figure", "nu", "mu", "value", "stderr"])


def study(run, own):
    """A run's table of figures."""
    rngs = [torch.Generator(run.args.device).manual_seed(own.seed + 10**9 * k) for k in range(3)]
    figures, aim = {}, None
    if own.cosine:
        grads = reference(run, rngs[0], own.reference_rollouts, own.sweeps)
        aim, halves = grads.mean(0), (grads[::2].mean(0), grads[1::2].mean(0))
        figures["halves", "", ""] = [torch.cosine_similarity(*halves, 0)[None]]
    for k, played in enumerate(play(run, rngs[0], own.rollouts, "rollouts")):
        new = mixtures(run, played, rngs[1], own.nus, aim)
        if run.agent.second != "none":
            new |= control_variate(run.agent, *played[1:3])
        if own.truth:
            # The middles of equal parts of the rollout.
            t = (2 * k + 1) * run.args.rollout_steps // (2 * own.rollouts)
            new |= ranking(run, played, t, own.copies, rngs[2])
        for key, x in new.items():
            figures.setdefault(key, []).append(x if x.dim() else x[None])
    return table_of({key: torch.cat(x, -1) for key, x in figures.items()})


def main(argv=None):
    """Run a command line; the exit code: 1 failed, 2 bad input."""
    own, tables = tyro.cli(Args, args=argv, description=__doc__), {}

    def tell(name, table, about=""):
        tables[name] = table
        text = table.to_string(index=False, float_format="{:.4f}".format)
        print(f"{name}{about}\n{text}", flush=True)

    try:
        if min(own.rollouts, own.reference_rollouts, own.copies) < 2 or own.copies % 2:
            raise smac.UsageError("rollouts and copies: at least two; --copies: even")
        if not all(0 <= x <= 1 for x in [*own.nus, own.seed / 10**8]) or own.sweeps < 0:
            raise smac.UsageError("--nus lie in [0, 1], --seed in [0, 10^8], --sweeps from 0 on")
        if not 2 <= own.games <= 10**4 and (own.games or not own.run_dirs):
            raise smac.UsageError("give run folders, or two --games and more (at most 10,000)")
        if own.out and not own.out.parent.is_dir():
            raise smac.UsageError(f"--out {own.out}: there is no such folder")
        runs = [(x, load(x, own)) for x in own.run_dirs]
        if own.games:
            tell("matrix games", study_games(own))
        for run_dir, run in runs:
            restore(run, own.seed)
            with contextlib.closing(run.envs):
                tell(str(run_dir), study(run, own), f", step {run.saved['progress']['step']:,}")
        if own.out:
            pd.concat(tables, names=["run"]).droplevel(1).to_csv(own.out)
        return 0
    except (*evaluate.USAGE_ERRORS, *evaluate.FAILURES, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, evaluate.USAGE_ERRORS) else 1


if __name__ == "__main__":
    sys.exit(main())
