"""
Writes the model card of an MMAR folder from its config and weights, stated facts (YAML) and evaluations' results.

    mmar card checkpoints/mmar-tiny --facts configs/mmar-tiny/card.yaml \
        --evaluation runs/evaluation/result.json
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from ..modeling_mmar.configuration_mmar import shorten
from .card import MMARCardFacts, count_parameters, make_model_card, read_evaluation, write_model_card
from .folders import read_config
from .models import model_class_of


def main(folder: Path, facts: Path | None, evaluations: Sequence[Path], repo_id: str | None) -> None:
    r"""
    Writes the card, README.md, of a folder.

    Args:
        folder (`Path`): Of an MMAR; its README.md is replaced.
        facts (`Path`, *optional*): YAML of what the author states.
        evaluations (`Sequence[Path]`, *optional*): result.json of evaluations.
        repo_id (`str`, *optional*): Repository that the examples open; the folder as given by default.

    Raises:
        ValueError: If the folder is no MMAR, or a file is not what it should be.
    """
    config = read_config(folder)
    stated_facts = None
    if facts is not None:
        try:
            stated = yaml.safe_load(facts.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(
                f"expected the facts of a card as YAML in {shorten(str(facts))}; {shorten(error)}."
            ) from error
        stated_facts = MMARCardFacts.from_dict(stated)
    with torch.device("meta"):
        model = model_class_of(config)(config)
    card = make_model_card(
        config,
        repo_id or folder.as_posix(),
        stated_facts,
        [read_evaluation(path) for path in evaluations],
        count_parameters(model),
    )
    write_model_card(folder, card)
    print(folder / "README.md")
