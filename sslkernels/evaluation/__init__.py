# SPDX-License-Identifier: Apache-2.0
"""What frozen features are worth, and whether they have collapsed; `docs/evaluation.md` has protocols and examples."""

from __future__ import annotations

from sslkernels.evaluation.features import extract_features
from sslkernels.evaluation.knn import KNNClassifier, knn_accuracy, merge_neighbors
from sslkernels.evaluation.linear import LinearProbe
from sslkernels.evaluation.metrics import (
    Alignment,
    FeatureStd,
    RankMe,
    TeacherStudentCosine,
    Uniformity,
    alignment,
    feature_std,
    rankme,
    spread,
    std_of_rows,
    teacher_student_cosine,
    uniformity,
)
from sslkernels.evaluation.probe import linear_probe
from sslkernels.evaluation.words import WordScore, context_accuracy, spearman, word_analogies, word_similarity
from sslkernels.evaluation.zero_shot import fill_templates, zero_shot_accuracy, zero_shot_classifier

__all__ = [
    "Alignment",
    "FeatureStd",
    "KNNClassifier",
    "LinearProbe",
    "RankMe",
    "TeacherStudentCosine",
    "Uniformity",
    "WordScore",
    "alignment",
    "context_accuracy",
    "extract_features",
    "feature_std",
    "fill_templates",
    "knn_accuracy",
    "linear_probe",
    "merge_neighbors",
    "rankme",
    "spearman",
    "spread",
    "std_of_rows",
    "teacher_student_cosine",
    "uniformity",
    "word_analogies",
    "word_similarity",
    "zero_shot_accuracy",
    "zero_shot_classifier",
]
