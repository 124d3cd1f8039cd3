"""The typed configuration of one run. `python -m sparsevit.train --schema` prints it as JSON schema."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.config import Section
from shared.gpu import Precision


def _fraction(value: Any) -> Any:
    if isinstance(value, int):  # torch's pruning would take 1 for one weight
        raise ValueError(f"{value} is an integer; a ratio is a fraction, write {float(value)}")
    return value


Ratio = Annotated[float, BeforeValidator(_fraction), Field(ge=0, le=1, description="the share that is pruned")]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

Method = Literal[
    "none", "paper", "null", "flip", "attn_l1", "paper_strong", "attn_sparse", "l1", "ffn_log", "ffn_l1", "group"
]
METHODS: tuple[str, ...] = get_args(Method)
Pruner = Literal["global_l1", "global_l1_blocks", "local_l1", "random", "wanda", "two_four"]
Removal = Literal["neurons", "heads", "neurons_heads"]


class DataConfig(Section):
    """Images; small ones live on the device, those of ImageNet-100 are decoded from files."""

    name: Literal["sample", "fashion_mnist", "cifar10", "cifar100", "imagenet100"]
    image_size: int | None = Field(None, ge=1, description="pixels a side that the network sees (default: as they are)")
    mean: tuple[float, ...] = Field(min_length=1, max_length=4, description="channel means, of pixels in [0, 1]")
    std: tuple[Positive, ...] = Field(min_length=1, max_length=4, description="channel deviations, in [0, 1]")
    flip: bool = Field(True, description="mirror training images with probability 1/2")
    shuffle: bool = Field(True, description="a new order every epoch (false: the published code's fixed order)")
    train_images: int | None = Field(None, ge=1, description="training images taken, the same number of each class")
    test_images: int | None = Field(None, ge=1, description="test images taken, the same number of each class")
    val_images: int = Field(0, ge=0, description="training images held out to choose by, the same number of each class")
    split_seed: Seed = Field(0, description="which images are held out")
    download: bool = False
    folder: str = Field("imagenet", description="ImageNet-1k with train/ and val/, under the data root (imagenet100)")
    min_area: float = Field(0.5, gt=0, le=1, description="smallest share of an image a training crop has (imagenet100)")
    workers: int = Field(8, ge=1, description="threads that decode image files (imagenet100)")

    @model_validator(mode="after")
    def _channels(self) -> "DataConfig":
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give one number a channel")
        return self


class ModelConfig(Section):
    """The network: a named one, any of whose sizes may be given otherwise."""

    arch: Literal["vit_b16", "vit_s16", "vit_ti16", "vit_s14", "s0", "s1", "s2"]
    patch: int | None = Field(None, ge=1, description="pixels a side of a patch")
    width: int | None = Field(None, ge=1)
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    mlp: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout while fine-tuning")
    ln_eps: Positive = 1e-6
    layer_scale: bool = False
    head_init: Literal["torch", "zero"] = "torch"


class WeightsConfig(Section):
    """A pretrained file; see `weights.py` for the three layouts."""

    path: str = Field(description="the file, under the data root unless absolute")
    pos_resize: Literal["none", "bicubic", "bicubic_antialias", "bilinear"] = "bicubic_antialias"


class PretrainConfig(Section):
    """Pre-training by ourselves where there is no file: AdamW with OneCycle, without any penalty, once for all arms."""

    data: DataConfig | None = Field(None, description="other images (default: the run's own, and its head is kept)")
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)
    lr: Positive = 1e-3
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, gt=0, lt=1, description="share of the steps that warm up")
    dropout: float = Field(0.1, ge=0, lt=1)
    seed: Seed = 0


class AuthorsRecipe(Section):
    """SGD with OneCycle as published: its momentum cycle, and weight decay on everything."""

    name: Literal["authors"]
    lr: Positive = 1e-3
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(500, ge=1)
    div: float = Field(25.0, ge=1, description="peak rate over the first")
    final_div: float = Field(1e4, ge=1, description="first rate over the last")
    low_momentum: float = Field(0.85, ge=0, lt=1)
    high_momentum: float = Field(0.95, ge=0, lt=1)


class OursRecipe(Section):
    """OneCycle at constant momentum; biases, norms, positions and class token do not decay."""

    name: Literal["ours"]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 1e-2
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(1e-4, ge=0)
    decay_all: bool = False
    warmup: float = Field(0.1, gt=0, lt=1, description="share of the steps that warm up")
    div: float = Field(25.0, ge=1, description="peak rate over the first")
    final_div: float = Field(1e4, ge=1, description="first rate over the last")
    clip: Positive | None = Field(None, description="largest norm of the whole gradient")


Recipe = Annotated[AuthorsRecipe | OursRecipe, Field(discriminator="name")]


class Coefficients(Section):
    """What each arm's term is multiplied with; only the run's own method uses its number."""

    paper: float = Field(0.01, ge=0, description="mean ln(1 + a^2) of the last attention map")
    flip: float = Field(0.01, ge=0, description="the same, subtracted")
    attn_l1: float = Field(0.01, ge=0, description="mean |a| of the last map: a constant")
    paper_strong: float = Field(30.0, ge=0, description="as paper")
    attn_sparse: float = Field(0.1, ge=0, description="entropy of the last map's rows, in nats")
    l1: float = Field(1.5e-3, ge=0, description="sum |w| over the prune set")
    ffn_log: float = Field(1.0, ge=0, description="mean over layers of mean ln(1 + h^2), h after GELU")
    ffn_l1: float = Field(4.0, ge=0, description="mean over layers of mean |h|")
    group: float = Field(1e-2, ge=0, description="sum over neurons of the length of their weights")
    noise: float = Field(1e-6, ge=0, description="relative noise on the start weights of the null arm")
    scope: Literal["last", "all"] = Field("last", description="blocks whose attention map is penalised")


class RecoverConfig(Section):
    """Training after pruning, for some pruners and ratios; masks stay."""

    epochs: int = Field(1, ge=1)
    lr_factor: Positive = Field(0.1, description="of the recipe's peak rate")
    pruners: tuple[Pruner | Removal, ...] = Field(min_length=1)
    ratios: tuple[Ratio, ...] = Field(min_length=1)


class PruneConfig(Section):
    """What is pruned after training, each time from the dense weights."""

    set: Literal["authors", "matrices", "blocks"] = Field(
        "matrices",
        description="tensors that global_l1 and random rank (global_l1_blocks, local_l1 and wanda: always blocks)",
    )
    pruners: tuple[Pruner, ...] = ("global_l1",)
    ratios: tuple[Ratio, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    removals: tuple[Removal, ...] = ()
    removal_ratios: tuple[Ratio, ...] = (0.25, 0.5, 0.75)
    multiple: int = Field(1, ge=1, description="kept neurons are a multiple of it (64 on a GPU)")
    compensate: bool = Field(True, description="fold the mean of what is removed into the next bias")
    calibration_images: int = Field(1000, ge=1, description="training images that scores are measured on")
    recover: RecoverConfig | None = None

    @model_validator(mode="after")
    def _recoverable(self) -> "PruneConfig":
        if self.recover is None:
            return self
        known: dict[str, tuple[float, ...]] = dict.fromkeys(self.pruners, self.ratios)
        known |= dict.fromkeys(self.removals, self.removal_ratios)
        for name in self.recover.pruners:
            if name not in known:
                raise ValueError(f"recover.pruners has {name!r}, which is in neither pruners nor removals")
            if strangers := [r for r in self.recover.ratios if r not in known[name] and name != "two_four"]:
                raise ValueError(f"recover.ratios has {strangers[0]}, at which {name} is not pruned")
        return self


class Config(Section):
    """One complete run: a start, a fine-tuning, a sweep of prunings."""

    paper: Literal["sparsevit"]
    data: DataConfig
    model: ModelConfig
    weights: WeightsConfig | None = None
    pretrain: PretrainConfig | None = None
    method: Method = "paper"
    coefficients: Coefficients = Coefficients()
    recipe: Recipe
    epochs: int = Field(ge=1, description="passes of fine-tuning")
    batch_size: int = Field(ge=1)
    select: Literal["last", "best"] = Field(
        "last", description="the epoch that is pruned; best: on the held-out images"
    )
    prune: PruneConfig = PruneConfig()
    eval_batch_size: int = Field(250, ge=1)
    seed: Seed = 0
    device: str = "auto"
    precision: Precision = "auto"
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes all cores (a run's bits depend on it)")

    @field_validator("method", mode="before")
    @classmethod
    def _null_is_a_name(cls, value: Any) -> Any:
        """In YAML `method: null` is nothing; here it is the arm of that name."""
        return "null" if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.weights and self.pretrain:
            raise ValueError("weights and pretrain are both given; a run has one start, remove one of them")
        if self.select == "best" and not self.data.val_images:
            raise ValueError("select: best needs held-out images; set data.val_images (never the test set)")
        return self
