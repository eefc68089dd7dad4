"""Greedy episodes of a run's policy: win rate and return with 95% intervals, and a film.

    python benchmark/evaluate.py RUN_DIR --episodes 200
    python benchmark/evaluate.py RUN_DIR --capture-video     # film.gif; StarCraft II: a replay
    python benchmark/evaluate.py RUN_DIR --env-id pettingzoo.sisl.pursuit_v5:parallel_env

For runs of maipg_smac.py, maipg_mpe.py, maipg_grf.py and the baselines. Intervals: Wilson's for
rates, Student's for returns. `load_policy` gives a run's policy to a program of your own.
"""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maipg_grf as grf  # noqa: E402
import maipg_mpe as mpe  # noqa: E402
import maipg_smac as smac  # noqa: E402
from benchmark import films  # noqa: E402
from benchmark.baselines import facmac, fitted, happo, qmix  # noqa: E402

# {script: (the script of its games, its Args, its policy network of n agents, O observations, H
# units, A actions)}
SCRIPTS = {
    "maipg_smac": (smac, smac.Args, lambda n, *shape: smac.Recurrent(*shape, 0.01)),
    "maipg_mpe": (mpe, mpe.Args, lambda n, *shape: mpe.Recurrent(*shape, 0.01)),
    "maipg_grf": (grf, grf.Args, lambda n, *shape: grf.Recurrent(*shape, 0.01)),
    "fitted": (smac, fitted.Args, lambda n, *shape: smac.Recurrent(*shape, 0.01)),
    "happo": (smac, happo.Args, lambda n, *shape: happo.Actors(n, *shape, 0.01)),
    "qmix": (smac, qmix.Args, lambda n, *shape: qmix.Recurrent(*shape)),
    "facmac": (smac, facmac.Args, lambda n, *shape: qmix.Recurrent(*shape)),
}
USAGE_ERRORS = smac.UsageError, mpe.UsageError, grf.UsageError
FAILURES = smac.GameError, mpe.EnvError, grf.GameError, ImportError, OSError


# ---------- policies
def load_run(run_dir):
    """A run folder's checkpoint, with its `policy` and `step`. UsageError: none that is sound."""
    path = Path(run_dir, "checkpoint.pt")
    try:
        script = dict(torch.load(path, map_location="cpu", weights_only=True))["script"]
        module, args_class, _ = SCRIPTS[script]
        saved = module.load_checkpoint(run_dir, args_class)
        saved |= {"policy": policy_of(saved), "step": saved["progress"]["step"]}
    except USAGE_ERRORS:
        raise
    except Exception as error:
        text = f"{path} is no checkpoint of {' '.join(SCRIPTS)}, as they are now: {error!r:.200}"
        raise smac.UsageError(text) from None
    for name, x in saved["agent"].items():
        if not x.isfinite().all():
            raise smac.UsageError(f"{path}: weights are not finite, first {name}")
    return saved


def policy_of(saved):
    """The policy network of a checkpoint, on the CPU."""
    parts = [(*name.partition("."), x) for name, x in saved["agent"].items()]
    weights = {name: x for network, _, name, x in parts if network == "policy"}
    matrices = [x for x in weights.values() if x.dim() == 2]
    obs_dim, num_actions = matrices[0].shape[1], matrices[-1].shape[0]
    heads = sum(name.endswith("head.weight") for name in weights)
    make = SCRIPTS[saved["script"]][2]
    policy = make(heads, obs_dim, saved["args"]["hidden_dim"], num_actions)
    policy.shape = obs_dim, num_actions
    if "log_std" in weights:
        policy.log_std = torch.nn.Parameter(weights["log_std"])
    policy.load_state_dict(weights)
    return policy


def load_policy(run_dir):
    """A run's greedy policy as a function: act(obs, avail, hidden) -> actions, hidden.

    obs [N, n, O] as the script's games give it, avail bool [N, n, A]: what is not available is
    never chosen. Actions are what the games' step() takes: numbers [N, n], and in maipg_mpe.py
    [N, n, A], one-hot or forces (the Gaussian's mean, in [-1, 1]). hidden [N, n, H] is what the
    policy remembers: None when the episodes begin, later what the last call returned.
    """
    saved = load_run(run_dir)

    @torch.no_grad()
    def act(obs, avail, hidden=None):
        if hidden is None:
            hidden = obs.new_zeros(*obs.shape[:2], saved["args"]["hidden_dim"])
        keep = obs.new_ones(1, len(obs))  # 0 would empty a game's hidden state
        out, hiddens = saved["policy"](obs[None], hidden, keep)
        if saved["script"] == mpe.Args.script:
            return mpe.distribution(saved["policy"], out[0], avail).mode, hiddens[0]
        return smac.masked_log_softmax(out[0], avail).argmax(-1), hiddens[0]

    return act


