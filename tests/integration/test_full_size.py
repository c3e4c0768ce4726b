"""MMAR-0.5B at full size, with random weights: made, kept by reference, loaded, drawing and describing on a CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from fresh import run_fresh
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmar.modeling_mmar.configuration_mmar import KL16_CONFIG, QWEN2_0_5B_CONFIG


TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "components" / "qwen2-tokenizer"
SHARD = 500_000_000
# Python with torch, transformers and diffusers, and the module that is drawn, in float32.
LIBRARIES = 800_000_000

MEASURE = """
import re, time
started = time.perf_counter()

def measured(**values):
    # Not getrusage, which begins with the peak of the process that started this one.
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    return {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak, **values}
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN2_0_5B_CONFIG)).to(torch.bfloat16).save_pretrained(root / "qwen2")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, root / "qwen2" / file.name)
    AutoencoderKL(**KL16_CONFIG).save_pretrained(root / "kl16")
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs Qwen2's tokenizer files of shared/")
def test_mmar_0_5b(parts, capsys):
    sources = (parts / "qwen2" / "model.safetensors", parts / "kl16" / "diffusion_pytorch_model.safetensors")
    frozen = sum(file.stat().st_size for file in sources)
    made = run_fresh(
        f"""{MEASURE}
from mmar.conversion.init_from_qwen2 import init_from_qwen2
report = init_from_qwen2({str(parts / "qwen2")!r}, {str(parts / "kl16")!r}, "mmar-0.5b", {str(parts / "whole")!r},
                         max_shard_size={SHARD}, allow_unmeasured_scale=True)
result = measured(**report)
""",
        parts / "home",
    )
    assert made["image_token_id"] == 151646 and made["dtype"] == "bfloat16" and made["files"] > 3
    # The mapped pages of both sources count too.
    assert made["peak_bytes"] < frozen + SHARD + LIBRARIES

    saved = run_fresh(
        f"""{MEASURE}
from mmar import MMARPipeline
MMARPipeline.from_pretrained({str(parts / "whole")!r}).save_pretrained({str(parts / "own")!r}, frozen="reference")
result = measured()
""",
        parts / "home",
    )
    config = json.loads((parts / "own" / "config.json").read_text())
    assert config["frozen_weights"] == "reference" and set(config["frozen_parts"]) == {"backbone", "vae"}
    own = sum(file.stat().st_size for file in (parts / "own").glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in (parts / "whole").glob("*.safetensors"))
    assert whole - own == pytest.approx(frozen, rel=0.01)

    used = run_fresh(
        f"""{MEASURE}
import numpy as np
from mmar import MMARPipeline
pipe = MMARPipeline.from_pretrained({str(parts / "own")!r})
loaded = measured()["seconds"]
seed = torch.Generator().manual_seed(0)
image = pipe("a red apple", num_ar_steps=4, num_inference_steps=2, generator=seed).images[0]
drawn = measured()["seconds"]
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "Describe the image."}}]
inputs = pipe.processor.apply_chat_template([{{"role": "user", "content": content}}], tokenize=True, return_dict=True,
                                            add_generation_prompt=True, return_tensors="pt")
answer = pipe.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
result = measured(loaded=loaded, drawn=drawn, size=image.size, spread=float(np.asarray(image).std()),
                  new=answer.shape[1] - inputs["input_ids"].shape[1], dtype=str(pipe.model.dtype))
""",
        parts / "home",
    )
    assert used["size"] == [256, 256] and used["spread"] > 0 and used["new"] == 4 and used["dtype"] == "torch.bfloat16"
    with capsys.disabled():
        print("\n" + json.dumps({"init": made, "save by reference": saved, "load, draw, describe": used}, indent=1))
