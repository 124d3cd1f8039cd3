"""What the paper compares with. `FedAvg` is the plainest method and the interface; each other says what it changes.

All share the backbone, the data order, the draws and the optimiser. A generic or personal model that a method does not
define is reported all the same, as its docstring says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloge.config import Config, DittoConfig, FedAvgFtConfig, FedBabuConfig, FedEtfConfig, FedProxConfig, FedRepConfig
from fedloge.federated import Client, Phase, Server, State
from fedloge.method import simplex_etf
from fedloge.model import (
    Head,
    Network,
    Shape,
    average_clients,
    build_backbone,
    for_all,
    head_of,
    linear_head,
    some_heads,
)
from shared.batches import Batches
from shared.errors import ConfigError
from shared.gpu import stream


class FedAvg:
    """McMahan et al. 2017: one backbone and one classifier, trained by cross-entropy and averaged by client size.

    Personal model: the averaged model, not adapted.
    """

    heads_bias = True
    whole_personal = False
    realigns = False

    def __init__(self, config: Config, shape: Shape) -> None:
        self.config, self.shape = config, shape

    def network(self) -> Network:
        """Parts `backbone` and `classifier`."""
        backbone = build_backbone(
            self.config.model.name, self.shape.in_channels, self.shape.image_size, self.init_seed("backbone")
        )
        return Network({"backbone": backbone, "classifier": self.head("classifier", backbone.feature_dim)})

    def head(self, name: str, feature_dim: int) -> nn.Linear:
        """A new linear head, drawn from the run's stream of that name."""
        return linear_head(feature_dim, self.shape.num_classes, self.heads_bias, self.init_seed(name))

    def init_seed(self, name: str) -> int:
        """The seed of one part's first values."""
        return stream(self.config.seed, "init", name).initial_seed()

    def is_private(self, entry: str) -> bool:
        """Nothing is private."""
        return False

    def is_fixed(self, entry: str) -> bool:
        """Nothing is fixed."""
        return False

    def phases(self) -> Sequence[Phase]:
        """All that is not fixed, together."""
        return [Phase(self.config.local_epochs, lambda entry: not self.is_fixed(entry))]

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(network.logits("classifier", network.features(images)), targets)

    def extra_message(self, network: Network, source: Batches, client: Client, generator: torch.Generator) -> State:
        """Nothing beside the state."""
        return {}

    def server_step(self, server: Server, message: State) -> None:
        """Nothing after averaging."""

    def generic_state(self, server: Server) -> State:
        """Nothing beside the average."""
        return {}

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """The averaged classifier."""
        return {"": head_of(server.state, "classifier")}

    def personal_heads(self, server: Server, clients: slice = slice(None)) -> dict[str, Head]:
        """The averaged classifier, for every client."""
        return {"": for_all(head_of(server.state, "classifier"), len(self.shape.counts[clients]))}

    def fine_tuning(self) -> Sequence[Phase]:
        """None."""
        return []

    def fine_tuning_loss(
        self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State
    ) -> Tensor:
        """That of the rounds."""
        return self.loss(network, images, targets, client, received)

    def personal_logits(self, network: Network, images: Tensor) -> Tensor:
        """Logits [B, C] of the network as it stands."""
        return network.logits("classifier", network.features(images))


class FedAvgFt(FedAvg):
    """FedAvg; before its test a client trains the averaged model, all of it, for some epochs on its own data."""

    whole_personal = True

    def fine_tuning(self) -> Sequence[Phase]:
        """Everything."""
        settings = self.config.method
        assert isinstance(settings, FedAvgFtConfig)
        return [Phase(settings.fine_tune_epochs, lambda entry: True)]


class FedProx(FedAvg):
    """Li et al. 2020: plus (mu / 2) ||w - w^t||^2, the squared distance to the received model, in every batch."""

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """Cross-entropy and the proximal term."""
        settings = self.config.method
        assert isinstance(settings, FedProxConfig)
        proximal = settings.mu / 2 * squared_distance(network, received, "")
        return super().loss(network, images, targets, client, received) + proximal


