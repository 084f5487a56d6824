#define JAXLLM_LEVEL avx512_level
#include "gradients.h"

namespace jaxllm {
using namespace avx512_level;
const Level avx512 = {"avx512", rounds, round_rows, multiply, attend, gradients};
}  // namespace jaxllm
