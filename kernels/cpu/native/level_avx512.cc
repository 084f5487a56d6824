#define JAXLLM_LEVEL avx512_level
#include "attention.h"

namespace jaxllm {
const Level avx512 = {"avx512", avx512_level::rounds, avx512_level::round_rows, avx512_level::multiply, avx512_level::attend};
}
