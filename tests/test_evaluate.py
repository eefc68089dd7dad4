"""benchmark/evaluate.py and films.py against plain calculations, and on damaged runs."""

import copy
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maipg_grf as grf
import maipg_mpe as mpe
import maipg_smac as smac
from benchmark import evaluate, films
from benchmark.baselines import facmac, happo, qmix

ROOT = Path(__file__).resolve().parent.parent
STANDIN = str(Path(__file__).with_name("standin"))


@pytest.fixture(autouse=True)
def as_before():
    """main() sets signal handlers; two threads of torch wait for each other on a busy machine."""
    torch.set_num_threads(1)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def no_engine(monkeypatch):
    """maipg_grf.py with games of random numbers, whether gfootball is installed or not."""
    monkeypatch.setattr(grf, "find_spec", lambda name: True)
    monkeypatch.setattr(grf, "FootballEnvs", Toy)


class Toy:
    """Games of random numbers with deaths; an agent's own no-op is action 0, for the dead alone."""

    def __init__(self, args, n=3, actions=5, obs=7, state=6):
        self.shape, self.count = (n, actions, obs, state), args.num_envs

    def rand(self, *shape):
        return torch.rand(self.count, *shape, generator=self.rng)

    def look(self):
        n, actions, obs, state = self.shape
        avail = self.rand(n, actions) < 0.7
        avail[..., 0], avail[..., 1], avail[..., 2] = False, True, True
        avail[~self.living] = torch.eye(actions, dtype=torch.bool)[0]
        return 2 * self.rand(n, obs) - 1, 2 * self.rand(state) - 1, avail

    def reset(self, seed):
        self.rng = torch.Generator().manual_seed(seed)
        self.living = torch.ones(self.count, self.shape[0], dtype=torch.bool)
        return self.look()

    def step(self, actions):
        self.living &= self.rand(self.shape[0]) > 0.1
        self.living[:, 0] = True
        done = self.rand() < 0.2
        self.living |= done.unsqueeze(-1)
        reward = self.rand() + 0.3 * actions.float().mean(-1)
        return *self.look(), reward, done, done & (self.rand() < 0.6)

    def close(self):
        pass


AGENTS = {"maipg_smac": smac, "fitted": smac, "happo": happo, "qmix": qmix, "facmac": facmac}
AGENTS |= {"maipg_mpe": mpe, "maipg_grf": grf}


def save_run(folder, script="maipg_smac", look=None, **settings):
    """A run folder with an agent of random weights that are not indifferent; its args, the agent,
    and games."""
    module, args_class, _ = evaluate.SCRIPTS[script]
    args = args_class(device="cpu", num_envs=2, hidden_dim=8)
    if module is smac:
        args.map_name, args.backend = "3m", "smax"
    for name, value in settings.items():
        setattr(args, name, value)
    if script in ("maipg_smac", "fitted", "happo"):
        args.nu, args.update_epochs = args.nu or 0.0, 2
    kind = mpe.PettingZooEnvs if getattr(args, "env_id", "") else mpe.ParticleEnvs
    games = kind(args) if module is mpe else Toy(args)
    torch.manual_seed(5)
    if look is None:
        look = dict(zip(("obs", "state", "avail"), games.reset(0)))
    agent = AGENTS[script].Agent(look, args)
    for name, x in agent.named_parameters():
        x.data += (2.0 if "head.weight" in name else 0.1) * torch.randn_like(x)
    Path(folder).mkdir(parents=True, exist_ok=True)
    smac.write_checkpoint(
        Path(folder), args, {"agent": agent.state_dict(), "progress": {"step": 1234}}
    )
    return args, agent, games


# --------------------------------------------------------------------------------------- intervals
def test_intervals():
    p, n, z = 0.8, 10, 1.959964
    centre, root = p + z * z / (2 * n), math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wilson = [(centre + sign * z * root) / (1 + z * z / n) for sign in (-1, 1)]
    returns = [1.0, 2.0, 4.0, 1.5, 0.5, 3.0, 2.5, 2.0, 1.0, 0.5]
    error = 2.262157 * np.sqrt(sum((x - 1.8) ** 2 for x in returns) / 9 / 10)  # t of 9 degrees
    of_rate, of_mean = evaluate.intervals(8, returns)
    assert of_rate == pytest.approx(wilson, abs=1e-6)
    assert of_mean == pytest.approx((1.8 - error, 1.8 + error), abs=1e-6)
    low, high = evaluate.intervals(0, [0.0] * 20)[0]
    assert low == 0.0 and 0.1 < high < 0.2  # no victory is no proof that there is none
    of_rate, of_mean = evaluate.intervals(1, [2.0])
    assert of_rate[1] == 1.0 and all(math.isnan(x) for x in of_mean)


