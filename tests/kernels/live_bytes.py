"""How much memory is held at once, on any device: by the birth and death of every tensor."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes at once of what is made under it and still held."""

    def __init__(self):
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and StorageWeakRef(x.untyped_storage()) not in given:
                self.live[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        self.most = max(self.most, sum(self.live.values()))
        return result
