"""HAPPO, QMIX, FACMAC, other fits: against plain computations, and on games with a known answer."""

import copy
import itertools
import json
import signal

import numpy as np
import pytest
import torch

import maipg_smac as smac
from benchmark.baselines import facmac, fitted, happo, qmix

MODULES = {"qmix": qmix, "facmac": facmac}


def first_look(n, actions=3, obs=4, state=5):
    """What an agent is made for: the shapes of one game."""
    look = {"obs": torch.zeros(1, n, obs), "state": torch.zeros(1, state)}
    return look | {"avail": torch.ones(1, n, actions, dtype=torch.bool)}


def mixed(mixer, utilities, actions, state):
    """q_tot in a state."""
    return mixer(utilities, actions, mixer.weights(state))


# ------------------------------------------------------------------------------------------- HAPPO
def on_policy_batch(agent, n, chunks=6, steps=4, actions=3, seed=0):
    """Chunks [L, B, ...] as maipg_smac.estimate makes them, with a dead agent in some."""
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=rng)
    obs, state = rand(steps, chunks, n, 4), rand(steps, chunks, 5)
    avail = torch.ones(steps, chunks, n, actions, dtype=torch.bool)
    avail[:, 0, 0, 1:] = False
    keep, hidden = torch.ones(steps, chunks), rand(1, chunks, n, 8)
    keep[-1, 1] = 0.0
    with torch.no_grad():
        log_pi = smac.masked_log_softmax(agent.policy(obs, hidden[0], keep)[0], avail)
    taken = qmix.one_hot(smac.gumbel_max(log_pi, rng).argmax(-1), log_pi)
    batch = {"obs": obs, "state": state, "avail": avail, "keep": keep, "actions": taken}
    batch |= {"log_probs": (log_pi * taken).sum(-1), "advantages": rand(steps, chunks, n)}
    batch |= {"alive": (avail.sum(-1) > 1).float(), "policy_hidden": hidden}
    batch |= {"critic_hidden": rand(1, chunks, n, 8), "values": rand(steps, chunks, n)}
    return batch | {"returns": rand(steps, chunks, n)}


def on_policy(make, n, **settings):
    args = smac.Args(nu=0.0, hidden_dim=8, device="cpu", **settings)
    torch.manual_seed(3)
    agent = make(first_look(n), args)
    return args, agent, torch.optim.Adam(agent.parameters(), 1e-2, eps=1e-5)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_happo_with_one_agent_is_ppo(minibatches):
    weights = []
    for make, update in ((smac.Agent, smac.update), (happo.Agent, happo.update)):
        settings = {"update_epochs": 5, "num_minibatches": minibatches, "clip_eps": 0.05}
        args, agent, optimizer = on_policy(make, 1, **settings)
        batch = on_policy_batch(agent, 1)
        # PPO draws an order per epoch for both networks, HAPPO for each of them: with several
        # minibatches only the policy's orders can be made the same.
        rngs = {"shuffle": torch.Generator().manual_seed(1), "gumbel": torch.Generator()}
        if update is smac.update:
            torch.randperm(1, generator=rngs["shuffle"])
        before = [x.clone() for x in agent.policy.parameters()]
        update(agent, optimizer, batch, torch.tensor(1.0), rngs, args)
        trained = list(agent.policy.parameters())
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, trained))
        weights.append(trained + (list(agent.critic.parameters()) if minibatches == 1 else []))
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_happo_weighs_with_the_ratios_of_the_agents_before(monkeypatch):
    """M of each agent from plain probabilities: the actors before it, as they are after."""
    n = 3
    args, agent, optimizer = on_policy(happo.Agent, n, update_epochs=2)
    batch, old, seen = on_policy_batch(agent, n), copy.deepcopy(agent.policy), []
    genuine = happo.actor_loss

    def spy(actor, part, i, weight, args):
        seen.append((i, weight.clone()))
        return genuine(actor, part, i, weight, args)

    monkeypatch.setattr(happo, "actor_loss", spy)
    rngs = {"shuffle": torch.Generator().manual_seed(5)}
    happo.update(agent, optimizer, batch, None, rngs, args)

    def probability(actors, i):
        logits, _ = actors(batch["obs"], batch["policy_hidden"][0], batch["keep"])
        weights = logits[:, :, i].exp() * batch["avail"][:, :, i]
        return (weights * batch["actions"][:, :, i]).sum(-1) / weights.sum(-1)

    order = list(dict.fromkeys(i for i, _ in seen))
    assert sorted(order) == [0, 1, 2]
    with torch.no_grad():
        for i, weight in seen:
            expected = torch.ones_like(weight)
            for j in order[: order.index(i)]:
                expected *= probability(agent.policy, j) / probability(old, j)
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
        last = [weight for i, weight in seen if i == order[-1]][0]
        assert (last - 1).abs().max() > 0.01  # it is not one everywhere
        assert (last[:, 0] - 1).abs().max() > 0  # a dead agent alone changes nothing


