// A quantized matrix as its leaves lie in memory: what Python calls a Weight.
#pragma once
#include <cstdint>

namespace jaxllm {

// Formats, numbered as in kernels/cpu/operands.py.
enum Format : int64_t {
  kDense, kScaled, kCodebook, kMXFP4, kNVFP4, kAffine,
  kQ1_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ8_1, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kQ8_K, kTQ1_0, kTQ2_0,
  kGGML_MXFP4, kGGML_NVFP4, kIQ1_S, kIQ1_M, kIQ2_XXS, kIQ2_XS, kIQ2_S, kIQ3_XXS, kIQ3_S, kIQ4_NL, kIQ4_XS,
  kFormats
};

// Element types of leaves, numbered as in kernels/cpu/operands.py.
enum Type : int64_t { kF32, kF16, kBF16, kE4M3, kE5M2, kE8M0, kS8, kU8, kS16, kU16, kS32, kU32 };

constexpr int kLeaves = 6, kParams = 8;

struct Matrix {
  Format format;
  int64_t rows, cols;
  const uint8_t* leaf[kLeaves];
  int64_t row_bytes[kLeaves];  // from one row of the matrix to the next; 0 if all rows share the leaf
  int64_t param[kParams];      // what they mean depends on the format, see decode.h
};

// The codebooks of the IQ types, which Python hands over once: entries of eight (or four) int8.
struct Grids {
  const int8_t *iq1_s, *iq2_xxs, *iq2_xs, *iq2_s, *iq3_xxs, *iq3_s;
};
extern Grids grids;

}  // namespace jaxllm
