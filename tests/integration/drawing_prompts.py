"""Draws with mmar-tiny into a folder; for a test to kill."""

import sys

from mmar import MMARPipeline
from mmar.evaluation.drawing import draw_pictures


NUM_PICTURES, BATCH_SIZE = 8, 2
PROMPTS = {f"pictures/{i:02d}.png": f"an emoji of thing {i} in noto style" for i in range(NUM_PICTURES)}
ARGUMENTS = {"num_ar_steps": 16, "num_inference_steps": 25}


def draw(folder):
    pipe = MMARPipeline.from_pretrained("checkpoints/mmar-tiny")
    return draw_pictures(pipe, PROMPTS, folder, seed=1, batch_size=BATCH_SIZE, **ARGUMENTS)


if __name__ == "__main__":
    draw(sys.argv[1])