@torch.no_grad()
def test_happo_actor_loss():
    """Minus M min(r A, clip(r) A) over live agents, minus the entropy bonus, summed one by one."""
    args, agent, _ = on_policy(happo.Agent, 2, clip_eps=0.1, ent_coef=0.02)
    batch = on_policy_batch(agent, 2)
    batch["log_probs"] = batch["log_probs"] + 0.3 * torch.randn_like(batch["log_probs"])
    weight = 0.5 + torch.rand(4, 6)
    logits, _ = agent.policy(batch["obs"], batch["policy_hidden"][0], batch["keep"])
    total, entropy, live = 0.0, 0.0, 0
    for t, b in itertools.product(range(4), range(6)):
        if batch["avail"][t, b, 0].sum() > 1:
            p = torch.softmax(logits[t, b, 0], -1)
            r = (p[batch["actions"][t, b, 0].argmax()] / batch["log_probs"][t, b, 0].exp()).item()
            a = batch["advantages"][t, b, 0].item()
            total += weight[t, b].item() * min(r * a, min(max(r, 0.9), 1.1) * a)
            entropy -= (p * p.log()).sum().item()
            live += 1
    loss = happo.actor_loss(agent.policy.each[0], batch, 0, weight, args)[0].item()
    assert loss == pytest.approx(-(total + 0.02 * entropy) / live, rel=1e-4)


def test_happo_leaves_the_other_actors_alone():
    args, agent, optimizer = on_policy(happo.Agent, 2, update_epochs=2)
    batch = on_policy_batch(agent, 2)
    rngs, before = {"shuffle": torch.Generator()}, copy.deepcopy(agent.policy.each[1])
    happo.update(agent, optimizer, batch, None, rngs, args)  # Adam has moments for both now
    before = [x.clone() for x in agent.policy.each[1].parameters()]
    loss = happo.actor_loss(agent.policy.each[0], batch, 0, torch.ones(4, 6), args)[0]
    own = next(agent.policy.each[0].parameters()).clone()
    smac.descend(agent, optimizer, {"policy": loss}, args)
    assert not torch.equal(own, next(agent.policy.each[0].parameters()))
    for a, b in zip(before, agent.policy.each[1].parameters()):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------- QMIX and FACMAC
def off_policy(module, n=2, **settings):
    args = module.Args(hidden_dim=8, mixer_dim=8, device="cpu", **settings)
    torch.manual_seed(2)
    agent = module.Agent(first_look(n), args)
    with torch.no_grad():  # target networks that differ from the online ones
        for name, x in agent.named_parameters():
            if name.startswith("target"):
                x.add_(0.3 * torch.randn_like(x))
    optimizers = {
        name: torch.optim.Adam(torch.nn.ModuleList(nets).parameters(), rate)
        for name, (nets, rate) in agent.groups().items()
    }
    return args, agent, optimizers


