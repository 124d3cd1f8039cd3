"""The ideas of MDCS and nothing else: the diversity loss, the consistency self-distillation, the confident sampling.

Pure functions on tensors, in the paper's notation: z raw logits [V, E, C] of V views, E experts and C classes; y the
classes [V]; n_c the training images of class c; lambda_e the exponent of expert e. A batch of B images has V = 2B
views: the B weak ones first, then the B strong ones in the same order. a = z + lambda log n are the adjusted logits.

Logits of lower precision (autocast) become float32 before anything is done with them; float64 stays. On a GPU nothing
waits for the device, as long as all tensors are on it: no value of a tensor is looked at.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError, DataError

Confident = Literal["adjusted", "raw", "all"]


def adjusted_logits(logits: Tensor, log_counts: Tensor, lambdas: Tensor) -> Tensor:
    """Add to each expert's logits the class frequencies that it is trained under.

    a_ec = z_ec + lambda_e log n_c          so that  softmax(a_e)_c  ~  n_c^lambda_e exp(z_ec)

    lambda 0 leaves the logits, 1 is balanced softmax; below 0 an expert learns to favour the head, above 1 the tail. A
    constant added to log n (priors instead of counts) changes no softmax.

    Args:
        logits: z [V, E, C].
        log_counts: log n [C], natural logarithm.
        lambdas: [E].

    Returns [V, E, C], float32, or float64 where the logits are. Raises DataError or ConfigError for other shapes.
    """
    _check_dimensions(logits)
    check_classes(logits, log_counts=log_counts)
    if lambdas.shape != logits.shape[1:2]:
        raise ConfigError(f"there are {lambdas.numel()} lambdas for {logits.shape[1]} experts; give one an expert")
    z = full_precision(logits)
    return torch.add(z, lambdas.to(z)[:, None] * log_counts.to(z))


def expert_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the experts of the mean over the views of -log softmax(logits_e)_y.

    With class weights w [C] the mean is torch's weighted one, sum_i w_yi l_i / sum_i w_yi.

    `logits` is [V, E, C], `targets` [V] int64. Returns a scalar. Raises DataError for other shapes.
    """
    check_rows(logits, targets)
    z, experts = full_precision(logits), logits.shape[1]
    if weights is not None:
        check_classes(logits, weights=weights)
        weights = weights.to(z)
    # All experts see the same targets, so each has the same number (or weight) of views in the common mean.
    mean = functional.cross_entropy(z.flatten(0, 1), targets.repeat_interleave(experts), weights)
    return experts * mean


def diversity_loss(logits: Tensor, targets: Tensor, log_counts: Tensor, lambdas: Tensor) -> Tensor:
    """Train each expert under a class distribution of its own: L_DL.

    L_DL = sum_e  mean_v  -log q_e(y_v | x_v),          q_e = softmax(z_e + lambda_e log n)

    Args:
        logits: z [V, E, C], raw.
        targets: y [V] int64.
        log_counts: log n [C].
        lambdas: [E].

    Returns a scalar: a sum over experts, not a mean. Raises DataError or ConfigError for shapes that do not fit.
    """
    return expert_cross_entropy(adjusted_logits(logits, log_counts, lambdas), targets)


def confident_mask(weak_logits: Tensor, targets: Tensor) -> Tensor:
    """Confident instance sampling: an expert teaches only the images that it gets right itself.

    m_ie = 1  if  argmax_c a_iec = y_i  else 0          no threshold on the probability

    `weak_logits` are the weak views' [B, E, C], adjusted (the paper's) or raw; `targets` [B]. Returns bool [B, E].
    Raises DataError for other shapes.
    """
    check_rows(weak_logits, targets)
    return torch.eq(weak_logits.argmax(dim=-1), targets[:, None])


