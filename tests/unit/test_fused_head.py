"""
The head's fused kernels against its modules: in Triton's interpreter, where TRITON_INTERPRET=1 and Triton is there
(`make test-triton`), and on a GPU.
"""

import os

import pytest
import torch
from helpers import seeded

from mmar import MMARDiffusionConfig
from mmar.modeling_mmar import fused_head_mmar
from mmar.modeling_mmar.denoising_mmar import PreparedHead
from mmar.modeling_mmar.diffusion_mmar import MMARDiffusionMLP
from mmar.modeling_mmar.fused_head_mmar import MAX_ROWS, can_fuse, fused_block, fused_output, plain_block, plain_output


is_interpreted = fused_head_mmar.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not is_interpreted, reason="needs Triton and TRITON_INTERPRET=1")
# Some roundings of values of std 1, which the modules make at each step and the kernels once.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}


@torch.no_grad()
def make_head(width=48, mlp_ratio=4.0, channels=6, condition_size=20):
    """A head in which nothing is zero; its widths are no multiples of a kernel's tiles."""
    config = MMARDiffusionConfig(hidden_size=width, mlp_ratio=mlp_ratio, num_hidden_layers=3)
    head = MMARDiffusionMLP(config, channels, condition_size)
    for name, parameter in head.named_parameters():
        # Outputs of std 1, whatever the width.
        std = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=seeded(len(name))) * std + ("norm.weight" in name))
    return head


def states(head, num_rows, number, seed=0):
    weight = head.input_projection.weight
    drawn = torch.randn(number, num_rows, weight.shape[0], generator=seeded(seed))
    return drawn.to(weight.device, weight.dtype).unbind()


def compare(head, num_rows):
    hidden_states, shift, scale, gate = states(head, num_rows, 4)
    # As AdaLN makes them: one linear's output in three, whose rows are not contiguous.
    shift, scale, gate = torch.cat([shift, scale, gate], dim=-1).chunk(3, dim=-1)
    tolerance = TOLERANCES[hidden_states.dtype]
    for block in head.blocks:
        expected = plain_block(block, hidden_states, shift, scale, gate)
        fused = fused_block(block, hidden_states, shift, scale, gate)
        torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
    expected = plain_output(head, hidden_states, shift, scale)
    fused = fused_output(head, hidden_states, shift, scale)
    torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
    assert expected.float().std() > 0.3


@needs_interpreter
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter's bfloat16 dot is wrong
@pytest.mark.parametrize("num_rows", [1, 2, 16, 19])
def test_kernels_are_the_modules(num_rows, dtype):
    compare(make_head().to(dtype), num_rows)


@needs_interpreter
@torch.no_grad()
def test_kernels_of_more_than_one_tile():
    """200 inputs in two tiles, 600 and 200 outputs in many."""
    compare(make_head(width=200, mlp_ratio=3.0), 3)


@torch.no_grad()
def test_a_head_runs_fused_where_it_can(monkeypatch):
    head, z, timesteps = make_head(), torch.randn(4, 20, generator=seeded(1)), torch.tensor([900, 3])
    calls = []

    def counted(block, *parts):
        calls.append(len(parts[0]))
        return plain_block(block, *parts)

    monkeypatch.setattr("mmar.modeling_mmar.denoising_mmar.can_fuse", lambda head, num_rows: num_rows < 4)
    monkeypatch.setattr("mmar.modeling_mmar.denoising_mmar.fused_block", counted)
    monkeypatch.setattr("mmar.modeling_mmar.denoising_mmar.fused_output", plain_output)
    prepared = PreparedHead(head, head.timestep_embedding(timesteps), z)
    for step, timestep in enumerate(timesteps):
        for number in (4, 2):
            noisy_latents = torch.randn(number, 6, generator=seeded(step))
            expected = head(noisy_latents, timestep.expand(number), z[:number])
            torch.testing.assert_close(prepared(step, noisy_latents), expected, atol=1e-5, rtol=1e-5)
    assert calls == [2] * 2 * len(head.blocks)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_wrong_slower_or_raises_is_not_used(monkeypatch, caplog, dtype):
    head, timed = make_head().to(dtype), iter(())
    monkeypatch.setattr(fused_head_mmar, "fused_block", plain_block)
    monkeypatch.setattr(fused_head_mmar, "fused_output", plain_output)
    monkeypatch.setattr(fused_head_mmar, "_seconds", lambda *_: next(timed))
    for plain, fused, expected in ((2.0, 1.0, True), (1.0, 2.0, False), (1.0, 0.95, False)):
        timed = iter((plain, fused))
        assert fused_head_mmar._is_right_and_faster(head, 16) is expected
    # Not by the clock.
    monkeypatch.setenv("MMAR_FUSED_HEAD", "1")
    assert fused_head_mmar._is_right_and_faster(head, 16)
    assert not caplog.records

    # A half-precision kernel that forgets its norm's bias is far beyond what rounding does.
    def without_bias(block, hidden_states, shift, scale, gate):
        return plain_block(block, hidden_states, shift - block.norm.bias * scale, scale, gate)

    monkeypatch.setattr(fused_head_mmar, "fused_block", without_bias)
    assert not fused_head_mmar._is_right_and_faster(head, 16) and "differ from the modules" in caplog.text

    def fail(*_):
        raise SystemError("no compiler")

    monkeypatch.setattr(fused_head_mmar, "fused_block", fail)
    assert not fused_head_mmar._is_right_and_faster(head, 16) and "no compiler" in caplog.text


def test_nothing_is_fused_on_a_cpu():
    assert not can_fuse(make_head(), 2)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 16, 19, MAX_ROWS])
def test_kernels_are_the_modules_on_a_gpu(num_rows, dtype):
    compare(make_head().to("cuda", dtype), num_rows)
    compare(make_head(width=1024, channels=16).to("cuda", dtype), num_rows)
