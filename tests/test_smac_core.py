"""maipg_smac.py against independent calculations: brute force, closed form, and plain MAPPO."""

import copy

import numpy as np
import pytest
import torch

import maipg_smac as maipg

SMALL = "--map-name 3m --backend smax --num-envs 2 --rollout-steps 40 --threads 1".split()
SMALL += "--hidden-dim 16 --mixer-dim 16 --update-epochs 3 --runs-dir unused".split()


def setup(*flags, seed=0):
    """(args, agent, optimizers, rngs, batch, metrics, buffer) after one rollout."""
    args = maipg.parse([*SMALL, *flags])
    envs = maipg.make_envs(args, 1)
    torch.manual_seed(seed)
    agent = maipg.Agent(envs, args)
    modules = {"policy": [agent.policy], "critic": [agent.critic]}
    if args.nu > 0:
        modules["q"] = [agent.utility, agent.mixer]
    optimizers = {
        name: torch.optim.Adam([p for m in group for p in m.parameters()], 5e-4, eps=1e-5)
        for name, group in modules.items()
    }
    rngs = {k: torch.Generator().manual_seed(7) for k in ("explore", "gumbel", "shuffle", "diag")}
    obs, state, avail = envs.reset()
    now = {"obs": obs, "state": state[:, 0], "avail": avail, "keep": obs.new_zeros(2)}
    for name in ("policy", "critic", "utility", "target"):
        now[f"{name}_hidden"] = obs.new_zeros(*obs.shape[:2], args.hidden_dim)
    buffer = {}
    for _ in range(2):  # the second rollout begins with hidden states that are not zero
        maipg.rollout(agent.policy, envs, buffer, now, rngs["explore"], args)
        batch, metrics = maipg.estimate(agent, buffer, now, rngs["diag"], args)
    return args, agent, optimizers, rngs, batch, metrics, buffer


def policy_gradient(agent, batch, sigma_a, args):
    rng = torch.Generator().manual_seed(3)
    loss = maipg.compute_losses(agent, batch, sigma_a, rng, args)[0]["policy"]
    grads = torch.autograd.grad(loss, list(agent.policy.parameters()))
    return torch.cat([g.flatten() for g in grads])


@pytest.fixture(scope="module")
def ready():
    return setup("--nu", "0.4")


@pytest.mark.parametrize("truncate", [False, True])
def test_gae_and_td_lambda_equal_sums_over_n_step_returns(truncate):
    T, N, n, gamma, lam = 12, 3, 2, 0.9, 0.7
    rng = np.random.default_rng(0)
    r, done = rng.normal(size=(T, N)), rng.random((T, N)) < 0.25
    terminated = done & (rng.random((T, N)) < 0.5) if truncate else done
    v, w = rng.normal(size=(T, N, n)), rng.normal(size=(T, N, n))
    w[:-1][~done[:-1]] = v[1:][~done[:-1]]  # the next value, except where an episode ends

    def n_step(t, k, horizon, value, i):  # sum of rewards, then a bootstrap unless it is over
        total, discount = 0.0, 1.0
        for j in range(t, t + horizon):
            total += discount * r[j, k]
            discount *= gamma
        last = t + horizon - 1
        return total + (0 if terminated[last, k] else discount * value[last, k, i])

    def weighted(t, k, value, i):  # (1 - lam) sum lam^(h-1) G^(h), the last one with the rest
        end = next((j for j in range(t, T) if done[j, k]), T - 1)
        most = end - t + 1
        weights = [(1 - lam) * lam ** (h - 1) for h in range(1, most)] + [lam ** (most - 1)]
        return sum(x * n_step(t, k, h, value, i) for h, x in enumerate(weights, 1))

    expected = np.array(
        [[[weighted(t, k, w, i) for i in range(n)] for k in range(N)] for t in range(T)]
    )
    to = torch.as_tensor
    got = maipg.gae(to(r), to(v), to(w), to(terminated), to(done), gamma, lam)
    np.testing.assert_allclose(got.numpy(), expected - v, atol=1e-6)
    got = maipg.td_lambda(to(r), to(w[..., 0]), to(terminated), to(done), gamma, lam)
    np.testing.assert_allclose(got.numpy(), expected[..., 0], atol=1e-6)


