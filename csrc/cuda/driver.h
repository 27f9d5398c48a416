// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA runtime that is linked into this library can run on the driver of this machine.
#pragma once

namespace sslkernels {

// The driver must be of the runtime's major version or a later one. No driver at all is a machine without a GPU, where
// registering a kernel harms nothing.
#ifdef SSLKERNELS_EMULATED
inline bool driver_serves() { return true; }
#else
bool driver_serves();
#endif

}  // namespace sslkernels