def consistency_loss(
    weak_logits: Tensor, strong_logits: Tensor, targets: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Teach each expert to see in the strong view what it sees in the weak one: L_CS.

    L_CS = sum_e  T^2  sum_i m_ie KL(p_t,ie || p_s,ie) / max(1, sum_i m_ie)
    p_t = softmax(sg(a_weak) / T),  p_s = softmax(a_strong / T)          sg: stop-gradient

    The divisor is the number of the expert's confident images, not B; an expert without any adds exactly 0.

    Args:
        weak_logits: a_weak [B, E, C], adjusted.
        strong_logits: a_strong [B, E, C], the same images in the same order.
        targets: y [B] int64.
        temperature: T > 0; 1 in the authors' code.
        mask: m, bool [B, E], instead of `confident_mask(weak_logits, targets)`.

    Returns a scalar. Raises DataError for views or a mask of other shapes, ConfigError for a temperature <= 0.
    """
    if weak_logits.shape != strong_logits.shape:
        shapes = f"{tuple(weak_logits.shape)} and {tuple(strong_logits.shape)}"
        raise DataError(f"weak and strong logits are views of different sizes, {shapes}")
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature} is not a positive number")
    confident = confident_mask(weak_logits, targets) if mask is None else mask
    if confident.shape != weak_logits.shape[:2]:
        expected = tuple(weak_logits.shape[:2])
        raise DataError(f"the mask of confident images is {tuple(confident.shape)}, expected {expected}")
    teacher = torch.log_softmax(full_precision(weak_logits.detach()) / temperature, dim=-1)
    student = torch.log_softmax(full_precision(strong_logits) / temperature, dim=-1)
    divergence = kl_divergence(teacher, student).masked_fill(~confident, 0.0)
    per_expert = divergence.sum(dim=0) / confident.sum(dim=0).clamp(min=1)
    return temperature**2 * per_expert.sum()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c), in nats; both [..., C], the result [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def ramp(epoch: int, ramp_epochs: int) -> float:
    """Weight of the consistency loss, r(t) = min(t / ramp_epochs, 1), t the epoch counted from 1.

    Without ramp epochs it is 1 from the start. Raises ConfigError for an epoch below 1 or negative ramp epochs.
    """
    if epoch < 1 or ramp_epochs < 0:
        raise ConfigError(f"epoch {epoch} of a ramp of {ramp_epochs} epochs: epochs count from 1, a ramp has 0 or more")
    return min(epoch / ramp_epochs, 1.0) if ramp_epochs else 1.0


def mdcs_loss(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor | Sequence[float],
    lambdas: Tensor | Sequence[float],
    alpha: float,
    ramp: float,
    temperature: float,
    confident: Confident = "adjusted",
) -> Tensor:
    """The whole loss of a step, L = L_DL + alpha r(t) L_CS (authors' code).

    L_DL is a mean over weak and strong views; both terms are sums over experts.

    Args:
        logits: z [2B, E, C], raw; rows 0..B-1 are the weak views, the others the strong ones.
        targets: y [B] int64.
        class_counts: n [C], training images a class, each > 0; any multiple of them (priors) does the same.
        lambdas: [E]. Where these or the counts are not on the logits' device, each call copies them there.
        alpha: weight of L_CS; 0.6 in the authors' code.
        ramp: r(t) in [0, 1], see `ramp`.
        temperature: T > 0.
        confident: logits that choose the images which teach: "adjusted" (the paper's) or "raw"; "all": every image.

    Returns a scalar. Raises DataError for logits that are not two views of the targets and for counts that are not
    positive or not one a class, ConfigError for lambdas that are not one an expert and an unknown `confident`.
    """
    images = len(targets)
    if len(logits) != 2 * images:
        raise DataError(f"{len(logits)} rows of logits for {images} images: views of different sizes, expected 2 each")
    log_counts = positive_counts(class_counts).log()
    adjusted = adjusted_logits(logits, log_counts, torch.as_tensor(lambdas, dtype=torch.float64))
    weak, strong = adjusted[:images], adjusted[images:]
    if confident == "adjusted":
        mask = confident_mask(weak, targets)
    elif confident == "raw":
        mask = confident_mask(logits[:images], targets)
    elif confident == "all":
        mask = torch.ones_like(weak[..., 0], dtype=torch.bool)
    else:
        raise ConfigError(f"confident '{confident}' is unknown; choose from adjusted, raw, all")
    diversity = expert_cross_entropy(adjusted, targets.repeat(2))
    return diversity + alpha * ramp * consistency_loss(weak, strong, targets, temperature, mask)


def spaced_lambdas(num_experts: int) -> tuple[float, ...]:
    """Exponents of E experts: equally spaced from -0.5 to 2.5, (-0.5, 1, 2.5) being the paper's; (1,) for one expert.

    Their mean is 1: the averaged experts are balanced. Raises ConfigError for fewer than one expert.
    """
    if num_experts < 1:
        raise ConfigError(f"{num_experts} experts; there must be at least 1")
    if num_experts == 1:
        return (1.0,)
    return tuple(-0.5 + 3 * e / (num_experts - 1) for e in range(num_experts))


def full_precision(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are: what every softmax of this package is computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def positive_counts(class_counts: Tensor | Sequence[float]) -> Tensor:
    """Class counts as float64 [C], on the device where they are.

    Raises DataError where a count is not positive: it would have no logarithm.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    # Only on the CPU: to look at values on a GPU is to wait for it, in every step.
    if counts.device.type == "cpu" and not bool((counts > 0).all()):
        lowest = counts.argmin()
        raise DataError(f"class {int(lowest)} has {float(counts[lowest]):g} training images; every class needs some")
    return counts


def check_rows(logits: Tensor, targets: Tensor) -> None:
    """Raise DataError unless logits are [V, E, C] and targets [V]."""
    _check_dimensions(logits)
    if targets.shape != logits.shape[:1]:
        raise DataError(f"{len(logits)} rows of logits for targets {tuple(targets.shape)}; expected one target a row")


def check_classes(logits: Tensor, **vectors: Tensor) -> None:
    """Raise DataError unless each named vector has one value for each of the logits' C classes (last dimension)."""
    for name, vector in vectors.items():
        if vector.shape != logits.shape[-1:]:
            found = f"{name.replace('_', ' ')} of shape {tuple(vector.shape)}"
            raise DataError(f"{found} for logits of {logits.shape[-1]} classes; give one value a class")


def _check_dimensions(logits: Tensor) -> None:
    if logits.ndim != 3:
        raise DataError(f"logits of shape {tuple(logits.shape)}; expected [views, experts, classes]")
