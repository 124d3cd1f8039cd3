"""The typed configuration of one run. `python -m mdcs.train --schema` prints it as JSON schema."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Section
from shared.gpu import Precision

Positive = Annotated[float, Field(gt=0)]
Views = Literal["weak", "strong", "both"]
LISTED = ("imagenet_lt", "places_lt", "inaturalist18", "list")


class DataConfig(Section):
    """A training set made long-tailed, and a balanced test set; or two list files that are so already."""

    name: Literal["sample", "fashion_mnist", "cifar10", "cifar100", "imagenet_lt", "places_lt", "inaturalist18", "list"]
    imbalance_factor: float = Field(1.0, ge=1, description="images of the largest class over those of the smallest")
    n_max: int | None = Field(None, ge=1, description="images of the largest class (default: all of it)")
    subset_seed: int | None = Field(0, ge=0, lt=2**32, description="seed of the long-tailed subset (null: the run's)")
    image_size: int | None = Field(None, ge=8, description="pixels a side (default: as they are; 224 for image files)")
    mean: tuple[float, ...] = Field(min_length=1, max_length=4, description="channel means, of pixels in [0, 1]")
    std: tuple[Positive, ...] = Field(max_length=4, description="channel deviations, in [0, 1]")
    augment: Literal["none", "grey", "cifar", "photo", "inaturalist"] = Field(description="the weak and strong views")
    download: bool = False
    train_list: str | None = Field(None, description="list file of the training images")
    test_list: str | None = Field(None, description="list file of the test images")
    image_root: str | None = Field(None, description="folder that the list files' paths start from")
    num_classes: int | None = Field(None, ge=2, description="number of classes of the list files")
    relabel: bool = Field(False, description="number the classes by descending training count, as Places-LT has it")
    workers: int = Field(8, ge=0, description="threads that decode image files; 0 decodes between the steps")

    @property
    def listed(self) -> bool:
        """Whether the images are files named by lists."""
        return self.name in LISTED

    @model_validator(mode="after")
    def _complete(self) -> "DataConfig":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give one number a channel")
        wanted = {"train_list": self.train_list, "test_list": self.test_list, "image_root": self.image_root,
                  "num_classes": self.num_classes}  # fmt: skip
        missing = [key for key, value in wanted.items() if value is None]
        if self.listed and missing:
            raise ValueError(f"a list data set needs {', '.join(missing)} as well")
        surplus = [key for key, value in (wanted | {"relabel": self.relabel or None}).items() if value is not None]
        if self.listed:
            surplus = [k for k, v in (("imbalance_factor", self.imbalance_factor > 1), ("n_max", self.n_max)) if v]
        if surplus:
            kind = "a list data set is taken as it is listed" if self.listed else f"{self.name} is not read from lists"
            raise ValueError(f"{kind}; remove {', '.join(surplus)}")
        if self.listed != (self.augment in ("photo", "inaturalist")) and self.augment != "none":
            raise ValueError(f"augment {self.augment!r} is not for {self.name}; photo and inaturalist are for files")
        return self


class MdcsConfig(Section):
    """The paper's method: every expert its own prior, and each learns from its weak view on the strong one."""

    name: Literal["mdcs"] = "mdcs"
    lambdas: tuple[float, ...] = Field((-0.5, 1.0, 2.5), min_length=1, description="an exponent of the prior an expert")
    alpha: float = Field(0.6, ge=0, description="weight of the consistency self-distillation")
    ramp_epochs: int = Field(20, ge=0, description="epochs over which that weight rises from zero")
    temperature: Positive = Field(1.0, description="of teacher and student")
    confident: Literal["adjusted", "raw", "all"] = Field(
        "adjusted", description="which logits decide whether an instance is confident; all: every instance is taken"
    )


class DlConfig(Section):
    """The diversity loss alone."""

    name: Literal["dl"]
    lambdas: tuple[float, ...] = Field((-0.5, 1.0, 2.5), min_length=1, description="an exponent of the prior an expert")
    views: Views = "weak"


