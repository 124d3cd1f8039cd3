"""The typed configuration of one run: one method, some seeds side by side. `--schema` prints it as JSON schema."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lightcnn.augment import Warp
from lightcnn.budget import LAYOUT
from lightcnn.method import Schedule
from lightcnn.model import HeadActivation, HeadTransfer
from shared.config import Section
from shared.gpu import Precision

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Section):
    """A data set, and which of its training images choose the epoch. The test set is read once, by `eval.py`."""

    name: Literal["sample", "mnist", "fashion_mnist", "cifar10"]
    download: bool = False
    val_images: int = Field(10_000, ge=1, description="the number of training images held out for validation")
    val_from: Literal["first", "each_class"] = Field(
        "first", description="which are held out: the first in file order (the paper), or the first of each class"
    )
    train_images: int | None = Field(
        None, ge=1, description="training images taken, evenly over the classes (default: all)"
    )
    test_images: int | None = Field(None, ge=1, description="test images read, evenly over the classes (default: all)")


class AugmentConfig(Section):
    """What the second branch's images go through."""

    warp: Warp = "sequential"
    rotation: Share = Field(0.1, description="the largest rotation, in turns")
    zoom: float = Field(0.2, ge=0, lt=1, description="the largest change of either factor")
    shift: Share = Field(0.2, description="the largest shift, as a share of the side")
    brightness: Share = Field(0.0, description="the largest change, on the 0..1 range")
    flip: bool = False


class Stage1Config(Section):
    """Training of the two submodels."""

    epochs: int = Field(20, ge=1, description="the most epochs")
    patience: int = Field(5, ge=0, description="epochs without improvement that end it; 0 never does")
    branches: Path | None = Field(None, description="folder of a finished run whose branches are taken, not trained")


class Stage2Config(Section):
    """Fine-tuning of the merged model; the schedule is the method's."""

    max_epochs: int | None = Field(None, ge=1, description="a cap on every phase's epochs (default: the schedule's)")
    cache_mib: int = Field(2048, ge=0, description="memory for the frozen layers' outputs, computed once a phase")


class PlainConfig(Section):
    """Training of the baselines that are trained in one go."""

    epochs: int | None = Field(None, ge=1, description="the most epochs (default: as many as both stages at most)")
    patience: int = Field(10, ge=0, description="epochs without improvement that end it; 0 never does")
    peak_lr: Positive = Field(0.01, description="the highest rate of one-cycle SGD")
    batch_size: int | None = Field(None, ge=2, description="images a step of one-cycle SGD (default: the run's)")


class TwoStageConfig(Section):
    """The paper's method, every choice open."""

    name: Literal["two_stage"] = "two_stage"
    schedule: Schedule = "paper"
    head_transfer: HeadTransfer = "both"
    head_activation: HeadActivation = "relu"
    branch_b: Literal["augmented", "clean"] = "augmented"
    kfold: Literal["none", "notebook", "honest"] = "none"
    folds: int = Field(6, ge=2, le=100, description="the number of folds, where there are any")


class VariantConfig(Section):
    """The paper's method with one thing changed; `algorithm.VARIANTS` says what."""

    name: Literal[
        "literal", "notebook", "all_at_once", "two_clean", "a_only", "no_transfer", "linear_head", "combined_warp"
    ]


class BaselineConfig(Section):
    """A network trained in one go; `baselines.BASELINES` says which and how."""

    name: Literal[
        "submodel", "scratch", "scratch_augmented", "scratch_mild", "wide", "scratch_one_cycle", "wide_one_cycle",
        "bn_gap", "lenet5", "mobilenet_v2_010", "mobilenet_v2_025", "mobilenet_v2_035", "squeezenet", "shufflenet_v2",
    ]  # fmt: skip


class BudgetConfig(Section):
    """The budget track: any network and recipe within the paper's number of parameters. It is not the paper's."""

    name: Literal["budget"]
    layout: Annotated[str, Field(pattern=rf"^(merged|{LAYOUT})$")] = Field(
        "merged", description="the paper's merged network, or blocks such as 'c16 s32 P s48' (`budget.LayoutNet`)"
    )
    optimizer: Literal["nadam", "one_cycle"] = "one_cycle"
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    peak_lr: Positive = Field(0.2, description="the highest rate of one-cycle SGD (Nadam's is 0.001)")
    decay: float = Field(0.005, ge=0, description="decoupled weight decay of one-cycle SGD (Nadam has none)")
    shift: int = Field(0, ge=0, description="the largest shift of a training image, in pixels")
    flip: bool = Field(False, description="whether training images are mirrored left to right")
    rotation: Share = Field(0.0, description="the largest rotation, in turns")
    zoom: float = Field(0.0, ge=0, lt=1, description="the largest change of either factor")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    teacher: Path | None = Field(None, description="folder of a finished run on the same images")
    teacher_share: Share = Field(0.9, description="the teacher's share of the loss")
    temperature: Positive = 2.0


MethodConfig = Annotated[TwoStageConfig | VariantConfig | BaselineConfig | BudgetConfig, Field(discriminator="name")]


class Config(Section):
    """One complete run: `seeds` runs of one method, trained side by side as one network."""

    paper: Literal["lightcnn"]
    data: DataConfig
    method: MethodConfig = TwoStageConfig()
    augment: AugmentConfig = AugmentConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    plain: PlainConfig = PlainConfig()
    batch_size: int = Field(32, ge=1, description="images a step and seed")
    seed: int = Field(0, ge=0, lt=2**32, description="the first seed")
    seeds: int = Field(1, ge=1, le=64, description="how many seeds run side by side: seed, seed + 1, ...")
    device: str = "auto"
    precision: Precision = "float32"
    threads: int = Field(1, ge=0, le=1024, description="CPU threads; 0 takes all cores (a run's bits depend on it)")

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        """`method: scratch` is short for `method: {name: scratch}`."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _seeds_fit(self) -> "Config":
        if self.seed + self.seeds > 2**32:
            raise ValueError(f"seed {self.seed} and the {self.seeds - 1} after it go beyond {2**32 - 1}")
        return self

    @model_validator(mode="after")
    def _branches_are_used(self) -> "Config":
        if self.stage1.branches and not isinstance(self.method, TwoStageConfig | VariantConfig):
            raise ValueError(f"stage1.branches: method {self.method.name} has no stage 1; leave it out")
        return self

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of this run."""
        return list(range(self.seed, self.seed + self.seeds))
