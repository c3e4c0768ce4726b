"""Functions of tensors that are launched as one CUDA graph, from their second call with the same shapes on."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def capture_cuda_graph(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...]
) -> tuple[Callable[[], None], Tensor]:
    """What runs `function` on these very tensors again, and the tensor that it writes its result to."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*arguments)
    return graph.replay, output


class GraphedFunction:
    r"""
    A function whose kernels follow from the shapes of its arguments, so that the host launches them all at once.

    The first call with some shapes runs as it is, and warms up what the kernels need; the second is captured. On other
    devices than CUDA's, and within autocast, whose copies of weights a graph must not hold, every call runs as it is.

    Args:
        function (`Callable`): Of a hashable and tensors; must not wait for the device, nor return what it was given.
        capture (`Callable`, *optional*): Makes a graph of a function and its arguments.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Callable = capture_cuda_graph):
        self._function, self._capture = function, capture
        # By what the kernels follow from: None once called, then the graph, its arguments and its result.
        self._graphs: dict[Hashable, tuple[Callable[[], None], tuple[Tensor, ...], Tensor] | None] = {}

    def __call__(self, static: Hashable, *tensors: Tensor) -> Tensor:
        r"""
        Args:
            static (hashable): What else the kernels follow from.
            *tensors (`torch.Tensor`): All on one device.

        Returns:
            `torch.Tensor`
        """
        if not self.is_capturable(tensors[0]):
            return self._function(static, *tensors)
        key = static, *((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._graphs:
            self._graphs[key] = None
            return self._function(static, *tensors)
        if self._graphs[key] is None:
            own = tuple(tensor.clone() for tensor in tensors)
            replay, output = self._capture(lambda *arguments: self._function(static, *arguments), own)
            self._graphs[key] = replay, own, output
        replay, own, output = self._graphs[key]
        for kept, tensor in zip(own, tensors, strict=True):
            kept.copy_(tensor)
        replay()
        # The next call writes there.
        return output.clone()

    @staticmethod
    def is_capturable(tensor: Tensor) -> bool:
        return tensor.is_cuda and not torch.is_autocast_enabled("cuda")
