"""Greedy episodes of a run's policy: win rate and return with 95% intervals, and a film.

    python benchmark/evaluate.py RUN_DIR --episodes 200
    python benchmark/evaluate.py RUN_DIR --capture-video     # film.gif; StarCraft II: a replay

For runs of maipg_smac.py and of the baselines. Intervals: Wilson's for the win rate, Student's for
the return. `load_policy` gives a run's policy to a program of your own.
"""

import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maipg_smac as smac  # noqa: E402
from benchmark.baselines import facmac, happo, qmix  # noqa: E402

# {script: (its Args, its policy network of n agents, O observations, H units, A actions)}
SCRIPTS = {
    "maipg_smac": (smac.Args, lambda n, *shape: smac.Recurrent(*shape, 0.01)),
    "happo": (happo.Args, lambda n, *shape: happo.Actors(n, *shape, 0.01)),
    "qmix": (qmix.Args, lambda n, *shape: qmix.Recurrent(*shape)),
    "facmac": (facmac.Args, lambda n, *shape: qmix.Recurrent(*shape)),
}
LATER = ["maipg_matrix", "maipg_mpe", "maipg_grf"]


# ---------- policies
def load_run(run_dir):
    """A run folder's checkpoint. UsageError: there is none that is sound, or it is unknown."""
    path, script = Path(run_dir, "checkpoint.pt"), "maipg_smac"
    with contextlib.suppress(Exception):  # load_checkpoint says what is wrong
        script = torch.load(path, map_location="cpu", weights_only=True)["script"]
    if script in LATER:
        raise smac.UsageError(f"{run_dir}: runs of {script}.py are not supported yet")
    saved = smac.load_checkpoint(run_dir, SCRIPTS.get(script, SCRIPTS["maipg_smac"])[0])
    broken = [name for name, x in saved["agent"].items() if not x.isfinite().all()]
    if broken:
        raise smac.UsageError(f"{path}: weights are not finite, first {broken[0]}")
    return saved


def policy_of(saved):
    """The policy network of a checkpoint, on the CPU."""
    parts = [(name.partition("."), x) for name, x in saved["agent"].items()]
    weights = {name[2]: x for name, x in parts if name[0] == "policy"}
    matrices = [x for x in weights.values() if x.dim() == 2]
    obs_dim, num_actions = matrices[0].shape[1], matrices[-1].shape[0]
    heads = sum(name.endswith("head.weight") for name in weights)
    make = SCRIPTS[saved["script"]][1]
    policy = make(heads, obs_dim, saved["args"]["hidden_dim"], num_actions)
    policy.load_state_dict(weights)
    return policy


def load_policy(run_dir):
    """A run's greedy policy as a function: act(obs, avail, hidden) -> actions [N, n], hidden.

    obs [N, n, O] as the games of maipg_smac.py give it (it ends with the agent's index), avail bool
    [N, n, A]: what is not available is never chosen. hidden [N, n, H] is what the policy remembers:
    None when the episodes begin, later what the last call returned.
    """
    saved = load_run(run_dir)
    policy = policy_of(saved)

    @torch.no_grad()
    def act(obs, avail, hidden=None):
        if hidden is None:
            hidden = obs.new_zeros(*obs.shape[:2], saved["args"]["hidden_dim"])
        keep = obs.new_ones(1, len(obs))  # 0 would empty a game's hidden state
        logits, hiddens = policy(obs[None], hidden, keep)
        return smac.masked_log_softmax(logits[0], avail).argmax(-1), hiddens[0]

    return act


# ---------- win rate and return
class Recorder:
    """N games that note the returns of their episodes, in a list each, and move a progress bar."""

    def __init__(self, envs, bar):
        self.envs, self.bar = envs, bar

    def reset(self, seed):
        seen = self.envs.reset(seed)
        self.total, self.returns = torch.zeros(len(seen[0])), [[] for _ in seen[0]]
        self.bar.reset()
        return seen

    def step(self, actions):
        answer = self.envs.step(actions)
        reward, done = answer[3].cpu(), answer[4].cpu()
        self.total += reward
        for k in done.nonzero().flatten().tolist():
            self.returns[k].append(self.total[k].item())
            self.total[k] = 0.0
        self.bar.update(int(done.sum()))
        return answer


