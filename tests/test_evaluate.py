"""benchmark/evaluate.py and variance.py against plain calculations, and on damaged runs."""

import copy
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maipg_smac as smac
from benchmark import evaluate, variance
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


def save_run(folder, script="maipg_smac", look=None, **settings):
    """A run folder with an agent of random weights that are not indifferent; the agent."""
    args_class = evaluate.SCRIPTS[script][0]
    known = dict(map_name="3m", backend="smax", device="cpu", num_envs=2, hidden_dim=8)
    args = args_class(**known | settings)
    if script in ("maipg_smac", "happo"):
        args.nu, args.update_epochs = args.nu or 0.0, 2
    torch.manual_seed(5)
    if look is None:
        obs, state, avail = Toy(args).reset(0)
        look = {"obs": obs, "state": state, "avail": avail}
    make = {"maipg_smac": smac, "happo": happo, "qmix": qmix, "facmac": facmac}[script].Agent
    agent = make(look, args)
    for name, x in agent.named_parameters():
        x.data += (2.0 if "head.weight" in name else 0.1) * torch.randn_like(x)
    folder.mkdir(parents=True, exist_ok=True)
    smac.write_checkpoint(folder, args, {"agent": agent.state_dict(), "progress": {"step": 1234}})
    return args, agent


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
    fails = [True]

    class Failing(Lengths):
        def step(self, actions):
            answer = super().step(actions)
            if self.time[0] == 1 and self.episodes[0] == 1 and fails and fails.pop():
                raise smac.GameError("a game has failed")
            return answer

    save_run(tmp_path / "run", num_envs=3)
    monkeypatch.setattr(smac, "SMAXEnvs", Failing)
    assert evaluate.main([str(tmp_path / "run"), "--episodes", "3"]) == 0
    assert not fails and "return    3.000" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- refusals
def damage(path):
    """A byte of the weights is another one: only a checksum tells."""
    weights = torch.load(path, weights_only=True)["agent"]["policy.gru.weight_ih"]
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)


def spoil(path, **parts):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | parts, path)


def put_nan(path):
    saved = torch.load(path, weights_only=True)
    saved["agent"]["critic.head.bias"][0] = torch.nan
    torch.save(saved, path)


