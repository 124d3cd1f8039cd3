"""Keras' optimisers: oracles T11, T12, and what is frozen stays (T9)."""

import pytest
import torch

from lightcnn.optim import (
    build_optimizer,
    narrowed_state,
    one_cycle,
    optimizer_state,
    restore_optimizer,
    set_rate,
    trainable,
)

GRADIENTS = ([0.1, -2.0], [-0.2, 1.0], [0.3, 0.5], [0.05, -0.7])
NADAM = ([0.99893719, -0.99893719], [0.99981886, -0.99932981], [0.99898714, -0.99953324], [0.99878407, -0.99919236])
SGD = ([0.99980986, -0.99619991], [1.00010872, -0.99647981], [0.99962771, -0.99678171], [0.99936980, -0.99527341])


def played(optimizer_of, gradients=GRADIENTS):
    parameter = torch.tensor([1.0, -1.0], requires_grad=True)
    optimizer, values = optimizer_of([parameter]), []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        values.append(parameter.detach().clone())
    return torch.stack(values)


@pytest.mark.parametrize(("name", "wanted"), [("nadam", NADAM), ("sgd", SGD)])
def test_the_optimisers_take_keras_steps(name, wanted):
    found = played(lambda p: build_optimizer(name, p))
    torch.testing.assert_close(found, torch.tensor(wanted), atol=2e-7, rtol=0)


def test_torchs_own_defaults_take_other_steps():
    nadam = played(lambda p: torch.optim.NAdam(p, lr=1e-3, eps=1e-7))
    assert abs(float(nadam[1, 0]) - 0.99985009) < 2e-7
    coupled = played(lambda p: torch.optim.SGD(p, 1e-3, 0.9, nesterov=True, weight_decay=1e-4))
    assert abs(float(coupled[3, 0]) - 0.99936903) < 2e-7


def test_decay_moves_what_is_trainable_and_nothing_else():
    weights = {"a.w": torch.ones(3), "b.w": torch.ones(3)}
    optimizer = build_optimizer("sgd", trainable(weights, ["a.w"]))
    assert not weights["b.w"].requires_grad
    (weights["a.w"].sum() * 0).backward()  # a gradient of exactly zero
    optimizer.step()
    assert torch.equal(weights["b.w"], torch.ones(3))
    torch.testing.assert_close(weights["a.w"].detach(), torch.full((3,), 1 - 1e-7))
    assert len(optimizer.state_dict()["state"]) == 1


@pytest.mark.parametrize("name", ["nadam", "sgd"])
def test_a_narrowed_optimiser_goes_on_with_each_networks_own_moments(name):
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in range(4)]

    def steps(values, optimizer, some):
        for gradient in some:
            values.grad = gradient.clone()
            optimizer.step()
        return values

    whole = torch.ones(3, 4, requires_grad=True)
    steps(whole, build_optimizer(name, [whole]), gradients)
    first = torch.ones(3, 4, requires_grad=True)
    optimizer = build_optimizer(name, [first])
    steps(first, optimizer, gradients[:2])
    part = first.detach()[[0, 2]].requires_grad_()
    again = build_optimizer(name, [part])
    restore_optimizer(again, narrowed_state(optimizer_state(optimizer), [0, 2], 3))
    steps(part, again, [g[[0, 2]] for g in gradients[2:]])
    assert torch.equal(part, whole[[0, 2]])


def test_one_cycle_rises_and_falls():
    rates = [one_cycle(s, 100, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.004)
    assert max(rates) == pytest.approx(rates[20]) == pytest.approx(0.1)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4)
    assert one_cycle(0, 1, 0.1) > 0
    optimizer = build_optimizer("sgd", [torch.ones(1, requires_grad=True)])
    set_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
