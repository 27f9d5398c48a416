# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.evaluation import extract_features, fill_templates, zero_shot_accuracy, zero_shot_classifier


def test_loss_is_clips(training):
    run = training("clip")
    images, texts = run.batch(13)
    loss, metrics = run.method((images, texts))
    with torch.no_grad():
        i, t = (run.method.encode_image(images).double(), run.method.encode_text(texts).double())
    logits = i @ t.T / 0.07
    labels = torch.arange(13)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=0)
    assert metrics["scale"].item() == pytest.approx(1 / 0.07, rel=1e-6)
    torch.testing.assert_close(i.norm(dim=1), torch.ones(13, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("value", "clamped"), [(5.0, math.log(100)), (-0.5, 0.0), (3.0, 3.0)])
def test_clamps_the_scale_after_the_step_only(training, value, clamped):
    """Beyond the bound the forward uses the value as it is and its gradient flows; the step after it is put back."""
    run = training("clip")
    with torch.no_grad():
        run.method.logit_scale.fill_(value)
    parameter = run.method.logit_scale
    loss, metrics = run.method(run.batch(16))
    loss.backward()
    assert metrics["scale"].item() == pytest.approx(math.exp(value), rel=1e-6)
    assert parameter.grad is not None and parameter.grad.item() != 0
    run.method.after_step(0)
    assert run.method.logit_scale is parameter
    assert parameter.item() == pytest.approx(clamped, rel=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_names_digits_without_a_label(trained, training, name):
    """Zero-shot, chance being one in ten: each class is the ensemble of its captions under the four templates."""
    prompts = fill_templates(data.DIGIT_NAMES, data.CAPTION_TEMPLATES)

    def shares(run):
        run.method.eval()
        classifier = zero_shot_classifier(run.method.encode_text, prompts, tokenizer=data.caption_tokens)
        features = extract_features(run.method, run.data.test_images, encode=run.method.encode_image)
        return zero_shot_accuracy(features, run.data.test_labels, classifier, topk=(1, 3))

    assert shares(training(name))[1] < 0.3
    reached = shares(trained(name).run)
    assert reached[1] > 0.85 and reached[3] > 0.95
