/* All that a tier offers, in terms of its own primitives. */
#include "linear.h"
#include "int8.h"
#include "layers.h"
#include "mamba.h"
#include "attention.h"
#include "experts.h"
#include "model.h"
#include "sampling.h"

#define OPERATIONS multiply, to_bytes, multiply_int8, decode, draw /* in the order of `struct operations` */