class Lengths(Toy):
    """Game k plays episodes of k + 2 steps, at a reward of one, and wins the first of each two."""

    def reset(self, seed):
        self.seed, self.time, self.episodes = seed, torch.zeros(self.count), 0
        return super().reset(seed)

    def step(self, actions):
        obs, state, avail, *_ = super().step(actions)
        self.time = self.time + 1
        done = self.time == torch.arange(self.count) + 2
        self.episodes = self.episodes + done.int()
        self.time[done] = 0
        return obs, state, avail, torch.ones(self.count), done, done & (self.episodes % 2 == 1)


def test_every_game_plays_as_many(tmp_path, monkeypatch, capsys):
    """Seven episodes of three games: three each, whose lengths are 2, 3 and 4."""
    save_run(tmp_path / "run", num_envs=3)
    monkeypatch.setattr(smac, "SMAXEnvs", Lengths)
    assert evaluate.main([str(tmp_path / "run"), "--episodes", "7"]) == 0
    head, rate, mean = capsys.readouterr().out.splitlines()
    assert head == "smax 3m, maipg_smac at step 1,234: 9 episodes"
    error = 2.306004 * np.sqrt(6 / 8 / 9)  # t of 8 degrees of freedom; variance 6 / 8
    numbers = lambda line: [float(x) for x in re.findall(r"\d\.\d+", line)]
    assert numbers(mean) == pytest.approx([3, 3 - error, 3 + error], abs=6e-4)
    assert numbers(rate)[0] == pytest.approx(2 / 3, abs=6e-4)
    assert numbers(rate)[1:] == pytest.approx(evaluate.intervals(6, [0] * 9)[0], abs=6e-4)
    assert evaluate.main([str(tmp_path / "run"), "--episodes", "2"]) == 0
    assert "2 episodes" in capsys.readouterr().out  # no more games than episodes


def test_episodes_after_a_failed_game_are_counted_anew(tmp_path, monkeypatch, capsys):
    fails, seeds = [True], []

    class Failing(Lengths):
        def reset(self, seed):
            seeds.append(seed)
            return super().reset(seed)

        def step(self, actions):
            answer = super().step(actions)
            if self.time[0] == 1 and self.episodes[0] == 1 and fails and fails.pop():
                raise smac.GameError("a game has failed")
            return answer

    save_run(tmp_path / "run", num_envs=3)
    monkeypatch.setattr(smac, "SMAXEnvs", Failing)
    assert evaluate.main([str(tmp_path / "run"), "--episodes", "3"]) == 0
    assert seeds == [2 * 10**9 + 1, 2 * 10**9 + 2]  # or it would fail again
    assert not fails and "return    3.000" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- refusals
def flip_a_bit(path):
    """In a weight: only a checksum tells."""
    weights = torch.load(path, weights_only=True)["agent"]["policy.gru.weight_ih"]
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)


def rewritten(change):
    """A spoiler that changes what is in a checkpoint."""

    def spoil(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return spoil


NONE, NOT_FINITE = "is no checkpoint of", "not finite, first"
SPOILED = {
    "missing": (lambda path: path.unlink(), NONE),
    "empty": (lambda path: path.write_bytes(b""), NONE),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), NONE),
    "a bit flipped": (flip_a_bit, "damaged"),
    "text": (lambda path: path.write_text("import os"), NONE),
    "foreign": (lambda path: torch.save({"model": torch.ones(2)}, path), NONE),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), NONE),
    "matrix": (rewritten(lambda x: x.update(script="maipg_matrix")), "maipg_matrix"),
    "unknown": (rewritten(lambda x: x.update(script="another")), "another"),
    "another script's": (rewritten(lambda x: x.update(script="maipg_mpe")), "of maipg_mpe"),
    "old flags": (rewritten(lambda x: x["args"].update(temperature=1.0)), "temperature"),
    "old weights": (rewritten(lambda x: x["agent"].pop("policy.gru.bias_ih")), "gru.bias_ih"),
    "old sizes": (rewritten(lambda x: x["args"].update(hidden_dim=9)), "size mismatch"),
    "no weights": (rewritten(lambda x: x["agent"].clear()), NONE),
    "no progress": (rewritten(lambda x: x.pop("progress")), "progress"),
    "nan": (rewritten(lambda x: x["agent"]["critic.head.bias"].fill_(math.nan)), NOT_FINITE),
    "infinite": (rewritten(lambda x: x["agent"]["policy.head.bias"].fill_(-math.inf)), NOT_FINITE),
    "no such map": (rewritten(lambda x: x["args"].update(map_name="4m")), "--map-name 4m"),
}


