"""On a GPU: the same losses and gradients as on the CPU, and runs that train, stop and go on.

Skipped where torch finds no GPU.
"""

import contextlib
import csv
import math

import pytest
import torch

import maipg_matrix
import maipg_mpe
import maipg_smac

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SCRIPTS = {"mpe": maipg_mpe, "smac": maipg_smac}
GAMES = {"mpe": "ParticleEnvs", "smac": "SMAXEnvs"}
OWN = {"mpe": {}, "smac": {"backend": "smax", "map_name": "3m"}}
METHODS = {
    "mappo": {"nu": 0},
    "qmix": {"nu": 0.4, "mixer": "qmix"},
    "vdn": {"nu": 0.4, "mixer": "vdn"},
    "gumbel": {"nu": 0.4, "mu": "gumbel"},
    "compatible": {"nu": 0.4, "critic": "compatible"},
}
SMALL = {"num_envs": 4, "rollout_steps": 50}


def moved(x, device):
    """A copy of tensors, and of dicts of them, on another device."""
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    return x.clone().to(device)


def losses_and_gradients(script, agent, buffer, now, args):
    """{name: tensor on the CPU} of one pass over a rollout."""
    batch, out = script.estimate(agent, buffer, now, args)
    rng = torch.Generator(args.device).manual_seed(1)
    sigma_a = out["diagnostics/sigma_a"]
    losses, metrics = script.policy_losses(agent, batch, sigma_a, rng, args)
    losses["critic"] = script.critic_loss(agent, batch, args)
    sum(losses.values()).backward()
    grads = {k: p.grad for k, p in agent.named_parameters() if p.grad is not None}
    out |= batch | metrics | losses | grads | dict(agent.named_buffers())
    return {key: x.detach().cpu().float() for key, x in out.items()}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gumbel"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_rollout_gives_the_cpus_losses_and_gradients(name, method):
    """Gumbel noise is left out: each device has its own generator."""
    script, results = SCRIPTS[name], {}
    args = script.resolve(script.Args(device="cpu", **SMALL | OWN[name] | METHODS[method]))
    torch.manual_seed(1)
    with contextlib.closing(getattr(script, GAMES[name])(args)) as envs:
        now, buffer = script.begin(envs, 1, args), {}
        agent, start = script.Agent(now, args), moved(now, "cpu")
        explore = torch.Generator().manual_seed(1)
        script.rollout(agent.policy, envs, buffer, now, args.rollout_steps, explore)
    for device in ["cpu", "cuda"]:
        args.device = device
        copy = script.Agent(start, args)
        copy.load_state_dict(agent.state_dict())
        parts = copy.to(device), moved(buffer, device), moved(start, device), args
        results[device] = losses_and_gradients(script, *parts)
    assert results["cpu"].keys() == results["cuda"].keys()
    for key, x in results["cpu"].items():
        # A loss can be small by cancellation: the advantages have the mean 0.
        scale = x.abs().max().clamp(min=0.1 if x.dim() == 0 else 1e-3)
        assert (results["cuda"][key] - x).abs().max() < 5e-3 * scale, key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_trains_stops_and_goes_on(name, method, tmp_path):
    step = math.prod(SMALL.values())
    words = SMALL | OWN[name] | METHODS[method] | {"eval_episodes": 4, "eval_every": step}
    words = [f"--{key}={value}" for key, value in words.items()]
    words += ["--device=cuda", f"--total-timesteps={2 * step}", f"--runs-dir={tmp_path}"]
    script = SCRIPTS[name]
    assert script.main(words) == 0
    (folder,) = tmp_path.iterdir()
    assert script.main([f"--resume={folder}", f"--total-timesteps={4 * step}"]) == 0
    rows = list(csv.DictReader(open(folder / "progress.csv")))
    assert [int(row["global_step"]) for row in rows] == [k * step for k in range(1, 5)]
    empty = {"charts/episodic_return", "charts/win_rate"}  # where no episode has ended
    for row in rows:
        assert all(math.isfinite(float(x)) for key, x in row.items() if key not in empty)
    assert script.load_checkpoint(folder)["args"]["device"] == "cuda"


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_matrix_games_reach_the_cpus_rewards(estimator, tmp_path):
    """Other random numbers: equal in the mean over many games."""
    rewards = []
    for device in ["cpu", "cuda"]:
        words = f"--settings 2x3 --num-games 300 --estimator {estimator} --device {device}"
        folder = tmp_path / device
        assert maipg_matrix.main([*words.split(), "--nus", "0", "0.5", f"--out-dir={folder}"]) == 0
        rows = csv.DictReader(open(folder / "figure1.csv"))
        rewards.append([float(row["mean_reward"]) for row in rows])
    assert rewards[1] == pytest.approx(rewards[0], abs=0.03)