def played(args, lengths, n=2, seed=0):
    """A Replay with one game's episodes of given lengths, one after the other."""
    replay, rng = qmix.Replay(args), torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(1, *shape, generator=rng)
    for length in lengths:
        for t in range(length):
            avail = torch.rand(1, n, 3, generator=rng) < 0.6
            avail[..., 0] = True
            actions = (torch.rand(1, n, 3, generator=rng) * avail).argmax(-1)
            seen = {"obs": rand(n, 4), "state": rand(5), "avail": avail, "keep": "not stored"}
            replay.add(seen, actions, rand(1)[0], torch.tensor([t == length - 1]))
    return replay


def steps_by_hand(network, episode, dim):
    """Output [T, n, out] of a recurrent network, one step after the other."""
    hidden, out = torch.zeros(1, episode["obs"].shape[1], dim), []
    for t, obs in enumerate(episode["obs"]):
        y, hiddens = network(obs[None, None], hidden, torch.full((1, 1), float(t > 0)))
        hidden = hiddens[0]
        out.append(y[0, 0])
    return torch.stack(out)


@torch.no_grad()
def test_qmix_targets():
    args, agent, _ = off_policy(qmix, num_envs=1, gamma=0.9)
    replay = played(args, [3, 6])
    batch = replay.sample(2)
    utilities = qmix.whole_episodes(agent.policy, batch["obs"], 8)
    targets = agent.targets(batch, utilities)
    order = [0, 1] if batch["valid"][:, 0].sum() == 3 else [1, 0]
    for column, k in enumerate(order):
        episode = replay.episodes[k]
        online = steps_by_hand(agent.policy, episode, 8)
        target = steps_by_hand(agent.target_policy, episode, 8)
        length = len(episode["reward"])
        assert batch["valid"][:, column].sum() == length == [3, 6][k]
        for t in range(length):
            y = episode["reward"][t]
            if t < length - 1:
                actions = torch.zeros(2, 3)
                for i in range(2):
                    allowed = [a for a in range(3) if episode["avail"][t + 1, i, a]]
                    best = max(allowed, key=lambda a, i=i: online[t + 1, i, a].item())
                    actions[i, best] = 1.0
                state = episode["state"][t + 1]
                y = y + 0.9 * mixed(agent.target_mixer, target[t + 1], actions, state)
            torch.testing.assert_close(targets[t, column], y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_facmac_targets():
    """TD(lambda) as the weighted sum of all n-step returns."""
    args, agent, _ = off_policy(facmac, num_envs=1, gamma=0.9, td_lambda=0.7)
    replay = played(args, [3, 6])
    batch = replay.sample(2)
    targets = agent.targets(batch)
    order = [0, 1] if batch["valid"][:, 0].sum() == 3 else [1, 0]
    for column, k in enumerate(order):
        episode = replay.episodes[k]
        logits = steps_by_hand(agent.target_policy, episode, 8)
        length, values = len(episode["reward"]), []
        for t in range(length):
            rows, state = [], episode["state"][t]
            for i in range(2):
                allowed = [a for a in range(3) if episode["avail"][t, i, a]]
                action = torch.zeros(3)
                action[max(allowed, key=lambda a, i=i, t=t: logits[t, i, a].item())] = 1.0
                rows.append(agent.target_utility.layers(torch.cat([episode["obs"][t, i], action])))
            values.append(
                mixed(agent.target_mixer, torch.stack(rows), torch.ones(2, 1), state).item()
            )
        values.append(0.0)  # after the end
        rewards = episode["reward"].tolist()
        for t in range(length):
            returns = []
            for m in range(1, length - t + 1):
                discounted = sum(0.9**j * rewards[t + j] for j in range(m))
                returns.append(discounted + 0.9**m * values[t + m])
            y = sum(0.3 * 0.7 ** (m - 1) * g for m, g in enumerate(returns[:-1], 1))
            y += 0.7 ** (len(returns) - 1) * returns[-1]
            assert targets[t, column].item() == pytest.approx(y, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_padding_changes_nothing(name):
    """The loss of a padded batch is the mean over the steps that were played."""
    args, agent, _ = off_policy(MODULES[name], num_envs=1)
    replay = played(args, [2, 7])
    losses = []
    for episodes in ([0], [1], [0, 1]):
        one = qmix.Replay(args)
        one.episodes.extend(replay.episodes[k] for k in episodes)
        fresh, optimizer = copy.deepcopy(agent), {}
        for key, (nets, _) in fresh.groups().items():
            optimizer[key] = torch.optim.SGD(torch.nn.ModuleList(nets).parameters(), 0.0)
        metrics = fresh.learn(one.sample(len(episodes)), optimizer, torch.Generator())
        losses.append(metrics["losses/q"].item())
    assert losses[2] == pytest.approx((2 * losses[0] + 7 * losses[1]) / 9, rel=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_behaviour_explores_only_what_is_available(name):
    _, agent, _ = off_policy(MODULES[name])
    rng, avail = torch.Generator().manual_seed(0), torch.tensor([[True, False, True]] * 2)
    out = torch.tensor([[0.0, 9.0, 2.0]] * 2).expand(20_000, 2, 3)
    avail = avail.expand(20_000, 2, 3)
    for epsilon in (0.0, 0.4, 1.0):
        actions = agent.act(out, avail, epsilon, rng)
        greedy = 1.0 if name == "qmix" else 1 / (1 + np.exp(-2.0))
        expected = (1 - epsilon) * greedy + epsilon / 2
        assert not (actions == 1).any()
        assert (actions == 2).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_epsilon_falls_in_a_line():
    args = qmix.Args(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100)
    steps = {0: 0.9, 50: 0.5, 75: 0.3, 100: 0.1, 10_000: 0.1}
    assert {step: pytest.approx(qmix.epsilon_at(step, args)) for step in steps} == steps


@pytest.mark.parametrize("name", MODULES)
def test_a_loss_that_is_not_finite_leaves_the_weights(name):
    args, agent, optimizers = off_policy(MODULES[name], num_envs=1)
    batch, before = played(args, [4]).sample(1), copy.deepcopy(agent.state_dict())
    batch["reward"][1] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        agent.learn(batch, optimizers, torch.Generator())
    assert all(torch.equal(x, before[key]) for key, x in agent.state_dict().items())


class Numbered:
    """Two games whose observations tell which game they are, and the step: (number, t).

    Game k of the c-th begin has the number 10 c + k; its episodes last 3 + k steps. The step calls
    in `faults` fail."""

    def __init__(self, faults=()):
        self.faults, self.begun, self.calls = faults, 0, 0

    def look(self):
        obs = torch.stack([self.number, self.time], -1).float().unsqueeze(1).expand(-1, 2, -1)
        return obs, obs[:, 0], torch.ones(2, 2, 3, dtype=torch.bool)

    def reset(self, seed):
        self.begun, self.number = self.begun + 1, 10 * self.begun + torch.arange(2)
        self.time = torch.zeros(2, dtype=torch.long)
        return self.look()

    def step(self, actions):
        self.calls += 1
        if self.calls in self.faults:
            raise smac.GameError("a game has failed")
        done = self.time == torch.tensor([2, 3])
        self.time = (self.time + 1) * ~done
        return *self.look(), torch.ones(2), done, done

    def close(self):
        pass


def gathered(monkeypatch, folder, envs, steps):
    """Train QMIX on these games; the replay."""
    replays, genuine = [], qmix.Replay
    keep = lambda args: replays.append(genuine(args)) or replays[0]
    monkeypatch.setattr(qmix, "Replay", keep)
    args = qmix.Args(backend="smax", device="cpu", num_envs=2, total_timesteps=steps)
    args.batch_episodes, args.log_every, args.runs_dir, args.eval_episodes = 3, 20, str(folder), 2
    qmix.train(args, envs)
    return replays[0]


def test_a_failed_game_costs_the_episodes_in_the_making(monkeypatch, tmp_path, capsys):
    envs = Numbered(faults={9, 15})
    replay = gathered(monkeypatch, tmp_path, envs, 40)
    assert capsys.readouterr().err.count("a game has failed; new games begin") == 2
    numbers = []
    for episode in replay.episodes:
        number, time = episode["obs"][:, 0].unbind(-1)
        assert (number == number[0]).all() and time.tolist() == list(range(len(time)))
        assert len(time) == 3 + number[0] % 10 and episode["done"].tolist()[-1]
        assert not episode["done"][:-1].any()
        numbers.append(int(number[0]))
    # 8 steps: two episodes of game 0, two of game 1; then 5 steps; then 7 that have not failed.
    assert numbers == [0, 1, 0, 1, 10, 11, 20, 21, 20]
    (folder,) = tmp_path.iterdir()
    rows = (folder / "progress.csv").read_text().splitlines()
    restarts = rows[0].split(",").index("charts/env_restarts")
    assert [row.split(",")[restarts] for row in rows[1:]] == ["1", "2"]
    assert [row.split(",")[0] for row in rows] == ["global_step", "20", "40"]


def test_games_that_always_fail_stop_the_run_and_save_it(monkeypatch, tmp_path):
    with pytest.raises(smac.GameError, match="a game has failed"):
        gathered(monkeypatch, tmp_path, Numbered(faults=range(6, 99)), 400)
    (folder,) = tmp_path.iterdir()
    saved = smac.load_checkpoint(folder, qmix.Args)
    assert saved["progress"]["step"] == 10 and saved["progress"]["restarts"] == 5


# ------------------------------------------------------------------------ games with a known answer
MONOTONIC = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 6.0, 9.0]])
NON_MONOTONIC = torch.tensor([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])


