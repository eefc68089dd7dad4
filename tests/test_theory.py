"""The paper's propositions on random tabular problems, by exact dynamic programming and autograd.

A problem has S states, n agents with m actions each, and gamma = 0.9. Policies are softmaxes of
logits theta_i . x(s) that share parameters between states. d is the discounted, unnormalised state
distribution sum_t gamma^t Pr(s_t = s), so the paper's factor 1 / (1 - gamma) is in it.

Slips of the paper, with the form that is tested here:
* Appendix G prints the Robbins-Monro condition as sum alpha_k^2 = 0; it must be finite:
  sum alpha_k = inf and sum alpha_k^2 < inf (all steps would be zero otherwise).
* Proposition 3's proof ends with sqrt(eps) <= eps, which fails for eps < 1. The bound as printed
  still holds: mu is deterministic, so the total variation is 1 - pi(mu(s) | s) <= eps directly.
* Algorithm 1, line 14 stores tau[l : l + T] for a chunk; it means tau[l L : (l + 1) L].
* Proposition 2 writes the density of f(s, xi) + N(0, h^2) as exp(-(a - f)^2 / h^2); the exponent
  needs a factor 1/2.
"""

import functools
import math

import numpy as np
import pytest
import torch

import maipg_matrix as maipg

GAMMA, S, FEATURES = 0.9, 4, 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Problem:
    """A random MMDP with rewards in [0, 1]: r [S, m^n], P [S, m^n, S], rho [S]."""

    def __init__(self, seed, n=2, m=3, scale=1.0):
        rng = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.rand(*shape, generator=rng)
        self.n, self.m = n, m
        self.r, self.rho = draw(S, m**n), draw(S).softmax(0)
        self.P = (4 * draw(S, m**n, S)).softmax(-1)
        self.x = torch.randn(S, FEATURES, generator=rng)
        self.theta = scale * torch.randn(n, FEATURES, m, generator=rng)
        self.joint = maipg.all_joint_actions(n, m, "cpu").double()  # [m^n, n, m]

    def policies(self, theta, temperature=1.0):
        """pi_i(a_i | s) [S, n, m]."""
        return torch.einsum("sf,nfm->snm", self.x, theta / temperature).softmax(-1)

    def probabilities(self, pi):
        """Of the joint actions, [S, m^n]: the product over the agents."""
        return torch.einsum("snm,bnm->sbn", pi, self.joint).prod(-1)

    def solve(self, p):
        """(J, V [S], Q [S, m^n], d [S]) when joint actions have the probabilities p [S, m^n]."""
        r, P = (p * self.r).sum(-1), torch.einsum("sb,sbt->st", p, self.P)
        inverse = torch.linalg.inv(torch.eye(S) - GAMMA * P)
        V, d = inverse @ r, self.rho @ inverse
        return self.rho @ V, V, self.r + GAMMA * self.P @ V, d

    def scores(self):
        """d log pi(a | s) / d theta, [S, m^n, parameters]."""
        log_p = lambda theta: self.probabilities(self.policies(theta)).log()
        return torch.func.jacrev(log_p)(self.theta).flatten(2)


