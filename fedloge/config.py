"""The typed configuration of one federated run. `python -m fedloge.train --schema` prints it as JSON schema."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Section
from shared.gpu import Precision

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class DataConfig(Section):
    """A training set made long-tailed, and a balanced test set; or two list files that are so already."""

    name: Literal["sample", "fashion_mnist", "mnist", "cifar10", "cifar100", "list"]
    imbalance_factor: float = Field(1.0, ge=1, description="images of the largest class over those of the smallest")
    profile: Literal["exponential", "step"] = "exponential"
    n_max: int | None = Field(None, ge=1, description="images of the largest class (default: all of it)")
    subset_seed: int = Field(0, ge=0, lt=2**32, description="numpy seed of the long-tailed subset")
    image_size: int | None = Field(None, ge=1, description="pixels a side after average pooling (default: as they are)")
    mean: tuple[float, ...] = Field(min_length=1, max_length=4, description="channel means, of pixels in [0, 1]")
    std: tuple[Positive, ...] = Field(min_length=1, max_length=4, description="channel deviations, in [0, 1]")
    augment: Literal["none", "crop_flip"] = "none"
    download: bool = False
    train_list: str | None = Field(None, description="list file of the training images (data.name: list)")
    test_list: str | None = Field(None, description="list file of the test images (data.name: list)")
    image_root: str | None = Field(None, description="folder that the list files' paths start from")
    num_classes: int | None = Field(None, ge=2, description="number of classes of the list files")
    workers: int = Field(8, ge=1, description="threads that decode image files")

    @model_validator(mode="after")
    def _complete(self) -> "DataConfig":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give one number a channel")
        wanted = {"train_list": self.train_list, "test_list": self.test_list, "image_root": self.image_root,
                  "num_classes": self.num_classes}  # fmt: skip
        missing = [key for key, value in wanted.items() if value is None]
        if self.name == "list" and missing:
            raise ValueError(f"a list data set needs {', '.join(missing)} as well")
        given = {"imbalance_factor": self.imbalance_factor > 1, "n_max": self.n_max is not None,
                 "augment": self.augment != "none", "profile": self.profile != "exponential"}  # fmt: skip
        surplus = ", ".join(key for key, value in given.items() if value)
        if self.name == "list" and surplus:
            raise ValueError(f"a list data set is taken as it is listed; remove {surplus}")
        return self


class ClientsConfig(Section):
    """Who holds what, and who takes part."""

    count: int = Field(ge=1, description="the number of clients")
    fraction: float = Field(1.0, gt=0, le=1, description="the share of clients trained in a round")
    alpha: float = Field(gt=0, description="the Dirichlet concentration; small means few classes a client")
    min_size: int = Field(10, ge=1, description="the smallest number of images of a client")
    partition_seed: int | None = Field(None, ge=0, lt=2**32, description="the partition's seed (default: the run's)")
    local_test: Literal["proportional_global", "proportional_client"] = "proportional_global"
    local_test_size: int = Field(200, ge=1, description="test images a client under proportional_client")


class FedLoGeConfig(Section):
    """The paper's method."""

    name: Literal["fedloge"] = "fedloge"
    sparsity: Share = Field(0.6, description="beta, the share of zeros in the frame")
    norm: Positive = Field(0.1, description="gamma, the row length of the frame")
    etf_steps: int = Field(1000, ge=0, description="repair steps of the sparse frame")
    heads_bias: bool = False
    scale: Positive = Field(1.0, description="the row length of the realigned generic head (the code has 1.7)")
    personal_rule: Literal["paper", "code", "readme", "stage1_sum"] = "paper"


class DenseEtfConfig(Section):
    """Control: FedLoGe with a frame without zeros."""

    name: Literal["dense_etf"]
    norm: Positive = 0.1
    heads_bias: bool = False
    scale: Positive = 1.0
    personal_rule: Literal["paper", "code", "readme", "stage1_sum"] = "paper"


class FedAvgGlaConfig(Section):
    """Control: FedAvg, with a private head beside it and the realignment after it."""

    name: Literal["fedavg_gla"]
    heads_bias: bool = False
    scale: Positive = 1.0
    personal_rule: Literal["paper", "code", "readme", "stage1_sum"] = "paper"


