"""What several files of these tests use: draws, a short FedLoGe, and what a method does asked from outside."""

import torch

from fedloge.federated import live_state, load_client, train_client

FEDLOGE = "{name: fedloge, norm: 1.0, etf_steps: 50}"


def gaussian(*shape, seed=0):
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(server, problem, batch, k=0, loss=None):
    """The gradients of the method's loss on one batch, by parameter; the network as it stands."""
    network = server.network
    network.zero_grad()
    (loss or server.method.loss)(network, *batch, problem.clients[k], server.state).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def personal_states(lab, server, problem, config):
    """The state of each client's fine-tuned network, as it is when the evaluation reads it."""
    states, method = [], server.method
    for client in problem.clients:
        load_client(server, client.index)
        names = ("fine tune", server.round, client.index)
        train_client(server, problem.train, client, method.fine_tuning(), config, names, method.fine_tuning_loss)
        states.append(lab.copy(live_state(server.network)))
    return states


def personal_accuracy(server, problem, states):
    """Mean accuracy of whole networks on the local tests, by hand."""
    found = []
    for state, local in zip(states, problem.local_tests, strict=True):
        server.network.load_state_dict(state)
        server.network.eval()
        images, labels = problem.test.batch(local, torch.Generator())
        with torch.no_grad():
            found.append(
                float((server.method.personal_logits(server.network, images).argmax(1) == labels).double().mean())
            )
    return sum(found) / len(found)