def gradient(f, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(f(theta), theta)[0].flatten()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nu", [0.0, 0.3, 1.0])
def test_proposition_1_interpolated_gradient(seed, nu):
    """Eq. (9), against autograd through the exact values of pi and mu.

    mu(s) is a point of the product of simplices, on which reward and dynamics are multilinear; it
    is a sharper softmax than pi, so the two have different values and state distributions.
    """
    problem = Problem(seed)
    sharp = functools.partial(problem.policies, temperature=0.5)

    def objective(theta):  # Eq. (8) at the first state: (1 - nu) V^pi + nu V^mu
        pi, mu = (problem.probabilities(f(theta)) for f in (problem.policies, sharp))
        return (1 - nu) * problem.solve(pi)[0] + nu * problem.solve(mu)[0]

    p = problem.probabilities(problem.policies(problem.theta))
    _, _, Q, d = problem.solve(p)
    stochastic = torch.einsum("s,sb,sbk,sb->k", d, p, problem.scores(), Q)
    mu = sharp(problem.theta)
    _, _, Q_mu, d_mu = problem.solve(problem.probabilities(mu))
    point = mu.clone().requires_grad_()  # the gradient of Q^mu(s, a) by a, at a = mu(s)
    by_action = torch.autograd.grad((problem.probabilities(point) * Q_mu).sum(), point)[0]
    jacobian = torch.func.jacrev(sharp)(problem.theta).flatten(3)  # [S, n, m, parameters]
    deterministic = torch.einsum("s,snmk,snm->k", d_mu, jacobian, by_action)
    expected = gradient(objective, problem.theta)
    torch.testing.assert_close(
        maipg.interpolate(stochastic, deterministic, nu), expected, atol=1e-10, rtol=1e-8
    )
    assert (stochastic - deterministic).abs().max() > 1e-3  # or nu would not matter


@pytest.mark.parametrize("kind, equal", [("vdn", True), ("qmix", False)])
def test_proposition_2_by_enumeration(kind, equal):
    """Eq. (12) = Eq. (10) in expectation, where E[grad log pi Q] = grad mu grad Q.

    For discrete actions with mu = E[f] = pi that holds for a Q which is linear in each action, as
    VDN's is; not for QMIX, whose Q(E[a]) is not E[Q(a)]. The paper's words cover both.
    """
    n, m, nu = 3, 3, 0.4
    rng = torch.Generator().manual_seed(0)
    payoffs = torch.rand(1, m, m, m, generator=rng)
    logits = torch.randn(1, n, m, generator=rng)
    args = maipg.Args(mixer=kind, device="cpu", mu="expectation")
    critic = maipg.Critic(1, n, m, args, rng)
    critic.tables.normal_(generator=rng)
    joint = maipg.all_joint_actions(n, m, "cpu").double()
    log_p = lambda x: torch.einsum("bnm,znm->b", joint, x.log_softmax(-1))
    score = torch.func.jacrev(log_p)(logits).flatten(1)  # [m^n, n m]
    p, advantage = log_p(logits).exp(), payoffs.flatten() - payoffs.mean()
    q = critic(joint[None])[0]
    second = -gradient(
        lambda x: maipg.deterministic_term(critic, x.log_softmax(-1), args, rng).sum(), logits
    )
    form_10 = (1 - nu) * (p * advantage) @ score + nu * second
    form_12 = (1 - nu) * (p * (advantage - q)) @ score + second
    distance = (form_10 - form_12).abs().max()
    assert distance < 1e-12 if equal else distance > 1e-3


def test_proposition_2_for_gaussians_by_monte_carlo():
    """Eq. (11) for the mean of a Gaussian; Q is no polynomial. Within 4 standard errors."""
    rng, samples = torch.Generator().manual_seed(0), 1_000_000
    mean, std = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 0.8])
    noise = torch.randn(samples, 2, generator=rng)
    a = (mean + std * noise).requires_grad_()
    q = (a[:, 0] * a[:, 1]).sin() + a[:, 0] ** 2 * a[:, 1].cos()
    by_action = torch.autograd.grad(q.sum(), a)[0]  # d f / d mean = 1
    by_score = noise / std * q.detach().unsqueeze(-1)
    difference = by_score - by_action
    error = difference.std(0) / math.sqrt(samples)
    assert (difference.mean(0).abs() < 4 * error).all() and (error < 5e-3).all()
    assert (by_action.mean(0).abs() > 20 * error).all()  # there is something to agree on


def trace(gradients):
    return gradients.flatten(1).var(0).sum().item()


