#define JAXLLM_LEVEL dotprod_level
#include "attention.h"

namespace jaxllm {
const Level dotprod = {"dotprod", dotprod_level::rounds, dotprod_level::round_rows, dotprod_level::multiply, dotprod_level::attend};
}
