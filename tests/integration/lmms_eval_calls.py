"""What `test_lmms_eval.py` asks of the plugin in a process of the kit: `MODEL ANSWER.json`."""

import json
import sys
from pathlib import Path

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.models import get_model, get_model_manifest
from PIL import Image


def request(kind, *arguments):
    return Instance(kind, arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})


def refusal(call, *arguments, **options):
    try:
        return f"not refused: {call(*arguments, **options)!r}"
    except ValueError as error:
        return str(error)


def main():
    folder, out = map(Path, sys.argv[1:])
    documents = [{"question": "Which colour?", "colours": colours} for colours in (["red"], [], ["blue", "green"])]

    def pictures_of(document):
        return [Image.new("RGB", (8, 8), colour) for colour in document["colours"]]

    model = get_model("mmar").create_from_arg_string(f"pretrained={folder}", {"batch_size": "2", "device": None})
    chat = get_model("mmar_chat").create_from_arg_string(f"pretrained={folder}", {"batch_size": 2})
    model.task_dict = chat.task_dict = {"t": {"test": documents}}
    result = {
        "classes": [type(each).__module__ for each in (model, chat)],
        "manifest": get_model_manifest("mmar").simple_class_path,
        "ranks": [model.rank, model.world_size, str(model.device), model.batch_size],
    }

    # 1. Answers, of several options at once, with marks in one text.
    texts = ["Which colour?", "Which colour?", "Describe <image> and <image> the image."]
    options = [{"max_new_tokens": 6, "until": ["\n\n"], "image_aspect_ratio": "pad"}, {"max_gen_toks": 3}]
    requests = [
        request("generate_until", texts[i], options[j], pictures_of, i, "t", "test")
        for i in range(3)
        for j in range(2)
    ]
    result["answers"] = model.generate_until(requests)
    first = result["answers"][0]
    stop = first[len(first) // 2 :][:2]
    cut = request("generate_until", texts[0], {"max_new_tokens": 6, "until": stop}, pictures_of, 0, "t", "test")
    result["cut"] = [stop, model.generate_until([cut])[0]]

    # 2. The same by messages.
    def messages_of(document, round_idx=None, previous_output=None, previous_round_info=None):
        content = [{"type": "image", "url": picture} for picture in pictures_of(document)]
        content.append({"type": "text", "text": document["question"]})
        if round_idx is None:
            return [{"role": "user", "content": content}]
        again = [{"type": "text", "text": f"Again: {previous_output[-1]}"}]
        return [{"role": "user", "content": again}], round_idx == 3, previous_output, previous_round_info

    requests = [request("generate_until", "", messages_of, options[0], i, "t", "test") for i in range(3)]
    result["chat answers"] = chat.generate_until(requests)

    # 3. Rounds: the task makes each question of the answers so far.
    def text_of(document, previous_output, round_idx, previous_round_info):
        return [], f"Again: {previous_output[-1]}", round_idx == 3, previous_output, previous_round_info

    rounds = request("generate_until_multi_round", texts[0], options[0], pictures_of, text_of, 0, "t", "test")
    result["rounds"] = model.generate_until_multi_round([rounds])
    rounds = request("generate_until_multi_round", "", messages_of, options[0], 0, "t", "test")
    result["chat rounds"] = chat.generate_until_multi_round([rounds])

    # 4. Log-likelihoods, and the options of multiple choice.
    result["likelihoods"] = model.loglikelihood(
        [request("loglikelihood", texts[i], lambda document: "red", pictures_of, i, "t", "test") for i in range(3)]
        + [request("loglikelihood", "Which colour?", " red")]
    )
    result["choices"] = model.loglikelihood(
        [request("loglikelihood", texts[0], word, pictures_of, 0, "t", "test") for word in ("red", "green")]
    )

    # 5. Twice with the kit's cache of responses.
    cached = {
        "loglikelihood": [request("loglikelihood", texts[0], "red", pictures_of, 0, "t", "test")],
        "generate_until": [request("generate_until", texts[0], options[1], pictures_of, 0, "t", "test")],
    }
    result["cached"] = []
    for _ in range(2):
        cache = ResponseCache.create(str(out.with_name("cache")))
        outputs = [cache.execute(model, kind, requests)[0] for kind, requests in cached.items()]
        result["cached"].append([unwrap_generation_output(output)[0] for output in outputs])
        # As the kit ends a run; the next one reads what it left.
        cache.finalize(success=True)
    red = out.with_name("red.png")
    Image.new("RGB", (8, 8), "red").save(red)
    named = [{"role": "user", "content": [{"type": "image", "url": str(red)}]}]
    result["refused"] = {
        "batch": refusal(type(model), str(folder), batch_size="auto"),
        "model": refusal(type(model), str(folder / "none")),
        "likelihood": refusal(chat.loglikelihood, []),
        "place": refusal(
            model.generate_until,
            [request("generate_until", texts[0], options[1], lambda document: [str(red)], 0, "t", "test")],
        ),
        "place in a chat": refusal(
            chat.generate_until,
            [request("generate_until", "", lambda document: named, options[1], 0, "t", "test")],
        ),
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