def replicated_gradients(nu, payoffs, logits, critic, args, rng, refit):
    """One estimate of the interpolated gradient per run, each from a batch of its own [R, n, m]."""
    logits = logits.clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    draws = log_pi.detach().unsqueeze(1).expand(-1, args.batch_size, -1, -1)
    actions = maipg.gumbel_max(draws, rng).argmax(-1)
    actions = torch.nn.functional.one_hot(actions, args.m).double()
    rewards = maipg.rewards_of(payoffs, actions)
    if refit:
        optimizer = torch.optim.Adam(critic.parameters, 0.05)
        weights = torch.full_like(rewards, 1 / args.batch_size)
        maipg.fit(critic, optimizer, actions, rewards, weights, 200)
    advantages = rewards - 0.5
    old = (draws * actions).sum(-1)
    first = maipg.sampled_term(log_pi, actions, old, advantages, args)
    second = maipg.deterministic_term(critic, log_pi, args, rng)
    loss = maipg.interpolate(first, second, nu).sum()
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("refit", [False, True])
def test_equation_13_variance(refit):
    """With a frozen critic, variance(nu) = (1 - nu)^2 variance(0) + nu^2 variance(1). With a critic
    that was fitted to the same batch it hardly falls: both terms then carry the same noise."""
    n, m, runs = 3, 3, 4000
    rng = torch.Generator().manual_seed(1)
    payoffs = torch.rand(1, m, m, m, generator=rng).expand(runs, m, m, m)
    logits = torch.randn(1, n, m, generator=rng).expand(runs, n, m)
    args = maipg.Args(device="cpu", batch_size=32)
    args.m = m
    critic = maipg.Critic(runs, n, m, args, rng)
    maipg.fit_vdn_exactly(critic, payoffs, logits.softmax(-1))
    if refit:
        critic = maipg.Critic(runs, n, m, args, rng)
    estimate = lambda nu: replicated_gradients(nu, payoffs, logits, critic, args, rng, refit)
    v0, v_half, v1 = (trace(estimate(nu)) for nu in (0.0, 0.5, 1.0))
    if refit:
        assert v_half > 0.5 * v0
    else:
        assert v_half == pytest.approx(0.25 * v0 + 0.25 * v1, rel=0.08)
        assert v1 < 0.2 * v0  # what is left is the Gumbel noise


@pytest.mark.parametrize("seed", range(60))
def test_proposition_3_bound(seed):
    """|J(pi) - J_hat(pi)| <= 2 sqrt(2) eps nu / (1 - gamma)^2 + nu delta, with Q_hat the VDN that
    least squares fits to Q^mu under pi (Eq. 14), and mu the most probable actions."""
    problem = Problem(seed, n=2 + seed % 2, scale=[0.3, 1.0, 3.0, 10.0][seed % 4])
    pi = problem.policies(problem.theta)
    p = problem.probabilities(pi)
    J, _, _, d = problem.solve(p)
    greedy = torch.nn.functional.one_hot(pi.argmax(-1), problem.m).double()
    chosen = problem.probabilities(greedy)
    _, _, Q_mu, _ = problem.solve(chosen)
    features = torch.cat([problem.joint.flatten(1), torch.ones(len(problem.joint), 1)], -1).numpy()
    fitted = []
    for s in range(S):  # one regression a state: the weights d(s) do not matter
        weight = p[s].sqrt().numpy()
        w, *_ = np.linalg.lstsq(features * weight[:, None], Q_mu[s].numpy() * weight, rcond=None)
        fitted.append(features @ w)
    Q_hat = torch.tensor(np.stack(fitted))
    delta = (Q_mu - Q_hat).abs().max()
    eps = -(p * chosen).sum(-1).log().min()
    for nu in (0.1, 0.5, 1.0):
        J_hat = (1 - nu) * J + nu * problem.rho @ (chosen * Q_hat).sum(-1)
        bound = 2 * math.sqrt(2) * eps * nu / (1 - GAMMA) ** 2 + nu * delta
        assert (J - J_hat).abs() <= bound + 1e-12


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("n", [2, 3])
def test_proposition_5_compatible_vdn(seed, n):
    """The least-squares Q^w = w . grad log pi + V(s) gives the true gradient, for any V."""
    problem = Problem(seed, n)
    p, score = problem.probabilities(problem.policies(problem.theta)), problem.scores()
    _, _, Q, d = problem.solve(p)
    V = torch.randn(S, 1, generator=torch.Generator().manual_seed(seed))  # not the true one
    weight = (d[:, None] * p).sqrt()
    rows, goal = (weight[..., None] * score).flatten(0, 1), (weight * (Q - V)).flatten()
    w = np.linalg.lstsq(rows.numpy(), goal.numpy(), rcond=None)[0]
    Q_w = score @ torch.tensor(w) + V
    got = torch.einsum("s,sb,sbk,sb->k", d, p, score, Q_w)
    objective = lambda theta: problem.solve(problem.probabilities(problem.policies(theta)))[0]
    torch.testing.assert_close(got, gradient(objective, problem.theta), atol=1e-8, rtol=0)
    assert (Q - Q_w).abs().max() > 0.05  # though Q itself is not reproduced
    # It is a sum of utilities: changing agent 0's action changes Q_w by as much, whoever else acts.
    table = Q_w.view(S, problem.m, -1)
    torch.testing.assert_close(
        table[:, 0] - table[:, 1], (table[:, 0] - table[:, 1])[:, :1].expand_as(table[:, 0])
    )