def matrix_batch(payoff):
    """All nine joint actions of a one-step game, once each."""
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    obs = torch.zeros(1, 9, 2, 4)
    obs[:, :, 0, 0] = obs[:, :, 1, 1] = 1.0
    end = torch.ones(1, 9, dtype=torch.bool)
    batch = {"obs": obs, "state": torch.ones(1, 9, 5), "actions": pairs[None]}
    batch |= {"avail": torch.ones(1, 9, 2, 3, dtype=torch.bool), "done": end}
    return batch | {"valid": end.float(), "reward": payoff[pairs[:, 0], pairs[:, 1]][None]}


def learned(module, payoff, updates, **settings):
    """(payoff of the greedy joint action, q_tot of all nine) after learning from all of them."""
    _, agent, optimizers = off_policy(module, **settings)
    batch, rng = matrix_batch(payoff), torch.Generator().manual_seed(0)
    for _ in range(updates):
        agent.learn(batch, optimizers, rng)
    with torch.no_grad():
        out = qmix.whole_episodes(agent.policy, batch["obs"], 8)[0, 0]
        first, second = out.argmax(-1).tolist()
        if module is qmix:
            actions = qmix.one_hot(batch["actions"][0], out)
            q = mixed(agent.mixer, out.expand(9, 2, 3), actions, batch["state"][0])
            return payoff[first, second].item(), q.view(3, 3)
    return payoff[first, second].item(), None


