"""
Writes the model card of an MMAR folder from its config and weights, stated facts (YAML) and evaluations' results.

    python -m mmar.conversion.model_card checkpoints/mmar-tiny --facts configs/mmar-tiny/card.yaml \
        --evaluation runs/evaluation/result.json
"""

import argparse
from pathlib import Path

import torch
import yaml

from ..command import run_command
from ..modeling_mmar.configuration_mmar import shorten
from .card_mmar import MMARCardFacts, count_parameters, make_model_card, read_evaluation, write_model_card
from .folders import read_config
from .models import model_class_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an MMAR folder; its README.md is replaced")
    parser.add_argument("--facts", type=Path, help="YAML of what the author states")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="an evaluation's result.json")
    parser.add_argument("--repo_id", help="repository that the examples open; the folder as given by default")
    args = parser.parse_args()

    config = read_config(args.folder)
    facts = None
    if args.facts is not None:
        try:
            stated = yaml.safe_load(args.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(
                f"expected the facts of a card as YAML in {shorten(str(args.facts))}; {shorten(error)}."
            ) from error
        facts = MMARCardFacts.from_dict(stated)
    with torch.device("meta"):
        model = model_class_of(config)(config)
    card = make_model_card(
        config,
        args.repo_id or args.folder.as_posix(),
        facts,
        [read_evaluation(path) for path in args.evaluation],
        count_parameters(model),
    )
    write_model_card(args.folder, card)
    print(args.folder / "README.md")


if __name__ == "__main__":
    run_command(main)