def refused(words, about, folder, capsys):
    """Whether evaluate.py ends with one clear line, and writes nothing."""
    before = sorted(folder.rglob("*"))
    assert evaluate.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and about in error, error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("kind", SPOILED)
def test_refused_checkpoints(kind, tmp_path, capfd):
    save_run(tmp_path / "run")
    spoiler, about = SPOILED[kind]
    spoiler(tmp_path / "run" / "checkpoint.pt")
    refused([str(tmp_path / "run"), "--capture-video"], about, tmp_path, capfd)


SPREAD = "mpe2.simple_spread_v3:parallel_env"
BAD = [
    ("maipg_smac", {}, "--episodes 0", "--episodes"),
    ("maipg_mpe", {}, "--episodes -3", "--episodes"),
    ("maipg_smac", {}, "--seed -1", "--seed"),
    ("maipg_mpe", {}, "--seed 100000001", "--seed"),
    ("maipg_smac", {}, f"--env-id {SPREAD}", "--env-id ''"),
    ("maipg_mpe", {}, f"--env-id {SPREAD}", "--env-id ''"),
    ("maipg_mpe", {"env_id": SPREAD}, "", f"--env-id '{SPREAD}'"),
    ("maipg_mpe", {"env_id": SPREAD}, "--env-id json:loads", f"--env-id '{SPREAD}'"),
    ("maipg_grf", {"scenario": "academy"}, "", "--scenario academy"),
]
if not torch.cuda.is_available():
    BAD += [(script, {}, "--device cuda", "no GPU") for script in ("maipg_mpe", "maipg_grf")]


@pytest.mark.parametrize("script, settings, words, about", BAD)
def test_bad_input(script, settings, words, about, no_engine, tmp_path, capsys):
    save_run(tmp_path / "run", script, **settings)
    refused([str(tmp_path / "run"), *words.split()], about, tmp_path, capsys)


def test_no_run_folder(tmp_path, capsys):
    refused([str(tmp_path / "nowhere")], NONE, tmp_path, capsys)
    refused([str(ROOT / "benchmark" / "results")], NONE, tmp_path, capsys)


def test_football_without_gfootball(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", "maipg_grf")
    monkeypatch.setattr(grf, "find_spec", lambda name: None)
    refused([str(tmp_path / "run")], "install_grf.sh", tmp_path, capsys)


def test_games_that_have_changed_since(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run")
    for change in ({"obs": 9}, {"actions": 6}):
        monkeypatch.setattr(smac, "SMAXEnvs", lambda args, change=change: Toy(args, **change))
        refused([str(tmp_path / "run")], "are not those of this run", tmp_path, capsys)


def test_unknown_device(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path), "--device", "tpu"])
    assert end.value.code == 2 and "tpu" in capsys.readouterr().err