class FedBn(FedAvg):
    """Li et al. 2021: batch norm (affine and statistics) stays at the clients; the rest is averaged.

    Personal model: the averaged weights with the client's own batch norm. The generic model is not the method's own: it
    has the clients' batch norms averaged by size.
    """

    whole_personal = True

    def network(self) -> Network:
        """As FedAvg; remembers which entries belong to a batch norm."""
        network = super().network()
        norm = nn.modules.batchnorm._BatchNorm
        self.norm_entries = tuple(f"{name}." for name, part in network.named_modules() if isinstance(part, norm))
        if not self.norm_entries:
            raise ConfigError(f"method fedbn: {self.config.model.name} has no batch norm; take convnet or a ResNet")
        return network

    def is_private(self, entry: str) -> bool:
        """The batch norms' entries."""
        return entry.startswith(self.norm_entries)

    def generic_state(self, server: Server) -> State:
        """The batch norms, averaged by client size."""
        return {entry: average_clients(value, self.shape.counts) for entry, value in server.private.items()}


class FedPer(FedAvg):
    """Arivazhagan et al. 2019: the classifier is private, trained together with the backbone, and never sent.

    Personal model: the averaged backbone with the client's classifier. The generic model is not the method's own: it
    has the mean of the private classifiers, weighted by client size.
    """

    def is_private(self, entry: str) -> bool:
        """The classifier."""
        return entry.startswith("classifier.")

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """The mean of the private classifiers."""
        weight, bias = head_of(server.private, "classifier")
        counts = self.shape.counts
        return {"": (average_clients(weight, counts), None if bias is None else average_clients(bias, counts))}

    def personal_heads(self, server: Server, clients: slice = slice(None)) -> dict[str, Head]:
        """Each client's own."""
        return {"": some_heads(head_of(server.private, "classifier"), clients)}


class FedRep(FedPer):
    """Collins et al. 2021: as FedPer, but in each round first the head alone is trained, then the backbone alone."""

    def phases(self) -> Sequence[Phase]:
        """Head epochs with the backbone standing still (its batch norm too), then body epochs with the head fixed."""
        settings = self.config.method
        assert isinstance(settings, FedRepConfig)
        head = Phase(settings.head_epochs, lambda entry: entry.startswith("classifier."))
        return [head, Phase(self.config.local_epochs, lambda entry: entry.startswith("backbone."))]


class Ditto(FedAvg):
    """Li et al. 2021: beside FedAvg, each client keeps a whole model of its own, pulled towards the received one.

    min over v_k of CE(v_k) + (lambda / 2) ||v_k - w^t||^2. Both see the same batches, and one step trains both: their
    parameters are disjoint. Memory: K models, which is the method's own need.
    """

    whole_personal = True

    def network(self) -> Network:
        """FedAvg's parts twice: the global ones and `own_...`, with the same first values."""
        parts = dict(super().network().items())
        return Network({**parts, **{f"own_{name}": part for name, part in super().network().items()}})

    def is_private(self, entry: str) -> bool:
        """The model of one's own."""
        return entry.startswith("own_")

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """Both cross-entropies, and the pull on the own model."""
        settings = self.config.method
        assert isinstance(settings, DittoConfig)
        own = functional.cross_entropy(self.personal_logits(network, images), targets)
        pull = settings.lam / 2 * squared_distance(network, received, "own_")
        return super().loss(network, images, targets, client, received) + own + pull

    def personal_logits(self, network: Network, images: Tensor) -> Tensor:
        """Of the own model."""
        return network.logits("own_classifier", network.features(images, "own_backbone"))


class PrivateHead(FedAvg):
    """What the methods have in common that keep a private linear head beside the averaged one: the part `personal`."""

    def network(self) -> Network:
        """FedAvg's parts and `personal`."""
        network = super().network()
        network["personal"] = self.head("personal", network.feature_dim)
        return network

    def is_private(self, entry: str) -> bool:
        """The private head never leaves its client."""
        return entry.startswith("personal.")


