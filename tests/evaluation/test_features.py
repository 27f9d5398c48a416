# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels.evaluation import extract_features
from sslkernels.nn import ResidualCNN


def test_features_are_taken_in_evaluation_mode():
    torch.manual_seed(0)
    backbone = ResidualCNN(in_chans=1, channels=(8,))
    backbone.bn.eval()  # a frozen part stays frozen
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.rand(7, 1, 8, 8)
    features = extract_features(backbone, images, batch_size=3)
    assert not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(images))
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_modes_are_put_back():
    backbone = ResidualCNN(in_chans=1, channels=(8,))
    backbone.bn.eval()
    extract_features(backbone, torch.rand(2, 1, 8, 8))
    assert backbone.training and not backbone.bn.training
    with pytest.raises(RuntimeError):
        extract_features(backbone, torch.rand(2, 3, 8, 8))
    assert backbone.training and not backbone.bn.training