def test_code_named_in_a_checkpoint_is_not_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.py").write_text("open('touched', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", "maipg_mpe", env_id=SPREAD)
    rewritten(lambda x: x["args"].update(env_id="evil:make"))(tmp_path / "run" / "checkpoint.pt")
    for words in ([], ["--env-id", SPREAD]):
        refused([str(tmp_path / "run"), *words], "--env-id 'evil:make'", tmp_path, capsys)
    assert "evil" not in sys.modules


# ---------------------------------------------------------------------------------------- policies
class Watched:
    """Games that note what was seen and done."""

    def __init__(self, games):
        self.games = games

    def reset(self, seed):
        self.now, self.steps = self.games.reset(seed), []
        return self.now

    def step(self, actions):
        answer = self.games.step(actions)
        self.steps.append((self.now[0], self.now[2], actions, answer[4]))
        self.now = answer[:3]
        return answer


KINDS = [*((script, {}) for script in AGENTS), ("maipg_mpe", {"continuous": True})]


@pytest.mark.parametrize("script, settings", KINDS)
def test_a_loaded_policy_acts_as_evaluate_does(script, settings, tmp_path):
    args, agent, games = save_run(tmp_path / "run", script, num_envs=4, **settings)
    games, args.eval_episodes = Watched(games), 40
    evaluate.SCRIPTS[script][0].evaluate(agent.policy, games, 3, args)
    act, hidden, memory = evaluate.load_policy(tmp_path / "run"), None, 0
    for obs, avail, actions, done in games.steps:
        forgetful, _ = act(obs, avail)
        ours, hidden = act(obs, avail, hidden)
        assert torch.equal(ours, actions)
        if ours.dim() == 2:  # what is masked is never chosen
            assert avail.gather(-1, ours.unsqueeze(-1)).all()
        memory += (forgetful != ours).sum()
        hidden[done] = 0.0  # their next episodes begin
    assert len(games.steps) > 40 and memory > 0


def test_forces_are_the_mean_of_the_gaussian(tmp_path):
    _, agent, games = save_run(tmp_path / "run", "maipg_mpe", continuous=True)
    obs, _, avail = games.reset(7)
    act = evaluate.load_policy(tmp_path / "run")
    with torch.no_grad():
        out, _ = agent.policy(obs[None], obs.new_zeros(2, 5, 8), torch.zeros(1, 2))
    forces, _ = act(obs, avail)
    torch.testing.assert_close(forces, torch.tanh(out[0]))
    assert (forces.abs() <= 1).all() and forces.abs().max() > 0.5


@pytest.mark.parametrize("script, settings", KINDS)
def test_episodes_are_those_of_the_scripts_own_evaluation(script, settings, tmp_path):
    args, agent, games = save_run(tmp_path / "run", script, num_envs=3, **settings)
    module, args.eval_episodes = evaluate.SCRIPTS[script][0], 6
    expected = module.evaluate(agent.policy, games, 3, args)
    policy = evaluate.policy_of(evaluate.load_run(tmp_path / "run"))
    with evaluate.tqdm(total=6, disable=True) as bar:
        episodes = evaluate.play(module, policy, games, 3, args, bar)
    assert len(episodes["return"]) == 6
    assert np.mean(episodes["return"]) == expected.pop("eval/episodic_return")
    if expected:
        assert np.mean(episodes["won"]) == expected["eval/win_rate"]
    else:
        assert "won" not in episodes


TABLE = r"^(win rate|scored|return) +(-?[\d.]+) +95% interval \[(-?[\d.]+), (-?[\d.]+)\]$"


@pytest.mark.parametrize(
    "script, head, names",
    [
        ("maipg_grf", "academy_3_vs_1_with_keeper, maipg_grf at", ["scored", "return"]),
        ("maipg_mpe", "spread, 5 agents, maipg_mpe at", ["return"]),
    ],
)
def test_what_is_printed(script, head, names, no_engine, tmp_path, capsys):
    save_run(tmp_path / "run", script)
    assert evaluate.main([str(tmp_path / "run"), "--episodes", "6"]) == 0
    first, *table = capsys.readouterr().out.splitlines()
    assert first == f"{head} step 1,234: 6 episodes"
    rows = [re.match(TABLE, line).groups() for line in table]
    assert [row[0] for row in rows] == names
    assert all(float(low) < float(mean) < float(high) for _, mean, low, high in rows)


@pytest.mark.parametrize("env_id, continuous", [(SPREAD, False), ("toy_zoo:Steady", True)])
def test_pettingzoo(env_id, continuous, toy_zoo, capsys):
    """Returns of episodes that are stepped here, through PettingZoo alone."""
    args, agent, games = save_run("run", "maipg_mpe", env_id=env_id, continuous=continuous)
    assert evaluate.main(["run", "--env-id", env_id, "--episodes", "2", "--seed", "5"]) == 0
    text = capsys.readouterr().out
    act, returns = evaluate.load_policy("run"), []
    for k in range(2):
        env, total, hidden = games.make(), 0.0, None
        seen, _ = env.reset(seed=2 * 10**9 + 5 + 1000 * k)
        while env.agents:
            obs = np.stack([seen[a] for a in env.agents])
            obs = torch.tensor(np.concatenate([obs, np.eye(len(obs))], 1), dtype=torch.float)
            width = games.avail.shape[1]
            actions, hidden = act(obs[None], torch.ones(1, len(obs), width).bool(), hidden)
            actions = actions[0] if continuous else actions[0].argmax(-1)
            seen, rewards, *_ = env.step(dict(zip(env.agents, actions.numpy())))
            total += sum(rewards.values()) / len(rewards)
        returns.append(total)
    expected = f"return    {np.mean(returns):.3f} "
    assert text.splitlines()[0] == f"{env_id}, maipg_mpe at step 1,234: 2 episodes"
    assert expected in text, (text, expected)


# ---------------------------------------------------------------------------------------- films
@pytest.fixture(scope="module")
def smax():
    """SMAXEnvs that are compiled once for each map and number of games."""
    genuine, made = smac.SMAXEnvs, {}

    def make(args):
        key = args.map_name, args.num_envs
        if key not in made:
            made[key] = genuine(args)
        games = copy.copy(made[key])
        games.args = args
        return games

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smac, "SMAXEnvs", make)
        yield make


@pytest.fixture(scope="module")
def trained(smax, tmp_path_factory):
    """A real run of two updates."""
    place = tmp_path_factory.mktemp("trained")
    words = "--map-name 3m --backend smax --num-envs 1 --rollout-steps 20 --total-timesteps 40"
    words += f" --eval-every 40 --eval-episodes 1 --nu 0.4 --device cpu --runs-dir {place}"
    torch.set_num_threads(1)
    assert smac.main(words.split()) == 0
    (folder,) = place.iterdir()
    return folder


