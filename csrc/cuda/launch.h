// The host's side of the CUDA kernels: which there are, whether they run here, and the launch.
#pragma once
#include <string>

#include "kernels.h"

namespace dk::cuda {

/// Why no kernel runs on a device; empty where they do. Initialises CUDA there, but for a device below 0,
/// where it asks the driver alone.
std::string why_not(int device);

/// One step of a family's layers that hold `weights` and `gradient`, or a scan of all with kNone, on a stream
/// of a device; nobody waits. Throws std::runtime_error with the call, the error's name and its text.
void launch(int family, Type weights, Type gradient, Launch& launch, int device, void* stream);

}  // namespace dk::cuda
