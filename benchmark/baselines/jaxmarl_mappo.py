"""An update of MAPPO-RNN as JaxMARL trains it on SMAX, to time: benchmark/throughput.py calls it.

Networks Linear, GRU, Linear, Linear of 128 units, policy on obs and critic on the state with the
agent's index; 128 steps, 4 epochs of 4 minibatches of whole sequences. Rollout and update are one
jitted function each (JaxMARL's trainer is one function). Written for this comparison from the
published settings; initialisation and annealing are left out, and that it learns is not tested.
"""

import time
from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxmarl.environments import smax

Sample = namedtuple("Sample", "obs state avail reset done reward action log_prob value")


class Cell(nn.Module):
    @nn.compact
    def __call__(self, hidden, step):
        x, reset = step
        return nn.GRUCell(hidden.shape[-1])(hidden * ~reset[:, None], x)


class Network(nn.Module):
    out_dim: int

    @nn.compact
    def __call__(self, hidden, x, reset):
        """hidden [M, H], x [T, M, F], reset [T, M] -> hidden [M, H], output [T, M, out]."""
        dim = hidden.shape[-1]
        x = nn.relu(nn.Dense(dim)(x))
        scan = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})
        hidden, x = scan()(hidden, (x, reset))
        return hidden, nn.Dense(self.out_dim)(nn.relu(nn.Dense(dim)(x)))


def trainer(map_name, num_envs, steps=128, dim=128, epochs=4, minibatches=4):
    """turn(): seconds of (rollout, update). M = num_envs * n sequences."""
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(map_name))
    n, num_actions = env.num_agents, env.action_space(env.agents[0]).n
    policy, critic = Network(num_actions), Network(1)
    adam = optax.chain(optax.clip_by_global_norm(0.25), optax.adam(2e-3, eps=1e-5))

    def rows(x):
        return jnp.stack([x[name] for name in env.agents], 1).reshape(num_envs * n, -1)

    def see(obs, games):
        """obs [M, O], state [M, S + n], avail [M, A]."""
        state = jnp.repeat(obs["world_state"], n, 0)
        state = jnp.concatenate([state, jnp.tile(jnp.eye(n), (num_envs, 1))], 1)
        return rows(obs), state, rows(jax.vmap(env.get_avail_actions)(games))

    def play(params, carry, key):
        games, seen, reset, hiddens = carry
        act_key, step_key = jax.random.split(key)
        both = zip((policy, critic), params, hiddens, seen)
        outs = [net.apply(p, h, x[None], reset[None]) for net, p, h, x in both]
        log_pi = nn.log_softmax(outs[0][1][0] - 1e10 * (1 - seen[2]))
        action = jax.random.categorical(act_key, log_pi)
        chosen = dict(zip(env.agents, action.reshape(num_envs, n).T))
        keys = jax.random.split(step_key, num_envs)
        obs, games, reward, done, _ = jax.vmap(env.step)(keys, games, chosen)
        done, reward = jnp.repeat(done["__all__"], n), jnp.repeat(reward[env.agents[0]], n)
        log_prob = jnp.take_along_axis(log_pi, action[:, None], 1)[:, 0]
        sample = Sample(*seen, reset, done, reward, action, log_prob, outs[1][1][0, :, 0])
        return (games, see(obs, games), done, [out[0] for out in outs]), sample

    def loss(params, start, batch, advantages):
        _, logits = policy.apply(params[0], start[0], batch.obs, batch.reset)
        _, values = critic.apply(params[1], start[1], batch.state, batch.reset)
        log_pi = nn.log_softmax(logits - 1e10 * (1 - batch.avail))
        log_prob = jnp.take_along_axis(log_pi, batch.action[..., None], -1)[..., 0]
        ratio = jnp.exp(log_prob - batch.log_prob)
        scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        gain = jnp.minimum(ratio * scaled, ratio.clip(0.8, 1.2) * scaled).mean()
        targets, near = advantages + batch.value, (values[..., 0] - batch.value).clip(-0.2, 0.2)
        errors = [values[..., 0] - targets, batch.value + near - targets]
        entropy = -(jnp.exp(log_pi) * log_pi).sum(-1).mean()
        return 0.5 * jnp.maximum(*jnp.square(jnp.array(errors))).mean() - gain - 0.01 * entropy

    @jax.jit
    def rollout(params, carry, key):
        return jax.lax.scan(lambda c, k: play(params, c, k), carry, jax.random.split(key, steps))

    @jax.jit
    def update(params, adam_state, start, carry, batch, key):
        _, last = critic.apply(params[1], carry[3][1], carry[1][1][None], carry[2][None])

        def gae(after, x):
            delta = x.reward + 0.99 * (1 - x.done) * after[1] - x.value
            total = delta + 0.99 * 0.95 * (1 - x.done) * after[0]
            return (total, x.value), total

        _, advantages = jax.lax.scan(gae, (last[0, :, 0] * 0, last[0, :, 0]), batch, reverse=True)

        def minibatch(state, index):
            start_part = [x[index] for x in start]
            part = jax.tree.map(lambda x: x[:, index], (batch, advantages))
            grads = jax.grad(loss)(state[0], start_part, *part)
            pairs = [adam.update(g, s) for g, s in zip(grads, state[1])]
            new = [optax.apply_updates(p, pair[0]) for p, pair in zip(state[0], pairs)]
            return (new, [pair[1] for pair in pairs]), None

        order = jnp.tile(jnp.arange(num_envs * n), (epochs, 1))
        order = jax.random.permutation(key, order, 1, independent=True)
        order = order.reshape(epochs * minibatches, -1)
        return jax.lax.scan(minibatch, (params, adam_state), order)[0]

    key = jax.random.PRNGKey(1)
    obs, games = jax.jit(jax.vmap(env.reset))(jax.random.split(key, num_envs))
    # Strong types: else the rollout compiles twice.
    games = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), games)
    seen, reset = jax.jit(see)(obs, games), jnp.zeros(num_envs * n, bool)
    hiddens = [jnp.zeros((num_envs * n, dim))] * 2
    inputs = zip((policy, critic), hiddens, seen)
    params = [net.init(key, h, x[None], reset[None]) for net, h, x in inputs]
    adam_state, carry = [adam.init(p) for p in params], (games, seen, reset, hiddens)

    def turn():
        nonlocal params, adam_state, carry, key
        key, *keys = jax.random.split(key, 3)
        start, times = carry[3], [time.perf_counter()]
        carry, batch = jax.block_until_ready(rollout(params, carry, keys[0]))
        times.append(time.perf_counter())
        new = update(params, adam_state, start, carry, batch, keys[1])
        params, adam_state = jax.block_until_ready(new)
        return times[1] - times[0], time.perf_counter() - times[1]

    return turn
