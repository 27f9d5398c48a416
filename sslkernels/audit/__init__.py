# SPDX-License-Identifier: Apache-2.0
"""Does a loss over several processes have the value and the gradient of one process? Any loss object may be asked.

`check_dist` runs it both ways in float64 and says what differs, in numbers and in words; `python -m sslkernels
check-dist` does it on the command line. See docs/check_dist.md.
"""

from sslkernels.audit._audit import Audit, check_dist
from sslkernels.audit._inputs import INPUTS, Encoder, Inputs
from sslkernels.audit._verdict import Finding

__all__ = ["INPUTS", "Audit", "Encoder", "Finding", "Inputs", "check_dist"]
