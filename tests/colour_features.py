"""A feature extractor that a test can compute by hand: mean colours of the quarters of a picture."""

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase


def mean_colours(pictures: Tensor) -> Tensor:
    """Bytes `(B, 3, H, W)` to features `(B, 12)`, float32."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


class ColourFeatures(FeatureExtractorBase):
    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("colours",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "colours"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, pictures):
        return (mean_colours(pictures),)
