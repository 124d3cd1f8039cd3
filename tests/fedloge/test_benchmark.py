"""The benchmark of a round compares two sides that do the same work; its timings are not tested."""

import csv

import pytest
import torch

from fedloge.federated import add_client, finish_round, live_state, load_client


@pytest.fixture(scope="module")
def bench(load_benchmark):
    """The benchmark as a module."""
    return load_benchmark("fedloge_round")


@pytest.mark.parametrize(("network", "method"), [("mlp", "fedavg"), ("convnet", "fedloge")])
def test_both_sides_take_the_same_number_of_steps(bench, network, method):
    server, problem, config = bench.begin(network, method, 3, 0, bench.TINY)
    # a last batch of one image: ours joins it to the one before, the reference drops it
    one_over = bench.Client(0, problem.clients[0].images[: config.batch_size + 1], problem.clients[0].counts)
    problem = bench.replace(problem, clients=(one_over, *problem.clients[1:]))
    reference = bench.Reference(server, problem, config, 0)
    steps = bench.our_round(server, problem, config)[0]
    assert steps == reference.round()[0] == 1 + sum(-(-c.size // config.batch_size) for c in problem.clients[1:])


def test_the_references_average_is_ours_on_the_same_client_states(bench):
    server, problem, _ = bench.begin("convnet", "fedloge", 3, 0, bench.TINY)
    total, states = sum(client.size for client in problem.clients), []
    for client in problem.clients:
        load_client(server, client.index)
        with torch.no_grad():
            for tensor in live_state(server.network).values():
                noise = torch.randint(9, tensor.shape) if not tensor.is_floating_point() else torch.randn(tensor.shape)
                tensor.add_(noise)
        states.append({entry: tensor.detach().clone() for entry, tensor in live_state(server.network).items()})
        add_client(server, client, client.size / total, {})
    finish_round(server)
    mean = bench.average(states, [client.size for client in problem.clients])
    sent = {entry: mean[entry] for entry in server.state if entry != "etf.weight"}
    torch.testing.assert_close(sent, {entry: server.state[entry] for entry in sent})
    assert any(not tensor.is_floating_point() for tensor in sent.values())


@pytest.mark.parametrize("method", ["fedavg", "fedloge"])
def test_both_sides_agree_on_the_accuracy_of_the_same_models(bench, method):
    server, problem, config = bench.begin("mlp", method, 3, 0, bench.TINY)
    ours = bench.our_round(server, problem, config)
    reference = bench.Reference(server, problem, config, 0)
    reference.network.load_state_dict(server.state, strict=False)
    for k, state in enumerate(reference.states):
        state.update({entry: values[k] for entry, values in server.private.items()})
    assert reference.evaluate() == pytest.approx(ours[1:], abs=0.011)  # one image of 100 on an edge


def test_the_smallest_run_writes_its_rows(bench, tmp_path, capsys):
    out = tmp_path / "new" / "benchmarks.csv"
    assert bench.main(["--rounds", "1", "--repeats", "1", "--out", str(out)], bench.TINY) == 0
    assert "fedloge, 3 clients" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert {"ours", "reference", "ratio", "unit", "n", "device", "threads", "torch", "commit"} <= set(rows[0])
    assert {row["benchmark"] for row in rows} > {"round", "accuracy", "evaluation of K heads", "bytes held"}
    assert all(float(row["ratio"]) > 0 for row in rows if row["reference"])
    shares = [float(row["ours"]) for row in rows if row["benchmark"] == "where our time goes"]
    assert sum(shares) == pytest.approx(200)  # of two methods
