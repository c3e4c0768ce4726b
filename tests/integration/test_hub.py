"""Uploads with the real client to a Hub on the loopback address, and what comes back from there."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import REPO, SHARDED_REPO
from fresh import run_fresh
from helpers import tiny_config
from hub_server import LFS_SUFFIXES, Hub, serve
from huggingface_hub import ModelCard

from mmar.conversion.card import make_model_card


TOKEN = "hf_of_the_tests"

# Whether what a repository gives is bit for bit what the saved model gave.
SAME = """
from doors import outputs_of
from safetensors.torch import load_file

def same(pipe, expected):
    got, expected = outputs_of(pipe.model, pipe.processor), load_file(expected)
    return all(torch.equal(value, expected[name]) for name, value in got.items())
"""
RAISED = """
def raised(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]
"""


@pytest.fixture(scope="module")
def hub():
    return Hub(token=TOKEN)


@pytest.fixture(scope="module")
def url(hub):
    with serve(hub) as address:
        yield address


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pushed(hub, url, home, hub_root):
    """Pushes the pipeline twice, to a private repository and its branch, and then model and processor to another."""
    return run_fresh(
        f"""
from mmar import MMARPipeline
pipe = MMARPipeline.from_pretrained({str(hub_root / REPO)!r})
first = pipe.push_to_hub("me/pipe.v1", private=True)
pipe.model.config.image_generation["guidance_scale"] = 1.5
second = pipe.push_to_hub("me/pipe.v1", revision="dev", commit_message="Less guidance")
pipe.model.push_to_hub("parts", tags=["squares"])
pipe.processor.push_to_hub("me/parts")
pipe.save_pretrained("saved", push_to_hub=True, repo_id="me/saved")
result = [first.oid, second.oid]
""",
        home,
        url,
        TOKEN,
    )


def test_whole_folder_arrives_as_one_commit(pushed, hub, hub_root):
    repo = hub.repos["me/pipe.v1"]
    assert repo.private and len(repo.commits) == 3  # .gitattributes, main, dev
    folder = hub_root / REPO
    expected = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    got = dict(repo.commits[pushed[0]])
    assert got.pop(".gitattributes") and got.pop("README.md")
    assert got == expected
    saved = hub.repos["me/saved"]
    assert set(saved.commits[saved.branches["main"]]) == set(repo.commits[pushed[0]])


def test_weights_are_uploaded_once(pushed, hub):
    """Of five pushes, and whatever else the tests have pushed; nothing else of a folder is uploaded by itself."""
    files = hub.repos["me/pipe.v1"].commits[pushed[0]]
    weights = {hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith(LFS_SUFFIXES)}
    assert len(weights) == 1 and hub.uploads.count(weights.pop()) == 1
    assert len(hub.uploads) == len(set(hub.uploads))


def test_card_is_made(pushed, hub):
    repo = hub.repos["me/pipe.v1"]
    card = ModelCard(repo.commits[pushed[0]]["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "any-to-any"
    assert {"mmar", "text-to-image", "diffusers"} <= set(card.data.tags)
    assert card.data.license is None and "Not stated." in card.text  # nothing invented
    assert '"me/pipe.v1"' in card.text and "need the processor" not in card.text
    parts = hub.repos["me/parts"]
    files = parts.commits[parts.branches["main"]]
    card = ModelCard(files["README.md"].decode())
    assert "squares" in card.data.tags and "need the processor" in card.text
    assert {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json"} <= set(files)


def test_revisions_and_private_repositories(pushed, url, home, hub_root):
    expected = str(hub_root / f"{REPO}.safetensors")
    result = run_fresh(
        f"""{SAME}
from mmar import MMARForConditionalGeneration, MMARPipeline, MMARProcessor
pipe = MMARPipeline.from_pretrained("me/pipe.v1")
at_first = MMARPipeline.from_pretrained("me/pipe.v1", revision={pushed[0]!r})
dev = MMARPipeline.from_pretrained("me/pipe.v1", revision="dev")
model = MMARForConditionalGeneration.from_pretrained("me/pipe.v1", revision="dev")
result = {{
    "same": [same(pipe, {expected!r}), same(at_first, {expected!r})],
    "guidance": [part.config.image_generation["guidance_scale"] for part in (pipe.model, dev.model, model)],
}}
""",
        home,
        url,
        TOKEN,
    )
    assert result == {"same": [True, True], "guidance": [3.0, 1.5, 1.5]}


def test_remote_code_from_a_private_repository(pushed, url, tmp_path, hub_root):
    expected = str(hub_root / f"{REPO}.safetensors")
    result = run_fresh(
        f"""{SAME}
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/pipe.v1", trust_remote_code=True, token={TOKEN!r})
result = same(pipe, {expected!r})
""",
        tmp_path,
        url,
        installed=False,
        token=TOKEN,
    )
    assert result is True


def test_offline_with_a_warm_cache(pushed, url, home, hub_root):
    expected = str(hub_root / f"{REPO}.safetensors")
    online = f"""{SAME}