def test_the_example_of_the_readme(trained, smax):
    """A policy in another project; on the map of the run that there is."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [x for x in blocks if "load_policy" in x]
    assert "RUN_DIR" in code and "2s3z" in code
    names = {}
    exec(code.replace("RUN_DIR", str(trained)).replace("2s3z", "3m"), names)
    assert names["done"].all() and names["actions"].shape == (1, 3)
    assert names["hidden"].abs().max() > 0


def shoot(obs, avail, hidden):
    """The last action that there is: an enemy in range, or stop."""
    return (avail * torch.arange(avail.shape[-1])).argmax(-1), hidden


def test_the_film_shows_the_episode(trained, smax, monkeypatch, capfd):
    """Whole command line; and its world states are those of the games that are evaluated."""
    worlds, genuine = [], films.battle
    keep = lambda env, world, view: worlds.append(world) or genuine(env, world, view)
    monkeypatch.setattr(films, "battle", keep)
    monkeypatch.setattr(evaluate, "load_policy", lambda run_dir: shoot)  # many shots, much chance
    words = [str(trained), "--capture-video", "--episodes", "3", "--seed", "4"]
    assert evaluate.main(words) == 0
    text = capfd.readouterr().out
    saved = evaluate.load_run(trained)
    args = smac.Args(**saved["args"])
    seed, policy = 2 * 10**9 + 4, evaluate.policy_of(saved)
    args.eval_episodes = 3
    rate, mean = smac.evaluate(policy, smax(args), seed, args).values()
    assert "smax 3m, maipg_smac at step 40: 3 episodes" in text
    assert f"win rate  {rate:.3f} " in text and f"return    {mean:.3f} " in text

    games, total = smax(args), 0.0
    seen = games.reset(seed)
    for k, world in enumerate(worlds[:-1]):
        shown = games.games[1].state
        np.testing.assert_array_equal(world.unit_positions, shown.unit_positions[0])
        np.testing.assert_array_equal(world.unit_health, shown.unit_health[0])
        *seen, reward, done, won = games.step(shoot(seen[0], seen[2], None)[0])
        assert done.item() == (k == len(worlds) - 2)
        total += reward.item()
    outcome = "won" if won.item() else "not won"
    end = f"smax 3m   step {len(worlds) - 1}   return {total:.2f}   {outcome}"
    assert text.splitlines()[-1] == f"film {trained}/film.gif: {end}"

    frames, times = frames_of(trained / "film.gif")
    assert len(frames) == len(worlds) > 5 and times[-1] == 2500
    assert (trained / "film.gif").stat().st_size < films.LIMIT
    for colour in films.COLOURS:  # three units of each side
        assert (abs(frames[0] - colour).sum(-1) < 60).sum() > 100
    assert all((a != b).any() for a, b in zip(frames, frames[1:]))


def test_a_picture_shows_health_and_the_dead(smax):
    """Half of the health is half of the disc; the dead are no disc."""
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"))
    world = jax.tree.map(np.array, env.reset(jax.random.PRNGKey(0))[1].state)
    places = np.array([[4.0, 4], [8, 4], [12, 4], [4, 12], [8, 12], [12, 12]])
    health, view = world.unit_health.copy(), (np.array([0.0, 0.0]), np.array([16.0, 16.0]))
    health[1] /= 2
    alive = np.array([True, True, False, True, True, True])
    world = world.replace(unit_positions=places, unit_health=health, unit_alive=alive)
    picture = np.asarray(films.battle(env, world, view)).astype(int)
    assert picture.shape == (480, 480, 3)

    def ink(i):
        """Pixels in the colour of unit i's side about its place."""
        x, y = 30 * places[i, 0], 480 - 30 * places[i, 1]
        part = picture[int(y) - 25 : int(y) + 25, int(x) - 25 : int(x) + 25]
        return (abs(part - films.COLOURS[int(i >= 3)]).sum(-1) < 40).sum()

    whole = ink(0)
    assert whole > 150 and ink(4) == pytest.approx(whole, rel=0.1)
    assert 0.4 < ink(1) / whole < 0.8 and ink(2) == 0


def test_a_caption_has_room_above_a_narrow_picture():
    text = "smax smacv2_10_units   step 100   return -0.12   not won"
    whole = np.asarray(films.captioned(Image.new("RGB", (60, 200), "red"), text).convert("RGB"))
    assert whole.shape[0] == 200 + films.HEAD
    ink = np.flatnonzero((whole[: films.HEAD] < 128).any((0, 2)))
    assert 340 < ink.max() < whole.shape[1] - 1
    assert (whole[films.HEAD :, :60] == [255, 0, 0]).all()


