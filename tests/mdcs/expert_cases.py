"""Logits of experts, and the slow reference: plain Python on floats."""

import math

import torch

from shared.longtail import exponential_counts

LAMBDAS = (-0.5, 1.0, 2.5)
COUNTS = (100, 10, 1)


def gaussian(*shape, seed=0, spread=2.0):
    """Normal numbers of a seed, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def case(images=5, experts=3, classes=4, seed=0):
    """Raw logits [2B, E, C], targets [B], counts [C]."""
    targets = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed + 1))
    return gaussian(2 * images, experts, classes, seed=seed), targets, exponential_counts(80, classes, 16)


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def slow_parts(logits, targets, counts, lambdas, temperature, confident="adjusted"):
    """Cross-entropy, masks and KL of each expert, by loops."""
    z, y = logits.tolist(), targets.tolist()
    entropies, masks, divergences = [], [], []
    for e, exponent in enumerate(lambdas):
        a = [[value + exponent * math.log(n) for value, n in zip(row[e], counts, strict=True)] for row in z]
        entropies.append(sum(-math.log(softmax(row)[label]) for row, label in zip(a, y + y, strict=True)) / len(a))
        mask, total = [], 0.0
        for i, label in enumerate(y):
            seen = {"adjusted": a[i], "raw": z[i][e], "all": [c == label for c in range(len(counts))]}[confident]
            mask.append(seen.index(max(seen)) == label)
            teacher = softmax([value / temperature for value in a[i]])
            student = softmax([value / temperature for value in a[len(y) + i]])
            if mask[-1]:
                total += sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
        masks.append(mask)
        divergences.append(temperature**2 * total / max(1, sum(mask)))
    return entropies, masks, divergences


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)
