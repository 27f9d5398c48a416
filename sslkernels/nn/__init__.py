# SPDX-License-Identifier: Apache-2.0
"""Small backbones, decoders and heads, for tests, demos and small data; any other `nn.Module` does as well."""

from sslkernels.nn.convolutional import ProjectionHead, ResidualCNN, feature_dim
from sslkernels.nn.decoders import ConvolutionalDecoder, MaskedDecoder, Predictor
from sslkernels.nn.heads import DINOHead, WeightNormLinear
from sslkernels.nn.quantizers import GumbelVectorQuantizer, VectorQuantizer
from sslkernels.nn.speech import ConvFeatureEncoder, ConvPositionalEmbedding, SpeechGRU, SpeechTransformer
from sslkernels.nn.text import TextTransformer
from sslkernels.nn.tokenizers import PatchTokenizer
from sslkernels.nn.transformer import TransformerBlock, VisionTransformer, sincos_positions

__all__ = [
    "ConvFeatureEncoder",
    "ConvPositionalEmbedding",
    "ConvolutionalDecoder",
    "DINOHead",
    "GumbelVectorQuantizer",
    "MaskedDecoder",
    "PatchTokenizer",
    "Predictor",
    "ProjectionHead",
    "ResidualCNN",
    "SpeechGRU",
    "SpeechTransformer",
    "TextTransformer",
    "TransformerBlock",
    "VectorQuantizer",
    "VisionTransformer",
    "WeightNormLinear",
    "feature_dim",
    "sincos_positions",
]