# ---------------------------------------------------------------------------- films of other games
ZOO = """
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

class Steady(ParallelEnv):
    metadata = {"name": "steady"}
    possible_agents = ["a", "b"]
    shown, length = True, 6

    def observation_space(self, agent):
        return Box(-9, 9, (3,), np.float32)

    def action_space(self, agent):
        return Box(-1, 1, (2,), np.float32)

    def see(self):
        return {a: np.float32([i, self.t, 1]) for i, a in enumerate(self.possible_agents)}

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        return self.see(), {a: {} for a in self.agents}

    def step(self, actions):
        self.t += 1
        rewards, over = {a: float(x.sum()) for a, x in actions.items()}, self.t >= self.length
        acted, self.agents = self.agents, [] if over else self.agents
        ended = dict.fromkeys(acted, over)
        return self.see(), rewards, dict.fromkeys(acted, False), ended, dict.fromkeys(acted, {})

    def render(self):
        if self.shown:
            return np.full((60, 900, 3), 40 * self.t)

class Hidden(Steady):
    shown = False

class Blind(Steady):
    render = ParallelEnv.render

class Endless(Steady):
    length = 10**9
    def render(self):
        return np.zeros((4, 4, 3))
"""


@pytest.fixture
def toy_zoo(tmp_path, monkeypatch):
    (tmp_path / "toy_zoo.py").write_text(ZOO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("toy_zoo", None)


def frames_of(path):
    """The frames of a film as arrays, and their milliseconds."""
    film, frames, times = Image.open(path), [], []
    for k in range(film.n_frames):
        film.seek(k)
        frames.append(np.asarray(film.convert("RGB")).astype(int))
        times.append(film.info["duration"])
    return frames, times


@pytest.mark.parametrize(
    "task, continuous", [("spread", False), ("line", True), ("formation", False)]
)
def test_a_film_of_particles(task, continuous, tmp_path, capsys):
    settings = {"scenario": task, "continuous": continuous, "num_agents": 3}
    args, agent, _ = save_run(tmp_path, "maipg_mpe", **settings)
    assert evaluate.main([str(tmp_path), "--episodes", "2", "--capture-video"]) == 0
    text, (frames, times) = capsys.readouterr().out, frames_of(tmp_path / "film.gif")
    args.num_envs = args.eval_episodes = 1
    games, seed = mpe.ParticleEnvs(args), 2 * 10**9 + 1
    mean = mpe.evaluate(agent.policy, games, seed, args)["eval/episodic_return"]
    assert text.endswith(
        f"film {tmp_path}/film.gif: {task}, 3 agents   step 25   return {mean:.2f}\n"
    )
    assert len(frames) == 26 and times == [200] * 25 + [2500]
    assert (tmp_path / "film.gif").stat().st_size < 300_000
    # Where mpe2 draws: 700 pixels across, the farthest of all at 0.9 of the half; here halved.
    games.reset(seed)
    places = torch.cat([games.pos[0], games.landmarks[0]]).numpy()
    pixels = 175 + 0.9 * 175 * places * [1, -1] / abs(places).max() + [0, films.HEAD]
    for i, (x, y) in enumerate(pixels):
        colour = frames[0][int(y), int(x)]
        blue = colour[2] > 100 and colour[2] > colour[0] + 50
        # Landmarks lie above the agents.
        assert colour.max() < 80 or (i < 3 and blue), (i, colour)
    assert (frames[0] != frames[-1]).any()


def test_a_film_of_pettingzoo(toy_zoo, capsys):
    """Of what makes pictures when it is asked to: they are the environment's own."""
    _, _, games = save_run("run", "maipg_mpe", env_id=SPREAD)
    words = ["run", "--env-id", SPREAD, "--episodes", "1", "--capture-video"]
    assert evaluate.main(words) == 0
    frames, _ = frames_of("run/film.gif")
    env = games.make(render_mode="rgb_array")
    env.reset(seed=2 * 10**9 + 1)
    first = np.asarray(Image.fromarray(env.render()).resize((480, 480))).astype(int)
    shown = frames[0][films.HEAD :]
    assert len(frames) == 26 and shown.shape == (480, 480, 3)
    assert abs(shown - first).mean() < 3 and (first < 128).any()


def test_frames_of_an_environment_without_a_choice(toy_zoo, capsys):
    for name in ("Steady", "Hidden", "Blind"):
        save_run(name, "maipg_mpe", env_id=f"toy_zoo:{name}", continuous=True)
    words = ["--episodes", "1", "--capture-video", "--env-id"]
    assert evaluate.main(["Steady", *words, "toy_zoo:Steady"]) == 0
    frames, _ = frames_of("Steady/film.gif")
    assert len(frames) == 7 and frames[0].shape == (32 + films.HEAD, 480, 3)
    for t, frame in enumerate(frames):  # the last one twice
        assert abs(frame[films.HEAD :] - 40 * min(t, 5)).max() < 8
    capsys.readouterr()
    for name in ("Hidden", "Blind"):
        refused([name, *words, f"toy_zoo:{name}"], "gives no rgb_array", Path(name), capsys)


def test_an_episode_without_end(toy_zoo):
    args = mpe.Args(env_id="toy_zoo:Endless", continuous=True, num_envs=1, device="cpu")
    games = mpe.PettingZooEnvs(args)
    look, draw = films.pettingzoo(games)
    act = lambda obs, avail, hidden: (torch.ones(1, 2, 2), None)
    seen, returns, won = films.episode(act, games, 1, look)
    assert len(seen) == len(returns) == 1001 and not won
    assert returns == [2.0 * t for t in range(1001)]


def test_a_large_film_loses_frames(monkeypatch):
    monkeypatch.setattr(films, "LIMIT", 120_000)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (34, 100, 100, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x).quantize(64) for x in pixels]
    content = io.BytesIO(films.gif(pictures, 50))
    frames, times = frames_of(content)
    assert 60_000 < len(content.getvalue()) < 120_000
    assert len(frames) == 10 and times == [200] * 9 + [2500]
    for k, number in ((0, 0), (4, 16), (8, 32), (9, 33)):
        np.testing.assert_array_equal(frames[k], np.asarray(pictures[number].convert("RGB")))