from mmar import MMARPipeline
result = same(MMARPipeline.from_pretrained("me/pipe.v1"), {expected!r})
"""
    assert run_fresh(online, home, url, TOKEN) is True
    assert run_fresh(online, home, None) is True


def test_without_a_token_or_a_cache(pushed, url, tmp_path, hub_root):
    result = run_fresh(
        f"""{RAISED}
from mmar import MMARForConditionalGeneration, MMARPipeline
pipe = MMARPipeline.from_pretrained({str(hub_root / REPO)!r})
result = [
    raised(lambda: MMARForConditionalGeneration.from_pretrained("me/pipe.v1")),
    raised(lambda: pipe.push_to_hub("me/other")),
    raised(lambda: pipe.model.push_to_hub("me/other", token="hf_wrong")),
    raised(lambda: pipe.processor.push_to_hub("me/other", token="hf_wrong")),
    raised(lambda: pipe.push_to_hub("not a name")),
    raised(lambda: pipe.push_to_hub(None)),
]
""",
        tmp_path,
        url,
    )
    assert result[0][0] == "OSError" and "me/pipe.v1" in result[0][1]
    for kind, message in result[1:4]:
        assert kind == "ValueError" and re.search("expected a token that may write to 'me/other'.*`token`", message)
    for (kind, message), name in zip(result[4:], ("'not a name'", None), strict=True):
        assert (kind, message) == ("ValueError", f"`repo_id` must be 'OWNER/NAME' or 'NAME'; got {name}.")


def test_broken_upload_goes_on(hub, url, home, hub_root):
    push = f"""{RAISED}
from mmar import MMARPipeline
pipe = MMARPipeline.from_pretrained({str(hub_root / SHARDED_REPO)!r})
result = raised(lambda: pipe.push_to_hub("me/broken", max_shard_size="200KB"))
"""
    before = len(hub.uploads)
    hub.break_after = before + 1
    try:
        kind, message = run_fresh(push, home, url, TOKEN)
    finally:
        hub.break_after = None
    assert kind == "ValueError" and "Check the network and try again" in message
    assert len(hub.uploads) == before + 1
    assert list(hub.repos["me/broken"].commits[hub.repos["me/broken"].branches["main"]]) == [".gitattributes"]
    assert run_fresh(push, home, url, TOKEN)[0] == "nothing"
    shards = len(list((hub_root / SHARDED_REPO).glob("*.safetensors")))
    assert shards > 2 and len(hub.uploads) == before + shards == len(set(hub.uploads))


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "remote code"])
def test_each_example_of_the_cards_runs(pushed, hub, url, tmp_path, installed):
    """Of a complete card; the short one has some of them."""
    short = ModelCard(hub.repos["me/pipe.v1"].commits[pushed[0]]["README.md"].decode())
    complete = make_model_card(tiny_config(), "me/pipe.v1")
    some, blocks = (re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) for card in (short, complete))
    assert len(blocks) == 5 and some and set(some) <= set(blocks)
    chosen = [block for block in blocks if ("from mmar import" in block) == installed]
    assert chosen
    # The answer of a random model would be as long as its positions allow.
    code = "\n".join(chosen).replace("generate(**inputs)", "generate(**inputs, max_new_tokens=3)")
    code = code.replace("return_full_text=False)", "return_full_text=False, max_new_tokens=3)")
    run_fresh(f"{code}\nfrom PIL import Image\nresult = Image.open('drawn.png').size", tmp_path, url, TOKEN, installed)
    assert (tmp_path / "drawn.png").is_file()


def test_shards_replace_one_file_and_an_edited_card_stays(hub, url, home, hub_root):
    push = f"""
from mmar import MMARPipeline
pipe = MMARPipeline.from_pretrained({str(hub_root / REPO)!r})
result = pipe.push_to_hub("me/resharded", max_shard_size=SIZE).oid
"""
    run_fresh(push.replace("SIZE", "None"), home, url, TOKEN)
    repo = hub.repos["me/resharded"]
    edited = b"---\nlicense: mit\n---\nedited"
    hub.commit(repo, "main", {"README.md": edited})
    oid = run_fresh(push.replace("SIZE", "'200KB'"), home, url, TOKEN)
    files = repo.commits[oid]
    assert files["README.md"] == edited
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    oid = run_fresh(push.replace("SIZE", "None"), home, url, TOKEN)
    weights = [name for name in repo.commits[oid] if name.startswith("model") and "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_card_of_the_folder_goes_along(hub, url, home, hub_root):
    """With its licence and notices, and examples that open the new repository."""
    result = run_fresh(
        f"""
