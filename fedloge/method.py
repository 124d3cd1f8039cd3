"""The ideas of FedLoGe and nothing else: the static sparse frame, the local objective, the closed-form realignment.

Pure functions on tensors, in the paper's notation: h features [B, d]; S the frozen sparse frame (SSE-C) [C, d], with
rows s_c of length gamma; psi the shared head, rows psi_c; phi_k the private head of client k, rows phi_{k,c}.
"""

import difflib
import hashlib
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError, DataError

Head = tuple[Tensor, Tensor | None]  # weight [C, d], bias [C]

# The summands of each personal rule: `realigned` is phi'_k, `global` is psi, `local` is phi_k.
PERSONAL_RULES: dict[str, tuple[str, ...]] = {
    "paper": ("realigned",),
    "code": ("realigned", "local"),
    "readme": ("realigned", "global"),
    "stage1_sum": ("global", "local"),
}

_COSINE_LIMIT = 0.99999  # arccos has an infinite slope at +-1


class EtfGeometry(NamedTuple):
    """How near a frame is to a simplex; angles in degrees, the variance over rows (population)."""

    mean_angle: float
    min_angle: float
    ideal_angle: float
    length_mean: float
    length_var: float
    zeros: int
    dead_channels: int


def simplex_etf(feature_dim: int, num_classes: int, seed: int) -> Tensor:
    """Draw a simplex equiangular tight frame: the C most spread-out unit directions in R^d.

    M = sqrt(C / (C - 1)) * Q (I - 11^T / C),  Q [d, C] with orthonormal columns       (the transpose of M is returned)

    Rows have length 1, pairwise cosine -1/(C-1) and sum to zero. Q is the orthogonal factor of a Gaussian matrix, in
    float64. torch's global generator is neither read nor advanced.

    Returns [C, d] float32. Raises ConfigError for fewer than two classes or fewer feature channels than classes.
    """
    if num_classes < 2:
        raise ConfigError(f"a simplex frame needs at least 2 classes, got {num_classes}")
    if feature_dim < num_classes:
        raise ConfigError(f"{num_classes} classes need a backbone of at least as many channels; it has {feature_dim}")
    gaussian = torch.randn(feature_dim, num_classes, dtype=torch.float64, generator=_generator(seed, "directions"))
    orthonormal, _ = torch.linalg.qr(gaussian)
    centred: Tensor = orthonormal - orthonormal.mean(dim=1, keepdim=True)
    return centred.mul(math.sqrt(num_classes / (num_classes - 1))).T.contiguous().float()


def sparse_etf(
    feature_dim: int,
    num_classes: int,
    sparsity: float,
    norm: float,
    seed: int,
    steps: int = 1000,
    *,
    prescale: bool = True,
) -> Tensor:
    """Build the static sparse frame S: a simplex with a fixed share of zeros, its geometry repaired by optimisation.

    1. Exactly floor(sparsity * d * C) entries, uniform over the whole matrix, are zero for ever.
    2. Adam on the other entries lowers `etf_repair_loss` for `steps` steps (0 returns the start).

    With `prescale` the rows are brought to length `norm` first and the rate is 1e-3 * norm: 1,000 steps then reach the
    geometry of the authors' schedule, which is `prescale=False, steps=10_000` (start as masked, rate 1e-4).
    Without zeros the result is norm * simplex exactly, and nothing is optimised.

    Args:
        sparsity: beta, the share of zeros, in [0, 1).
        norm: gamma, the row length aimed at, > 0.
        seed: of the directions and of the mask; each has a generator of its own, torch's global one is untouched.

    Returns [C, d] float32 without gradient. Warns when the mean angle is more than 1 degree from the simplex's. Raises
    ConfigError for an argument out of range, or a class that the mask leaves without any channel.
    """
    _check_sparse_etf(sparsity, norm, steps)
    dense = simplex_etf(feature_dim, num_classes, seed)
    zeros = math.floor(sparsity * feature_dim * num_classes)
    if zeros == 0:
        return dense.mul_(norm)
    mask = _draw_mask(num_classes, feature_dim, zeros, seed)
    if empty := int((mask.sum(dim=1) == 0).sum()):
        raise ConfigError(
            f"sparsity {sparsity} leaves {empty} of {num_classes} classes without any of the {feature_dim} channels; "
            "lower the sparsity or take a wider backbone"
        )
    start = dense * mask
    if prescale:
        start = norm * realign_global(start)
    weight = _repair(start, mask, norm, steps, learning_rate=1e-3 * norm if prescale else 1e-4)
    found = etf_geometry(weight)
    if abs(found.mean_angle - found.ideal_angle) > 1:
        warnings.warn(
            f"at sparsity {sparsity} and {steps} steps the frame is not equiangular: mean angle {found.mean_angle:.2f} "
            f"degrees (ideal {found.ideal_angle:.2f}), {found.dead_channels} of {feature_dim} channels dead; "
            "lower the sparsity, widen the backbone or raise the steps",
            stacklevel=2,
        )
    return weight


