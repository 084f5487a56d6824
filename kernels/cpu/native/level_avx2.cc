#define JAXLLM_LEVEL avx2_level
#include "gradients.h"

namespace jaxllm {
using namespace avx2_level;
const Level avx2 = {"avx2", rounds, round_rows, multiply, attend, gradients};
}  // namespace jaxllm
