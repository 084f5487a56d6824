// Operations, divided among threads.
#pragma once
#include <vector>

#include "level.h"

namespace jaxllm {

// Products with rows of x, float32 [rows, cols]; all matrices have the same number of columns. Unless `exact`, formats
// that can do so take the rows rounded to int8.
void multiply(const Level& level, const std::vector<Product>& products, const float* x, int64_t rows, bool exact);

void attend(const Level& level, const Attention& attention);

void gradients(const Level& level, const AttentionGradients& attention);

// y = x / sqrt(mean(x^2) + eps) * weight for each row of x [rows, size]; without a weight if it is null.
struct Norm {
  const float *x, *weight;
  int64_t rows, size;
  float eps;
  float* y;
};

void normalize(const Norm& norm);

}  // namespace jaxllm
