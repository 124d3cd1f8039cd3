"""What is asked of stacks of networks."""


def largest_difference(a, b):
    """Of two stacks with the same names."""
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)