def test_qmix_is_monotonic_and_vdn_a_sum():
    torch.manual_seed(0)
    state, actions = torch.randn(50, 7), torch.eye(3).expand(50, 3, 3)
    for kind in ("qmix", "vdn", "joint"):
        mixer = maipg.Mixer(kind, 3, 3, 7, 16)
        utilities = torch.randn(50, 3, 3, requires_grad=True)
        q_tot = mixer(utilities, actions, mixer.weights(state))
        (grad,) = torch.autograd.grad(q_tot.sum(), utilities)
        slopes = grad.diagonal(dim1=1, dim2=2)
        assert (slopes.min() < 0) == (kind == "joint")
        if kind == "vdn":
            total = (
                utilities.diagonal(dim1=1, dim2=2).sum(-1) + mixer.value(mixer.norm(state))[:, 0]
            )
            torch.testing.assert_close(q_tot, total)


def test_gradient_of_the_deterministic_term_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 2, 3, dtype=torch.double, requires_grad=True)
    avail = torch.ones(1, 4, 2, 3, dtype=torch.bool)
    avail[..., 2] = torch.tensor([[[True, False]] * 4])
    utilities, mixer = torch.randn(1, 4, 2, 3).double(), maipg.Mixer("vdn", 2, 3, 5, 8).double()
    weights = [w.detach() for w in mixer.weights(torch.randn(1, 4, 5).double())]
    rng = torch.Generator().manual_seed(5)
    log_pi = maipg.masked_log_softmax(logits, avail)
    mu = maipg.gumbel_softmax(log_pi, 0.7, rng)
    assert torch.equal(mu.detach().sum(-1).round(), torch.ones(1, 4, 2).double())
    assert (mu.detach()[~avail] == 0).all()
    valid = torch.tensor([[1.0, 1.0, 0.0, 1.0]]).double()
    maipg.deterministic_pg_loss(mu, utilities, mixer, weights, valid, 0.5).backward()
    noise = -torch.empty_like(log_pi).exponential_(generator=rng.manual_seed(5)).log()
    soft = torch.softmax((log_pi.detach() + noise) / 0.7, -1)
    centred = utilities - (soft * utilities).sum(-1, keepdim=True)
    expected = -0.5 / 3 * valid[..., None, None] * soft * centred / 0.7
    torch.testing.assert_close(logits.grad, expected)  # log_softmax's own shift drops out


