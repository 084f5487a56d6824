#define JAXLLM_LEVEL portable_level
#include "gradients.h"

namespace jaxllm {
using namespace portable_level;
const Level portable = {"portable", rounds, round_rows, multiply, attend, gradients};
}  // namespace jaxllm
