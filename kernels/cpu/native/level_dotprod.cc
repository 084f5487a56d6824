#define JAXLLM_LEVEL dotprod_level
#include "gradients.h"

namespace jaxllm {
using namespace dotprod_level;
const Level dotprod = {"dotprod", rounds, round_rows, multiply, attend, gradients};
}  // namespace jaxllm
