"""maipg_mpe.py: what it does not share with maipg_smac.py, and its command line."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_mpe as maipg

SCRIPT = Path(maipg.__file__)
TINY = "--num-agents 3 --num-envs 4 --update-epochs 2 --hidden-dim 16 --mixer-dim 16"
TINY += " --eval-episodes 6 --threads 1 --device cpu --eval-every 200 --checkpoint-every 1"
STEP = 100  # environment steps of an update


def call(*words):
    return maipg.main([x for word in words for x in str(word).split()])


def train(folder, *words):
    """A new run; its folder, which must be the only one in `folder`."""
    assert call(TINY, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def flat(x, name=""):
    if isinstance(x, dict | list):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: x}


def differing(a, b):
    """Names of what differs between two checkpoints, times and arguments aside."""
    a, b = (flat(maipg.load_checkpoint(path)) for path in (a, b))
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    names = [k for k in a.keys() | b.keys() if not k.startswith(("/args", "/done/seconds"))]
    return [k for k in names if k not in a or k not in b or not same(a[k], b[k])]


# --------------------------------------------------------------------------------------- algorithm
def test_gaussian_policies_against_torch():
    torch.manual_seed(0)
    pi, log_std = torch.randn(4, 3, 2).tanh(), torch.tensor([-0.7, 0.3])
    normal = torch.distributions.Normal(pi, log_std.exp())
    independent = torch.distributions.Independent(normal, 1)
    actions = maipg.sample(pi, log_std, torch.Generator().manual_seed(1))
    torch.testing.assert_close(maipg.log_prob(pi, log_std, actions), independent.log_prob(actions))
    torch.testing.assert_close(maipg.entropy_of(pi, log_std), independent.entropy())
    many = maipg.sample(pi.expand(20000, 4, 3, 2), log_std, torch.Generator().manual_seed(2))
    torch.testing.assert_close(many.mean(0), pi, atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), log_std.exp().expand(4, 3, 2), atol=0.05, rtol=0)
    assert maipg.greedy(pi, log_std) is pi and maipg.deterministic(pi, log_std, 1.0, None) is pi


def test_discrete_policies():
    torch.manual_seed(0)
    log_pi = torch.randn(4, 3, 5).log_softmax(-1)
    categorical = torch.distributions.Categorical(logits=log_pi)
    actions = maipg.sample(log_pi, None, torch.Generator().manual_seed(1))
    assert torch.equal(actions.sum(-1), torch.ones(4, 3)) and actions.max() == 1
    expected = categorical.log_prob(actions.argmax(-1))
    torch.testing.assert_close(maipg.log_prob(log_pi, None, actions), expected)
    torch.testing.assert_close(maipg.entropy_of(log_pi, None), categorical.entropy())
    draws = log_pi.expand(20000, 4, 3, 5)
    many = maipg.sample(draws, None, torch.Generator().manual_seed(2))
    torch.testing.assert_close(many.mean(0), log_pi.exp(), atol=0.02, rtol=0)
    assert torch.equal(maipg.greedy(log_pi, None).argmax(-1), log_pi.argmax(-1))


@pytest.mark.parametrize("kind", ["qmix", "vdn", "joint"])
def test_the_gradient_through_continuous_actions(kind):
    """deterministic_pg_loss by the mean, against finite differences; none reaches beyond +-1."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        mixer = maipg.ContinuousMixer(kind, 3, 2, 4, 8, 6)
        utilities, state, valid = torch.randn(2, 5, 3, 6), torch.randn(2, 5, 4), torch.ones(2, 5)
        weights, mu = mixer.weights(state), 0.9 * torch.rand(2, 5, 3, 2)
        mu[0, 0, 0, 0] = 1.5  # where the environment clips
        loss = lambda x: maipg.deterministic_pg_loss(x, utilities, mixer, weights, valid, 0.3)
        x = mu.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x), x)
        assert grad[0, 0, 0, 0] == 0 and grad.abs().max() > 1e-4
        for index in [(0, 0, 0, 1), (1, 4, 2, 0), (0, 3, 1, 1)]:
            up, down = mu.clone(), mu.clone()
            up[index] += 1e-6
            down[index] -= 1e-6
            slope = (loss(up) - loss(down)) / 2e-6
            assert grad[index].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def prepare(**settings):
    """Args, agent, a rollout's batch, and sigma_A."""
    base = dict(num_agents=3, num_envs=4, hidden_dim=12, mixer_dim=8, device="cpu")
    args = maipg.Args(**base | settings)
    torch.manual_seed(3)
    envs = maipg.make_envs(args, 1)
    agent = maipg.Agent(envs, args)
    start = copy.deepcopy(agent.state_dict())
    for parameter in agent.policy.head.parameters():
        parameter.data *= 30  # no longer indifferent between the actions
    obs, state, avail = envs.reset()
    now = {"obs": obs, "state": state[:, 0], "avail": avail, "keep": obs.new_zeros(4)}
    for name in ["policy", "critic", "utility", "target"]:
        now[f"{name}_hidden"] = obs.new_zeros(4, 1 if name == "critic" else 3, 12)
    rngs = [torch.Generator().manual_seed(k) for k in range(2)]
    buffer = {}
    maipg.rollout(agent.policy, envs, buffer, now, rngs[0], args)
    batch, metrics = maipg.estimate(agent, buffer, now, rngs[1], args)
    return args, agent, start, buffer, batch, metrics