SPOILED = {
    "nan": (put_nan, "not finite"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "no checkpoint"),
    "damaged": (damage, "no checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "no checkpoint"),
    "missing": (lambda path: path.unlink(), "no checkpoint"),
    "foreign": (lambda path: torch.save({"model": torch.ones(2)}, path), "no checkpoint"),
    "unknown": (lambda path: spoil(path, script="another"), "no checkpoint"),
    "old": (lambda path: spoil(path, args={"temperature": 1.0}), "no checkpoint"),
    "later": (lambda path: spoil(path, script="maipg_mpe"), "maipg_mpe.py are not supported yet"),
}


@pytest.mark.parametrize("tool", [evaluate, variance])
@pytest.mark.parametrize("kind", SPOILED)
def test_refusals(kind, tool, tmp_path, capsys):
    save_run(tmp_path / "run")
    spoiler, about = SPOILED[kind]
    spoiler(tmp_path / "run" / "checkpoint.pt")
    before = sorted(tmp_path.rglob("*"))
    assert tool.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and about in error
    assert sorted(tmp_path.rglob("*")) == before


BAD = [
    (evaluate, "--episodes 0", "--episodes"),
    (evaluate, "--seed -1", "--seed"),
    (variance, "--rollouts 0", "counts"),
    (variance, "--nus 0 1.5", "--nus"),
]
if not torch.cuda.is_available():
    BAD.append((evaluate, "--device cuda", "no GPU"))


@pytest.mark.parametrize("tool, words, about", BAD)
def test_bad_input(tool, words, about, tmp_path, capsys):
    save_run(tmp_path / "run")
    assert tool.main([str(tmp_path / "run"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and about in error


def test_variance_is_for_maipg_alone(tmp_path, capsys):
    save_run(tmp_path / "qmix", "qmix")
    assert variance.main([str(tmp_path / "qmix")]) == 2
    assert "is of qmix" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- policies
class Watched(Toy):
    """Notes what was seen and done."""

    def reset(self, seed):
        self.now, self.steps = super().reset(seed), []
        return self.now

    def step(self, actions):
        answer = super().step(actions)
        self.steps.append((self.now[0], self.now[2], actions, answer[4]))
        self.now = answer[:3]
        return answer


@pytest.mark.parametrize("script", evaluate.SCRIPTS)
def test_a_loaded_policy_acts_as_evaluate_does(script, tmp_path):
    args, agent = save_run(tmp_path / "run", script, num_envs=4)
    games = Watched(args)
    args.eval_episodes = 40
    smac.evaluate(agent.policy, games, 3, args)
    act, hidden, memory = evaluate.load_policy(tmp_path / "run"), None, 0
    for obs, avail, actions, done in games.steps:
        forgetful, _ = act(obs, avail)
        ours, hidden = act(obs, avail, hidden)
        assert torch.equal(ours, actions)
        assert avail.gather(-1, ours.unsqueeze(-1)).all()  # what is masked is never chosen
        memory += (forgetful != ours).sum()
        hidden[done] = 0.0  # their next episodes begin
    assert len(games.steps) > 40 and memory > 0


# ---------------------------------------------------------------------------------------- films
@pytest.fixture(scope="module")
def smax():
    """SMAXEnvs that are compiled once for each number of games."""
    genuine, made = smac.SMAXEnvs, {}

    def make(args):
        if args.num_envs not in made:
            made[args.num_envs] = genuine(args)
        games = copy.copy(made[args.num_envs])
        games.args = args
        return games

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smac, "SMAXEnvs", make)
        yield make


@pytest.fixture(scope="module")
def trained(smax, tmp_path_factory):
    """A real run of two updates, its policy made resolute."""
    place = tmp_path_factory.mktemp("trained")
    words = "--map-name 3m --backend smax --num-envs 2 --rollout-steps 20 --total-timesteps 80"
    words += f" --eval-every 40 --eval-episodes 2 --nu 0.4 --device cpu --runs-dir {place}"
    torch.set_num_threads(1)
    assert smac.main(words.split()) == 0
    (folder,) = place.iterdir()
    return folder


def shoot(obs, avail, hidden):
    """The last action that there is: an enemy in range, or stop."""
    return (avail * torch.arange(avail.shape[-1])).argmax(-1), hidden


def test_the_film_shows_the_episode(trained, smax, monkeypatch, capfd):
    """Whole command line; and its world states are those of the games that are evaluated."""
    films, genuine = [], evaluate.play_smax
    keep = lambda *words: films.append(genuine(*words)) or films[-1]
    monkeypatch.setattr(evaluate, "play_smax", keep)
    monkeypatch.setattr(evaluate, "load_policy", lambda run_dir: shoot)  # many shots, much chance
    words = [str(trained), "--capture-video", "--episodes", "3", "--seed", "4"]
    assert evaluate.main(words) == 0
    text, (_, worlds) = capfd.readouterr().out, films[0]
    assert "4 episodes" in text and re.search(r"film .*film.gif: (won|lost|time is up)", text)

    saved = evaluate.load_run(trained)
    args = smac.Args(**saved["args"])
    seed, policy = 2 * 10**9 + 4, evaluate.policy_of(saved)
    args.eval_episodes = 3
    rate, mean = smac.evaluate(policy, smax(args), seed, args).values()
    assert f"win rate  {rate:.3f} " in text and f"return    {mean:.3f} " in text

    # The first of two games has the seed of the film's.
    two = smax(args)
    seen = two.reset(seed)
    for world in worlds[:-1]:
        shown = two.games[1].state
        np.testing.assert_allclose(world.unit_positions, shown.unit_positions[0], atol=1e-5)
        np.testing.assert_allclose(world.unit_health, shown.unit_health[0], atol=1e-4)
        *seen, reward, done, won = two.step(shoot(seen[0], seen[2], None)[0])
        assert bool(done[0]) == (int(world.step) == int(worlds[-2].step))
    assert ("won" in text.splitlines()[-1]) == bool(won[0])

    film = Image.open(trained / "film.gif")
    assert film.n_frames == len(worlds) > 5
    assert (trained / "film.gif").stat().st_size < 2_000_000
    pictures = []
    for k in (0, film.n_frames // 2, film.n_frames - 1):
        film.seek(k)
        pictures.append(np.asarray(film.convert("RGB")).astype(int))
    for colour in evaluate.COLOURS:  # three units of each side
        assert (abs(pictures[0] - colour).sum(-1) < 60).sum() > 100
    assert all((a != b).any() for a, b in zip(pictures, pictures[1:]))
    assert film.info["duration"] == 2500  # the end stays for a while


def test_a_picture_shows_health_and_the_dead(smax):
    """Half of the health is half of the disc; the dead are no disc."""
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    env = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"))
    world = env.reset(jax.random.PRNGKey(0))[1].state
    places = np.array([[4.0, 4], [8, 4], [12, 4], [4, 12], [8, 12], [12, 12]])
    health, view = np.array(world.unit_health), (np.array([0.0, 0.0]), np.array([16.0, 16.0]))
    health[1] /= 2
    alive = np.array([True, True, False, True, True, True])
    world = world.replace(unit_positions=places, unit_health=health, unit_alive=alive)
    picture = np.asarray(evaluate.draw(env, world, view, "3m").convert("RGB")).astype(int)
    assert picture.shape == (500, 480, 3)

    def ink(i):
        """Pixels in the colour of unit i's side about its place."""
        x, y = 30 * places[i, 0], 500 - 30 * places[i, 1]
        part = picture[int(y) - 25 : int(y) + 25, int(x) - 25 : int(x) + 25]
        return (abs(part - evaluate.COLOURS[int(i >= 3)]).sum(-1) < 40).sum()

    whole = ink(0)
    assert whole > 150 and ink(4) == pytest.approx(whole, rel=0.1)
    assert 0.4 < ink(1) / whole < 0.8 and ink(2) == 0


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
        evaluate.replay_sc2(evaluate.load_policy(folder), "3m", 7, folder)


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


# ---------------------------------------------------------------------------------------- variance
def measured(critic="paper", mixer="qmix", **settings):
    """Two rollouts of Toy with one chunk per game: args, agent, and of the second one `now` as it
    was before, buffer, batch, sigma_A, and the agent after estimate()."""
    common = dict(backend="smax", device="cpu", num_envs=4, rollout_steps=20, chunk_length=20)
    args = smac.Args(**common, nu=0.5, hidden_dim=8, critic=critic, mixer=mixer, **settings)
    games, buffer, rng = Toy(args), {}, torch.Generator().manual_seed(2)
    now = smac.begin(games, 1, args)
    torch.manual_seed(4)
    agent = smac.Agent(now, args)
    for name, x in agent.named_parameters():
        x.data += (3.0 if "head.weight" in name else 0.1) * torch.randn_like(x)
    for name, mean, std in (("v_norm", 2.0, 1.5), ("q_norm", 3.0, 0.7)):
        if hasattr(agent, name):
            norm = getattr(agent, name)
            norm.moments.copy_(torch.tensor([mean, mean**2 + std**2, 1.0]))
            norm.mean.fill_(mean)
            norm.std.fill_(std)
    smac.rollout(agent.policy, games, buffer, now, args.rollout_steps, rng)
    smac.estimate(agent, buffer, now, args)
    before, used = dict(now), copy.deepcopy(agent)
    smac.rollout(agent.policy, games, buffer, now, args.rollout_steps, rng)
    batch, metrics = smac.estimate(used, buffer, now, args)
    return args, agent, before, buffer, batch, metrics, used


def one_by_one(network, hidden, buffer, T, with_state):
    """A network over a buffer, a step at a time: outputs and last features [T + 1, N, n, ...]."""
    outs, features = [], []
    for t in range(T + 1):
        state = buffer["state"][t][None] if with_state else None
        out, hiddens = network(buffer["obs"][t][None], hidden, buffer["keep"][t][None], state)
        hidden = hiddens[0]
        outs.append(out[0])
        features.append(network.norm(hidden))
    return torch.stack(outs), torch.stack(features)


def numpy_mixer(mixer, chosen, state):
    """q_tot of utilities `chosen` [n] in a state [S], by QMIX's formulas or VDN's."""
    numbers = lambda layer: (layer.weight.detach().numpy(), layer.bias.detach().numpy())
    apply = lambda layer, x: numbers(layer)[0] @ x + numbers(layer)[1]
    hyper = lambda net, x: apply(net[2], np.maximum(apply(net[0], x), 0))
    s = (state - state.mean()) / np.sqrt(state.var() + 1e-5)
    s = s * numbers(mixer.norm)[0] + numbers(mixer.norm)[1]
    value = hyper(mixer.value, s)[0]
    if mixer.kind == "vdn":
        return chosen.sum() + value
    x = chosen @ np.abs(hyper(mixer.w_1, s)).reshape(len(chosen), -1) + apply(mixer.b_1, s)
    return np.where(x > 0, x, np.expm1(x)) @ np.abs(hyper(mixer.w_2, s)) + value


def raw_advantages(args, agent, now, buffer):
    """(GAE [T, N, n] as a sum over later steps, V [T + 1, N, n]) in the reward's unit."""
    T, N, gamma, lam = args.rollout_steps, args.num_envs, args.gamma, args.gae_lambda
    with torch.no_grad():
        values, _ = one_by_one(agent.critic, now["critic_hidden"], buffer, T, True)
    values = values[..., 0].double().numpy() * 1.5 + 2.0
    reward, done, raw = buffer["reward"].numpy(), buffer["done"].numpy(), np.zeros_like(values[:T])
    for t, k in np.ndindex(T, N):
        for j in range(t, T):
            following = 0.0 if done[j, k] else gamma * values[j + 1, k]
            raw[t, k] += (gamma * lam) ** (j - t) * (reward[j, k] + following - values[j, k])
            if done[j, k]:
                break
    return raw, values


def by_numpy(args, agent, now, buffer):
    """{r_var_pi, r_var_v, corr, slope} from sums over steps and agents."""
    T, N = args.rollout_steps, args.num_envs
    with torch.no_grad():
        hidden = now["policy_hidden"]
        logits, features = one_by_one(agent.policy, hidden, buffer, T, False)
        if args.critic == "paper":
            hidden = now["utility_hidden"]
            utilities = one_by_one(agent.q.utility, hidden, buffer, T, True)[0].numpy()
    raw, values = raw_advantages(args, agent, now, buffer)
    avail, actions = buffer["avail"].numpy(), buffer["actions"].numpy()
    weights = np.where(avail, np.exp(logits.double().numpy()), 0.0)
    pi, alive = weights / weights.sum(-1, keepdims=True), avail.sum(-1) > 1
    sigma, rows = raw[alive[:T]].std(), []
    for t, k in np.ndindex(T, N):
        living, x, p = alive[t, k], actions[t, k], pi[t, k]
        a = raw[t, k][living].mean()
        if args.critic == "paper":
            u, state = utilities[t, k], buffer["state"][t, k].numpy()
            q, q_pi = (numpy_mixer(agent.q.mixer, (u * y).sum(-1), state) for y in (x, p))
            v = values[t, k][living].mean()
            rows.append((a, 0.7 * (q - q_pi), 0.7 * q + 3.0 - v))
            continue
        w, qc = agent.compatible.weights.numpy(), 0.0
        for i in np.flatnonzero(living):
            h = np.append(features[t, k, i].numpy(), 1.0)
            qc += (h @ w * (x[i] - p[i])).sum() * sigma  # it is fitted to A / sigma
        rows.append((a, qc, math.nan))
    a, qc, qv = np.array(rows).T
    cov = ((a - a.mean()) * (qc - qc.mean())).mean()
    return {
        "r_var_pi": (a - qc).var() / a.var(),
        "r_var_v": (a - qv).var() / a.var(),
        "corr": cov / (a.std() * qc.std()),
        "slope": cov / qc.var(),
    }


@pytest.mark.parametrize("critic, mixer", [("paper", "qmix"), ("paper", "vdn"), ("compatible", "")])
def test_control_variates(critic, mixer):
    args, agent, now, buffer, batch, metrics, _ = measured(critic, mixer)
    ours = variance.control_variate(agent, batch, metrics["diagnostics/sigma_a"])
    expected = by_numpy(args, agent, now, buffer)
    if critic == "compatible":
        del expected["r_var_v"]  # it has no value
    assert ours == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in expected.items()}
    assert abs(ours["corr"]) > 0.01 and abs(ours["r_var_pi"] - 1) > 0.003
    # The script's own numbers of the same rollout.
    assert ours["corr"] == pytest.approx(metrics["variance/corr"].item(), rel=1e-3, abs=1e-5)
    assert ours["slope"] == pytest.approx(metrics["variance/slope"].item(), rel=1e-3, abs=1e-5)


def gradients_by_hand(args, agent, now, buffer, nu, ent_coef):
    """The policy's gradient on each game, [N, parameters]: of probabilities, nothing clipped."""
    T, parameters, rows = (
        args.rollout_steps,
        [x for x in agent.policy.parameters() if x.numel()],
        [],
    )
    raw, _ = raw_advantages(args, agent, now, buffer)
    live = raw[buffer["avail"][:T].sum(-1).numpy() > 1]
    advantages = torch.tensor((raw - live.mean()) / live.std(), dtype=torch.float32)
    for k in range(args.num_envs):
        part = {key: x[:, k : k + 1] for key, x in buffer.items()}
        one = {key: x[k : k + 1] for key, x in now.items()}
        avail, alive = part["avail"][:T, 0], part["avail"][:T, 0].sum(-1) > 1
        logits, _ = one_by_one(agent.policy, one["policy_hidden"], part, T, False)
        p = torch.softmax(torch.where(avail, logits[:T, 0], -1e10), -1)
        taken = (p * part["actions"][:T, 0]).sum(-1)
        first = (taken / taken.detach() * advantages[:, k])[alive].mean()
        with torch.no_grad():
            utilities, _ = one_by_one(agent.q.utility, one["utility_hidden"], part, T, True)
        weights = agent.q.mixer.weights(part["state"][:T, 0])
        q = 0.7 * agent.q.mixer(utilities[:T, 0], p, weights).mean()
        second = q / (alive.float().sum(-1).mean() * live.std())
        entropy = -(p * torch.log(p.clamp(min=1e-30))).sum(-1)[alive].mean()
        loss = -((1 - nu) * first + nu * second + ent_coef * entropy)
        grads = torch.autograd.grad(loss, parameters)
        rows.append(np.concatenate([x.double().flatten().numpy() for x in grads]))
    return np.stack(rows)


@pytest.mark.parametrize("nu", [0.0, 0.3, 1.0])
def test_trace(nu):
    args, agent, now, buffer, batch, metrics, used = measured()
    sigma, setting = metrics["diagnostics/sigma_a"], replace(args, nu=nu, ent_coef=0.02)
    ours = variance.trace(used, batch, sigma, None, setting)
    grads = gradients_by_hand(args, agent, now, buffer, nu, 0.02)
    spread = ((grads - grads.mean(0)) ** 2).sum() / (len(grads) - 1)
    assert ours == pytest.approx(spread / len(grads), rel=5e-3)


def test_reference():
    """With V as it is: PPO's gradient of the whole rollout. Refitted: V is better, and only V."""
    args, agent, now, buffer, batch, metrics, used = measured()
    sigma, before = metrics["diagnostics/sigma_a"], copy.deepcopy(agent.state_dict())
    grads, sigmas = variance.reference(agent, [buffer], now, args, 0)
    assert sigmas[0] == sigmas[1] == pytest.approx(sigma.item(), rel=1e-5)
    bare = replace(args, nu=0.0, ent_coef=0.0)
    expected = variance.gradient(used, batch, sigma, None, bare)
    torch.testing.assert_close(grads, expected[None], rtol=1e-3, atol=1e-5)
    lively = replace(args, learning_rate=0.01)
    grads, sigmas = variance.reference(agent, [buffer, buffer], now, lively, 40)
    assert grads.shape == (2, len(expected)) and sigmas[1] < 0.9 * sigmas[0]
    assert variance.cosine(grads[0], expected) < 0.999
    assert all(torch.equal(x, before[key]) for key, x in agent.state_dict().items())


def test_variance_of_a_run(trained, capfd):
    before = (trained / "checkpoint.pt").read_bytes()
    words = "--rollouts 2 --nus 0 0.5 --cosine --reference-rollouts 2 --sweeps 1".split()
    assert variance.main([str(trained), *words]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^3m, nu 0.4, critic paper: 2 rollouts of 40 steps$", out, re.M)
    for name in ("r_var_pi", "r_var_v", "corr", "slope"):
        assert re.search(rf"^  {name} +-?\d+\.\d+ +\(each: ", out, re.M)
    traces, cosines = out.split("cosine with the reference")
    row = r"expectation +(-?\d\.\d+) +(-?\d\.\d+)"
    base, half = map(float, re.search(row, traces).groups())
    assert base == 1.0 and 0 < half < 1
    assert len(re.findall(r"-?\d\.\d{3}", cosines)) == 6  # nu = 0, 0.5 and 1, twice
    assert all(-1 <= float(x) <= 1 for x in re.findall(r"-?\d\.\d{3}", cosines))
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_variance_of_mappo(tmp_path, monkeypatch, capsys):
    """Without a second critic there is only nu = 0."""
    save_run(tmp_path / "run", rollout_steps=20, nu=0.0)
    monkeypatch.setattr(smac, "SMAXEnvs", Toy)
    assert variance.main([str(tmp_path / "run"), "--rollouts", "1"]) == 0
    out = capsys.readouterr().out
    assert "critic none" in out and "r_var" not in out and out.count("1.000") == 1