class Match(Toy):
    """A ball that rolls into the goal in twelve steps, among three and two players."""

    def look(self):
        obs = torch.zeros(self.count, 3, 115)
        obs[..., :97] = -1.0  # no such players
        obs[..., :6] = torch.tensor([-1.0, 0, 0.6, 0.2, 0.6, -0.2])
        obs[..., 44:48] = torch.tensor([1.0, 0, 0.8, 0.1])
        obs[..., 88:91] = torch.tensor([0.4 + 0.05 * self.time, 0.0, 0.1])
        obs[:, [0, 1, 2], [98, 99, 99]] = 1.0  # two of the three agents steer the same
        return obs, obs[:, 0, :97], torch.ones(self.count, 3, 19).bool()

    def reset(self, seed):
        self.time = 0
        return self.look()

    def step(self, actions):
        self.time = (self.time + 1) % 12
        done = torch.full((self.count,), self.time == 0)
        return *self.look(), 0.5 + done, done, done


def test_a_film_of_football(no_engine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(grf, "FootballEnvs", Match)
    games = Match(grf.Args(num_envs=1))
    look = dict(zip(("obs", "state", "avail"), games.reset(0)))
    save_run(tmp_path, "maipg_grf", look=look)
    assert evaluate.main([str(tmp_path), "--episodes", "2", "--capture-video"]) == 0
    text, (frames, times) = capsys.readouterr().out, frames_of(tmp_path / "film.gif")
    assert "scored    1.000   95% interval [0.342, 1.000]\nreturn    7.000 " in text
    assert text.endswith("academy_3_vs_1_with_keeper   step 12   return 7.00   scored\n")
    assert len(frames) == 13 and times[-1] == 2500
    zoom = 480 / 1.2  # what is seen begins at -0.1
    ball = lambda t: (int(0.47 * zoom) + films.HEAD, int((0.5 + 0.05 * t) * zoom))
    for t in (0, 5, 11):
        # White; without the ball it is grass.
        assert frames[t][ball(t)].min() > 245 and frames[t][ball((t + 6) % 12)].min() < 240
    assert abs(frames[12] - frames[11])[films.HEAD :].max() == 0


def test_a_picture_of_football():
    obs = Match(grf.Args(num_envs=1)).reset(0)[0][0].numpy()
    whole = np.asarray(films.pitch(obs, -1.1)).astype(int)
    zoom = 480 / 2.2
    assert whole.shape == (int(0.94 * 2 * zoom) // 2, 480, 3)

    def ink(x, y, colour):
        """Pixels of a colour about a place."""
        i, j = int((y + 0.47) * zoom), int((x + 1.1) * zoom)
        part = whole[max(i - 7, 0) : i + 8, max(j - 7, 0) : j + 8]
        return (abs(part - colour).sum(-1) < 100).sum()

    ours, theirs = films.COLOURS
    for x, y, steered in ((-1, 0, False), (0.6, 0.2, True), (0.6, -0.2, True)):
        assert ink(x, y, ours) > 10 and ink(x, y, theirs) == 0
        assert (ink(x, y, (0, 0, 0)) > 10) == steered
    for x, y in ((1, 0), (0.8, 0.1)):
        assert ink(x, y, theirs) > 10 and ink(x, y, ours) == ink(x, y, (0, 0, 0)) == 0
    for colour, count in ((ours, 3), (theirs, 2)):
        assert (abs(whole - colour).sum(-1) < 100).sum() < (count + 0.7) * ink(0.8, 0.1, theirs)
    high = obs.copy()
    high[:, 90] = 5.0
    black = [(np.asarray(films.pitch(x, -1.1)).max(-1) < 60).sum() for x in (obs, high)]
    assert black[1] > black[0] + 20


def run_right(saved):
    saved["agent"]["policy.head.bias"][5] = 1000.0  # into the empty goal


def test_football_on_the_engine(tmp_path, capfd):
    reason = "gfootball is not installed (benchmark/install_grf.sh)"
    pytest.importorskip("gfootball", reason=reason, exc_type=ImportError)
    settings = {"scenario": "academy_empty_goal_close", "num_envs": 2, "num_workers": 1}
    avail = torch.ones(2, 1, 19).bool()
    look = {"obs": torch.zeros(2, 1, 115), "state": torch.zeros(2, 104), "avail": avail}
    save_run(tmp_path, "maipg_grf", look=look, **settings)
    rewritten(run_right)(tmp_path / "checkpoint.pt")
    assert evaluate.main([str(tmp_path), "--episodes", "2", "--capture-video"]) == 0
    text, (frames, _) = capfd.readouterr().out, frames_of(tmp_path / "film.gif")
    head, scored, mean, film = text.splitlines()
    assert head == "academy_empty_goal_close, maipg_grf at step 1,234: 2 episodes"
    assert scored.startswith("scored    1.000 ") and film.endswith("scored")
    assert f"step {len(frames) - 1} " in film and 10 < len(frames) < 100
    assert (tmp_path / "film.gif").stat().st_size < films.LIMIT


# ---------------------------------------------------------------------------------- StarCraft II
@pytest.fixture
def standin(monkeypatch, tmp_path):
    """The stand-in for smac in sys.path, and an SC2PATH."""
    monkeypatch.syspath_prepend(STANDIN)
    from fake_install import make_fake_sc2

    monkeypatch.setenv("PYTHONPATH", STANDIN)
    monkeypatch.setenv("SC2PATH", str(make_fake_sc2(tmp_path / "sc2")))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "smac"]:
        del sys.modules[name]


def test_a_replay_of_starcraft(standin, tmp_path, monkeypatch, capfd):
    from smac.env import StarCraft2Env

    env = StarCraft2Env("3m", seed=1)
    env.reset()
    n, avail = env.n_agents, torch.tensor(env.get_avail_actions(), dtype=torch.bool)
    obs = torch.zeros(1, n, env.get_obs_size() + n)
    look = {"obs": obs, "state": torch.zeros(1, env.get_state_size()), "avail": avail[None]}
    env.close()
    folder = tmp_path / "run"
    save_run(folder, look=look, backend="sc2", num_envs=1)
    assert evaluate.main([str(folder), "--episodes", "1", "--capture-video"]) == 0
    (replay,) = folder.glob("*.SC2Replay")
    text = capfd.readouterr().out
    assert text.startswith("sc2 3m") and f"replay in {folder}" in text and replay.read_bytes()

    monkeypatch.setenv("STANDIN_SMAC_FAULTS", '[{"step": 3, "kind": "crash"}]')
    with pytest.raises(smac.GameError, match="crashed"):
        films.replay(evaluate.load_policy(folder), smac.Args(map_name="3m"), 7, folder)


def test_the_installation_ends_with_a_check_that_plays(standin, tmp_path):
    """The last lines of install_sc2.sh, on the stand-in; and without it they fail in one line."""
    text = (ROOT / "benchmark" / "install_sc2.sh").read_text()
    check = text[text.index('SC2PATH="$SC2PATH" python') :].replace(
        '$(dirname "$0")', str(ROOT / "benchmark")
    )
    setting = f"set -euo pipefail\nSC2PATH={shlex.quote(os.environ['SC2PATH'])}\nwork={tmp_path}\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for place, code in ((STANDIN, 0), ("", 2)):
        script = ["bash", "-c", f"PATH={path}\nexport PYTHONPATH={place}\n{setting}{check}"]
        answer = subprocess.run(script, capture_output=True, text=True, timeout=280)
        assert answer.returncode == code, answer.stderr
        assert ("ok: maipg_smac.py has played" in answer.stdout) == (code == 0)
    assert answer.stderr.startswith("error: --backend sc2") and answer.stderr.count("\n") == 1
