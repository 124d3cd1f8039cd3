"""CReFF (Shang et al. 2022): the classifier is trained anew on the server, on features made to fit gradients.

Each round a client sends, for each class that it has, the classifier's mean gradient on its real features of the class.
The server holds some synthetic features a class, moves them until their gradients point the same way (1 - cosine, row
by row), trains the classifier on them, in balance, and sends it back.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloge.baselines import FedAvg
from fedloge.config import CreffConfig
from fedloge.federated import Client, Server, State
from fedloge.model import Head, Network, head_of
from shared.batches import Batches, split_batches
from shared.gpu import stream

GRADIENT_BATCH = 500


class Synthetic(nn.Module):
    """The server's features [C, n, d], and for which classes a gradient has ever come [C]."""

    features: Tensor
    known: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("known", torch.zeros(len(features), dtype=torch.bool))


class Creff(FedAvg):
    """FedAvg for backbone and classifier; the generic model has the retrained classifier. Personal models: the same."""

    @property
    def settings(self) -> CreffConfig:
        """The method's section of the configuration."""
        assert isinstance(self.config.method, CreffConfig)
        return self.config.method

    def network(self) -> Network:
        """FedAvg's parts, `retrained` (a classifier) and `synthetic`."""
        network = super().network()
        width = network.feature_dim
        network["retrained"] = self.head("classifier", width)
        size = (self.shape.num_classes, self.settings.features_per_class, width)
        network["synthetic"] = Synthetic(torch.randn(size, generator=stream(self.config.seed, "init", "synthetic")))
        return network

    def is_fixed(self, entry: str) -> bool:
        """The server alone changes the retrained classifier and the features."""
        return entry.startswith(("retrained.", "synthetic."))

    def extra_message(self, network: Network, source: Batches, client: Client, generator: torch.Generator) -> State:
        """Mean gradients by class of the retrained classifier [C, C, d+1], bias last; and the classes it has [C]."""
        network.eval()
        classes = self.shape.num_classes
        sums = torch.zeros(classes, classes, network.feature_dim + 1, device=client.images.device)
        with torch.no_grad():
            for images, targets in source.prefetch(split_batches(client.images, GRADIENT_BATCH), generator):
                features = network.features(images).float()
                errors = network.logits("retrained", features).softmax(dim=1) - functional.one_hot(targets, classes)
                of_class = functional.one_hot(targets, classes).to(features)
                sums += torch.einsum("bk,bc,bd->kcd", of_class, errors, with_one(features))
        present = client.counts > 0
        means = sums / client.counts.clamp(min=1)[:, None, None]
        return {"gradients": means, "present": present.to(means)}

    def server_step(self, server: Server, message: State) -> None:
        """Fit the features to the clients' mean gradients, then retrain the classifier on all that were ever fitted."""
        weight, bias = head_of(server.state, "retrained")
        assert bias is not None
        seen = message["present"] > 0
        wanted = message["gradients"] / message["present"].clamp(min=1)[:, None, None]
        features, known = server.state["synthetic.features"], server.state["synthetic.known"]
        known.logical_or_(seen)
        features.copy_(fit_features(features, wanted, seen, (weight, bias), self.settings))
        new_weight, new_bias = retrain(features[known], known, head_of(server.state, "classifier"), self.settings)
        weight.copy_(new_weight)
        bias.copy_(new_bias)

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """The retrained classifier, and the averaged one."""
        return {"": head_of(server.state, "retrained"), "raw": head_of(server.state, "classifier")}


def fit_features(features: Tensor, wanted: Tensor, seen: Tensor, head: Head, settings: CreffConfig) -> Tensor:
    """Move the features [C, n, d] of the seen classes until their gradients point as `wanted` [C, C, d+1]."""
    moved = features.clone().requires_grad_()
    optimizer = torch.optim.SGD([moved], settings.match_lr)
    for _ in range(settings.match_steps):
        optimizer.zero_grad()
        cosines = functional.cosine_similarity(class_gradients(moved, head), wanted, dim=-1)
        ((1 - cosines).sum(dim=1) * seen).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return moved.detach()


def class_gradients(features: Tensor, head: Head) -> Tensor:
    """The head's mean cross-entropy gradient on each class's features: [C, n, d] -> [C, C, d+1], bias last."""
    classes = features.shape[0]
    errors = functional.linear(features, *head).softmax(dim=-1) - torch.eye(classes).to(features)[:, None, :]
    return torch.einsum("knc,knd->kcd", errors, with_one(features)) / features.shape[1]


def retrain(features: Tensor, known: Tensor, head: Head, settings: CreffConfig) -> tuple[Tensor, Tensor]:
    """Train a copy of the head on the features [S, n, d] of the S known classes, all at each step: a balanced set."""
    weight, bias = head
    assert bias is not None
    new_weight, new_bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.SGD([new_weight, new_bias], settings.retrain_lr)
    targets = known.nonzero()[:, 0].repeat_interleave(features.shape[1])
    for _ in range(settings.retrain_steps):
        optimizer.zero_grad()
        logits = functional.linear(features.flatten(0, 1), new_weight, new_bias)
        functional.cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return new_weight.detach(), new_bias.detach()


def with_one(features: Tensor) -> Tensor:
    """Append the constant channel that belongs to the bias: [..., d] -> [..., d+1]."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)
