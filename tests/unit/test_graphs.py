"""What becomes a CUDA graph: the bookkeeping, with a graph that records on any device; the real one on a GPU."""

import pytest
import torch
from helpers import random_text, seeded, tiny_model

from mmar.modeling_mmar.graphs_mmar import GraphedFunction


class Recorder:
    """Captures as a CUDA graph does: replaying reads the captured arguments and writes the captured result."""

    def __init__(self):
        self.num_captures = self.num_replays = 0

    def __call__(self, function, arguments):
        self.num_captures += 1
        output = function(*arguments)

        def replay():
            self.num_replays += 1
            output.copy_(function(*arguments))

        return replay, output


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(GraphedFunction, "is_capturable", staticmethod(lambda tensor: True))
    return Recorder()


def test_captured_at_the_second_call_with_the_same_shapes(recorder):
    graphed = GraphedFunction(lambda power, a, b: a**power + b, capture=recorder)
    results = []
    for number in range(4):
        a, b = torch.full((2, 3), float(number)), torch.ones(3)
        results.append(graphed(2, a, b))
    # No result is the place that the next call writes to.
    for number, result in enumerate(results):
        assert torch.equal(result, torch.full((2, 3), number**2 + 1.0))
    assert (recorder.num_captures, recorder.num_replays) == (1, 3)


def test_other_shapes_dtypes_and_static_arguments_have_graphs_of_their_own(recorder):
    graphed = GraphedFunction(lambda power, a: a**power, capture=recorder)
    arguments = [(2, torch.ones(2)), (3, torch.ones(2)), (2, torch.ones(4)), (2, torch.ones(2).double())]
    for _ in range(3):
        for power, tensor in arguments:
            assert torch.equal(graphed(power, tensor * 2), (tensor * 2) ** power)
    assert (recorder.num_captures, recorder.num_replays) == (4, 8)


def test_on_a_cpu_every_call_runs_as_it_is():
    def fail(*_):
        raise AssertionError

    graphed = GraphedFunction(lambda _, a: a + 1, capture=fail)
    for _ in range(3):
        assert torch.equal(graphed(None, torch.zeros(2)), torch.ones(2))


def draw(model, **arguments):
    return model.generate_images(
        random_text(2, 6),
        negative_input_ids=random_text(2, 3),
        generator=[seeded(0), seeded(1)],
        num_ar_steps=8,
        num_inference_steps=4,
        guidance_scale=2.0,
        output_type="latent",
        **arguments,
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"guidance_schedule": "linear"}, {"guidance_interval": (0.0, 0.5)}], ids=str
)
def test_pictures_by_graphs_are_the_same(recorder, monkeypatch, arguments):
    model = tiny_model()
    monkeypatch.setattr(GraphedFunction.__init__, "__defaults__", (recorder,))
    captured = draw(model, **arguments)
    # Eight rounds of 1, 2 or 3 tokens: some shapes come again, in the language model and in the sampler.
    assert recorder.num_captures >= 2 and recorder.num_replays >= 4
    monkeypatch.undo()
    assert torch.equal(captured, draw(model, **arguments))


@pytest.mark.gpu
def test_pictures_by_cuda_graphs_are_the_same(monkeypatch):
    model = tiny_model().cuda()

    def on_gpu():
        return model.generate_images(
            random_text(2, 6).cuda(),
            negative_input_ids=random_text(2, 3).cuda(),
            generator=[seeded(0), seeded(1)],
            num_ar_steps=8,
            num_inference_steps=4,
            guidance_scale=2.0,
            output_type="latent",
        )

    captured = on_gpu()
    monkeypatch.setattr(GraphedFunction, "is_capturable", staticmethod(lambda tensor: False))
    torch.testing.assert_close(captured, on_gpu(), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_the_denoise_loop_never_waits_for_the_gpu():
    from mmar.modeling_mmar.denoising_mmar import Denoiser

    model = tiny_model().cuda()
    denoiser = Denoiser(model.diffusion_mlp, model.default_scheduler(), 5, torch.device("cuda"))
    z = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        denoiser(z, [2.0] * 5, [seeded(0)])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                denoiser(z, [2.0] * 5, [seeded(0)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