def etf_repair_loss(weight: Tensor, norm: float) -> Tensor:
    """Measure how far a frame is from equal lengths and from the largest possible angles.

    Equations 3 and 4, as the public reviews of the paper describe them:

    L(S) = sum_c (||s_c|| - gamma)^2  -  (1/C) sum_c arccos( max_{j != c} cos(s_c, s_j) )

    Each class is pushed away from its nearest neighbour only; the cosine is clipped to +-0.99999. The second term is at
    least -arccos(-1/(C-1)) radians, which the simplex reaches. `weight`: [C, d], no row zero. `norm`: gamma.
    """
    lengths = torch.linalg.vector_norm(weight, dim=1)
    directions = weight / lengths[:, None]
    itself = torch.eye(len(weight), dtype=torch.bool, device=weight.device)
    nearest = (directions @ directions.T).masked_fill(itself, -2.0).amax(dim=1)
    angles = nearest.clamp(-_COSINE_LIMIT, _COSINE_LIMIT).arccos()
    return torch.sub((lengths - norm).square().sum(), angles.mean())


def etf_geometry(weight: Tensor) -> EtfGeometry:
    """Measure a frame [C, d] in float64. A dead channel is a column of zeros; a zero row is orthogonal to all."""
    frame = weight.detach().double().cpu()
    classes = len(frame)
    lengths = torch.linalg.vector_norm(frame, dim=1)
    directions = realign_global(frame)
    angles = torch.rad2deg((directions @ directions.T).clamp(-1, 1).arccos())
    pairs = angles[~torch.eye(classes, dtype=torch.bool)]
    return EtfGeometry(
        mean_angle=pairs.mean().item(),
        min_angle=pairs.min().item(),
        ideal_angle=math.degrees(math.acos(-1 / (classes - 1))),
        length_mean=lengths.mean().item(),
        length_var=lengths.var(unbiased=False).item(),
        zeros=int((frame == 0).sum()),
        dead_channels=int((frame == 0).all(dim=0).sum()),
    )


def local_objective(features: Tensor, targets: Tensor, etf: Tensor, global_head: Head, personal_head: Head) -> Tensor:
    """Sum the three losses of a local step; one backward gives each parameter set its own gradient and no other.

    L = CE(h S^T, y)  +  CE(sg(h) psi^T + b, y)  +  CE(sg(h) phi_k^T + b_k, y)          sg: stop-gradient

    The first term trains the backbone only, the second psi only, the third phi_k only, so one optimiser step on the sum
    equals three separate ones. S has no bias and no temperature; the features are not normalised.

    Args:
        features: [B, d], the backbone's output, attached to its graph.
        targets: [B] int64 class indices.
        etf: S [C, d], frozen.
        global_head: psi as (weight [C, d], bias [C] or None); `personal_head`, phi_k, likewise.

    Returns:
        Scalar, each term a mean over the batch.
    """
    frozen = features.detach()
    return (
        functional.cross_entropy(functional.linear(features, etf), targets)
        + functional.cross_entropy(functional.linear(frozen, *global_head), targets)
        + functional.cross_entropy(functional.linear(frozen, *personal_head), targets)
    )


def realign_global(weight: Tensor, *, scale: float = 1.0) -> Tensor:
    """Remove the lengths that follow the class frequencies (GLA-FR, stage 1).

    psi'_c = scale * psi_c / ||psi_c||          `weight`: [..., C, d], rows psi_c

    The paper's scale is 1, the authors' code has 1.7; without a bias the predictions are the same. A row of length zero
    stays zero (logit 0 for its class), never NaN.
    """
    lengths = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return torch.mul(weight / lengths.masked_fill(lengths == 0, 1.0), scale)


def realign_local(global_weight: Tensor, local_weight: Tensor) -> Tensor:
    """Give the shared class directions the lengths that a client has learnt (GLA-FR, stage 2).

    phi'_{k,c} = psi_c * ||phi_{k,c}||          psi_c as trained, not of unit length

    `global_weight` is [C, d], `local_weight` [..., C, d] with clients in the leading dimensions.
    Returns [..., C, d]. A class whose local row is zero gets a zero row, never NaN.
    """
    return torch.mul(global_weight, torch.linalg.vector_norm(local_weight, dim=-1, keepdim=True))