def test_nu_zero_is_plain_mappo():
    args, agent, optimizers, rngs, batch, metrics, _ = setup("--nu", "0")
    assert not hasattr(agent, "utility") and not hasattr(agent, "mixer") and "q" not in optimizers
    plain = copy.deepcopy(agent)
    adam = [torch.optim.Adam(m.parameters(), 5e-4, eps=1e-5) for m in (plain.policy, plain.critic)]
    before = rngs["gumbel"].get_state()
    maipg.update(agent, optimizers, batch, metrics["diagnostics/sigma_a"], rngs, args)
    assert torch.equal(before, rngs["gumbel"].get_state())

    mean = square = weight = 0.0  # MAPPO's ValueNorm, in double precision
    chosen, alive = batch["actions"].argmax(-1), batch["alive"]
    for _ in range(3):
        returns = batch["returns"].double()
        mean = 0.99999 * mean + 1e-5 * returns.mean()
        square = 0.99999 * square + 1e-5 * (returns**2).mean()
        weight = 0.99999 * weight + 1e-5
        mu, var = mean / weight, max(square / weight - (mean / weight) ** 2, 0.01)
        target = ((returns - mu) / var**0.5).float()
        logits, _ = plain.policy(batch["obs"], batch["policy_hidden"][0], batch["keep"])
        logits = torch.where(batch["avail"], logits, torch.full_like(logits, -1e10))
        pi = torch.distributions.Categorical(logits=logits)
        ratio = torch.exp(pi.log_prob(chosen) - batch["log_probs"])
        gain = torch.minimum(
            ratio * batch["advantages"], ratio.clip(0.8, 1.2) * batch["advantages"]
        )
        loss = (
            -(gain * alive).sum() / alive.sum() - 0.01 * (pi.entropy() * alive).sum() / alive.sum()
        )
        values, _ = plain.critic(
            batch["obs"], batch["critic_hidden"][0], batch["keep"], batch["state"]
        )
        old, values = batch["values"], values[..., 0]
        errors = [target - values, target - old - (values - old).clip(-0.2, 0.2)]
        huber = [torch.where(e.abs() <= 10, e**2 / 2, 10 * (e.abs() - 5)) for e in errors]
        for optimizer, x in zip(adam, (loss, torch.maximum(*huber).mean())):
            optimizer.zero_grad()
            x.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
            optimizer.step()
    for ours, theirs in zip(agent.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert not torch.equal(next(plain.parameters()), torch.ones(1))


def test_every_nu_starts_from_the_same_weights_and_rollout(ready):
    mappo = setup("--nu", "0")
    for name, weight in mappo[1].policy.state_dict().items():
        assert torch.equal(weight, ready[1].policy.state_dict()[name])
    assert torch.equal(mappo[6]["actions"], ready[6]["actions"])
    assert torch.equal(mappo[4]["advantages"], ready[4]["advantages"])


def test_the_gradient_is_linear_in_nu(ready):
    args, agent, _, _, batch, metrics, _ = ready
    sigma_a, args = metrics["diagnostics/sigma_a"], copy.copy(args)
    args.ent_coef = 0.0
    gradients = {}
    for args.nu in (1e-9, 0.3, 1.0):
        gradients[args.nu] = policy_gradient(agent, batch, sigma_a, args)
    mixed = 0.7 * gradients[1e-9] + 0.3 * gradients[1.0]
    torch.testing.assert_close(gradients[0.3], mixed, atol=1e-7, rtol=1e-4)
    assert (gradients[1.0] - gradients[1e-9]).norm() > 1e-3 * gradients[1.0].norm()


def test_a_dead_agent_has_no_gradient(ready):
    args, agent, _, _, batch, metrics, _ = ready
    dead = batch["alive"] == 0
    assert dead.any()  # else the test shows nothing
    obs = batch["obs"].clone().requires_grad_()
    changed = batch | {"obs": obs}
    rng = torch.Generator().manual_seed(3)
    losses, _ = maipg.compute_losses(agent, changed, metrics["diagnostics/sigma_a"], rng, args)
    (grad,) = torch.autograd.grad(losses["policy"], obs)
    last = dead.clone()  # a hidden state may still carry an agent's last living steps forward
    assert (grad[last] == 0).all() and (grad[~dead] != 0).any()


def test_chunks_repeat_the_rollout(ready):
    args, agent, _, _, batch, _, buffer = ready
    assert (buffer["keep"][1:-1] == 0).any()  # an episode ends within the rollout
    logits, _ = agent.policy(batch["obs"], batch["policy_hidden"][0], batch["keep"])
    log_pi = maipg.masked_log_softmax(logits, batch["avail"])
    again = (log_pi * batch["actions"]).sum(-1)
    torch.testing.assert_close(again, batch["log_probs"], atol=1e-6, rtol=0)
    values, _ = agent.critic(batch["obs"], batch["critic_hidden"][0], batch["keep"], batch["state"])
    torch.testing.assert_close(values[..., 0], batch["values"], atol=1e-6, rtol=0)


def test_unrolling_equals_single_steps_with_resets():
    torch.manual_seed(0)
    network = maipg.Recurrent(5, 8, 3, 1.0, state_dim=4)
    obs, state, hidden = torch.randn(6, 2, 3, 5), torch.randn(6, 2, 4), torch.randn(2, 3, 8)
    keep = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1.0]])
    out, _ = network(obs, hidden, keep, state)
    for t in range(6):
        hidden = hidden.clone()
        hidden[keep[t] == 0] = 0
        now, hiddens = network(obs[t : t + 1], hidden, torch.ones(1, 2), state[t : t + 1])
        hidden = hiddens[0]
        torch.testing.assert_close(out[t], now[0])


def test_advantages_are_normalised_over_the_living(ready):
    _, _, _, _, batch, metrics, _ = ready
    live = batch["advantages"][batch["alive"] > 0]
    assert abs(live.mean()) < 1e-5 and abs(live.std(unbiased=False) - 1) < 1e-3
    raw = batch["raw"][batch["alive"] > 0]
    assert abs(raw.std(unbiased=False) - metrics["diagnostics/sigma_a"]) < 1e-6


def test_target_networks_follow_once_per_epoch():
    args, agent, optimizers, rngs, batch, metrics, _ = setup(
        "--nu", "0.4", "--num-minibatches", "2"
    )
    args.update_epochs = 1
    before = copy.deepcopy(agent.target_utility.state_dict())
    maipg.update(agent, optimizers, batch, metrics["diagnostics/sigma_a"], rngs, args)
    for name, new in agent.utility.state_dict().items():
        expected = 0.95 * before[name] + 0.05 * new
        torch.testing.assert_close(agent.target_utility.state_dict()[name], expected)