def intervals(wins, returns):
    """95% intervals (low, high): Wilson's of the win rate, Student's of the mean return."""
    count, error = len(returns), np.nan
    rate = stats.binomtest(wins, count).proportion_ci(method="wilson")
    if count > 1:
        error = stats.t.ppf(0.975, count - 1) * np.std(returns, ddof=1) / np.sqrt(count)
    mean = np.mean(returns)
    return (float(rate.low), float(rate.high)), (float(mean - error), float(mean + error))


def measure(saved, args, seed):
    """Play greedy episodes, as many in each game; print what comes out of them."""
    policy = policy_of(saved).to(args.device)
    games = smac.SC2Envs(args) if args.backend == "sc2" else smac.SMAXEnvs(args)
    share = -(-args.eval_episodes // args.num_envs)
    count = share * args.num_envs
    with contextlib.closing(games), tqdm(total=count, unit="episode", disable=None) as bar:
        record = Recorder(games, bar)
        judge = lambda attempt: smac.evaluate(policy, record, seed + attempt, args)
        result = smac.with_retries(judge, {"restarts": 0})
    returns = [x for row in record.returns for x in row[:share]]
    rate, mean = (result[name] for name in smac.EVALUATION)
    of_rate, of_mean = intervals(round(rate * count), returns)
    step = saved["progress"]["step"]
    print(f"{args.backend} {args.map_name}, {saved['script']} at step {step:,}: {count} episodes")
    for name, value, (low, high) in (("win rate", rate, of_rate), ("return", mean, of_mean)):
        print(f"{name:8}  {value:.3f}   95% interval [{low:.3f}, {high:.3f}]")


# ---------- film
COLOURS = [(0, 114, 178), (213, 94, 0)]  # allies, enemies: Okabe and Ito's blue and vermilion
SIDE = 960  # pixels of the longer side, before they are halved
HEAD = 40  # pixels above, for the text


def decide(act, obs, avail, hidden):
    """Actions [n] of one game and its hidden state; obs [n, O] without the agents' indices."""
    obs = np.concatenate([np.float32(obs), np.eye(len(obs), dtype=np.float32)], -1)
    avail = torch.from_numpy(np.array(avail, dtype=bool))
    actions, hidden = act(torch.from_numpy(obs)[None], avail[None], hidden)
    return actions[0].tolist(), hidden


def play_smax(act, map_name, seed):
    """An episode of SMAX: the environment, and its world states after every environment step,
    which is every eighth one of the world's own."""
    import jax
    import jax.numpy as jnp
    from jaxmarl.environments import smax

    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(map_name))

    def look(obs, game):
        avail = env.get_avail_actions(game)
        return [jnp.stack([x[name] for name in env.agents]) for x in (obs, avail)]

    @jax.jit
    def begin(key):
        obs, game = env.reset(key)
        # Strong types, or the second step would compile once more.
        game = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), game)
        return game, look(obs, game)

    @jax.jit
    def step(key, game, actions):
        actions = dict(zip(env.agents, actions))
        obs, game, _, done, _ = env.step_env(key, game, actions)
        return game, look(obs, game), done["__all__"]

    key, reset_key = jax.random.split(jax.random.PRNGKey(seed))
    game, (obs, avail) = begin(reset_key)
    worlds, hidden, done = [game.state], None, False
    print("compiling one game", flush=True)
    with tqdm(total=env.max_steps, desc="film", unit="step", disable=None) as bar:
        while not done:
            actions, hidden = decide(act, obs, avail, hidden)
            # Keys as in the games of maipg_smac.py, where one more is for the next episode.
            key, step_key = jax.random.split(key)
            step_key, _ = jax.random.split(step_key)
            game, (obs, avail), done = step(step_key, game, np.int32(actions))
            worlds.append(game.state)
            bar.update()
    return env, worlds