class FedRod(PrivateHead):
    """Chen and Chao 2022: a generic head trained by balanced softmax, and a private head on top of its logits.

    CE(G(h) + log(n_{k,c} / n_k)) trains backbone and G; CE(sg(G(h)) + P_k(sg(h))) trains P_k. A class that the client
    does not have gets a prior of zero, so it takes no part. Personal model: G + P_k.
    """

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """Balanced softmax for the generic part, cross-entropy for the private head."""
        features = network.features(images)
        logits = network.logits("classifier", features)
        balanced = functional.cross_entropy(logits + client.log_prior, targets)
        personal = logits.detach() + network.logits("personal", features.detach())
        return balanced + functional.cross_entropy(personal, targets)

    def personal_heads(self, server: Server, clients: slice = slice(None)) -> dict[str, Head]:
        """G + P_k."""
        weight, bias = some_heads(head_of(server.private, "personal"), clients)
        shared_weight, shared_bias = head_of(server.state, "classifier")
        assert bias is not None
        assert shared_bias is not None
        return {"": (weight + shared_weight, bias + shared_bias)}


class FedBabu(FedAvg):
    """Oh et al. 2022: the classifier stays at its common random start; only the backbone is trained and averaged.

    Generic model: the backbone with that classifier. Personal model: fine-tuned (head or all) before the test.
    """

    whole_personal = True

    def is_fixed(self, entry: str) -> bool:
        """The classifier."""
        return entry.startswith("classifier.")

    def fine_tuning(self) -> Sequence[Phase]:
        """The head, or everything."""
        settings = self.config.method
        assert isinstance(settings, FedBabuConfig)
        parts = "classifier." if settings.fine_tune == "head" else ""
        return [Phase(settings.fine_tune_epochs, lambda entry: entry.startswith(parts))]


class FedEtf(FedAvg):
    """Li et al. 2023 (ICCV): a dense frame V as classifier, a learnable projection, a learnable temperature s.

    u = P h / ||P h||; training by CE(s V u + log n_{k,c}). V is fixed; backbone, P and log s (so s > 0) are averaged.
    Personal model: P and a copy of V are fine-tuned, epochs in turn, by cross-entropy without the prior.
    """

    heads_bias = False
    whole_personal = True

    def network(self) -> Network:
        """Parts `backbone`, `projection`, `temperature`, and `classifier`, which holds V."""
        settings = self.config.method
        assert isinstance(settings, FedEtfConfig)
        network = super().network()
        width = settings.projection_dim or network.feature_dim
        network["projection"] = linear_head(network.feature_dim, width, False, self.init_seed("projection"))
        network["classifier"] = linear_head(width, self.shape.num_classes, bias=False, seed=0)
        frame = simplex_etf(width, self.shape.num_classes, self.init_seed("etf"))
        network["classifier"].load_state_dict({"weight": frame})
        network["temperature"] = nn.ParameterList([torch.tensor(settings.temperature).log()])
        return network

    def is_fixed(self, entry: str) -> bool:
        """V."""
        return entry.startswith("classifier.")

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """Balanced softmax on the frame's logits."""
        return functional.cross_entropy(self.personal_logits(network, images) + client.log_prior, targets)

    def fine_tuning(self) -> Sequence[Phase]:
        """The projection and the client's copy of V, in turn."""
        settings = self.config.method
        assert isinstance(settings, FedEtfConfig)
        turn = [
            Phase(1, lambda entry: entry.startswith("projection.")),
            Phase(1, lambda entry: entry.startswith("classifier.")),
        ]
        return turn * settings.fine_tune_epochs

    def fine_tuning_loss(
        self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State
    ) -> Tensor:
        """Plain cross-entropy."""
        return functional.cross_entropy(self.personal_logits(network, images), targets)

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """V P, one linear map: neither the length of P h nor s > 0 changes which class is largest."""
        return {"": (server.state["classifier.weight"] @ server.state["projection.weight"], None)}

    def personal_logits(self, network: Network, images: Tensor) -> Tensor:
        """s V u."""
        projected = network.logits("projection", network.features(images))
        scale = next(network["temperature"].parameters()).exp()
        return scale * network.logits("classifier", functional.normalize(projected, dim=1))


def squared_distance(network: Network, received: State, prefix: str) -> Tensor:
    """||w - w^t||^2 over the parameters under `prefix`, against the received entries of the same name without it."""
    pairs = [(p, received[n.removeprefix(prefix)]) for n, p in network.named_parameters() if n.startswith(prefix)]
    return torch.stack([(parameter - anchor).square().sum() for parameter, anchor in pairs]).sum()
