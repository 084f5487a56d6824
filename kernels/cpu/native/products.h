// Rows of x times the rows of a matrix, for one instruction set: rounding x, and which code each format has.
#pragma once
#include "one_row.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

// ---- rounding x ----

// Columns 32 * b .. of a slice as codes from -127 to 127 with a scale. There are `count`; the rest counts as zeros.
INLINE void round_block(const float* x, int64_t count, int64_t b, RoundedSlice& to) {
  float copy[32] = {};
  if (count < 32) x = (const float*)memcpy(copy, x, 4 * count);
  f32x8 block[4], most = {}, finite = {};
  for (int i = 0; i < 4; i++) {
    block[i] = load<f32x8>(x + 8 * i);
    const f32x8 size = (f32x8)((s32x8)block[i] & 0x7fffffff);
    most = size > most ? size : most;
    finite += block[i] * 0;
  }
  const float largest = largest_of(most);
  const f32x8 inverse = broadcast(largest > 0 ? 127 / largest : 0);
  s32x8 code[4];
  for (int i = 0; i < 4; i++) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, which then is in the lowest bits.
    const f32x8 big = block[i] * inverse + 12582912.0f;
    code[i] = ((s32x8)big & 0x7fffff) - 0x400000;
  }
  store(to.codes + 32 * b, bytes(code));
  const float scale = largest / 127 + sum_of(finite);  // NaN where an integer cannot stand for x: it is NaN or infinite
  const int first = sum_of(code[0] + code[1]), second = sum_of(code[2] + code[3]);
  to.scale[b] = scale, to.sum32[b] = scale * float(first + second), to.raised32[b] = -128 * (first + second);
  to.sum16[2 * b] = scale * float(first), to.sum16[2 * b + 1] = scale * float(second);
  to.raised16[2 * b] = -128 * first, to.raised16[2 * b + 1] = -128 * second;
}

// Rows [begin, end) of x.
static void round_rows(const float* x, int64_t cols, int64_t begin, int64_t end, const RoundedX& to) {
  for (int64_t row = begin; row < end; row++) {
    for (int64_t k = 0; k < cols; k += 32) {
      round_block(x + row * cols + k, cols - k, k % kSlice / 32, to.slices[k / kSlice * to.rows + row]);
    }
  }
}

// ---- the table of formats ----

using RoundedRows = void (*)(const Product&, const RoundedX&, int64_t, int64_t);
using ExactRows = void (*)(const Product&, const float*, int64_t, int64_t);

struct Entry {
  RoundedRows rounded;  // null: only exact
  ExactRows exact;
};

template <class F>
static void rounded(const Product& p, const RoundedX& x, int64_t begin, int64_t end) {
  p.count == 1 ? rounded_row<F>(p, x, begin, end) : rounded_rows<F>(p, x, begin, end);
}

template <class F>
static constexpr Entry integers() {
  return {rounded<F>, exact_codes<F>};
}

template <class F>
static constexpr Entry only_floats() {
  return {nullptr, exact_floats<F>};
}

static Entry entry_of(const Matrix& m) {
  const int64_t type = m.param[0];
  switch (m.format) {
    case kDense: {
      if (type == kF32) return only_floats<Dense<kF32>>();
      return type == kF16 ? only_floats<Dense<kF16>>() : only_floats<Dense<kBF16>>();
    }
    case kScaled: {
      const int64_t held = m.param[kValuesType];
      if (held == kS8) return only_floats<Scaled<kS8>>();
      return held == kE4M3 ? only_floats<Scaled<kE4M3>>() : only_floats<Scaled<kE5M2>>();
    }
    case kCodebook: return only_floats<Codebook>();
    case kMXFP4: return integers<MXFP4>();
    case kNVFP4: return integers<NVFP4>();
    case kAffine: {
      if (m.leaf[4] || m.leaf[5] || m.param[kGroupSize] % 16) return only_floats<AffineFloats>();
      const bool wide = m.param[kBits] > 4;
      if (m.param[kGroupSize] % 32) return wide ? integers<Affine<16, true>>() : integers<Affine<16, false>>();
      return wide ? integers<Affine<32, true>>() : integers<Affine<32, false>>();
    }
    case kQ1_0: return integers<Q1_0>();
    case kQ4_0: return integers<Q4_0>();
    case kQ4_1: return integers<Q4_1>();
    case kQ5_0: return integers<Q5_0>();
    case kQ5_1: return integers<Q5_1>();
    case kQ8_0: return integers<Q8<34, 2>>();
    case kQ8_1: return integers<Q8<36, 4>>();
    case kQ2_K: return integers<Q2_K>();
    case kQ3_K: return integers<Q3_K>();
    case kQ4_K: return integers<Q4_K>();
    case kQ5_K: return integers<Q5_K>();
    case kQ6_K: return integers<Q6_K>();
    case kQ8_K: return integers<Q8_K>();
    case kTQ1_0: return integers<TQ1_0>();
    case kTQ2_0: return integers<TQ2_0>();
    case kGGML_MXFP4: return integers<GGML_MXFP4>();
    case kGGML_NVFP4: return integers<GGML_NVFP4>();
    case kIQ1_S: return integers<IQ1_S>();
    case kIQ1_M: return integers<IQ1_M>();
    case kIQ2_XXS: return integers<IQ2_XXS>();
    case kIQ2_XS: return integers<IQ2_XS>();
    case kIQ2_S: return integers<IQ2_S>();
    case kIQ3_XXS: return integers<IQ3_XXS>();
    case kIQ3_S: return integers<IQ3_S>();
    case kIQ4_NL: return integers<IQ4_NL>();
    case kIQ4_XS: return integers<IQ4_XS>();
    default: return {nullptr, nullptr};
  }
}

static bool rounds(const Matrix& m) { return entry_of(m).rounded != nullptr; }

static void multiply(const Product& p, const float* x, const RoundedX* rounded, int64_t begin, int64_t end) {
  const Entry entry = entry_of(p.matrix);
  if (rounded && entry.rounded) {
    entry.rounded(p, *rounded, begin, end);
  } else {
    entry.exact(p, x, begin, end);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
