# SPDX-License-Identifier: Apache-2.0
"""Fast, exact kernels for self-supervised learning in PyTorch.

`sslkernels.losses` has the losses, `sslkernels.ops` the primitives under them, `sslkernels.methods` whole methods, and
`sslkernels.reference` the definition of every primitive in plain PyTorch. `python -m sslkernels info` tells what runs.
"""

from sslkernels import _library, losses, ops, reference
from sslkernels._checks import check_values
from sslkernels.audit import check_dist
from sslkernels.cached import cached_step
from sslkernels.ema import EMA

__version__ = "0.1.0"
__all__ = ["EMA", "__version__", "cached_step", "check_dist", "check_values", "losses", "ops", "reference"]

_library.load()  # after `ops`, which defines the schemas that the compiled kernels register under
