"""What a loss may not do on a device: wait for it, or take a softmax of low precision."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Refuses what makes the host wait for a device or copies to it; notes the precision of every softmax."""

    waits = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")
    )

    def __init__(self):
        super().__init__()
        self.softmaxes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.waits, f"{name} waits for the device"
        if name in ("index", "index_put_", "index_put"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing waits for the device"
        if "softmax" in name and "backward" not in name:
            self.softmaxes.append(args[0].dtype)
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            sources = [a for a in args if isinstance(a, torch.Tensor)]
            assert all(a.device == result.device for a in sources), f"{name} copies between devices"
        return result
