// Stands in for CUDA's header of the same name on the bench.
#pragma once
#include "simt_device.h"
