#define JAXLLM_LEVEL avx2_level
#include "attention.h"

namespace jaxllm {
using namespace avx2_level;
const Level avx2 = {"avx2", rounds, round_rows, multiply, attend};
}  // namespace jaxllm
