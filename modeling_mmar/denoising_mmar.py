"""
Image tokens from their conditions by diffusion, with all that does not hang on the noisy tokens computed once.

A step of DDPM or DDIM is linear in the noisy tokens, the prediction and fresh noise, so its three coefficients are
read off the scheduler before the loop; other schedulers are asked in each step. AdaLN hangs on timestep and condition
only (suppl. Fig. 6), so the modulations of all steps are one product per block.
"""

import copy
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_mmar import shorten
from .diffusion_mmar import MMARDiffusionBlock, MMARDiffusionMLP
from .fused_head_mmar import can_fuse, fused_block, fused_output, plain_block, plain_output
from .graphs_mmar import GraphCache, has_hooks


# Modulations are computed for so many steps at a time that they hold at most this many elements, or for one step.
MAX_MODULATION_ELEMENTS = 2**26
# torch's CPU generator fills normals in groups of this size: a draw of whole groups is the draws of its groups.
CPU_NORMAL_GROUP = 16


# Reading the coefficients off is some hundred steps of a scheduler: those of the last schedules are kept.
MAX_KEPT_STEPS = 256
_LINEAR_STEPS: dict[tuple, "LinearSteps | None"] = {}


@dataclass
class LinearSteps:
    r"""
    A sampler whose step is `keep * noisy_latents + take * prediction + noise_std * noise`.

    Args:
        keep, take, noise_std (`list[float]` of length T): Of each step; a step without fresh noise has a `noise_std`
            of 0.
    """

    keep: list[float]
    take: list[float]
    noise_std: list[float]

    @classmethod
    def read_off(cls, scheduler: Any, num_inference_steps: int) -> "LinearSteps | None":
        r"""
        Reads the coefficients off a scheduler by letting a copy of it step from unit vectors.

        Args:
            scheduler (diffusers scheduler): The sampler.
            num_inference_steps (`int`): T.

        Returns:
            `LinearSteps`, or None if its steps are not known to be linear and without memory.
        """
        if type(scheduler) not in (DDPMScheduler, DDIMScheduler):
            return None
        config = json.dumps(scheduler.config, sort_keys=True, default=str)
        key = type(scheduler), config, scheduler.alphas_cumprod.numpy(force=True).tobytes(), num_inference_steps
        if key not in _LINEAR_STEPS:
            if len(_LINEAR_STEPS) == MAX_KEPT_STEPS:
                _LINEAR_STEPS.clear()
            _LINEAR_STEPS[key] = cls._read(scheduler, num_inference_steps)
        return _LINEAR_STEPS[key]

    @classmethod
    def _read(cls, scheduler: Any, num_inference_steps: int) -> "LinearSteps | None":
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_inference_steps)
        # (noisy latents, prediction): in float64 the scheduler's own float32 schedule is all that is rounded.
        sample = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
        prediction = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        noise = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        steps = cls([], [], [])
        for timestep in scheduler.timesteps:
            kwargs = {"generator": torch.Generator().manual_seed(0)} if takes_generator else {}
            output = scheduler.step(prediction, timestep, sample, **kwargs).prev_sample
            noise_std = output[2] / noise[2]
            rest = output - noise_std * noise
            steps.keep.append(float(rest[0]))
            steps.take.append(float(rest[1]))
            steps.noise_std.append(float(noise_std))
        finite = torch.isfinite(torch.tensor([steps.keep, steps.take, steps.noise_std]))
        return steps if bool(finite.all()) else None


