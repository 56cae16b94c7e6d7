// Picks the kernels of the best instruction set the machine has, at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace commrt {

// Names of the instruction sets this build and machine can run, slowest first.
std::vector<std::string> available_isas();

const Kernels& active_kernels();

// Select by name; false when this build or machine cannot run it.
bool select_isa(const std::string& name);

}  // namespace commrt
