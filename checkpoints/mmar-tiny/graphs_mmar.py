"""Functions of tensors that are launched as one CUDA graph, once they were called often with the same shapes."""

import contextlib
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from .packed_linear_mmar import PackedLinear


# Capturing costs about as much as some calls: only what comes again and again is captured, as in the paper's protocol.
CALLS_BEFORE_CAPTURE = 8
# torch captures one graph at a time.
_CAPTURING = threading.Lock()


def capture_cuda_graph(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...]
) -> tuple[Callable[[], None], Tensor]:
    """What runs `function` on these very tensors again, and the tensor that it writes its result to."""
    device, graph = arguments[0].device, torch.cuda.CUDAGraph()
    with _CAPTURING, torch.cuda.device(device):
        # Of this device and this call: torch's own stream is of the device that was current first. Other threads may
        # go on allocating memory.
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = function(*arguments)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, output


def has_hooks(module: nn.Module) -> bool:
    """Whether a part of a module waits for its own call, as a user's hook or accelerate's: a graph would skip it."""
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        # Another thread may be drawing with the same weights, packed.
        or not isinstance(vars(part).get("forward"), (PackedLinear, type(None)))
        for part in module.modules()
    )


class GraphCache:
    r"""
    Graphs of a function whose kernels follow from the shapes of its arguments, so that the host launches them at once.

    The first calls with some shapes run as they are, and warm up what the kernels need. On other devices than CUDA's,
    within autocast, whose copies of weights a graph must not hold, and within another capture every call does; so it
    does after a capture that failed. The function is handed in with each call: kept here, it would keep its owner.

    Args:
        capture (`Callable`, *optional*): Makes a graph of a function and its arguments.
    """

    def __init__(self, capture: Callable = capture_cuda_graph):
        self._capture = capture
        # By what the kernels follow from: how often it was called, or the graph, its arguments and its result.
        self._entries: dict[Hashable, int | tuple[Callable[[], None], tuple[Tensor, ...], Tensor]] = {}

    def run(self, function: Callable[..., Tensor], static: Hashable, *tensors: Tensor) -> Tensor:
        r"""
        Args:
            function (`Callable`): Of `static` and the tensors, the same for every call; must not wait for the device,
                nor return what it was given.
            static (hashable): What else the kernels follow from.
            *tensors (`torch.Tensor`): All on one device.

        Returns:
            `torch.Tensor`
        """
        if not self.is_capturable(tensors[0]):
            return function(static, *tensors)
        key = static, *((tensor.shape, tensor.dtype) for tensor in tensors)
        entry = self._entries.get(key, 0)
        if entry == CALLS_BEFORE_CAPTURE:
            own = tuple(tensor.clone() for tensor in tensors)
            # No memory, or another library that cannot be captured: never tried again.
            entry = -1
            with contextlib.suppress(RuntimeError):
                entry = (*self._captured(function, static, own), own)
            self._entries[key] = entry
        if isinstance(entry, int):
            self._entries[key] = entry + 1 if entry >= 0 else entry
            return function(static, *tensors)
        replay, output, own = entry
        for kept, tensor in zip(own, tensors, strict=True):
            kept.copy_(tensor)
        replay()
        # The next call writes there.
        return output.clone()

    def _captured(
        self, function: Callable[..., Tensor], static: Hashable, own: tuple[Tensor, ...]
    ) -> tuple[Callable[[], None], Tensor]:
        return self._capture(lambda *arguments: function(static, *arguments), own)

    @staticmethod
    def is_capturable(tensor: Tensor) -> bool:
        """Whether calls on this tensor's device may become graphs now."""
        if not tensor.is_cuda or torch.is_autocast_enabled("cuda"):
            return False
        return not torch.cuda.is_current_stream_capturing()