class FedAvgConfig(Section):
    """McMahan et al. 2017."""

    name: Literal["fedavg"]


class FedAvgFtConfig(Section):
    """FedAvg, each client fine-tuning the final model on its own data."""

    name: Literal["fedavg_ft"]
    fine_tune_epochs: int = Field(10, ge=1)


class FedProxConfig(Section):
    """Li et al. 2020."""

    name: Literal["fedprox"]
    mu: float = Field(0.01, ge=0, description="the weight of the proximal term")


class FedBnConfig(Section):
    """Li et al. 2021."""

    name: Literal["fedbn"]


class FedPerConfig(Section):
    """Arivazhagan et al. 2019."""

    name: Literal["fedper"]


class FedRepConfig(Section):
    """Collins et al. 2021."""

    name: Literal["fedrep"]
    head_epochs: int = Field(10, ge=1, description="epochs of the head before those of the backbone")


class DittoConfig(Section):
    """Li et al. 2021."""

    name: Literal["ditto"]
    lam: float = Field(0.1, ge=0, description="the pull of the global model on the personal ones")


class FedRodConfig(Section):
    """Chen and Chao 2022."""

    name: Literal["fedrod"]


class FedBabuConfig(Section):
    """Oh et al. 2022."""

    name: Literal["fedbabu"]
    fine_tune_epochs: int = Field(10, ge=1)
    fine_tune: Literal["head", "all"] = "all"


class FedEtfConfig(Section):
    """Li et al. 2023 (ICCV)."""

    name: Literal["fedetf"]
    projection_dim: int | None = Field(
        None, ge=2, description="width of the projected features (default: the features')"
    )
    temperature: Positive = Field(1.0, description="the learnable temperature's first value")
    fine_tune_epochs: int = Field(3, ge=1, description="epochs of the projection, then of the classifier")


class CreffConfig(Section):
    """Shang et al. 2022."""

    name: Literal["creff"]
    features_per_class: int = Field(100, ge=1)
    match_steps: int = Field(100, ge=1, description="steps a round that fit the synthetic features to the gradients")
    match_lr: Positive = 1.0
    retrain_steps: int = Field(300, ge=1, description="steps a round that retrain the classifier on them")
    retrain_lr: Positive = 0.1


MethodConfig = Annotated[
    FedLoGeConfig | DenseEtfConfig | FedAvgGlaConfig | FedAvgConfig | FedAvgFtConfig | FedProxConfig | FedBnConfig
    | FedPerConfig | FedRepConfig | DittoConfig | FedRodConfig | FedBabuConfig | FedEtfConfig | CreffConfig,
    Field(discriminator="name"),
]  # fmt: skip


class ModelConfig(Section):
    """The backbone."""

    name: Literal["resnet18", "resnet34", "resnet50", "mlp", "convnet"]


class OptimizerConfig(Section):
    """SGD at a constant rate; its momentum starts at zero at every client in every round."""

    lr: Positive
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)


class EvaluateConfig(Section):
    """When the models are evaluated; the headline is the mean over the last rounds, never the best round."""

    every: int = Field(10, ge=1, description="rounds between evaluations")
    last: int = Field(10, ge=1, description="final rounds that are all evaluated and averaged")
    class_mask: bool = Field(
        False, description="rule out the classes a client has no training image of, for all methods"
    )
    batch_size: int = Field(500, ge=1)


class Config(Section):
    """One complete run."""

    paper: Literal["fedloge"]
    data: DataConfig
    clients: ClientsConfig
    model: ModelConfig
    method: MethodConfig = FedLoGeConfig()
    optimizer: OptimizerConfig
    rounds: int = Field(ge=1, description="the number of communication rounds")
    local_epochs: int = Field(ge=1, description="passes over a client's images in a round")
    batch_size: int = Field(ge=2, description="images a local step; batch norm needs two")
    seed: int = Field(0, ge=0, lt=2**32)
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"
    precision: Precision = "auto"
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes all cores (a run's bits depend on it)")

    @property
    def headline(self) -> str:
        """Where the headline figures are from: the mean over the last evaluated rounds."""
        return f"last{min(self.evaluate.last, self.rounds)}"

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """`method: fedprox` is short for `method: {name: fedprox}`."""
        return {"name": value} if isinstance(value, str) else value
