"""
The Diffusion MLP's blocks in two kernels each, for the few rows of a round on a CUDA device.

A diffusion step of one picture has two rows: its time is that of reading the weights, and of the launches between.
Norm and AdaLN are computed within the kernel of the first linear with its SiLU, gate and residual within that of the
second (suppl. Fig. 6), in float32 between. Used where Triton is installed, and where a first try on the very device
was right, and clearly faster. `MMAR_FUSED_HEAD=0` never uses them, and 1 wherever they are right: the same way then
in each process, whatever the clock says.
"""

import copy
import logging
import os
import statistics
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion_mmar import MMARDiffusionBlock, MMARDiffusionLinear, MMARDiffusionMLP
from .graphs_mmar import capture_cuda_graph


try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

# More rows are a product worth a library's kernels.
MAX_ROWS = 64
# A tensor core takes at least so many rows.
MIN_TILE = 16
# Inputs that a program multiplies at a time.
MAX_DEPTH = 128
# With fewer programs than this some of a large card's processors would have nothing to read.
MIN_PROGRAMS = 128
NUM_WARPS, NUM_STAGES = 4, 4
# How far a try may be from the modules in a wider dtype, by how far the modules are themselves, which round more;
# and in units of the dtype's resolution, where they happen to be exact.
TIMES_THE_ERROR, NUM_RESOLUTIONS = 2.0, 4.0
# Kernels that are hardly faster would be chosen by chance.
MARGIN = 1.1
NUM_TIMED = 5
SWITCH = "MMAR_FUSED_HEAD"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Which heads' shapes run fused, by device, dtype, sizes and rows.
_TRIED: dict[Hashable, bool] = {}