def test_qmix_solves_a_monotonic_game():
    value, q = learned(qmix, MONOTONIC, 500, learning_rate=0.02)
    assert value == 9.0
    torch.testing.assert_close(q, MONOTONIC, rtol=0.0, atol=0.3)


def test_qmix_fails_on_the_non_monotonic_game():
    """Its known limit (QTRAN's game): from uniform data it settles for 0 instead of 8."""
    value, q = learned(qmix, NON_MONOTONIC, 500, learning_rate=0.02)
    assert value == 0.0 and q[0, 0] < 0.0


def test_facmac_solves_a_monotonic_game():
    value, _ = learned(facmac, MONOTONIC, 500, learning_rate=0.01, critic_lr=0.01)
    assert value == 9.0


def test_happo_solves_a_game():
    args, agent, optimizer = on_policy(happo.Agent, 2, update_epochs=5, ent_coef=0.001)
    rng, rngs = torch.Generator().manual_seed(0), {"shuffle": torch.Generator().manual_seed(0)}
    for _ in range(60):
        batch = on_policy_batch(agent, 2, chunks=32, steps=1)
        obs = torch.zeros(1, 32, 2, 4)
        obs[:, :, 0, 0] = obs[:, :, 1, 1] = 1.0
        batch |= {"obs": obs, "keep": torch.zeros(1, 32), "alive": torch.ones(1, 32, 2)}
        batch["avail"] = torch.ones(1, 32, 2, 3, dtype=torch.bool)
        with torch.no_grad():
            log_pi = torch.log_softmax(
                agent.policy(obs, batch["policy_hidden"][0], batch["keep"])[0], -1
            )
        actions = smac.gumbel_max(log_pi, rng).argmax(-1)
        batch["actions"] = qmix.one_hot(actions, log_pi)
        batch["log_probs"] = (log_pi * batch["actions"]).sum(-1)
        reward = MONOTONIC[actions[..., 0], actions[..., 1]]
        advantage = (reward - reward.mean()) / (reward.std() + 1e-5)
        batch["advantages"] = advantage.unsqueeze(-1).expand(-1, -1, 2)
        happo.update(agent, optimizer, batch, None, rngs, args)
    assert log_pi[0, 0].argmax(-1).tolist() == [2, 2] and log_pi[0, 0].max(-1)[0].exp().min() > 0.9


