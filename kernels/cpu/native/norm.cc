// Root-mean-square norms of rows. Each row's sum has a fixed order, so that it does not depend on how many rows there are
// (XLA's does), and neither do the tokens that come of it.
#include <algorithm>
#include <cmath>

#include "divide.h"
#include "pool.h"

namespace jaxllm {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kPiece = 1 << 16;  // numbers

void norm_row(const Norm& n, const float* x, float* y) {
  float lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n.size; k += kLanes) {
    for (int i = 0; i < kLanes; i++) lanes[i] += x[k + i] * x[k + i];
  }
  for (int i = 0; k < n.size; i++, k++) lanes[i] += x[k] * x[k];
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  const float scale = 1 / std::sqrt(sum / float(n.size) + n.eps);
  if (n.weight) {
    for (int64_t i = 0; i < n.size; i++) y[i] = x[i] * scale * n.weight[i];
  } else {
    for (int64_t i = 0; i < n.size; i++) y[i] = x[i] * scale;
  }
}

}  // namespace

void normalize(const Norm& n) {
  const int64_t some = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, n.size));
  in_parallel((n.rows + some - 1) / some, [&](int64_t i) {
    for (int64_t row = some * i; row < std::min(some * (i + 1), n.rows); row++) {
      norm_row(n, n.x + row * n.size, n.y + row * n.size);
    }
  });
}

}  // namespace jaxllm
