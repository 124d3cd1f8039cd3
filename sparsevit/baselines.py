"""What the paper is compared with: other regularisers, other ways to choose weights, 2:4 sparsity, the noise floor."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shared.errors import ConfigError, DataError
from shared.gpu import stream
from sparsevit.method import at_least_float32, lowest_masks, zeros_to_prune


def attention_l1(attention: Tensor) -> Tensor:
    """Mean |a| of [B, H, N, N]: 1/N whatever the map is, so its gradient is zero. The control that must do nothing."""
    return at_least_float32(attention).abs().mean()


def activation_l1(hidden: Tensor) -> Tensor:
    """Mean |h| over [B, N, m] GELU outputs."""
    return at_least_float32(hidden).abs().mean()


def weight_l1(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of |w| over all tensors: the textbook's sparse-then-prune."""
    return torch.stack([tensor.abs().sum() for tensor in tensors]).sum()


def neuron_group_lasso(fc1_weight: Tensor, fc2_weight: Tensor) -> Tensor:
    """Sum over neurons of sqrt(||fc1 row||^2 + ||fc2 column||^2), which drives whole neurons to zero.

    The gradient of a neuron that is zero is zero, not NaN.

    Args:
        fc1_weight: [m, d].
        fc2_weight: [d, m].
    """
    squares = fc1_weight.square().sum(dim=1) + fc2_weight.square().sum(dim=0)
    alive = squares > 0
    return torch.where(alive, torch.where(alive, squares, 1.0).sqrt(), 0.0).sum()


@torch.no_grad()
def perturb(network: nn.Module, relative: float, seed: int) -> None:
    """Multiply every parameter by 1 + relative * N(0, 1): the same run but for rounding, which is the noise floor."""
    generator = stream(seed, "perturb")
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + relative * noise)


def local_magnitude_masks(tensors: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The lowest |w| of each tensor go, the same share of each; True where a weight stays."""
    return {name: lowest_masks([tensor.detach().abs()], ratio)[0] for name, tensor in tensors.items()}


def random_masks(tensors: Mapping[str, Tensor], ratio: float, seed: int) -> dict[str, Tensor]:
    """As many weights as the global ranking prunes, drawn; a higher ratio prunes those of a lower one too."""
    generator = stream(seed, "random masks")
    scores = [torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in tensors.values()]
    return dict(zip(tensors, lowest_masks(scores, ratio), strict=True))


def wanda_masks(tensors: Mapping[str, Tensor], input_norms: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Wanda (Sun et al. 2024): |w_ij| * ||x_j||, the lowest round(ratio * in) of each output row go.

    Args:
        tensors: matrices [out, in] by name.
        input_norms: for each the L2 norms [in] of its input features over calibration images.

    Raises:
        DataError: a tensor has no input norms.
    """
    masks = {}
    for name, tensor in tensors.items():
        if name not in input_norms:
            raise DataError(f"{name}: there are no input norms of it; Wanda ranks the matrices of blocks only")
        count = zeros_to_prune(ratio, tensor.shape[1])
        scores = tensor.detach().abs() * input_norms[name].to(tensor)
        lowest = torch.sort(scores, dim=1, stable=True).indices[:, :count]
        masks[name] = torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
    return masks


def two_four_mask(weight: Tensor) -> Tensor:
    """2:4 sparsity: of every four consecutive inputs the two largest |w| stay; weight [out, in] -> bool mask.

    Raises:
        ConfigError: the number of inputs is no multiple of four.
    """
    out, inputs = weight.shape
    if inputs % 4:
        raise ConfigError(f"2:4 sparsity: a matrix of {inputs} inputs is not a multiple of 4; leave it dense")
    groups = weight.detach().abs().reshape(out, inputs // 4, 4)
    lowest = torch.sort(groups, dim=-1, stable=True).indices[..., :2]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False).view(out, inputs)


def can_run_two_four(device: torch.device) -> bool:
    """Whether the device has tensor cores for 2:4 sparsity: NVIDIA, compute capability 8.0 or above."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@torch.no_grad()
def to_two_four(network: nn.Module) -> list[str]:
    """Turn fc1 and fc2 of every block into semi-structured matrices, in place; the names of those that were turned.

    For inference, in float16 or bfloat16, as the last step: an optimiser step after it is undefined. Matrices whose
    shape the kernels do not take stay dense.

    Raises:
        ConfigError: the device has no 2:4 kernels, or the network is not in half precision.
    """
    parameter = next(network.parameters())
    if not can_run_two_four(parameter.device):
        raise ConfigError(f"2:4 kernels need an NVIDIA GPU of compute capability 8.0 or above, not {parameter.device}")
    if parameter.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"2:4 kernels need float16 or bfloat16, found {parameter.dtype}; call network.half() first")
    from torch.sparse import to_sparse_semi_structured

    turned = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("fc1", "fc2"):
            rows, columns = module.weight.shape
            if rows % 32 or columns % 64:
                continue
            pruned = torch.where(two_four_mask(module.weight), module.weight, 0).contiguous()
            module.weight = nn.Parameter(to_sparse_semi_structured(pruned), requires_grad=False)
            turned.append(name)
    return turned
