"""FedLoGe as a federated method: which parts the network has, what is private, which heads are read off at the end.

The equations are in `method.py`; the two controls that tell its ingredients apart are here too.
"""

from torch import Tensor, nn
from torch.nn import functional

from fedloge import baselines
from fedloge.baselines import FedAvg, PrivateHead
from fedloge.config import Config, DenseEtfConfig, FedAvgGlaConfig, FedLoGeConfig
from fedloge.creff import Creff
from fedloge.federated import Client, Server, State
from fedloge.method import PERSONAL_RULES, local_objective, personal_heads, realign_global, sparse_etf
from fedloge.model import Head, Network, Shape, head_of, some_heads


class Frame(nn.Module):
    """The frozen classifier S [C, d]: a buffer, so no optimiser can reach it."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


class FedAvgGla(PrivateHead):
    """Control: FedAvg's training, a private head on detached features beside it, GLA-FR after it.

    `classifier` is psi and `personal` is phi_k. What it lacks of FedLoGe is the frame alone.
    """

    realigns = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        settings = config.method
        assert isinstance(settings, FedAvgGlaConfig | FedLoGeConfig | DenseEtfConfig)
        self.heads_bias, self.rule, self.scale = settings.heads_bias, settings.personal_rule, settings.scale

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """FedAvg's loss, and the private head's on detached features."""
        features = network.features(images)
        classifier = functional.cross_entropy(network.logits("classifier", features), targets)
        return classifier + functional.cross_entropy(network.logits("personal", features.detach()), targets)

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """psi', and psi as it was trained."""
        weight, bias = head_of(server.state, "classifier")
        return {"": (realign_global(weight, scale=self.scale), bias), "raw": (weight, bias)}

    def personal_heads(self, server: Server, clients: slice = slice(None)) -> dict[str, Head]:
        """The configured rule, then every rule by its name, then phi_k alone."""
        weight, bias = head_of(server.state, "classifier")
        own_weight, own_bias = some_heads(head_of(server.private, "personal"), clients)
        rules = {rule: personal_heads(rule, weight, bias, own_weight, own_bias) for rule in PERSONAL_RULES}
        return {"": rules[self.rule], **rules, "phi": (own_weight, own_bias)}


class FedLoGe(FedAvgGla):
    """The paper: the backbone learns through the frozen sparse frame S; psi and phi_k learn on detached features."""

    def network(self) -> Network:
        """Parts `backbone`, `classifier` (psi), `personal` (phi_k) and `etf` (S)."""
        network = super().network()
        network["etf"] = Frame(self.frame(network.feature_dim))
        return network

    def frame(self, feature_dim: int) -> Tensor:
        """S [C, d]."""
        method = self.config.method
        assert isinstance(method, FedLoGeConfig)
        return sparse_etf(
            feature_dim, self.shape.num_classes, method.sparsity, method.norm, self.init_seed("etf"), method.etf_steps
        )

    def is_fixed(self, entry: str) -> bool:
        """S is made once and sent once."""
        return entry.startswith("etf.")

    def loss(self, network: Network, images: Tensor, targets: Tensor, client: Client, received: State) -> Tensor:
        """The three losses of a local step, for one backward."""
        features, frame = network.features(images), network.head("etf")[0]
        return local_objective(features, targets, frame, network.head("classifier"), network.head("personal"))

    def generic_heads(self, server: Server) -> dict[str, Head]:
        """psi', psi as it was trained, and S."""
        return {**super().generic_heads(server), "etf": (server.state["etf.weight"], None)}


class DenseEtf(FedLoGe):
    """Control: the frame without zeros."""

    def frame(self, feature_dim: int) -> Tensor:
        """gamma M [C, d]."""
        method = self.config.method
        assert isinstance(method, DenseEtfConfig)
        return sparse_etf(feature_dim, self.shape.num_classes, 0.0, method.norm, self.init_seed("etf"))


METHODS: dict[str, type[FedAvg]] = {
    "fedloge": FedLoGe,
    "dense_etf": DenseEtf,
    "fedavg_gla": FedAvgGla,
    "fedavg": FedAvg,
    "fedavg_ft": baselines.FedAvgFt,
    "fedprox": baselines.FedProx,
    "fedbn": baselines.FedBn,
    "fedper": baselines.FedPer,
    "fedrep": baselines.FedRep,
    "ditto": baselines.Ditto,
    "fedrod": baselines.FedRod,
    "fedbabu": baselines.FedBabu,
    "fedetf": baselines.FedEtf,
    "creff": Creff,
}


def build_method(config: Config, shape: Shape) -> FedAvg:
    """The method that the configuration names."""
    return METHODS[config.method.name](config, shape)