if triton is not None:

    @triton.jit
    def _linear_kernel(
        inputs,
        weight,
        bias,
        norm_weight,
        norm_bias,
        shift,
        scale,
        residual,
        gate,
        outputs,
        num_rows,
        modulation_stride,
        eps,
        IN: tl.constexpr,
        OUT: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        IS_NORMED: tl.constexpr,
        IS_AFFINE: tl.constexpr,
        HAS_SILU: tl.constexpr,
        HAS_GATE: tl.constexpr,
    ):
        """All rows of some columns: [AdaLN of] inputs @ weight.T + bias [, SiLU] [, gate and residual]."""
        rows = tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_row = (rows < num_rows)[:, None]
        is_column = (columns < OUT)[None, :]
        mean = tl.zeros((ROWS,), tl.float32)
        inverse_std = tl.zeros((ROWS,), tl.float32)
        if IS_NORMED:
            for start in range(0, IN, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                is_in = is_row & (depth < IN)[None, :]
                x = tl.load(inputs + rows[:, None] * IN + depth[None, :], mask=is_in, other=0.0).to(tl.float32)
                mean += tl.sum(x, axis=1)
            mean = mean / IN
            for start in range(0, IN, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                is_in = is_row & (depth < IN)[None, :]
                x = tl.load(inputs + rows[:, None] * IN + depth[None, :], mask=is_in, other=0.0).to(tl.float32)
                x = tl.where(is_in, x - mean[:, None], 0.0)
                inverse_std += tl.sum(x * x, axis=1)
            inverse_std = 1.0 / tl.sqrt(inverse_std / IN + eps)

        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, IN, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            is_deep = depth < IN
            is_in = is_row & is_deep[None, :]
            x = tl.load(inputs + rows[:, None] * IN + depth[None, :], mask=is_in, other=0.0)
            if IS_NORMED:
                x = (x.to(tl.float32) - mean[:, None]) * inverse_std[:, None]
                if IS_AFFINE:
                    x = x * tl.load(norm_weight + depth, mask=is_deep, other=0.0).to(tl.float32)[None, :]
                    x += tl.load(norm_bias + depth, mask=is_deep, other=0.0).to(tl.float32)[None, :]
                at = rows[:, None] * modulation_stride + depth[None, :]
                x = x * tl.load(scale + at, mask=is_in, other=0.0).to(tl.float32)
                x += tl.load(shift + at, mask=is_in, other=0.0).to(tl.float32)
                x = x.to(weight.dtype.element_ty)
            at = columns[None, :] * IN + depth[:, None]
            w = tl.load(weight + at, mask=is_column & is_deep[:, None], other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")

        total += tl.load(bias + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
        if HAS_SILU:
            total = total * tl.sigmoid(total)
        is_out = is_row & is_column
        if HAS_GATE:
            at = rows[:, None] * modulation_stride + columns[None, :]
            total = total * tl.load(gate + at, mask=is_out, other=0.0).to(tl.float32)
            total += tl.load(residual + rows[:, None] * OUT + columns[None, :], mask=is_out, other=0.0).to(tl.float32)
        tl.store(outputs + rows[:, None] * OUT + columns[None, :], total.to(outputs.dtype.element_ty), mask=is_out)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def fused_linear(
    inputs: Tensor,
    linear: nn.Linear,
    norm: nn.LayerNorm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    has_silu: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    r"""
    A linear in one kernel with what comes before and after it.

    Args:
        inputs (`torch.FloatTensor` of shape `(M, I)`): Contiguous rows, at most `MAX_ROWS`.
        linear (`nn.Linear`): From I to O.
        norm (`nn.LayerNorm`, *optional*): Applied to the inputs, with `shift` and `scale` after it.
        shift, scale (`torch.FloatTensor` of shape `(M, I)`, *optional*): AdaLN's, the 1 added to the scale; of one
            row stride.
        has_silu (`bool`, *optional*, defaults to `False`): SiLU of the result.
        residual, gate (`torch.FloatTensor` of shape `(M, O)`, *optional*): What the gated result is added to; the
            residual's rows contiguous.

    Returns:
        `torch.FloatTensor` of shape `(M, O)`, in the inputs' dtype.
    """
    num_rows, num_in, num_out = len(inputs), linear.in_features, linear.out_features
    outputs = inputs.new_empty(num_rows, num_out)
    columns = MIN_TILE if num_out < 2 * MIN_TILE * MIN_PROGRAMS else 2 * MIN_TILE
    modulation = shift if gate is None else gate
    is_affine = norm is not None and norm.weight is not None
    # Triton launches on the current device.
    with torch.cuda.device_of(inputs):
        _linear_kernel[(-(-num_out // columns),)](
            inputs,
            linear.weight,
            linear.bias,
            norm.weight if is_affine else None,
            norm.bias if is_affine else None,
            shift,
            scale,
            residual,
            gate,
            outputs,
            num_rows,
            0 if modulation is None else modulation.stride(0),
            0.0 if norm is None else norm.eps,
            IN=num_in,
            OUT=num_out,
            ROWS=max(MIN_TILE, _power_of_two(num_rows)),
            COLUMNS=columns,
            DEPTH=min(MAX_DEPTH, max(MIN_TILE, _power_of_two(num_in))),
            IS_NORMED=norm is not None,
            IS_AFFINE=is_affine,
            HAS_SILU=has_silu,
            HAS_GATE=gate is not None,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return outputs


def plain_block(
    block: MMARDiffusionBlock, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """`MMARDiffusionBlock` on `(M, W)` with given modulations `(M, W)`, the 1 added to the scale."""
    update = torch.addcmul(shift, block.norm(hidden_states), scale)
    update = block.linear_2(F.silu(block.linear_1(update)))
    return torch.addcmul(hidden_states, gate, update)


def fused_block(
    block: MMARDiffusionBlock, hidden_states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """`plain_block` in two kernels."""
    update = fused_linear(hidden_states, block.linear_1, block.norm, shift, scale, has_silu=True)
    return fused_linear(update, block.linear_2, residual=hidden_states, gate=gate)


def plain_output(head: MMARDiffusionMLP, hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The head's last norm, modulation `(M, W)` and linear on `(M, W)`: `(M, C)`."""
    return head.output_projection(torch.addcmul(shift, head.final_norm(hidden_states), scale))


def fused_output(head: MMARDiffusionMLP, hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`plain_output` in one kernel."""
    return fused_linear(hidden_states, head.output_projection, head.final_norm, shift, scale)


def can_fuse(head: MMARDiffusionMLP, num_rows: int) -> bool:
    r"""
    Whether the blocks of a head are to run fused: Triton, a CUDA device, few rows, no autocast, the head's own linears
    in a dtype of `DTYPES`, and a first try of these shapes that was right and faster. The try waits for the device,
    once a process.

    Args:
        head (`MMARDiffusionMLP`): It.
        num_rows (`int`): M.
    """
    weight = head.input_projection.weight
    if triton is None or weight.device.type != "cuda" or num_rows > MAX_ROWS or not head.blocks:
        return False
    if os.environ.get(SWITCH) == "0" or torch.is_autocast_enabled("cuda"):
        return False
    linears = [head.output_projection, *(part for block in head.blocks for part in (block.linear_1, block.linear_2))]
    if not all(_is_own(linear, weight) for linear in linears):
        return False
    block = head.blocks[0]
    sizes = block.linear_1.in_features, block.linear_1.out_features, head.output_projection.out_features
    tile = max(MIN_TILE, _power_of_two(num_rows))
    key = weight.device, weight.dtype, sizes, tile
    if key not in _TRIED:
        if torch.cuda.is_current_stream_capturing():
            return False
        _TRIED[key] = _is_right_and_faster(head, tile)
    return _TRIED[key]


def _is_own(linear: nn.Module, like: Tensor) -> bool:
    """Whether a linear is the head's own, without a layer of another library on or in it."""
    if type(linear) is not MMARDiffusionLinear or linear.bias is None or "forward" in vars(linear):
        return False
    weight = linear.weight
    is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.is_contiguous()
    return is_plain and weight.dtype in DTYPES and (weight.dtype, weight.device) == (like.dtype, like.device)


@torch.no_grad()
def _is_right_and_faster(head: MMARDiffusionMLP, num_rows: int) -> bool:
    """Runs the blocks and the output both ways on normals; and the blocks, whose weights no cache holds, on time."""
    weight, width = head.input_projection.weight, head.input_projection.out_features
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = [
        torch.randn(num_rows, width, generator=generator, device=weight.device, dtype=weight.dtype) for _ in range(4)
    ]
    try:
        with torch.cuda.device_of(weight):
            if not _is_right(head, *inputs):
                logger.warning("fused diffusion kernels differ from the modules on this device, and are not used")
                return False
            if os.environ.get(SWITCH) == "1":
                return True
            plain, fused = (_seconds(_blocks(head, run), *inputs) for run in (plain_block, fused_block))
            return MARGIN * fused < plain
    # Compilers and drivers raise what they like, and the modules do as well.
    except Exception as error:
        logger.warning("fused diffusion kernels cannot run on this device, and are not used: %s", error)
        return False


def _is_right(head: MMARDiffusionMLP, hidden_states: Tensor, *modulation: Tensor) -> bool:
    """Whether a block and the output are as near to the modules in a wider dtype as the modules are."""
    wider = torch.float64 if hidden_states.dtype == torch.float32 else torch.float32
    block, states = head.blocks[0], (hidden_states, *modulation)
    results = []
    for run, last in ((plain_block, plain_output), (fused_block, fused_output)):
        results.append((run(block, *states), last(head, *states[:3])))
    wide_states = [part.to(wider) for part in states]
    wide = nn.ModuleDict({"norm": head.final_norm, "linear": head.output_projection, "block": block})
    wide = copy.deepcopy(wide).to(wider)
    shift, scale = wide_states[1:3]
    exact = (
        plain_block(wide["block"], *wide_states),
        wide["linear"](torch.addcmul(shift, wide["norm"](wide_states[0]), scale)),
    )
    for plain, fused, expected in zip(*results, exact, strict=True):
        errors = [float((part.to(wider) - expected).abs().max()) for part in (plain, fused)]
        resolution = torch.finfo(plain.dtype).eps * float(expected.abs().max().clamp(min=1.0))
        if not errors[1] <= max(TIMES_THE_ERROR * errors[0], NUM_RESOLUTIONS * resolution):
            return False
    return True


def _blocks(head: MMARDiffusionMLP, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All blocks of a head, one after the other, with the same modulation."""

    def run_all(hidden_states: Tensor, *modulation: Tensor) -> Tensor:
        for block in head.blocks:
            hidden_states = run(block, hidden_states, *modulation)
        return hidden_states

    return run_all


def _seconds(run: Callable[..., Tensor], *arguments: Any) -> float:
    """Median device time of a graph of it, which is how rounds run it."""
    run(*arguments)  # compiles
    replay, _ = capture_cuda_graph(run, arguments)
    times = []
    for _ in range(NUM_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
