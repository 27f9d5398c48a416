# SPDX-License-Identifier: Apache-2.0
"""Self-supervised methods, one a file, each a thin `nn.Module` over any backbone; `docs/methods.md` is their table."""

from sslkernels.methods.barlow_twins import BarlowTwins
from sslkernels.methods.beit import BEiT
from sslkernels.methods.bert import BERT
from sslkernels.methods.byol import BYOL
from sslkernels.methods.clip import CLIP
from sslkernels.methods.cpc import CPC
from sslkernels.methods.data2vec import Data2Vec
from sslkernels.methods.dino import DINO
from sslkernels.methods.dinov2 import DINOv2
from sslkernels.methods.hubert import HuBERT
from sslkernels.methods.ibot import IBOT
from sslkernels.methods.ijepa import IJEPA
from sslkernels.methods.mae import MAE
from sslkernels.methods.moco import MoCo
from sslkernels.methods.nnclr import NNCLR
from sslkernels.methods.siglip import SigLIP
from sslkernels.methods.simclr import SimCLR
from sslkernels.methods.simmim import SimMIM
from sslkernels.methods.simsiam import SimSiam
from sslkernels.methods.swav import SwAV
from sslkernels.methods.vicreg import VICReg
from sslkernels.methods.videomae import VideoMAE
from sslkernels.methods.vjepa import VJEPA
from sslkernels.methods.wav2vec2 import Wav2Vec2
from sslkernels.methods.word2vec import Word2Vec

__all__ = [
    "BERT",
    "BYOL",
    "CLIP",
    "CPC",
    "DINO",
    "IBOT",
    "IJEPA",
    "MAE",
    "NNCLR",
    "VJEPA",
    "BEiT",
    "BarlowTwins",
    "DINOv2",
    "Data2Vec",
    "HuBERT",
    "MoCo",
    "SigLIP",
    "SimCLR",
    "SimMIM",
    "SimSiam",
    "SwAV",
    "VICReg",
    "VideoMAE",
    "Wav2Vec2",
    "Word2Vec",
]
