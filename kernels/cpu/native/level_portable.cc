#define JAXLLM_LEVEL portable_level
#include "attention.h"

namespace jaxllm {
const Level portable = {"portable", portable_level::rounds, portable_level::round_rows, portable_level::multiply, portable_level::attend};
}