import pathlib
from mmar import MMARPipeline
from mmar.conversion.card import MMARCardFacts, make_model_card, write_model_card
pipe = MMARPipeline.from_pretrained({str(hub_root / REPO)!r})
pipe.save_pretrained("with_card")
facts = MMARCardFacts(license="cc-by-sa-4.0", license_notice="Keep this.", prompt='a "red" square')
write_model_card("with_card", make_model_card(pipe.model.config, "with_card", facts))
result = MMARPipeline.from_pretrained("with_card").push_to_hub("me/card").oid
""",
        home,
        url,
        TOKEN,
    )
    card = ModelCard(hub.repos["me/card"].commits[result]["README.md"].decode())
    assert card.data.license == "cc-by-sa-4.0" and "Keep this." in card.text
    assert '"me/card"' in card.text and '"with_card"' not in card.text
    assert 'pipe("a \\"red\\" square"' in card.text


def training(max_steps: int, model: str = "None", **arguments) -> str:
    """Code of a training of `model`, the tiny MMAR by default, that pushes at each step; leaves what its trainer
    logged and its folders of checkpoints. The file `saved` is there once the last checkpoint is."""
    return f"""
import logging, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from squares import make_processor, make_trainer
from transformers import TrainerCallback
class Saved(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            Path("saved").touch()
logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("mmar.training.trainer").addHandler(handler)
trainer = make_trainer(
    "run", make_processor(), {model}, max_steps={max_steps}, save_strategy="steps", save_steps=1, push_to_hub=True,
    hub_model_id="me/training", **{arguments!r}
)
trainer.add_callback(Saved())
trainer.train()
result = [logged, sorted(path.name for path in Path("run").glob("checkpoint-*"))]
"""


def test_a_training_pushes_its_checkpoints(tmp_path):
    """Whole, where the next one is saved, and the last one removed, while an upload runs."""
    hub = Hub(token=TOKEN)
    hub.delay = 0.3
    code = training(3, hub_strategy="all_checkpoints", hub_always_push=True, save_total_limit=1)
    code += """
from mmar import MMARPipeline
result.append(str(MMARPipeline.from_pretrained("me/training").model.dtype))
"""
    with serve(hub) as url:
        logged, left, opens = run_fresh(code, tmp_path, url, TOKEN)
    assert logged == [] and opens == "torch.float32"
    assert left == ["checkpoint-3"]
    repo = hub.repos["me/training"]
    files = repo.commits[repo.branches["main"]]
    assert {"model.safetensors", "modeling_mmar.py", "model_index.json", "checkpoint-3/optimizer.pt"} <= set(files)
    assert not [name for name in files if "saving" in str(Path(name).parent)]
    # The repository's first, and two of each push.
    assert len(repo.commits) == 7
    pushed = [files[f"checkpoint-{number}/model.safetensors"] for number in (1, 2, 3)]
    assert len(set(pushed)) == 3 and pushed[2] == files["model.safetensors"]


def test_a_subclass_is_pushed_with_its_code(tmp_path):
    hub = Hub(token=TOKEN)
    code = """
from mmar.ablations.modeling_transfusion_mmar import MMARTransfusionConfig, MMARTransfusionForConditionalGeneration
from helpers import tiny_arguments
from squares import make_processor
own = {"text_config": {"vocab_size": len(make_processor().tokenizer)}}
arguments = tiny_arguments(**own, diffusion_config={"prediction_type": "epsilon"})
arguments["image_token_id"] = make_processor().image_token_id
model = MMARTransfusionForConditionalGeneration(MMARTransfusionConfig(**arguments))
"""
    pushing = training(1, "model", hub_strategy="every_save")
    path, pushing = pushing.split("from squares", 1)
    with serve(hub) as url:
        run_fresh(f"{path}{code}\nfrom squares{pushing}", tmp_path, url, TOKEN)
        opened = """
from transformers import AutoModel
result = type(AutoModel.from_pretrained("me/training", trust_remote_code=True)).__name__
"""
        home = tmp_path / "elsewhere"
        assert run_fresh(opened, home, url, TOKEN, installed=False) == "MMARTransfusionForConditionalGeneration"


def test_a_training_does_not_wait_for_uploads(tmp_path):
    """Steps meanwhile are not pushed; a checkpoint stays until it is uploaded, here after the last one is saved."""
    hub = Hub(token=TOKEN)
    hub.waits_for = tmp_path / "saved"
    with serve(hub) as url:
        logged, left = run_fresh(training(3, hub_strategy="checkpoint", save_total_limit=1), tmp_path, url, TOKEN)
    assert logged == [] and left == ["checkpoint-3"]
    repo = hub.repos["me/training"]
    files = repo.commits[repo.branches["main"]]
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 1
    assert files["last-checkpoint/model.safetensors"] == files["model.safetensors"]


def test_a_training_pushes_nothing_before_its_end(tmp_path):
    hub = Hub(token=TOKEN)
    with serve(hub) as url:
        logged, left = run_fresh(training(2, hub_strategy="end", save_total_limit=1), tmp_path, url, TOKEN)
    assert logged == [] and left == ["checkpoint-2"]
    assert len(hub.repos["me/training"].commits) == 1


def test_a_training_says_that_a_push_failed(tmp_path):
    hub = Hub(token=TOKEN)
    hub.break_after = 0
    with serve(hub) as url:
        logged, left = run_fresh(training(1), tmp_path, url, TOKEN)
    assert left == ["checkpoint-1"]
    (message,) = logged
    assert re.search("a push to me/training failed: .*model.safetensors.* in run are whole", message, re.DOTALL)
