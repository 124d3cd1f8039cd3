"""What a training step of MDCS costs, beside the usual way to write one: `python benchmarks/mdcs_step.py`.

ResNet-32 with three reduced experts (783,856 parameters), 64 images of 32 x 32 in two views a step, 100 classes with
the counts of CIFAR-100-LT (IF 100). All sides are measured by turns (A B C A B C ...): medians, and quartiles of the
turns' ratios.

step          a step with the making of its two views, as the mean over a pass of 40 steps: ours (the calls of
              `mdcs.train`, without its log and checkpoints) in bfloat16 and in float32 against `Usual` below in float32
where         shares of our step (on a GPU with a wait after each part, which the step itself does not have)
augmentation  an image's weak view, strong view and both, on one core: ours against torchvision's transforms on PIL
evaluation    ensemble and all experts by one pass over the test images (`mdcs.eval`) against a pass for each expert
throughput    images in two views a second, and what follows for 400 epochs of 170 steps, without their evaluations

The pixels are random but smooth, as photos are, for no data is downloaded. The usual way is the plain one, not a slow
one: its images are decoded beforehand, its workers persist, its algorithms need not be deterministic, and it draws no
image grids and keeps no tables at every step, as the authors' code does. Measure on an idle machine.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench_report import Report, now, smooth_images, timed
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from mdcs.algorithm import Method, build_method
from mdcs.config import Config, DataConfig, MdcsConfig, ModelConfig, OptimizerConfig, StepSchedule
from mdcs.eval import run_network
from mdcs.model import MultiExpert, forward_views, laid_out
from mdcs.problem import Problem, thirds
from mdcs.state import Training, start
from mdcs.views import ResidentViews
from shared.batches import Resident, epoch_order, split_batches
from shared.gpu import Precision, autocast, setup, stream
from shared.longtail import exponential_counts, shot_groups

CLASSES, N_MAX, IMBALANCE = 100, 500, 100.0  # CIFAR-100-LT: 10,847 images
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
LAMBDAS, ALPHA, TEMPERATURE = (-0.5, 1.0, 2.5), 0.6, 1.0
SIDE, RATE, MOMENTUM, DECAY = 32, 0.1, 0.9, 5e-4
EPOCH = 20  # the ramp is at its end: both losses count fully
STEPS, EPOCHS = 170, 400  # steps an epoch: 10,847 images by 64; and epochs of a whole run
WORKERS = 2
Mark = Callable[[str], None]  # books the time since the last mark to a part
Item = tuple[Tensor, Tensor, int]  # weak view, strong view, label


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `QUICK` only shows that it runs."""

    depth: int = 32
    pairs: int = 64
    steps: int = 40
    rounds: int = 5
    augmented: int = 2048
    views_rounds: int = 9
    tests: int = 2000


FULL = Sizes()
QUICK = Sizes(8, 16, 3, 2, 64, 2, 100)


# ----------------------------------------------------------------------------------------------------------- our way


@dataclass(frozen=True)
class Ours:
    """What `mdcs.train` has at hand when an epoch begins."""

    state: Training
    problem: Problem
    method: Method
    config: Config
    batches: list[Tensor]

    def run_pass(self, epoch: int, mark: Mark = lambda part: None) -> float:
        """A pass over the batches by the calls of `mdcs.train`; returns its seconds a step."""
        state, config, device = self.state, self.config, self.problem.train.labels.device
        assert isinstance(self.problem.train, ResidentViews)
        state.model.train()
        began = now(device)
        for images, targets in self.problem.train.epoch(self.batches, "both", config.seed, ("views", epoch)):
            mark("augmentation")
            with autocast(device, config.precision):
                logits = forward_views(state.model, laid_out(images, config.precision), split=False)
            loss = self.method.loss(logits.float(), targets, EPOCH)
            state.meter.add(loss)
            mark("forward and loss")
            torch.autograd.backward(loss)
            mark("backward")
            state.update()
            mark("optimiser")
            state.count_confident(logits, targets, self.method.lambdas)
            mark("confident images counted")
        state.read_losses()
        return (now(device) - began) / len(self.batches)


def begin(device: torch.device, precision: Precision, sizes: Sizes) -> Ours:
    """A network before its first step, on images of this file."""
    counts = exponential_counts(N_MAX, CLASSES, IMBALANCE)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=stream(0, "labels"))][: sizes.pairs * sizes.steps]
    images, tests = (smooth_images(n, name).to(device) for n, name in ((len(labels), "train"), (sizes.tests, "test")))
    test_labels = torch.arange(sizes.tests, device=device) % CLASSES
    problem = Problem(
        ResidentViews(images, labels.to(device), MEAN, STD, "cifar"), Resident(tests, test_labels, MEAN, STD),
        tuple(counts), tuple(map(str, range(CLASSES))), shot_groups(counts), thirds(counts), 3, None, {},
    )  # fmt: skip
    config = Config(
        paper="mdcs", data=DataConfig(name="cifar100", imbalance_factor=IMBALANCE, mean=MEAN, std=STD, augment="cifar"),
        model=ModelConfig(name="resnet_cifar", depth=sizes.depth), precision=precision,
        method=MdcsConfig(lambdas=LAMBDAS, alpha=ALPHA, ramp_epochs=EPOCH, temperature=TEMPERATURE),
        optimizer=OptimizerConfig(lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY),
        schedule=StepSchedule(name="step", milestones=()), epochs=EPOCHS, batch_size=sizes.pairs,
    )  # fmt: skip
    batches = split_batches(epoch_order(len(labels), stream(0, "order")), sizes.pairs)
    return Ours(start(config, problem, device), problem, build_method(config, counts, device), config, batches)