@pytest.mark.parametrize("q_scale", ["advantage", "raw"])
@pytest.mark.parametrize("continuous", [False, True])
def test_the_gradient_is_interpolated_linearly(continuous, q_scale):
    args, agent, _, _, batch, metrics = prepare(continuous_actions=continuous, q_scale=q_scale)
    batch["log_probs"] = batch["log_probs"] + 0.2 * torch.randn(batch["log_probs"].shape)
    sigma_a, parameters = metrics["diagnostics/sigma_a"], list(agent.policy.parameters())

    def gradient(nu):
        rng = torch.Generator().manual_seed(5)
        losses, _ = maipg.compute_losses(agent, batch, sigma_a, rng, replace(args, nu=nu))
        grads = torch.autograd.grad(losses["policy"], parameters)
        return torch.cat([g.flatten() for g in grads])

    first, middle, last = (gradient(nu) for nu in (1e-9, 0.3, 1.0))
    assert (first - last).norm() > 1e-4
    torch.testing.assert_close(middle, 0.7 * first + 0.3 * last, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient(0.0), first, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("continuous", [False, True])
def test_every_nu_starts_from_the_same_weights_and_rollout(continuous):
    mappo, ours = (prepare(nu=nu, continuous_actions=continuous) for nu in (0.0, 0.5))
    assert not any(k.startswith(("utility", "mixer", "target", "q_")) for k in mappo[2])
    assert all(torch.equal(mappo[2][key], ours[2][key]) for key in mappo[2])
    for key in ("obs", "actions", "reward", "pi"):
        assert torch.equal(mappo[3][key], ours[3][key]), key
    for key in ("advantages", "returns", "log_probs"):
        assert torch.equal(mappo[4][key], ours[4][key]), key


def test_estimates_by_hand():
    """V(s) once a world; GAE and TD(lambda) over whole episodes, which time limits end."""
    args, agent, _, buffer, batch, metrics = prepare(nu=0.5)
    T, N = 25, 4
    assert batch["values"].shape == (T, N, 1) and batch["advantages"].shape == (T, N, 1)
    r, done = buffer["reward"][:-1].double(), buffer["done"][:-1]
    assert done[-1].all() and not done[:-1].any()
    v = agent.value_norm.denormalize(batch["values"][..., 0]).double()
    for k in range(N):
        for t in (0, 10, 24):
            deltas = [r[j, k] + (0.99 * v[j + 1, k] if j < 24 else 0) - v[j, k] for j in range(T)]
            expected = sum((0.99 * 0.95) ** (j - t) * deltas[j] for j in range(t, T))
            got = (batch["returns"][t, k, 0] - v[t, k]).item()
            assert got == pytest.approx(expected.item(), abs=1e-4)
    assert (batch["q_targets"][24] - r[24]).abs().max() < 1e-5  # nothing comes after the end
    advantages = batch["advantages"].flatten()
    assert advantages.mean().abs() < 1e-5 and advantages.std(correction=0) == pytest.approx(1, 1e-4)
    assert all(math.isfinite(x) for x in metrics.values())


# -------------------------------------------------------------------------------- the real thing
@pytest.mark.parametrize("continuous", [False, True])
def test_a_policy_earns_the_same_in_mpe2(continuous, tmp_path):
    words = "--total-timesteps 300 --learning-rate 0.01 --nu 0 --scenario line"
    path = train(tmp_path, words, "--continuous-actions" if continuous else "")
    argv = ["--evaluate", str(path), "--eval-episodes", "256", "--num-envs", "256"]
    args = maipg.parse(argv)
    with maipg.evaluation_games(args, 0) as games:
        agent = maipg.Agent(games, args)
        agent.load_state_dict(maipg.load_checkpoint(path)["agent"])
        batched = maipg.evaluate(agent.policy, games, args)
    env = maipg.mpe2_env(args)
    returns = [maipg.play_mpe2(agent.policy, env, args, seed)[0] for seed in range(60)]
    error = math.hypot(np.std(returns, ddof=1) / 60**0.5, batched["eval/return_stderr"])
    assert abs(np.mean(returns) - batched["eval/episodic_return"]) < 4 * error


# ------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four updates in one go."""
    return train(tmp_path_factory.mktemp("whole"), f"--total-timesteps {4 * STEP}")


def test_run_folder(whole):
    names = {"progress.csv", "args.json", "checkpoint.pt", "result.json"}
    assert names < set(os.listdir(whole)) and whole.name.startswith("spread-3__maipg_mpe__nu")
    table = rows(whole)
    assert [int(row["global_step"]) for row in table] == [STEP * k for k in (1, 2, 3, 4)]
    assert [row["eval/episodic_return"] != "" for row in table] == [False, True, False, True]
    names = "charts/episodic_return charts/SPS losses/policy losses/critic losses/q losses/entropy"
    names += " diagnostics/sigma_a diagnostics/approx_kl diagnostics/clip_fraction"
    names += " diagnostics/explained_variance_q variance/r_var_pi variance/r_var_v variance/corr"
    for key in names.split():
        assert all(math.isfinite(float(row[key])) for row in table), key
    result = json.loads((whole / "result.json").read_text())
    returns = [x["eval/episodic_return"] for x in result["evaluations"]]
    assert result["final_return"] == pytest.approx(np.mean(returns)) and result["step"] == 4 * STEP


CASES = ["", "--continuous-actions --scenario line --mixer vdn", "--mixer joint --nu 0.7"]


@pytest.mark.parametrize("words", [*CASES, "--nu 0 --bootstrap-time-limits --scenario formation"])
def test_resume_is_bit_for_bit(words, tmp_path):
    whole = train(tmp_path / "whole", words, f"--total-timesteps {4 * STEP}")
    path = train(tmp_path / "half", words, f"--total-timesteps {2 * STEP}")
    assert any(name.startswith("/agent") for name in differing(whole, path))
    assert call(f"--resume {path} --total-timesteps {4 * STEP}") == 0
    assert differing(whole, path) == []
    clock = ("charts/SPS", "time/")
    tables = [
        [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows(x)]
        for x in (whole, path)
    ]
    assert tables[0] == tables[1]


def test_evaluate_and_film(whole, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    assert call(f"--evaluate {folder} --eval-episodes 20 --capture-video") == 0
    out = capsys.readouterr().out
    assert "95% interval [" in out and "20 greedy episodes" in out
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 25 and len(film.convert("RGB").getcolors(10**6)) > 2


def test_a_foreign_environment_trains_and_resumes(tmp_path, capsys):
    words = "--env-id mpe2.simple_spread_v3 --num-envs 2 --total-timesteps 100 --update-epochs 1"
    path = train(tmp_path, words)
    assert capsys.readouterr().out.startswith("environment PettingZoo's mpe2.simple_spread_v3")
    assert call(f"--resume {path} --total-timesteps 150") == 0
    assert [int(row["global_step"]) for row in rows(path)] == [50, 100, 150]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(number, tmp_path):
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--runs-dir", str(tmp_path)]
    process = subprocess.Popen([*command, "--total-timesteps", "10000000"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    (path,) = tmp_path.iterdir()
    step = maipg.load_checkpoint(path)["done"]["step"]
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    assert [int(r["global_step"]) for r in rows(path)] == list(range(STEP, step + STEP + 1, STEP))


BAD = [
    ("--scenario tag", "tag spread line"),
    ("--num-agents 1", "num-agents 1"),
    ("--num-agents 11", "num-agents 11"),
    ("--num-agents 2.5", "num-agents 2.5"),
    ("--continuous-actions maybe", "maybe"),
    ("--env-id nowhere.at.all", "nowhere.at.all"),
    ("--env-id json:dumps", "json:dumps"),
    ("--env-id mpe2.simple_world_comm_v3", "differ"),
    ("--env-id mpe2.simple_spread_v3 --continuous-actions", "continuous-actions"),
    ("--no-such-flag 1", "no-such-flag"),
    ("stray", "stray"),
    ("--nu 1.01", "nu 1.01"),
    ("--nu nan", "nu nan"),
    ("--mixer sum", "sum qmix"),
    ("--q-scale none", "none raw"),
    ("--log-std 9", "log-std"),
    ("--num-envs 0", "num-envs"),
    ("--rollout-steps -5", "rollout-steps"),
    ("--chunk-length 7", "chunk-length"),
    ("--num-minibatches 3", "num-minibatches"),
    ("--grad-variance-every 1 --num-envs 1", "grad-variance-every"),
    ("--total-timesteps 1e6", "total-timesteps"),
    ("--eval-episodes 0", "eval-episodes"),
    ("--gamma 2", "gamma"),
    ("--temperature 0", "temperature"),
    ("--env-timeout 0", "env-timeout"),
    ("--seed -1", "seed"),
    ("--threads 0", "threads"),
    ("--device abacus", "abacus"),
    ("--device meta", "meta"),
    ("--runs-dir file", "file"),
    ("--capture-video", "evaluate"),
    ("--resume missing", "missing"),
    ("--evaluate missing", "missing"),
    ("--resume damaged", "damaged"),
    ("--resume foreign", "foreign maipg_mpe"),
    ("--resume whole --nu 0.3", "nu"),
    ("--evaluate whole --hidden-dim 32", "hidden-dim"),
    ("--evaluate whole --scenario line", "scenario"),
]


@pytest.fixture(scope="module")
def corner(whole, tmp_path_factory):
    folder, good = tmp_path_factory.mktemp("corner"), (whole / "checkpoint.pt").read_bytes()
    for name in ("damaged", "foreign"):
        (folder / name).mkdir()
    (folder / "damaged" / "checkpoint.pt").write_bytes(good[: len(good) // 2])
    torch.save({"script": "maipg_smac", "args": {}}, folder / "foreign" / "checkpoint.pt")
    (folder / "file").write_text("a file\n")
    (folder / "whole").symlink_to(whole)
    return folder


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input(command, words, corner, monkeypatch, capsys):
    monkeypatch.chdir(corner)
    before = sorted(os.listdir(corner)), sorted(os.listdir(corner / "whole"))
    saved = "--resume" in command or "--evaluate" in command
    assert call("" if saved else TINY, "" if saved else "--total-timesteps 100", command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words.split()), error
    assert before == (sorted(os.listdir(corner)), sorted(os.listdir(corner / "whole")))


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nimport maipg_mpe\n"
    code += "assert not {'mpe2', 'pettingzoo', 'gymnasium', 'wandb', 'pygame'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not os.listdir(tmp_path)
