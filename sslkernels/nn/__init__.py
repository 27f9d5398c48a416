# SPDX-License-Identifier: Apache-2.0
"""Small backbones, decoders and heads, for tests, demos and small data; any other `nn.Module` does as well."""

from sslkernels.nn.batch_norm import GlobalBatchNorm, global_batch_norm
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
    "GlobalBatchNorm",
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
    "global_batch_norm",
    "sincos_positions",
]