# ---------- win rate and return
def intervals(wins, returns):
    """95% intervals (low, high): Wilson's of the win rate, Student's of the mean return."""
    count, mean = len(returns), np.mean(returns)
    rate = stats.binomtest(wins, count).proportion_ci(method="wilson")
    error = stats.t.ppf(0.975, count - 1) * stats.sem(returns) if count > 1 else np.nan
    return rate, (mean - error, mean + error)


def games_of(args):
    """(What is played, the class of its games, what a victory is called, its film.)"""
    if isinstance(args, grf.Args):
        return args.scenario, grf.FootballEnvs, "scored", films.football
    if isinstance(args, mpe.Args) and args.env_id:
        return args.env_id, mpe.PettingZooEnvs, None, films.pettingzoo
    if isinstance(args, mpe.Args):
        return f"{args.scenario}, {args.num_agents} agents", mpe.ParticleEnvs, None, films.particles
    if args.backend == "sc2":
        return f"sc2 {args.map_name}", smac.SC2Envs, "won", films.replay
    return f"smax {args.map_name}", smac.SMAXEnvs, "won", films.smax


def play(module, policy, games, seed, args, bar):
    """Greedy episodes, each game its share, as the script's evaluate() plays them: {"return":
    [...], "won": [...]}, the latter where there are victories."""
    now, share = module.begin(games, seed, args), bar.total // args.num_envs
    if (now["obs"].shape[-1], now["avail"].shape[-1]) != policy.shape:
        raise smac.UsageError("the games' observations or actions are not those of this run")
    bar.reset()
    played, buffer, episodes = now["keep"], {}, {}
    while (played < share).any():
        module.rollout(policy, games, buffer, now, 1)
        counted = buffer["done"][0] & (played < share)
        for name in {"return", "won"} & buffer.keys():
            episodes.setdefault(name, []).extend(buffer[name][0, counted].tolist())
        played = played + counted
        bar.update(int(counted.sum()))
    return episodes


def measure(saved, args, seed):
    """Play greedy episodes; print what comes out of them."""
    module, policy = SCRIPTS[saved["script"]][0], saved["policy"].to(args.device)
    task, envs_class, victory, _ = games_of(args)
    games, count = envs_class(args), -(-args.eval_episodes // args.num_envs) * args.num_envs
    with contextlib.closing(games), tqdm(total=count, unit="episode", disable=None) as bar:
        judge = lambda attempt: play(module, policy, games, seed + attempt, args, bar)
        # maipg_mpe.py has no games that crash.
        retry = getattr(module, "with_retries", smac.with_retries)
        episodes = retry(judge, {"restarts": 0})
    of_rate, of_mean = intervals(sum(episodes.get("won", [])), episodes["return"])
    row = "{:8}  {:.3f}   95% interval [{:.3f}, {:.3f}]".format
    print(f"{task}, {saved['script']} at step {saved['step']:,}: {count} episodes")
    if victory:
        print(row(victory.replace("won", "win rate"), np.mean(episodes["won"]), *of_rate))
    print(row("return", np.mean(episodes["return"]), *of_mean))


# ---------- main
@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # of maipg_smac.py, _mpe.py, _grf.py or a baseline
    episodes: int = 128  # at least so many: every game plays as many as the others
    seed: int = 1  # of the games
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    env_id: str = ""  # that of a run of a PettingZoo environment, again
    capture_video: bool = False  # film.gif in the run folder (StarCraft II: a replay)


def settings(saved, own):
    """The resolved args of a run's script, as its evaluation wants them. Raises UsageError."""
    if own.episodes < 1 or not 0 <= own.seed <= 10**8:
        raise smac.UsageError("--episodes must be positive, --seed lie in [0, 10^8]")
    module, given = SCRIPTS[saved["script"]][0], saved["args"]
    # Code is imported at the user's word, never at a file's.
    if given.get("env_id", "") != own.env_id:
        raise smac.UsageError(f"this run needs --env-id {given.get('env_id', '')!r}")
    args = module.Args(**{name: x for name, x in given.items() if hasattr(module.Args, name)})
    args.num_envs, args.eval_episodes = min(args.num_envs, own.episodes), own.episodes
    args.num_minibatches, args.device = 1, own.device
    return module.resolve(args)


def main(argv=None):
    """Run a command line; the exit code: 1 failed, 2 bad input."""
    own = tyro.cli(Args, args=argv, description=__doc__)
    try:
        saved = load_run(own.run_dir)
        args = settings(saved, own)
        torch.set_num_threads(args.threads)
        seed = 2 * 10**9 + own.seed  # games that no training has seen
        measure(saved, args, seed)
        if own.capture_video:
            args = settings(saved, replace(own, episodes=1, device="cpu"))
            act = load_policy(own.run_dir)
            print(films.capture(*games_of(args), act, args, seed, own.run_dir))
        return 0
    except (*USAGE_ERRORS, *FAILURES) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, USAGE_ERRORS) else 1


if __name__ == "__main__":
    sys.exit(main())