def personal_heads(
    rule: str,
    global_weight: Tensor,
    global_bias: Tensor | None,
    local_weight: Tensor,
    local_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Combine psi and phi_k into the one linear head by which client k predicts.

    paper        phi'_k                 the paper's framework figure
    code         phi'_k + phi_k         the authors' evaluation script
    readme       phi'_k + psi           the authors' README
    stage1_sum   psi + phi_k            no realignment; the authors' per-round logs

    phi'_k carries the bias of psi, so no rule drops the bias of a head that it uses.

    psi is a weight [C, d] and a bias [C] or None, phi_1 ... phi_K a weight [K, C, d] and a bias [K, C] or None.
    Returns a weight [K, C, d] and a bias [K, C], None when no summand has one. Raises ConfigError for an unknown rule.
    """
    if rule not in PERSONAL_RULES:
        close = difflib.get_close_matches(rule, PERSONAL_RULES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(PERSONAL_RULES)}"
        raise ConfigError(f"there is no personal rule '{rule}'; {hint}")
    heads: dict[str, Head] = {
        "realigned": (realign_local(global_weight, local_weight), global_bias),
        "global": (global_weight, global_bias),
        "local": (local_weight, local_bias),
    }
    parts = [heads[part] for part in PERSONAL_RULES[rule]]
    biases = [bias for _, bias in parts if bias is not None]
    weight = torch.zeros_like(local_weight) + sum(weight for weight, _ in parts)
    return weight, local_weight.new_zeros(local_weight.shape[:-1]) + sum(biases) if biases else None


def class_mask(logits: Tensor, counts: Tensor) -> Tensor:
    """Rule out the classes of which a client has no training image.

    Args:
        logits: [B, C], or [K, B, C] for K clients.
        counts: [C] or [K, C], *training* images per class. (Counts of test images would leak the test labels.)

    Returns:
        The logits, -inf for absent classes: these are never predicted, whatever the features.

    Raises:
        DataError: a client without any training image, for which no class would be left.
    """
    absent = counts == 0
    if bool(absent.all(dim=-1).any()):
        raise DataError("the class mask needs at least one training image per client; a client has none")
    return logits.masked_fill(absent.unsqueeze(-2).to(logits.device), -math.inf)


def _generator(seed: int, stream: str) -> torch.Generator:
    """Make a CPU generator for one named stream, so that streams of one seed are unrelated."""
    digest = hashlib.sha256(f"{stream}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _draw_mask(num_classes: int, feature_dim: int, zeros: int, seed: int) -> Tensor:
    mask = torch.ones(num_classes * feature_dim)
    mask[torch.randperm(mask.numel(), generator=_generator(seed, "mask"))[:zeros]] = 0
    return mask.view(num_classes, feature_dim)


def _check_sparse_etf(sparsity: float, norm: float, steps: int) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity {sparsity} is outside [0, 1); it is the share of zeros in the frame")
    if not (norm > 0 and math.isfinite(norm)):
        raise ConfigError(f"norm {norm} is not a positive number; it is the row length of the frame")
    if steps < 0:
        raise ConfigError(f"steps {steps} is negative; it counts the repair steps of the frame")


def _repair_gradient(weight: Tensor, norm: float) -> Tensor:
    """Gradient of `etf_repair_loss` by hand: 2 (512 x 100) to 4 (64 x 10) times as fast as autograd."""
    lengths = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    directions = weight / lengths
    cosines, nearest = (directions @ directions.T).fill_diagonal_(-2.0).max(dim=1)
    # -d arccos(z) / dz = 1 / sqrt(1 - z^2); a clipped cosine has no slope.
    clipped = cosines.abs() >= _COSINE_LIMIT
    slopes = ((1 - cosines.square()).rsqrt() / len(weight)).masked_fill(clipped, 0.0)[:, None]
    ascent = slopes * directions[nearest]
    ascent.index_add_(0, nearest, slopes * directions)
    tangent = ascent - (ascent * directions).sum(dim=1, keepdim=True) * directions
    return torch.add(tangent / lengths, (lengths - norm) * directions, alpha=2)


@torch.no_grad()
def _repair(start: Tensor, mask: Tensor, norm: float, steps: int, learning_rate: float) -> Tensor:
    """Adam (0.9, 0.999, 1e-8). A masked entry has gradient, moments and update of exactly zero, so it stays zero."""
    weight = start.clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        gradient = _repair_gradient(weight, norm).mul_(mask)
        first.lerp_(gradient, 1 - 0.9)
        second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        spread = (second.sqrt() / math.sqrt(1 - 0.999**step)).add_(1e-8)
        weight.addcdiv_(first, spread, value=-learning_rate / (1 - 0.9**step))
    return weight
