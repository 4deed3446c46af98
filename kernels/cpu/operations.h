/* All that a tier offers, in terms of its own primitives. */
#include "linear.h"
#include "int8.h"
#include "layers.h"
#include "sampling.h"