# ----------------------------------------------------------------------------------------------------- the usual way


def cut_out(image: Tensor) -> Tensor:
    """Set a square of 16 pixels of one image [C, H, W] to 0: its centre is uniform, the border clips it."""
    y, x = (int(torch.randint(side, ())) - SIDE // 4 for side in image.shape[-2:])
    image[:, max(0, y) : y + SIDE // 2, max(0, x) : x + SIDE // 2] = 0
    return image


class Pairs(Dataset[Item]):
    """The usual data set: PIL images, transformed one by one when asked for."""

    def __init__(self, source: Resident) -> None:
        self.images = [Image.fromarray(image) for image in source.images.permute(0, 2, 3, 1).cpu().numpy()]
        self.labels = source.labels.tolist()
        crop_flip = [transforms.RandomCrop(SIDE, padding=4), transforms.RandomHorizontalFlip()]
        tensor, normalise = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=(128, 128, 128))
        self.weak = transforms.Compose([*crop_flip, transforms.RandomRotation(15), tensor, normalise])
        self.strong = transforms.Compose([*crop_flip, policy, tensor, cut_out, normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.weak(self.images[index]), self.strong(self.images[index]), self.labels[index]


class Usual:
    """MDCS as it is usually written: transforms in a loader's two workers, float32, a loop over the experts."""

    def __init__(self, ours: Ours, network: MultiExpert) -> None:
        """Train `network` on the images, counts and settings of `ours`."""
        self.device = ours.problem.train.labels.device
        self.network = network.to(self.device)
        self.counts = torch.tensor(ours.problem.class_counts, dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.SGD(
            network.parameters(), RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
        )
        assert isinstance(ours.problem.train, Resident)
        self.loader = DataLoader(
            Pairs(ours.problem.train), ours.config.batch_size, shuffle=True, num_workers=WORKERS,
            persistent_workers=True,
        )  # fmt: skip

    def run_pass(self) -> float:
        """A pass over the loader; returns its seconds a step."""
        total, steps = 0.0, 0
        self.network.train()
        torch.use_deterministic_algorithms(False)
        began = now(self.device)
        for batch in self.loader:
            weak, strong, targets = (tensor.to(self.device) for tensor in batch)
            loss = usual_loss(self.network(torch.cat([weak, strong])), targets, self.counts)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item()
            steps += 1
        seconds = now(self.device) - began
        torch.use_deterministic_algorithms(True, warn_only=True)
        return seconds / steps


def usual_loss(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """The loss of a step, expert by expert, with a look at each one's mask and copies of the rows that it chooses."""
    loss, images = logits.new_zeros(()), len(targets)
    for expert, exponent in enumerate(LAMBDAS):
        adjusted = logits[:, expert] + exponent * torch.log(counts)
        loss = loss + functional.cross_entropy(adjusted, torch.cat([targets, targets]))
        weak, strong = adjusted[:images].detach(), adjusted[images:]
        mask = weak.argmax(dim=1) == targets
        if mask.sum() > 0:
            teacher = functional.softmax(weak[mask] / TEMPERATURE, dim=1)
            student = functional.log_softmax(strong[mask] / TEMPERATURE, dim=1)
            divergence = functional.kl_div(student, teacher, reduction="batchmean")
            loss = loss + ALPHA * TEMPERATURE**2 * divergence
    return loss


@torch.no_grad()
def expert_passes(model: MultiExpert, problem: Problem, config: Config) -> Tensor:
    """Predictions [N, E + 1] with a pass over the test images for each expert (trunk and own branch); last the mean."""
    model.eval()
    logits, device = [], problem.test.labels.device
    for expert, head in zip(model.experts, model.heads, strict=True):
        parts = []
        for images, _ in problem.test.evaluate(config.evaluate.batch_size):
            with autocast(device, config.precision):
                parts.append(head(expert(model.trunk(images))).float())
        logits.append(torch.cat(parts))
    return torch.stack([z.argmax(dim=1) for z in (*logits, torch.stack(logits).mean(dim=0))], dim=1).cpu()


# -------------------------------------------------------------------------------------------------------- measurement


def where_time_goes(ours: Ours, epoch: int) -> dict[str, float]:
    """The share of each part in a pass."""
    spent: dict[str, float] = {}
    device = ours.problem.train.labels.device
    last = now(device)

    def mark(part: str) -> None:
        """Count the time since the last mark as this part's."""
        nonlocal last
        spent[part] = spent.get(part, 0.0) + (time := now(device)) - last
        last = time

    ours.run_pass(epoch, mark)
    return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}


def measure_steps(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Passes of all sides by turns, after one that is not counted; then where our time goes."""
    bfloat16, float32 = begin(device, "bfloat16", sizes), begin(device, "float32", sizes)
    usual = Usual(float32, begin(device, "float32", sizes).state.model)
    names = ("bfloat16, channels_last", "float32")
    seconds: dict[str, list[float]] = {name: [] for name in (*names, "usual")}
    for turn in range(sizes.rounds + 1):
        passes = (bfloat16.run_pass(turn), float32.run_pass(turn), usual.run_pass())
        for name, time in zip(seconds, passes, strict=True):
            seconds[name] += [time] if turn else []
    spent = [where_time_goes(bfloat16, sizes.rounds + 1 + turn) for turn in range(3)]
    what = f"ResNet-{sizes.depth}, 3 experts, {sizes.pairs} images in two views"
    milliseconds = {name: [1000 * time for time in times] for name, times in seconds.items()}
    for name in names:
        report.add("step", f"{what}; {name}", "ms", milliseconds[name], milliseconds["usual"])
    for part in spent[0]:
        report.add("where our time goes", f"{names[0]}: {part}", "share", [shares[part] for shares in spent])
    rates = {name: [sizes.pairs / time for time in times] for name, times in seconds.items()}
    report.add("throughput", f"{what}; {names[0]}", "images/s", rates[names[0]], rates["usual"])
    network = [shares["forward and loss"] + shares["backward"] for shares in spent]
    report.add("throughput", f"{names[0]}: forward, loss and backward, of all our time", "share", network)
    for name in seconds:
        minutes = [EPOCHS * STEPS * time / 60 for time in seconds[name]]
        report.add("throughput", f"{EPOCHS} epochs of CIFAR-100-LT, {STEPS} steps each; {name}", "min", minutes)


def measure_augmentation(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Views of the same images by turns; ours come in batches, normalised, PIL's as normalised tensors one by one."""
    images, labels = smooth_images(sizes.augmented, "views").to(device), torch.zeros(sizes.augmented, device=device)
    pairs = Pairs(resident := ResidentViews(images, labels.long(), MEAN, STD, "cifar"))
    batches = list(torch.split(torch.arange(sizes.augmented), sizes.pairs))

    def ours(views: Any, turn: int) -> Iterator[Any]:
        """Batches of ours, on the device."""
        return resident.epoch(batches, views, 0, ("views", turn))

    def theirs(views: Any) -> Iterator[Any]:
        """PIL's views, image by image."""
        made = [pairs.weak, pairs.strong] if views == "both" else [getattr(pairs, views)]
        return (transform(image) for image in pairs.images for transform in made)

    def microseconds(make: Iterator[Any]) -> float:
        """Microseconds an image until the iterator ends."""
        began = now(device)
        for _ in make:
            pass
        return 1e6 * (now(device) - began) / sizes.augmented

    for views, name in (("weak", "weak view"), ("strong", "strong view"), ("both", "both views")):
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(sizes.views_rounds + 1):
            made = microseconds(ours(views, turn)), microseconds(theirs(views))
            for kept, time in zip(times, made, strict=True):
                kept += [time] if turn else []
        report.add("augmentation", f"an image's {name}", "us", *times)


def measure_evaluation(report: Report, device: torch.device, sizes: Sizes) -> None:
    """One pass over the test images against a pass for each expert, by turns, in the same precision."""
    case = begin(device, "bfloat16", sizes)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(sizes.rounds + 1):
        for kept, way in zip(times, (run_network, expert_passes), strict=True):
            time, _ = timed(lambda: way(case.state.model, case.problem, case.config))  # noqa: B023
            kept += [time] if turn else []
    setting = f"ResNet-{sizes.depth}, {sizes.tests} images, bfloat16: ensemble and 3 experts"
    report.add("evaluation", setting, "s", *times)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=2, help="of a step and an evaluation on a CPU (default 2)")
    parser.add_argument("--quick", action="store_true", help="a small network and few steps: no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("results/mdcs/benchmarks.csv"))
    asked = parser.parse_args(arguments)
    sizes = QUICK if asked.quick else FULL
    device = setup(asked.device, asked.threads)
    report = Report(device, ("step", "augmentation", "evaluation"))
    began = perf_counter()
    for measure in (measure_steps, measure_evaluation, measure_augmentation):
        setup(asked.device, threads := 1 if measure == measure_augmentation else asked.threads)
        print(f"{perf_counter() - began:.0f} s: {measure.__name__}, threads: {threads} ...", file=sys.stderr)
        measure(report, device, sizes)
    report.finish(asked.out)
    print(f"written: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