# -------------------------------------------------------------------------------------- other fits
def linear_data(rollouts):
    """Features [T, N, n, F], scores onehot(a) - pi, and A = sum_i (u_i(a_i) - E u_i) + noise; and
    that sum."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 3, generator=rng) / 4
    for _ in range(rollouts):
        h = torch.randn(50, 8, 2, 5, generator=rng)
        pi = torch.softmax(torch.randn(50, 8, 2, 3, generator=rng), -1)
        actions = torch.multinomial(pi.flatten(0, 2), 1, generator=rng).view(50, 8, 2)
        scores = qmix.one_hot(actions, pi) - pi
        q = (h @ weights * scores).sum((-2, -1))
        yield (h, scores, q + torch.randn(50, 8, generator=rng)), q


def fitted_network(network, **settings):
    torch.manual_seed(1)
    critic = fitted.FittedNetwork(5, 3, forgetting=0.75, ridge=0.001)
    critic.args = fitted.Args(network=network, fit_rate=2e-3, **settings)
    return critic


@pytest.mark.parametrize("network", ["fresh", "warm"])
def test_a_fitted_network_predicts_new_advantages(network):
    critic, data = fitted_network(network, window=3), list(linear_data(7))
    *seen, ((h, scores, _), truth) = data
    for rollout, _ in seen:
        critic.fit(*rollout)
    assert [x[2] is y[0][2] for x, y in zip(critic.window, seen[-3:])] == [True] * 3
    with torch.no_grad():
        q = (h @ critic.weights * scores).sum((-2, -1))
    slope = (q * truth).sum() / (q * q).sum()
    assert torch.corrcoef(torch.stack([q, truth]).flatten(1))[0, 1] > 0.9 and 0.7 < slope < 1.4
    assert all(p.grad is None for p in critic.parameters())  # the trainer's Adam leaves it alone


def test_a_fresh_network_owes_nothing_to_the_one_before():
    (before, _), (rollout, _) = linear_data(2)
    weights = {}
    for network in ("fresh", "warm"):
        for past in (False, True):
            critic = fitted_network(network, window=1, fit_steps=5)
            if past:
                critic.fit(*before)
            torch.manual_seed(2)
            critic.fit(*rollout)
            weights[network, past] = torch.cat([p.flatten() for p in critic.parameters()])
    assert torch.equal(weights["fresh", False], weights["fresh", True])
    assert not torch.allclose(weights["warm", False], weights["warm", True])


def test_without_a_fit_the_second_gradient_is_that_of_ppo_without_its_clip():
    rng = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=rng)
    old, logits, a = rand(5, 2, 3, 4), rand(5, 2, 3, 4).requires_grad_(), rand(5, 2, 3)
    pi = torch.softmax(old, -1)
    taken = qmix.one_hot(torch.multinomial(pi.flatten(0, 2), 1, generator=rng).view(5, 2, 3), pi)
    critic = fitted.NoFit(6, 4, forgetting=0.75, ridge=0.001)
    critic.fit(None, taken - pi, a)
    new = torch.log_softmax(logits, -1)
    q_tot = (rand(5, 2, 3, 6) @ critic.weights * new.exp()).sum((-2, -1))
    second = smac.deterministic_pg_loss(q_tot, q_scale=1 / 3)
    ratio = ((new - pi.log()) * taken).sum(-1)
    first = smac.stochastic_pg_loss(ratio, a, torch.ones(5, 2, 3), clip_eps=1e9)
    np.testing.assert_allclose(second.item(), first.item(), rtol=1e-4)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (first, second)]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_the_second_lambda_is_that_of_the_fit_alone(monkeypatch):
    """Against sums of TD errors; an agent is dead in some steps."""
    rng, T, N, n, gamma = np.random.default_rng(0), 6, 2, 3, 0.9
    rewards, values = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N, n))
    done, alive = rng.random((T, N)) < 0.2, np.ones((T, N, n))
    alive[2:, 0, 1] = 0
    scores = torch.tensor(rng.normal(size=(T, N, n, 4)) * alive[..., None]).float()

    def advantages(lam):
        delta = rewards[..., None] + gamma * ~done[..., None] * values[1:] - values[:-1]
        for t in range(T):
            weight, total = 1.0, np.zeros((N, n))
            for later in range(t, T):
                total = total + weight * delta[later]
                weight = weight * gamma * lam * ~done[later][:, None]
            yield total

    def played(args, envs, stopped):
        tensors = [torch.tensor(x).float() for x in (rewards, values)]
        own = smac.gae(*tensors, torch.tensor(done), gamma, args.gae_lambda)
        np.testing.assert_allclose(own, np.stack(list(advantages(0.95))), atol=1e-5)
        smac.CompatibleCritic(5, 4, 0.75, 0.001).fit(None, scores, None)

    seen, gae = [], smac.gae
    monkeypatch.setattr(smac, "train", played)
    record = lambda critic, features, scores, advantages: seen.append(advantages)
    monkeypatch.setattr(smac.CompatibleCritic, "fit", record)
    fitted.train(fitted.Args(second_lambda=0.3), None)
    expected = np.stack(list(advantages(0.3)))
    live = expected[alive > 0]
    expected = (expected - live.mean()) / live.std() * alive
    np.testing.assert_allclose(seen[0], expected.sum(-1) / alive.sum(-1), atol=1e-4)
    assert smac.gae is gae and smac.CompatibleCritic.__module__ == "maipg_smac"


# ------------------------------------------------------------------------------------ command lines
@pytest.fixture(autouse=True)
def as_before():
    """main() sets signal handlers; two threads of torch wait for each other on a busy machine."""
    torch.set_num_threads(1)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


BAD = [  # command line, exit code 2 with this in the message
    (qmix, "--gamma 2", "gamma 2"),
    (qmix, "--batch-episodes 0", "batch_episodes 0"),
    (qmix, "--batch-episodes 9 --replay-episodes 8", "replay-episodes"),
    (facmac, "--map-name nowhere", "nowhere"),
    (facmac, "--td-lambda 1.5", "td_lambda"),
    (facmac, "--epsilon-end -1", "epsilon_end"),
    (fitted, "--second-lambda 1.5", "second-lambda"),
    (happo, "--nu 0.4", "--nu"),
    (happo, "--chunk-length 7", "chunk-length"),
]


@pytest.mark.parametrize("module, words, about", BAD)
def test_bad_input(module, words, about, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    try:
        code = module.main([*words.split(), "--backend", "smax"])
    except SystemExit as end:  # tyro's own message
        code = end.code
    assert code == 2 and about in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def rows_of(folder):
    head, *rows = (folder / "progress.csv").read_text().splitlines()
    return [dict(zip(head.split(","), row.split(","), strict=True)) for row in rows]


SMALL = "--map-name 3m --backend smax --num-envs 2 --eval-every 100 --eval-episodes 2 --device cpu"


@pytest.mark.parametrize("name", MODULES)
def test_a_run_stops_and_goes_on(name, tmp_path, capfd):
    module, words = MODULES[name], f"{SMALL} --batch-episodes 2 --log-every 100 --seed 3"
    words += f" --total-timesteps 200 --runs-dir {tmp_path}"
    assert module.main(words.split()) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"smax-3m__{name}__s3__")
    saved = smac.load_checkpoint(folder, module.Args)
    assert module.main(["--resume", str(folder), "--total-timesteps", "400"]) == 0
    assert [row["global_step"] for row in rows_of(folder)] == ["100", "200", "300", "400"]
    for row in rows_of(folder):
        assert np.isfinite([float(row[key]) for key in module.Agent.metrics]).all()
        assert 0 <= float(row["eval/win_rate"]) <= 1 and float(row["charts/SPS"]) > 0
    later = smac.load_checkpoint(folder, module.Args)
    assert later["progress"]["updates"] > saved["progress"]["updates"] > 0
    steps = [x["state"][0]["step"].item() for x in later["optimizers"].values()]
    assert steps == [later["progress"]["updates"]] * len(steps)  # Adam's moments were kept
    capfd.readouterr()
    for words in ("--gamma 0.9", "--seed 4"):
        assert module.main(["--resume", str(folder), *words.split()]) == 2
    other = {"qmix": facmac, "facmac": happo}[name]
    assert other.main(["--resume", str(folder)]) == 2
    assert f"no checkpoint of {other.Args.script}" in capfd.readouterr().err


def test_happo_trains_and_goes_on(tmp_path):
    words = f"{SMALL} --rollout-steps 20 --total-timesteps 40 --runs-dir {tmp_path}"
    assert happo.main(words.split()) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("smax-3m__happo__nu0__s1__")
    assert happo.main(["--resume", str(folder), "--total-timesteps", "80"]) == 0
    assert [row["global_step"] for row in rows_of(folder)] == ["40", "80"]
    assert all(float(row["diagnostics/log_weight_std"]) > 0 for row in rows_of(folder))
    assert json.loads((folder / "args.json").read_text())["nu"] == 0
    weights = smac.load_checkpoint(folder, happo.Args)["agent"]
    assert {key.split(".")[2] for key in weights if key.startswith("policy.")} == {"0", "1", "2"}


def test_without_flags_the_fit_is_that_of_the_trainer(tmp_path):
    rows, same = [], {"map_name": "3m", "backend": "sc2", "device": "cpu", "nu": 0.4, "num_envs": 2}
    same |= {"rollout_steps": 20, "total_timesteps": 120, "update_epochs": 2, "hidden_dim": 8}
    for module in (smac, fitted):
        folder = tmp_path / module.__name__
        module.train(module.Args(**same, eval_episodes=2, runs_dir=str(folder)), Numbered())
        (run,) = folder.iterdir()
        rows.append([row | {"charts/SPS": ""} for row in rows_of(run)])
    assert rows[0] == rows[1] and float(rows[0][-1]["variance/slope"]) != 0
    same["total_timesteps"] = 160
    fitted.train(fitted.Args(**same, eval_episodes=2, resume=str(run)), Numbered())
    assert len(rows_of(run)) == 4


def test_a_signal_ends_a_run_and_saves_it(tmp_path, monkeypatch):
    """As if it had come in the third of many rows."""
    stopped, genuine = [], smac.Log.write
    after = lambda log, step, metrics: (
        genuine(log, step, metrics) or (step >= 60 and stopped.append(signal.SIGTERM))
    )
    monkeypatch.setattr(smac.Log, "write", after)
    args = qmix.Args(backend="smax", device="cpu", num_envs=2, log_every=20)
    args.runs_dir, args.eval_episodes = str(tmp_path), 2
    qmix.train(args, Numbered(), stopped)
    (folder,) = tmp_path.iterdir()
    assert smac.load_checkpoint(folder, qmix.Args)["progress"]["step"] == 60
    assert len(rows_of(folder)) == 3
