#define JAXLLM_LEVEL avx2_level
#include "attention.h"

namespace jaxllm {
const Level avx2 = {"avx2", avx2_level::rounds, avx2_level::round_rows, avx2_level::multiply, avx2_level::attend};
}
