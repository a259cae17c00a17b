// CUDA's header, for host code that is compiled for a CPU.

#pragma once

#include "emulator.h"