class PreparedHead:
    r"""
    The Diffusion MLP for given timesteps and conditions: `PreparedHead(head, ..., z)(step, x)` is
    `head(x, timesteps[step], z)`.

    Args:
        head (`MMARDiffusionMLP`): The network.
        time_embeddings (`torch.FloatTensor` of shape `(T, W)`): The head's embeddings of the timesteps.
        z (`torch.FloatTensor` of shape `(M, D)`): Conditions.
    """

    def __init__(self, head: MMARDiffusionMLP, time_embeddings: Tensor, z: Tensor):
        self.head, self.time_embeddings = head, time_embeddings
        self.projected = head.condition_projection(z.to(head.input_projection.weight.dtype))  # (M, W)
        elements_per_step = self.projected.numel() * (3 * len(head.blocks) + 2)
        self._chunk = max(1, MAX_MODULATION_ELEMENTS // elements_per_step)
        self._first: int | None = None
        self._is_fused: dict[int, bool] = {}  # by the number of rows

    def __call__(self, step: int, noisy_latents: Tensor) -> Tensor:
        r"""
        Args:
            step (`int`): Number of the timestep; they are best taken in order.
            noisy_latents (`torch.FloatTensor` of shape `(m, C)`): x^(t) for the first m <= M conditions.

        Returns:
            `torch.FloatTensor` of shape `(m, C)`, float32.
        """
        if self._first is None or not self._first <= step < self._first + self._chunk:
            self._modulate(step)
        at = step - self._first, slice(len(noisy_latents))
        head = self.head
        hidden_states = head.input_projection(noisy_latents.to(self.projected.dtype))
        number = len(noisy_latents)
        if number not in self._is_fused:
            self._is_fused[number] = can_fuse(head, number)
        is_fused = self._is_fused[number]
        run_block, run_output = (fused_block, fused_output) if is_fused else (plain_block, plain_output)
        for block, modulation in zip(head.blocks, self._modulations, strict=True):
            hidden_states = run_block(block, hidden_states, *(part[at] for part in modulation))
        return run_output(head, hidden_states, *(part[at] for part in self._final_modulation)).float()

    def _modulate(self, first: int) -> None:
        """Shifts, scales with their 1 added, and gates of the steps from `first`, each `(T', M, W)`."""
        self._first = first
        times = self.time_embeddings[first : first + self._chunk, None]  # (T', 1, W)
        condition = F.silu(times + self.projected)  # (T', M, W)
        self._modulations = [block.modulation(condition).chunk(3, dim=-1) for block in self.head.blocks]
        self._final_modulation = self.head.final_modulation(condition).chunk(2, dim=-1)
        for _, scale, *_ in (*self._modulations, self._final_modulation):
            scale.add_(1)


def start_schedule(scheduler: Any, num_inference_steps: int, device: torch.device) -> None:
    """Sets a scheduler's timesteps, the first one to be taken next."""
    try:
        scheduler.set_timesteps(num_inference_steps, device=device)
    except ValueError as error:
        raise ValueError(
            f"`num_inference_steps` {num_inference_steps} is not what {type(scheduler).__name__} takes "
            f"({shorten(error)}). Take more steps, or another scheduler."
        ) from error
    # Left to look the first timestep up, it begins with the second of those that round to the same one, as Karras
    # sigmas do, and runs off the end.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of another; from the host to an accelerator without waiting for it."""
    if tensor.device.type == "cpu" and like.is_cuda:
        return tensor.pin_memory().to(like.device, non_blocking=True)
    return tensor.to(like.device)


def step_noise(generator: torch.Generator, num_steps: int, num_tokens: int, channels: int) -> Tensor:
    """Normals `(num_steps, num_tokens, channels)`: what as many draws of `(1, channels)` would give, in that order."""
    shape = (num_steps, num_tokens, channels)
    if generator.device.type == "cpu" and channels % CPU_NORMAL_GROUP == 0:
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    kwargs = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    draws = [torch.randn(channels, **kwargs) for _ in range(num_steps * num_tokens)]
    return torch.stack(draws).view(shape) if draws else torch.zeros(shape, device=generator.device)


def can_prepare(head: nn.Module) -> bool:
    """Whether `PreparedHead` is the head: the parts are of the classes that it knows, and none waits for its call."""
    is_known = type(head) is MMARDiffusionMLP and all(type(block) is MMARDiffusionBlock for block in head.blocks)
    return is_known and not has_hooks(head)


class Denoiser:
    r"""
    Draws tokens with one scheduler; what hangs on neither conditions nor noise is computed once.

    Args:
        head (`MMARDiffusionMLP`): The network.
        scheduler (diffusers scheduler): It is copied, since it has state.
        num_inference_steps (`int`): T.
        device (`torch.device`): Of the conditions.
    """

    def __init__(self, head: MMARDiffusionMLP, scheduler: Any, num_inference_steps: int, device: torch.device):
        self._head, self._scheduler = head, copy.deepcopy(scheduler)
        self._num_inference_steps, self._device = num_inference_steps, device
        self._set_timesteps()
        # Some schedulers take more steps than they are asked for.
        self._timesteps = self._scheduler.timesteps
        self._steps = LinearSteps.read_off(scheduler, num_inference_steps)
        self._is_whole = not can_prepare(head)
        self._graphs = GraphCache()
        self._time_embeddings = None if self._is_whole else head.timestep_embedding(self._timesteps)

    @property
    def num_steps(self) -> int:
        """T, the number of the network's evaluations per token."""
        return len(self._timesteps)

    def __call__(self, z: Tensor, guidance_scales: list[float] | None, generators: list[torch.Generator]) -> Tensor:
        r"""
        Args:
            z (`torch.FloatTensor` of shape `(M, D)`, or `(2 M, D)` with guidance): Conditions, the unconditional ones
                last.
            guidance_scales (`list[float]` of length T, *optional*): w of each step in v = v_u + w (v_c - v_u); the
                steps with 1 leave v_u out.
            generators (`list[torch.Generator]`): One per picture, each for M / len(generators) of the tokens.

        Returns:
            `torch.FloatTensor` of shape `(M, C)`, float32.
        """
        count = len(z) // ((1 if guidance_scales is None else 2) * len(generators))
        channels = self._head.input_projection.in_features
        start = [
            to_device(torch.randn(count, channels, generator=own, device=own.device, dtype=torch.float32), z)
            for own in generators
        ]
        # float32 state: the network's output is cast before each update (Sec. 3.3.4).
        noisy_latents = torch.cat(start) * self._scheduler.init_noise_sigma
        scales = [1.0] * self.num_steps if guidance_scales is None else guidance_scales
        # What is launched hangs on where guidance is active; how strong it is, is data.
        is_guided = tuple(scale != 1 for scale in scales)
        scales = to_device(torch.tensor(scales, dtype=torch.float32), z)
        if self._steps is None:
            per_token = [own for own in generators for _ in range(count)]
            return self._ask_scheduler(is_guided, z, noisy_latents, scales, per_token)
        num_draws = sum(std != 0 for std in self._steps.noise_std)
        # (draws, M, C)
        noise = torch.cat([to_device(step_noise(own, num_draws, count, channels), z) for own in generators], dim=1)
        if self._is_whole:
            return self._walk(is_guided, z, noisy_latents, scales, noise)
        return self._graphs.run(self._walk, is_guided, z, noisy_latents, scales, noise)

    def _predictor(self, is_guided: tuple[bool, ...], z: Tensor, scales: Tensor) -> Callable[[int, Tensor], Tensor]:
        """What predicts `(M, C)` from a step's number and noisy latents `(M, C)`, guided where it is to be."""
        if self._is_whole:
            head = functools.partial(self._plain_head, z)
        else:
            head = PreparedHead(self._head, self._time_embeddings, z)

        def predict(step: int, noisy_latents: Tensor) -> Tensor:
            if not is_guided[step]:
                return head(step, noisy_latents)
            v_cond, v_uncond = head(step, noisy_latents.repeat(2, 1)).chunk(2)
            return torch.lerp(v_uncond, v_cond, scales[step])

        return predict

    def _plain_head(self, z: Tensor, step: int, noisy_latents: Tensor) -> Tensor:
        number = len(noisy_latents)
        return self._head(noisy_latents, self._timesteps[step].expand(number), z[:number])

    def _walk(
        self, is_guided: tuple[bool, ...], z: Tensor, noisy_latents: Tensor, scales: Tensor, noise: Tensor
    ) -> Tensor:
        """Linear steps, with their fresh noise `(draws, M, C)`."""
        predict, fresh, steps = self._predictor(is_guided, z, scales), iter(noise.unbind()), self._steps
        for step, (keep, take, std) in enumerate(zip(steps.keep, steps.take, steps.noise_std, strict=True)):
            noisy_latents = (noisy_latents * keep).add_(predict(step, noisy_latents), alpha=take)
            if std != 0:
                noisy_latents.add_(next(fresh), alpha=std)
        return noisy_latents

    def _ask_scheduler(
        self,
        is_guided: tuple[bool, ...],
        z: Tensor,
        noisy_latents: Tensor,
        scales: Tensor,
        per_token: list[torch.Generator],
    ) -> Tensor:
        # Forgets the steps before.
        self._set_timesteps()
        takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters
        step_kwargs = {"generator": per_token} if takes_generator else {}
        predict = self._predictor(is_guided, z, scales)
        for step, timestep in enumerate(self._timesteps):
            scaled = self._scheduler.scale_model_input(noisy_latents, timestep)
            prediction = predict(step, scaled)
            noisy_latents = self._scheduler.step(prediction, timestep, noisy_latents, **step_kwargs).prev_sample
        return noisy_latents

    def _set_timesteps(self) -> None:
        start_schedule(self._scheduler, self._num_inference_steps, self._device)