def film_smax(act, map_name, seed, path):
    """Write an episode as a gif; its outcome."""
    env, worlds = play_smax(act, map_name, seed)
    last = np.array(worlds[-1].unit_alive)
    allies, enemies = last[: env.num_allies].any(), last[env.num_allies :].any()
    outcome = "time is up" if allies and enemies else "won" if allies else "lost"
    # What is seen: the rectangle in which they live.
    lived = [np.array(world.unit_positions)[np.array(world.unit_alive)] for world in worlds]
    view = np.concatenate(lived).min(0) - 1, np.concatenate(lived).max(0) + 1
    frames = [draw(env, world, view, map_name) for world in worlds[:-1]]
    frames.append(draw(env, worlds[-1], view, f"{map_name}: {outcome}"))
    times = [120] * (len(frames) - 1) + [2500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
    return outcome


def draw(env, world, view, title):
    """A world state: units as circles, filled as far as they have health, with their type's letter;
    lines are shots, crosses the dead."""
    low, high = view
    zoom = SIDE / (high - low).max()  # pixels per unit of length
    width, height = map(int, zoom * (high - low) + [0, HEAD])
    picture = Image.new("RGB", (width, height), "white")
    canvas, letter = ImageDraw.Draw(picture), ImageFont.load_default(0.7 * zoom)
    position = zoom * (np.array(world.unit_positions) - low)
    position[:, 1] = height - position[:, 1]  # north is up
    kinds, shots = np.array(world.unit_types), np.array(world.prev_attack_actions)
    alive, radius = np.array(world.unit_alive), zoom * np.array(env.unit_type_radiuses)[kinds]
    health, allies = np.array(world.unit_health / env.unit_type_health[kinds]), env.num_allies
    colour = [COLOURS[int(i >= allies)] for i in range(len(kinds))]
    for x, y in position[~alive]:
        canvas.text((x, y), "x", "silver", letter, anchor="mm")
    for i in np.flatnonzero(alive & (shots >= env.num_movement_actions)):
        # Each side numbers the other one from the border between them.
        k = shots[i] - env.num_movement_actions
        target = allies + k if i < allies else allies - 1 - k
        canvas.line([*position[i], *position[target]], fill=colour[i], width=4)
    for i in np.flatnonzero(alive):
        (x, y), r = position[i], radius[i]
        disc = [x - r, y - r, x + r, y + r]
        pale = tuple(c + (255 - c) * 2 // 3 for c in colour[i])
        canvas.ellipse(disc, fill=pale, outline=colour[i], width=3)
        canvas.pieslice(disc, -90, -90 + 360 * health[i], fill=colour[i])
        edge = {"stroke_width": 2, "stroke_fill": colour[i], "anchor": "mm"}
        canvas.text((x, y), env.unit_type_shorthands[kinds[i]], "white", letter, **edge)
    count = alive[:allies].sum(), alive[allies:].sum()
    text = f"{title}   step {int(world.step)}   {count[0]} against {count[1]}"
    canvas.text((16, 12), text, "black", ImageFont.load_default(28))
    return picture.reduce(2).quantize(32)


def replay_sc2(act, map_name, seed, folder):
    """Play an episode of StarCraft II here; the game writes its replay into the folder."""
    from smac.env import StarCraft2Env

    place, hidden, done = str(folder.resolve()), None, False
    with contextlib.closing(StarCraft2Env(map_name, seed=seed, replay_dir=place)) as env:
        env.reset()
        while not done:
            actions, hidden = decide(act, env.get_obs(), env.get_avail_actions(), hidden)
            _, done, info = env.step(actions)
            if not info:  # smac's answer to a crash
                raise smac.GameError("the game crashed")
        env.save_replay()
    return "won" if info["battle_won"] else "not won"


# ---------- main
@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # of maipg_smac.py, happo.py, qmix.py or facmac.py
    episodes: int = 128  # at least so many: every game plays as many as the others
    seed: int = 1  # of the games
    device: Literal["auto", "cpu", "cuda"] = "auto"  # a GPU if there is one
    capture_video: bool = False  # film.gif in the run folder (StarCraft II: a replay)


def main(argv=None):
    """Run a command line; the exit code: 1 failed, 2 bad input."""
    own = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if own.episodes < 1 or not 0 <= own.seed <= 10**8:
            raise smac.UsageError("--episodes must be positive, --seed lie in [0, 10^8]")
        saved = load_run(own.run_dir)
        known = asdict(smac.Args())
        args = smac.Args(**{k: v for k, v in saved["args"].items() if k in known})
        args.num_envs, args.eval_episodes = min(args.num_envs, own.episodes), own.episodes
        args.device = own.device
        args = smac.resolve(args)
        torch.set_num_threads(args.threads)
        seed = 2 * 10**9 + own.seed  # games that no training has seen
        measure(saved, args, seed)
        if own.capture_video:
            act, sc2 = load_policy(own.run_dir), args.backend == "sc2"
            path = own.run_dir if sc2 else own.run_dir / "film.gif"
            outcome = (replay_sc2 if sc2 else film_smax)(act, args.map_name, seed, path)
            print(f"{'replay in' if sc2 else 'film'} {path}: {outcome}")
        return 0
    except (smac.UsageError, smac.GameError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, smac.UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