class CeConfig(Section):
    """Cross-entropy."""

    name: Literal["ce"]
    classifier: Literal["cosine", "linear"] = "cosine"
    views: Views = "weak"


class BalancedSoftmaxConfig(Section):
    """Ren et al. 2020; with several experts the control that shows what diversity adds to an ensemble."""

    name: Literal["balanced_softmax"]
    experts: int = Field(1, ge=1)
    views: Views = "weak"


class LdamDrwConfig(Section):
    """Cao et al. 2019."""

    name: Literal["ldam_drw"]
    largest_margin: Positive = 0.5
    beta: float = Field(0.9999, ge=0, lt=1, description="of the class-balanced weights")
    deferred_epoch: int | None = Field(
        None, ge=0, description="last epoch without weights (default: first milestone or 80 %)"
    )
    views: Views = "weak"


class RideConfig(Section):
    """Wang et al. 2021, without router and distillation."""

    name: Literal["ride"]
    experts: int = Field(3, ge=1)
    diversity_weight: float = Field(0.45, ge=0)
    largest_margin: Positive = 0.5
    beta: float = Field(0.9999, ge=0, lt=1, description="of the class-balanced weights")
    gamma: float = Field(0.05, ge=0, le=1, description="how much the temperature follows the class frequency")
    deferred_epoch: int | None = Field(
        None, ge=0, description="last epoch without weights (default: first milestone or 80 %)"
    )
    views: Views = "weak"


class SadeConfig(Section):
    """Zhang et al. 2022, without test-time training."""

    name: Literal["sade"]
    tau: float | None = Field(
        None, ge=0, description="weight of the inverse prior in the third expert (default: 2; Places-LT, iNaturalist 1)"
    )
    views: Views = "weak"


class BalPoeConfig(Section):
    """The loss of Aimar et al. 2023; without its mixup."""

    name: Literal["balpoe"]
    taus: tuple[float, ...] = Field((0.0, 1.0, 2.0), min_length=1, description="their mean must be 1")
    views: Views = "weak"

    @field_validator("taus")
    @classmethod
    def _balanced(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        mean = sum(value) / len(value)
        if abs(mean - 1) > 1e-6:
            raise ValueError(f"{list(value)} has mean {mean:g}; the ensemble is balanced only where it is 1")
        return value


class NclConfig(Section):
    """Li et al. 2022, without its contrastive branch: separate networks that learn from each other."""

    name: Literal["ncl"]
    networks: int = Field(3, ge=2)
    hard_share: float = Field(0.3, gt=0, le=1, description="share of the classes that count as hard for an image")
    weight: float = Field(0.6, ge=0, description="weight of the mutual distillation")
    views: Views = "strong"


MethodConfig = Annotated[
    MdcsConfig | DlConfig | CeConfig | BalancedSoftmaxConfig | LdamDrwConfig | RideConfig | SadeConfig | BalPoeConfig
    | NclConfig,
    Field(discriminator="name"),
]  # fmt: skip


class ModelConfig(Section):
    """The network; the number of experts and the width of their stages are the method's."""

    name: Literal["resnet_cifar", "resnet50", "resnext50", "resnet152"]
    depth: int = Field(32, ge=8, description="layers of resnet_cifar, 6 n + 2")
    width: int = Field(16, ge=2, description="channels of the first stage of resnet_cifar")
    experts: int | None = Field(None, ge=1, description="a check: the method must have so many (default: it decides)")
    reduced: bool | None = Field(None, description="narrower late stages (default: where there are several experts)")
    share_stage3: bool = Field(False, description="experts of the large networks share stage 3 as well")
    pretrained: str | None = Field(None, description="file of a pretrained network, copied into every expert")

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % 6 != 2:
            raise ValueError(f"{value} is not 6 n + 2, as in 8, 14, 20, 26, 32")
        return value

    @model_validator(mode="after")
    def _of_the_large(self) -> "ModelConfig":
        if self.name == "resnet_cifar" and (self.pretrained or self.share_stage3):
            raise ValueError("pretrained and share_stage3 are for the large networks")
        return self


class OptimizerConfig(Section):
    """SGD; the weight decay is on all parameters."""

    lr: Positive
    backbone_lr: float | None = Field(None, gt=0, description="rate of all but the classifiers (default: lr)")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0)

    @model_validator(mode="after")
    def _of_nesterov(self) -> "OptimizerConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set nesterov: false with momentum: 0")
        return self


