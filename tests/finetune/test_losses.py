"""Losses and their coefficients against the same formulas in torch, differentiated by it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.loss import _coefficients
from flexllm_jax.finetune.losses import LOSSES, Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch

LENGTHS = (5, 9, 4, 6)  # two pairs
SLOTS, FIRST, UNIT = 48, 8, 8


def microbatch(loss, seed=0):
    """Four sequences with some labels, weights of both signs, and advantages 0, too."""
    random = np.random.default_rng(seed)
    data = []
    for number, length in enumerate(LENGTHS):
        label = random.integers(0, 50, length)
        label[:2] = -1
        weight = np.where(label < 0, 0, random.choice([1.0, 0.5, -2.0, 0.0], length))
        if loss.of_sequences:
            weight = np.where(label < 0, 0.0, 1.0)
        advantage = random.choice([0.0, 1.5, -0.7], length)
        if loss.name in ("dpo", "ipo", "simpo"):
            advantage = np.full(length, 1.0 - 2 * (number % 2))
        floats = (weight, random.normal(-1, 0.5, length), advantage)
        data.append(
            Datum(
                random.integers(0, 50, length).astype(np.int32),
                label.astype(np.int32),
                *(x.astype(np.float32) for x in floats),
            )
        )
    return PackedMicrobatch(tuple(data), loss, pairs=(1, 0, 3, 2))


def reference(packed, logprobs):
    """The loss of the whole microbatch in torch, from each sequence's log-probabilities."""
    name, s = packed.loss.name, packed.loss.settings
    q, A, w = (
        [torch.tensor(getattr(d, field)).double() for d in packed.data]
        for field in ("reference", "advantage", "weight")
    )

    def clipped(ratio, advantage):
        return -torch.minimum(ratio * advantage, ratio.clamp(s.low, s.high) * advantage).sum()

    total = torch.zeros((), dtype=torch.float64)
    for i, lp in enumerate(logprobs):
        ratio = torch.exp(lp - q[i])
        if name == "cross_entropy":
            total = total - (w[i] * lp).sum()
        elif name == "importance_sampling":
            total = total - (ratio * A[i]).sum()
        elif name == "ppo":
            total = total + clipped(ratio, A[i])
        elif name == "cispo":
            total = total - (ratio.clamp(s.low, s.high).detach() * lp * A[i]).sum()
        elif name == "dro":
            total = total - (lp * A[i] - s.beta / 2 * (lp - q[i]) ** 2).sum()
        elif name == "sapo":
            tau = torch.where(A[i] > 0, s.tau_pos, s.tau_neg)
            total = total - (torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A[i]).sum()
        elif name == "gspo":  # the gradient passes through the token's own log-probability
            of_all = torch.exp((w[i] * (lp - q[i])).sum() / w[i].sum()).detach()
            total = total + clipped(of_all * torch.exp(lp - lp.detach()), A[i])
    if name in ("dpo", "ipo", "simpo"):
        sums = [(w[i] * (lp - q[i])).sum() for i, lp in enumerate(logprobs)]
        means = [x / w[i].sum() for i, x in enumerate(sums)]
        for i in range(0, len(logprobs), 2):
            if name == "dpo":
                total = total - logsigmoid(s.beta * (sums[i] - sums[i + 1]))
            elif name == "ipo":
                total = total + (means[i] - means[i + 1] - 1 / (2 * s.beta)) ** 2
            else:
                total = total - logsigmoid(s.beta * (means[i] - means[i + 1]) - s.gamma)
    return total


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [0.1, 1.0], ids=["near", "far"])
def test_losses_and_coefficients_are_those_of_torch(name, far):
    packed = microbatch(Loss.of(name))
    random = np.random.default_rng(1)
    counted = packed.label >= 0
    own = np.concatenate([d.reference for d in packed.data])
    logprob = np.where(counted, own + random.normal(0, far, packed.tokens), 0).astype(np.float32)
    pieces = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in packed.split(logprob)
    ]
    # Where there is no label there is no loss, whatever the formula.
    labels = [torch.tensor(d.label >= 0) for d in packed.data]
    masked = [
        torch.where(has, x, torch.tensor(d.reference).double())
        for has, x, d in zip(labels, pieces, packed.data, strict=True)
    ]
    if name == "simpo":
        masked = [torch.where(has, x, 0.0) for has, x in zip(labels, pieces, strict=True)]
    loss = reference(packed, masked)
    loss.backward()
    expected = np.concatenate([x.grad.numpy() for x in pieces])
    assert np.abs(expected).max() > 1e-3, "nothing to compare"

    losses, coefficients = packed.evaluate(logprob)
    np.testing.assert_allclose(np.where(counted, coefficients, 0), expected, atol=2e-6, rtol=2e-6)
    if name in ("cross_entropy", "dpo", "ipo", "simpo"):
        assert losses.sum() == pytest.approx(loss.item(), rel=1e-5)
    else:
        kept = reference(packed, [torch.tensor(x).double() for x in packed.split(logprob)])
        assert losses.sum() == pytest.approx(kept.item(), rel=1e-5)

    # On the device the same, a slice at a time.
    table = packed.table(SLOTS, FIRST, np.zeros(packed.tokens, np.int32))
    loss, table = jnp.asarray(packed.loss.packed()), MicrobatchTable.unpack(jnp.asarray(table))
    all_logprobs = np.full(SLOTS, np.nan, np.float32)  # whatever earlier microbatches left
    all_logprobs[FIRST : FIRST + packed.tokens] = logprob
    device = [
        _coefficients(loss, table, jnp.asarray(all_logprobs), start, UNIT)
        for start in range(FIRST, FIRST + packed.tokens, UNIT)
    ]
    device = np.concatenate(device)[: packed.tokens]
    np.testing.assert_allclose(np.where(counted, device, 0), expected, atol=5e-6, rtol=5e-6)


def test_an_advantage_of_zero_gains_nothing_whatever_the_ratio():
    for name in ("importance_sampling", "ppo", "cispo", "sapo"):
        packed = PackedMicrobatch((_datum(advantage=0.0, reference=-1e4),), Loss.of(name))
        with np.errstate(over="ignore", invalid="ignore"):
            loss, coefficients = packed.evaluate(np.float32([-1, -2, 0]))
        assert not loss.any() and not coefficients.any()


def _datum(advantage, reference):
    full = np.full(3, 1.0, np.float32)
    return Datum(
        np.int32([1, 2, 3]), np.int32([2, 3, -1]), full, full * reference, full * advantage
    )


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("hinge", {}, "unknown loss 'hinge'; use one of cross_entropy, importance_sampling, ppo"),
        ("ppo", {"beta": 1.0}, "beta is no setting of the loss ppo; it has: low, high"),
        ("cross_entropy", {"low": 1.0}, "it has: none"),
        ("dpo", {"beta": 0.0}, "beta=0.0 of the loss dpo must be more than 0"),
        ("dro", {"beta": float("nan")}, "beta=nan of the loss dro must be a finite number"),
        ("ppo", {"low": 2.0}, "low=2.0 and high=1.2 of the loss ppo must be bounds"),
    ],
)
def test_what_a_loss_is_not_configured_by_is_refused_by_name(name, settings, reason):
    with pytest.raises(ValueError, match=reason):
        Loss.of(name, **settings)