@pytest.mark.parametrize("n, m", [(2, 3), (2, 10), (3, 5), (4, 3)])
def test_proposition_5_in_the_script(n, m):
    """fit_vdn_exactly is numpy's weighted least squares, and its gradient is that of E_pi[R]."""
    rng = torch.Generator().manual_seed(n * m)
    payoffs = torch.rand(5, *[m] * n, generator=rng)
    logits = (2 * torch.randn(5, n, m, generator=rng)).requires_grad_()
    args = maipg.Args(device="cpu", mu="expectation")
    critic = maipg.Critic(5, n, m, args, rng)
    maipg.fit_vdn_exactly(critic, payoffs, logits.detach().softmax(-1))
    joint = maipg.all_joint_actions(n, m, "cpu").double()
    features = torch.cat([joint.flatten(1), torch.ones(len(joint), 1)], -1).numpy()
    p = torch.einsum("bnm,znm->zb", joint, logits.detach().log_softmax(-1)).exp()
    for k in range(5):
        weight, goal = p[k].sqrt().numpy(), payoffs[k].flatten().numpy()
        w = np.linalg.lstsq(features * weight[:, None], goal * weight, rcond=None)[0]
        np.testing.assert_allclose(critic(joint[None])[k].numpy(), features @ w, atol=1e-7)
    term = maipg.deterministic_term(critic, logits.log_softmax(-1), args, rng).sum()
    got = torch.autograd.grad(-term, logits)[0]
    true = torch.autograd.grad(maipg.expected_reward(payoffs, logits.softmax(-1)).sum(), logits)[0]
    torch.testing.assert_close(got, true, atol=1e-8, rtol=0)
    # Under the wrong distribution the same regression points elsewhere: on-policy is essential.
    maipg.fit_vdn_exactly(critic, payoffs, torch.full_like(logits, 1 / m))
    term = maipg.deterministic_term(critic, logits.log_softmax(-1), args, rng).sum()
    assert (torch.autograd.grad(-term, logits)[0] - true).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(10))
def test_proposition_6_compatible_deterministic_critic(seed):
    """Q^w with grad_a Q^w = (grad mu)^T w, fitted to grad_a Q^mu, gives the true gradient of mu."""
    problem = Problem(seed)
    mu = problem.policies(problem.theta)
    _, _, Q, d = problem.solve(problem.probabilities(mu))
    point = mu.clone().requires_grad_()
    by_action = torch.autograd.grad((problem.probabilities(point) * Q).sum(), point)[0]
    jacobian = torch.func.jacrev(problem.policies)(problem.theta).flatten(3)  # [S, n, m, k]
    weight = d.sqrt()[:, None, None]
    rows = (weight[..., None] * jacobian).flatten(0, 2).numpy()
    w = np.linalg.lstsq(rows, (weight * by_action).flatten().numpy(), rcond=None)[0]
    got = torch.einsum("s,snmk,snm->k", d, jacobian, jacobian @ torch.tensor(w))
    objective = lambda theta: problem.solve(problem.probabilities(problem.policies(theta)))[0]
    torch.testing.assert_close(got, gradient(objective, problem.theta), atol=1e-8, rtol=0)