class StepSchedule(Section):
    """A rise, then a factor at each milestone."""

    name: Literal["step"]
    milestones: tuple[int, ...] = Field(description="epochs, counted from 1, after which the rate falls")
    factor: Positive = 0.1
    warmup_epochs: int = Field(0, ge=0)
    warmup: Literal["linear", "from_third"] = Field("linear", description="(e+1)/W, or from 1/3 to 1")

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"{list(value)} do not rise")
        return value


class CosineSchedule(Section):
    """Half a cosine to zero over all epochs."""

    name: Literal["cosine"]


ScheduleConfig = Annotated[StepSchedule | CosineSchedule, Field(discriminator="name")]


class EvaluateConfig(Section):
    """When the test set is looked at on the way; the headline is the last epoch, never the best one."""

    every: int = Field(10, ge=1, description="epochs between evaluations")
    batch_size: int = Field(500, ge=1)


class Config(Section):
    """One complete run."""

    paper: Literal["mdcs"]
    data: DataConfig
    model: ModelConfig
    method: MethodConfig = MdcsConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    epochs: int = Field(ge=1, description="passes over the training images")
    batch_size: int = Field(ge=1, description="images a step; each stands in as many views as the method has")
    bn_views: Literal["joint", "split"] = Field("joint", description="whether two views share batch statistics")
    seed: int = Field(0, ge=0, lt=2**32)
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"
    precision: Precision = "auto"
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes all cores (a run's bits depend on it)")

    @property
    def headline(self) -> str:
        """Where the headline figures are from."""
        return "last_epoch"

    @property
    def views(self) -> Views:
        """The views of an image that a step sees."""
        return "both" if isinstance(self.method, MdcsConfig) else self.method.views

    @property
    def experts(self) -> int:
        """Classifiers of the network."""
        method = self.method
        if isinstance(method, MdcsConfig | DlConfig):
            return len(method.lambdas)
        if isinstance(method, BalPoeConfig):
            return len(method.taus)
        if isinstance(method, BalancedSoftmaxConfig | RideConfig):
            return method.experts
        if isinstance(method, NclConfig):
            return method.networks
        return 3 if isinstance(method, SadeConfig) else 1

    @property
    def sade_tau(self) -> float:
        """SADE's own values: 2 for CIFAR and ImageNet-LT, 1 for the other two."""
        own = self.method.tau if isinstance(self.method, SadeConfig) else None
        return own if own is not None else 1.0 if self.data.name in ("places_lt", "inaturalist18") else 2.0

    @property
    def deferred_epoch(self) -> int:
        """The last epoch without class weights: the method's own, else the first milestone, else 80 % of the epochs.

        The two are the same in the schedule that LDAM and RIDE are published with, 160 of 200.
        """
        if isinstance(self.method, LdamDrwConfig | RideConfig) and self.method.deferred_epoch is not None:
            return self.method.deferred_epoch
        milestones = self.schedule.milestones if isinstance(self.schedule, StepSchedule) else ()
        return milestones[0] if milestones else self.epochs * 4 // 5

    @field_validator("method", "schedule", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`method: ce` is short for `method: {name: ce}`."""
        if isinstance(value, dict):  # what has gone through Python is no longer JSON, whose arrays fit a tuple
            return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.model.experts not in (None, self.experts):
            raise ValueError(
                f"model.experts is {self.model.experts}, but method {self.method.name} has {self.experts}"
                f"{' (one a lambda)' if isinstance(self.method, MdcsConfig | DlConfig) else ''}; make them equal "
                f"or leave model.experts out"
            )
        return self