@pytest.mark.parametrize("flag", ["--no-bootstrap-time-limits", "--bootstrap-time-limits"])
def test_a_time_limit_ends_the_episode_unless_it_is_bootstrapped(flag):
    args, agent, _, _, _, _, buffer = setup("--nu", "0.4", flag)
    game = int((~buffer["done"][4]).nonzero()[0])
    now = {
        f"{name}_hidden": torch.zeros(2, 3, 16)
        for name in ("policy", "critic", "utility", "target")
    }
    before, _ = maipg.estimate(agent, buffer, dict(now), torch.Generator(), args)
    buffer["truncated"][4, game] = buffer["done"][4, game] = True  # a limit where there was none
    batch, _ = maipg.estimate(agent, buffer, dict(now), torch.Generator(), args)
    reward = buffer["reward"][4, game]
    next_value = agent.value_norm.denormalize(before["values"][5, game])  # chunk 0 is steps 0..9
    bootstrap = args.gamma * next_value if args.bootstrap_time_limits else torch.zeros(3)
    torch.testing.assert_close(batch["returns"][4, game], reward + bootstrap)
    greedy = torch.nn.functional.one_hot(buffer["log_pi"][5].argmax(-1), buffer["log_pi"].shape[-1])
    utilities, _ = agent.target_utility(
        buffer["obs"], now["target_hidden"], buffer["keep"], buffer["state"]
    )
    q = agent.target_mixer(utilities[5], greedy, agent.target_mixer.weights(buffer["state"][5]))
    q = agent.q_norm.denormalize(q)[game] * args.gamma * args.bootstrap_time_limits
    torch.testing.assert_close(batch["q_targets"][4, game], (reward + q).detach())


def test_the_unfinished_episode_of_a_crashed_game_is_left_out():
    args, agent, _, _, _, _, buffer = setup("--nu", "0.4")
    for key in ("done", "broken"):
        buffer[key].zero_()
    buffer["done"][[9, 19, 29], 0] = True
    buffer["broken"][19, 0] = True
    now = {
        f"{name}_hidden": torch.zeros(2, 3, 16)
        for name in ("policy", "critic", "utility", "target")
    }
    batch, _ = maipg.estimate(agent, buffer, now, torch.Generator(), args)
    valid = batch["valid"].unflatten(1, (4, 2)).transpose(0, 1).flatten(0, 1)
    expected = torch.ones(40, 2)
    expected[10:20, 0] = 0
    assert torch.equal(valid, expected) and (batch["alive"][batch["valid"] == 0] == 0).all()


def test_smax_equals_jaxmarl_state_by_state():
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    args = maipg.parse(SMALL)
    envs = maipg.make_envs(args, 11)
    rules = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest"}
    env = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"), **rules)
    keys, games, ended = [], [], 0
    ours = envs.reset()
    for k in range(2):
        key, reset_key = jax.random.split(jax.random.PRNGKey(11 + 1000 * k))
        obs, game = env.reset(reset_key)
        keys.append(key)
        games.append((obs, game))
    rng = np.random.default_rng(0)
    step, total = jax.jit(env.step), [0.0, 0.0]
    for _ in range(130):
        actions = []
        for k, (obs, game) in enumerate(games):
            avail = np.stack(list(env.get_avail_actions(game).values()))
            theirs = np.stack([obs[name] for name in env.agents])
            np.testing.assert_allclose(ours[0][k, :, : theirs.shape[1]], theirs, atol=1e-6)
            np.testing.assert_array_equal(ours[0][k, :, theirs.shape[1] :], np.eye(3))
            np.testing.assert_allclose(ours[1][k, 0], obs["world_state"], atol=1e-6)
            np.testing.assert_array_equal(ours[2][k], avail == 1)
            actions.append([rng.choice(np.flatnonzero(row)) for row in avail])
        *ours, reward, done, info = envs.step(torch.tensor(np.array(actions)))
        for k, (_, game) in enumerate(games):
            keys[k], key = jax.random.split(keys[k])
            moves = dict(zip(env.agents, actions[k]))
            obs, new, theirs, over, _ = step(key, game, moves)
            games[k] = (obs, new)
            total[k] += float(theirs["ally_0"])
            assert float(reward[k]) == pytest.approx(float(theirs["ally_0"]), abs=1e-6)
            assert bool(done[k]) == bool(over["__all__"])
            if done[k]:
                assert float(info["return"][k]) == pytest.approx(total[k], abs=1e-4)
                total[k], ended = 0.0, ended + 1
    assert ended >= 2


def test_gradient_variance_is_that_of_disjoint_splits(ready):
    args, agent, _, _, batch, metrics, _ = ready
    args = copy.copy(args)
    args.nu = 0.0  # no Gumbel noise: the splits can be computed again
    sigma_a = metrics["diagnostics/sigma_a"]
    halves = [{k: x[:, i::2] for k, x in batch.items()} for i in range(2)]
    a, b = (policy_gradient(agent, half, sigma_a, args) for half in halves)
    expected = ((a - b) ** 2).sum() / 4  # variance of two values: half the square; over two splits
    torch.testing.assert_close(maipg.gradient_variance(agent, batch, sigma_a, args), expected)
