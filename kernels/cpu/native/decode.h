// How each format decodes. There are two kinds.
//
// An integer format gives small integers and, for each kGroup of them, a scale and an offset:
// w = scale * code + offset.
//   kChunk    weights that are decoded at once
//   kGroup    16 or 32
//   kOffset   whether offsets may differ from zero
//   kDepth    how large codes are, see Dot in simd.h
//   kWords    how many words of a row's chunk say what its scales are
//   scales(words, scale, offset)      scales and offsets of eight rows from their words
//
// If each row is blocks, these are read eight at a time, and transposed before codes are taken apart:
//   codes(blocks, out)                codes of eight rows: out[i] has columns 16 * i ..
//   heads(blocks, words)              the words of eight rows
//
// Others are read row by row:
//   codes(m, a, b, chunk, out)        codes of the rows a and b: out[2i] has columns 16 * 2i .. of a, then those of b
//   head(m, row, chunk, words)        the words
//
// A float format gives 32 weights:
//   decode(m, row, block, weights)
//
// Layouts of ggml's blocks: jaxllm/formats/ggml_blocks.py and ggml_iq.py, from ggml-common.h.
#pragma once
#include "matrix.h"
#include "simd.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

INLINE const uint8_t* row_of(const Matrix& m, int leaf, int64_t row) { return m.leaf[leaf] + row * m.row_bytes[leaf]; }

INLINE float half_at(const uint8_t* p) { return f16(load<uint16_t>(p)); }

INLINE float from_bits(uint32_t bits) { return load<float>(&bits); }

INLINE uint32_t bits_of(float x) { return load<uint32_t>(&x); }

// A power of two from its exponent's byte. `top` is what 255 stands for. (2^-127 is a subnormal.)
INLINE float e8m0(uint8_t e, float top) { return e == 255 ? top : from_bits(e ? uint32_t(e) << 23 : 0x400000u); }

INLINE float e4m3(uint8_t byte) {
  const uint32_t rest = byte & 0x7f;
  float size = float(rest & 7) * 0x1p-9f;
  if (rest >= 8) size = from_bits((rest + (120u << 3)) << 20);
  if (rest == 0x7f) size = __builtin_nanf("");
  return byte & 0x80 ? -size : size;
}

// Element `i` of an array of some type, as float.
INLINE float element(const uint8_t* p, int64_t i, int64_t type) {
  switch (type) {
    case kF32: return load<float>(p + 4 * i);
    case kF16: return half_at(p + 2 * i);
    case kBF16: return from_bits(uint32_t(load<uint16_t>(p + 2 * i)) << 16);
    case kE4M3: return e4m3(p[i]);
    case kE5M2: return f16(uint16_t(p[i] << 8));
    case kE8M0: return e8m0(p[i], __builtin_nanf(""));
    case kS8: return float(int8_t(p[i]));
    case kU8: return float(p[i]);
    case kS16: return float(load<int16_t>(p + 2 * i));
    case kU16: return float(load<uint16_t>(p + 2 * i));
    case kS32: return float(load<int32_t>(p + 4 * i));
    default: return float(load<uint32_t>(p + 4 * i));
  }
}

// `count` bytes of a row from `at` on. Where the row ends before, they are copied and filled up with zeros.
INLINE const uint8_t* bytes_of(const Matrix& m, int leaf, int64_t row, int64_t at, int count, uint8_t* copy) {
  const uint8_t* p = row_of(m, leaf, row) + at;
  const int64_t left = m.row_bytes[leaf] - at;
  if (left >= count) return p;
  memset(copy, 0, count);
  if (left > 0) memcpy(copy, p, left);
  return copy;
}

// ---- parts of blocks, of two rows at once ----

// Low nibble, high nibble, low nibble, ...
INLINE void low_and_high(u8x32 q, u8x32* out) {
  const u8x32 low = q & 15, high = q >> 4;
  out[0] = interleave_low(low, high), out[1] = interleave_high(low, high);
}

// Byte `i` of words, as float.
INLINE f32x8 byte_of(u32x8 words, int i) { return floats((s32x8)(words >> (8 * i) & 255)); }

constexpr u8x16 kIQ4 = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};  // int8
constexpr u8x16 kE2M1 = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};              // doubled, + 12

// ---- formats by how they are built ----

template <int kSize, int kIn, bool kOff, int kDeep, int kHead>
struct Integers {
  static constexpr int kChunk = kSize, kGroup = kIn, kDepth = kDeep, kWords = kHead, kGroups = kSize / kIn;
  static constexpr bool kOffset = kOff;
};

// One whose words are its scales and then its offsets, as floats.
template <int kSize, int kIn, bool kOff, int kDeep>
struct Computed : Integers<kSize, kIn, kOff, kDeep, kSize / kIn * (kOff ? 2 : 1)> {
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    UNROLL
    for (int g = 0; g < kSize / kIn; g++) {
      scale[g] = (f32x8)words[g];
      if (kOff) offset[g] = (f32x8)words[kSize / kIn + g];
    }
  }
};

// Rows of ggml's blocks, of `kBytes`.
template <int kBytes>
struct Block {
  static constexpr int kBlock = kBytes;
};

// The same, for those that are decoded row by row.
template <int kBytes>
struct Alone {
  INLINE const uint8_t* at(const Matrix& m, int64_t row, int64_t chunk) { return row_of(m, 0, row) + kBytes * chunk; }
};

// One that has a float16 scale in front, and codes that stand for kZero more than what is to be scaled.
template <int kBytes, int kZero = 0>
struct OneScale : Block<kBytes> {
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    scale[0] = halves(words[0]);
    if (kZero) offset[0] = float(-kZero) * scale[0];
  }
};

// One that has a float16 scale and a float16 offset in front.
template <int kBytes>
struct ScaleAndOffset : Block<kBytes> {
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    scale[0] = halves(words[0]), offset[0] = halves(words[0] >> 16);
  }
};

INLINE void lookup_both(u8x16 table, u8x32* codes) {
  codes[0] = lookup(table, codes[0]), codes[1] = lookup(table, codes[1]);
}

// ---- ggml's blocks of 32 ----

// Low nibbles of 16 bytes are the first 16 codes, high ones the last.
INLINE void low_then_high(const Blocks& b, int at, Four* out) {
  const Four both = b.bytes(at);
  out[0] = low(both), out[1] = high(both);
}

struct Q4_0 : Integers<32, 32, true, 8, 1>, OneScale<18, 8> {
  INLINE void codes(const Blocks& b, Four* out) { low_then_high(b, 2, out); }
};

struct Q4_1 : Integers<32, 32, true, 8, 1>, ScaleAndOffset<20> {
  INLINE void codes(const Blocks& b, Four* out) { low_then_high(b, 4, out); }
};

struct Q5_0 : Integers<32, 32, true, 4, 1>, OneScale<22, 16> {
  INLINE void codes(const Blocks& b, Four* out) {
    u32x8 words[2];
    b.two_words(0, words);
    low_then_high(b, 6, out), add_bits(words[0] >> 16 | words[1] << 16, 16, out);
  }
  INLINE void heads(const Blocks& b, u32x8* words) {
    u32x8 two[2];
    b.two_words(0, two), words[0] = two[0];
  }
};

struct Q5_1 : Integers<32, 32, true, 4, 1>, ScaleAndOffset<24> {
  INLINE void codes(const Blocks& b, Four* out) {
    u32x8 words[2];
    b.two_words(0, words);
    low_then_high(b, 8, out), add_bits(words[1], 16, out);
  }
  INLINE void heads(const Blocks& b, u32x8* words) {
    u32x8 two[2];
    b.two_words(0, two), words[0] = two[0];
  }
};

template <int kBytes, int kCodes>  // Q8_0; Q8_1 has a sum between scale and codes
struct Q8 : Integers<32, 32, false, 0, 1>, OneScale<kBytes> {
  INLINE void codes(const Blocks& b, Four* out) { out[0] = b.bytes(kCodes), out[1] = b.bytes(kCodes + 16); }
};

struct IQ4_NL : Integers<32, 32, false, 0, 1>, OneScale<18> {
  INLINE void codes(const Blocks& b, Four* out) {
    low_then_high(b, 2, out);
    out[0] = lookup(kIQ4, out[0]), out[1] = lookup(kIQ4, out[1]);
  }
};

struct GGML_MXFP4 : Integers<32, 32, true, 4, 1>, Block<17> {
  INLINE void codes(const Blocks& b, Four* out) {
    low_then_high(b, 1, out);
    out[0] = lookup(kE2M1, out[0]), out[1] = lookup(kE2M1, out[1]);
  }
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    const u32x8 e = words[0] & 255;
    scale[0] = (f32x8)(e > 1 ? (e - 1) << 23 : u32x8{});  // the rest counts as zero, like all subnormals here
    offset[0] = -12 * scale[0];
  }
};

struct GGML_NVFP4 : Computed<64, 16, true, 4>, Alone<36> {
  INLINE void codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
    UNROLL
    for (int j = 0; j < 2; j++) {  // 8 bytes a group: low nibbles, then high ones
      const u8x32 q = two(at(m, a, chunk) + 4 + 16 * j, at(m, b, chunk) + 4 + 16 * j), low = q & 15, high = q >> 4;
      const u8x32 first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 32, 33, 34, 35, 36, 37, 38, 39, 16,
                                                  17, 18, 19, 20, 21, 22, 23, 48, 49, 50, 51, 52, 53, 54, 55);
      const u8x32 last = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 40, 41, 42, 43, 44, 45, 46, 47,
                                                 24, 25, 26, 27, 28, 29, 30, 31, 56, 57, 58, 59, 60, 61, 62, 63);
      out[2 * j] = lookup(kE2M1, first), out[2 * j + 1] = lookup(kE2M1, last);
    }
  }
  INLINE void head(const Matrix& m, int64_t row, int64_t chunk, uint32_t* words) {
    const uint8_t* p = at(m, row, chunk);
    UNROLL
    for (int g = 0; g < 4; g++) {
      const float scale = p[g] == 127 ? 0 : p[g] == 255 ? 240 : 0.5f * e4m3(p[g] & 127);
      words[g] = bits_of(scale), words[4 + g] = bits_of(-12 * scale);
    }
  }
};

// ---- ggml's superblocks ----

struct Q1_0 : Integers<128, 32, true, 8, 1>, Block<18> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int j = 0; j < 4; j++) out[2 * j] = out[2 * j + 1] = Four{}, add_bits(b.word(2 + 4 * j), 1, out + 2 * j);
  }
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    UNROLL
    for (int g = 0; g < 4; g++) scale[g] = 2 * halves(words[0]), offset[g] = -halves(words[0]);
  }
};

// Codes of two bits in 64 bytes, two halves of 4 x 32: columns 16 * i .., from bit `to` on.
INLINE Four crumbs(const Blocks& b, int at, int i, int to = 0) {
  return moved(b.bytes(at + i / 8 * 32 + i % 2 * 16), i % 8 / 2 * 2, 2, to);
}

// 16 bytes as four words.
INLINE void four_words(const Blocks& b, int at, u32x8* words) {
  const Four all = b.bytes(at);
  UNROLL
  for (int i = 0; i < 4; i++) words[i] = (u32x8)all.v[i];
}

struct Q2_K : Integers<256, 16, true, 4, 5>, Block<84> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int i = 0; i < 16; i++) out[i] = crumbs(b, 16, i);
  }
  INLINE void heads(const Blocks& b, u32x8* words) { four_words(b, 0, words), words[4] = b.word(80); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    const f32x8 d = halves(words[4]), least = halves(words[4] >> 16);
    UNROLL
    for (int g = 0; g < 16; g++) {
      scale[g] = d * byte_of(words[g / 4] & 0x0f0f0f0f, g % 4);
      offset[g] = -(least * byte_of(words[g / 4] >> 4 & 0x0f0f0f0f, g % 4));
    }
  }
};

struct Q3_K : Integers<256, 16, true, 4, 4>, Block<110> {
  INLINE void codes(const Blocks& b, Four* out) {
    const Four third[2] = {b.bytes(0), b.bytes(16)};
    UNROLL
    for (int i = 0; i < 16; i++) out[i] = crumbs(b, 32, i) | moved(third[i % 2], i / 2, 1, 2);
  }
  INLINE void heads(const Blocks& b, u32x8* words) {
    four_words(b, 94, words);  // of which the first two bytes are none
    UNROLL
    for (int i = 0; i < 4; i++) words[i] = words[i] >> 16 | (i < 3 ? words[i + 1] << 16 : u32x8{});
  }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    const f32x8 d = halves(words[3]);
    UNROLL
    for (int g = 0; g < 16; g++) {
      const u32x8 low = words[g % 8 / 4] >> (g % 4 * 8 + g / 8 * 4) & 15;
      const u32x8 high = words[2] >> (g % 4 * 8 + g / 4 * 2) & 3;
      scale[g] = d * floats((s32x8)(low | high << 4) - 32), offset[g] = -4 * scale[g];
    }
  }
};

// The head of Q4_K and Q5_K: scales and minima of 6 bits.
template <int kBytes>
struct SixBits : Block<kBytes> {
  INLINE void heads(const Blocks& b, u32x8* words) { four_words(b, 0, words); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    const f32x8 d = halves(words[0]), least = halves(words[0] >> 16);
    const u32x8 first = words[1], second = words[2], third = words[3];
    const u32x8 six = u32x8{} + 0x3f3f3f3f, four = six & 0x0f0f0f0f;
    const u32x8 more = (third & four) | (first >> 6 & 0x03030303) << 4;
    const u32x8 most = (third >> 4 & four) | (second >> 6 & 0x03030303) << 4;
    UNROLL
    for (int g = 0; g < 4; g++) {
      scale[g] = d * byte_of(first & six, g), scale[4 + g] = d * byte_of(more, g);
      offset[g] = -(least * byte_of(second & six, g)), offset[4 + g] = -(least * byte_of(most, g));
    }
  }
};

struct Q4_K : Integers<256, 32, true, 8, 4>, SixBits<144> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int i = 0; i < 8; i++) {
      const Four both = b.bytes(16 + 16 * i);
      out[i / 2 * 4 + i % 2] = low(both), out[i / 2 * 4 + 2 + i % 2] = high(both);
    }
  }
};

struct Q5_K : Integers<256, 32, true, 4, 4>, SixBits<176> {
  INLINE void codes(const Blocks& b, Four* out) {
    const Four fifth[2] = {b.bytes(16), b.bytes(32)};
    UNROLL
    for (int i = 0; i < 8; i++) {
      const Four both = b.bytes(48 + 16 * i);
      const int bit = i / 2 * 2;
      out[i / 2 * 4 + i % 2] = low(both) | moved(fifth[i % 2], bit, 1, 4);
      out[i / 2 * 4 + 2 + i % 2] = high(both) | moved(fifth[i % 2], bit + 1, 1, 4);
    }
  }
};

struct Q6_K : Integers<256, 16, true, 2, 5>, Block<210> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int i = 0; i < 16; i++) {
      const Four both = b.bytes(i / 8 * 64 + i % 4 * 16);
      out[i] = (i % 8 < 4 ? low(both) : high(both)) | crumbs(b, 128, i, 4);
    }
  }
  INLINE void heads(const Blocks& b, u32x8* words) { four_words(b, 192, words), words[4] = b.word(206) >> 16; }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    const f32x8 d = halves(words[4]);
    UNROLL
    for (int g = 0; g < 16; g++) {
      scale[g] = d * floats((s32x8)(words[g / 4] << (24 - g % 4 * 8)) >> 24), offset[g] = -32 * scale[g];
    }
  }
};

struct Q8_K : Integers<256, 32, false, 0, 1>, Block<292> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int i = 0; i < 16; i++) out[i] = b.bytes(4 + 16 * i);
  }
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8*) {
    UNROLL
    for (int g = 0; g < 8; g++) scale[g] = (f32x8)words[0];
  }
};

// Codes 0, 1, 2 that stand for -1, 0, 1; the scale is a float16 at byte kScale.
template <int kBytes, int kScale>
struct Ternary : Integers<256, 32, true, 8, 1>, Block<kBytes> {
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(kScale - 2) >> 16; }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8* offset) {
    UNROLL
    for (int g = 0; g < 8; g++) scale[g] = halves(words[0]), offset[g] = -scale[g];
  }
};

struct TQ1_0 : Ternary<54, 52> {
  // The first digit in base 3 of fractions x / 256, each times a power of 3.
  INLINE u8x32 digit(u8x32 x, int power) {
    const u8x32 shifted = x * uint8_t(power);
    // The high byte of 3 * shifted, without 16 bits: where three times the byte passes 256 and 512.
    return (u8x32)((u8x32)(shifted >= 86) & 1) + (u8x32)((u8x32)(shifted >= 171) & 1);
  }
  INLINE void codes(const Blocks& b, Four* out) {
    constexpr int power[] = {1, 3, 9, 27, 81};
    const Four bytes[3] = {b.bytes(0), b.bytes(16), b.bytes(32)};
    const u8x32 last = (u8x32)b.word(48);  // four bytes, each with four powers
    UNROLL
    for (int k = 0; k < 5; k++) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        out[2 * k].v[i] = digit(bytes[0].v[i], power[k]), out[2 * k + 1].v[i] = digit(bytes[1].v[i], power[k]);
        out[10 + k].v[i] = digit(bytes[2].v[i], power[k]);
      }
      if (k < 4) out[15].v[k] = digit(last, power[k]);
    }
  }
};

struct TQ2_0 : Ternary<66, 64> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int i = 0; i < 16; i++) out[i] = crumbs(b, 0, i);
  }
};

struct IQ4_XS : Integers<256, 32, false, 0, 2>, Block<136> {
  INLINE void codes(const Blocks& b, Four* out) {
    UNROLL
    for (int j = 0; j < 8; j++) {
      low_then_high(b, 8 + 16 * j, out + 2 * j);
      out[2 * j] = lookup(kIQ4, out[2 * j]), out[2 * j + 1] = lookup(kIQ4, out[2 * j + 1]);
    }
  }
  INLINE void heads(const Blocks& b, u32x8* words) { words[0] = b.word(0), words[1] = b.word(4); }
  INLINE void scales(const u32x8* words, f32x8* scale, f32x8*) {
    UNROLL
    for (int g = 0; g < 8; g++) {
      const u32x8 low = words[1] >> (4 * g) & 15, high = words[0] >> (16 + 2 * g) & 3;
      scale[g] = halves(words[0]) * floats((s32x8)(low | high << 4) - 32);
    }
  }
};

// ---- codebooks: entries of 8 or 4 codes, and signs ----

// A format that gives eight codes of a row at a time, as one word: F::eight(p, i) has columns 8 * i and following.
template <class F, int kIn>
struct ByEight : Computed<256, kIn, false, 0> {
  INLINE void codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
    const uint8_t *p = F::at(m, a, chunk), *q = F::at(m, b, chunk);
    UNROLL
    for (int i = 0; i < 16; i++) {
      out[i] = (u8x32)u64x4{F::eight(p, 2 * i), F::eight(p, 2 * i + 1), F::eight(q, 2 * i), F::eight(q, 2 * i + 1)};
    }
  }
  INLINE void head(const Matrix& m, int64_t row, int64_t chunk, uint32_t* words) {
    UNROLL
    for (int g = 0; g < 256 / kIn; g++) words[g] = bits_of(F::scale(F::at(m, row, chunk), g));
  }
};

// Eight codes, those negated whose bit is set.
INLINE uint64_t with_signs(uint64_t codes, uint32_t signs) {
  const uint64_t bits = (uint64_t(signs & 255) * 0x0101010101010101) & 0x8040201008040201;  // a bit in each byte
  const uint64_t ones = ((bits + 0x7f7f7f7f7f7f7f7f) | bits) >> 7 & 0x0101010101010101, minus = ones * 255;
  return (codes ^ minus) + ones;  // codes are between 1 and 127: nothing is carried into the next byte
}

INLINE uint32_t even_signs(uint32_t seven) {  // 8 signs from 7: the number of minus signs is even
  return (seven & 127) | uint32_t(__builtin_parity(seven & 127)) << 7;
}

INLINE uint64_t entry(const int8_t* grid, int index) { return load<uint64_t>(grid + 8 * index); }

INLINE uint64_t four_and_four(const int8_t* grid, int first, int second) {
  return load<uint32_t>(grid + 4 * first) | uint64_t(load<uint32_t>(grid + 4 * second)) << 32;
}

struct IQ2_XXS : ByEight<IQ2_XXS, 32>, Alone<66> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const uint8_t* q = p + 2 + i / 4 * 8;
    return with_signs(entry(grids.iq2_xxs, q[i % 4]), even_signs(load<uint32_t>(q + 4) >> 7 * (i % 4)));
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * (float(load<uint32_t>(p + 6 + 8 * g) >> 28) + 0.5f) * 0.25f;
  }
};

struct IQ2_XS : ByEight<IQ2_XS, 16>, Alone<74> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const uint32_t word = load<uint16_t>(p + 2 + 2 * i);
    return with_signs(entry(grids.iq2_xs, word & 511), even_signs(word >> 9));
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * (float(p[66 + g / 2] >> (g % 2 * 4) & 15) + 0.5f) * 0.25f;
  }
};

struct IQ2_S : ByEight<IQ2_S, 16>, Alone<82> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const int index = p[2 + i] | (p[66 + i / 4] >> (i % 4 * 2) & 3) << 8;
    return with_signs(entry(grids.iq2_s, index), p[34 + i]);
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * (float(p[74 + g / 2] >> (g % 2 * 4) & 15) + 0.5f) * 0.25f;
  }
};

struct IQ3_XXS : ByEight<IQ3_XXS, 32>, Alone<98> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const uint32_t signs = even_signs(load<uint32_t>(p + 66 + i / 4 * 4) >> 7 * (i % 4));
    return with_signs(four_and_four(grids.iq3_xxs, p[2 + 2 * i], p[3 + 2 * i]), signs);
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * (float(load<uint32_t>(p + 66 + 4 * g) >> 28) + 0.5f) * 0.5f;
  }
};

struct IQ3_S : ByEight<IQ3_S, 32>, Alone<110> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const int high = p[66 + i / 4] >> (i % 4 * 2);
    const int first = p[2 + 2 * i] | (high & 1) << 8, second = p[3 + 2 * i] | (high >> 1 & 1) << 8;
    return with_signs(four_and_four(grids.iq3_s, first, second), p[74 + i]);
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * float(2 * (p[106 + g / 2] >> (g % 2 * 4) & 15) + 1);
  }
};

// Entries of -1, 0 and 1, eight times, plus or minus one.
INLINE uint64_t iq1_entry(int index, bool minus) {
  const uint64_t large = entry(grids.iq1_s, index) << 3 & 0xf8f8f8f8f8f8f8f8, low = 0x7f7f7f7f7f7f7f7f;
  const uint64_t delta = minus ? ~uint64_t{0} : 0x0101010101010101;
  return ((large & low) + (delta & low)) ^ ((large ^ delta) & ~low);  // bytes are added without carries between them
}

struct IQ1_S : ByEight<IQ1_S, 32>, Alone<50> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const uint32_t word = load<uint16_t>(p + 34 + i / 4 * 2);
    return iq1_entry(p[2 + i] | (word >> (i % 4 * 3) & 7) << 8, word >> 15);
  }
  INLINE float scale(const uint8_t* p, int g) {
    return half_at(p) * float(2 * (load<uint16_t>(p + 34 + 2 * g) >> 12 & 7) + 1) * 0.125f;
  }
};

struct IQ1_M : ByEight<IQ1_M, 16>, Alone<56> {
  INLINE uint64_t eight(const uint8_t* p, int i) {
    const int high = p[32 + i / 2] >> (i % 2 * 4) & 15;
    return iq1_entry(p[i] | (high & 7) << 8, high >> 3);
  }
  INLINE float scale(const uint8_t* p, int g) {
    const uint8_t* s = p + 48;
    const float d = f16(uint16_t(s[1] >> 4 | (s[3] >> 4) << 4 | (s[5] >> 4) << 8 | (s[7] >> 4) << 12));
    return d * float(2 * (load<uint16_t>(s + g / 4 * 2) >> (g % 4 * 3) & 7) + 1) * 0.125f;
  }
};

// ---- formats of safetensors files ----

// leaves: codes, scales
struct MXFP4 : Computed<32, 32, true, 4> {
  INLINE void codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
    low_and_high(two(row_of(m, 0, a) + 16 * chunk, row_of(m, 0, b) + 16 * chunk), out);
    lookup_both(kE2M1, out);
  }
  INLINE void head(const Matrix& m, int64_t row, int64_t chunk, uint32_t* words) {
    const uint8_t e = row_of(m, 1, row)[chunk];
    const float scale = e > 1 ? 0.5f * e8m0(e, __builtin_nanf("")) : 0;
    words[0] = bits_of(scale), words[1] = bits_of(-12 * scale);
  }
};

// leaves: codes, scales, one scale for the matrix or none; params: whether scales are divided by it
struct NVFP4 : Computed<32, 16, true, 4> {
  INLINE void codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
    uint8_t copy[2][16];
    low_and_high(two(bytes_of(m, 0, a, 16 * chunk, 16, copy[0]), bytes_of(m, 0, b, 16 * chunk, 16, copy[1])), out);
    lookup_both(kE2M1, out);
  }
  INLINE void head(const Matrix& m, int64_t row, int64_t chunk, uint32_t* words) {
    UNROLL
    for (int g = 0; g < 2; g++) {
      float scale = 2 * chunk + g < m.row_bytes[1] ? e4m3(row_of(m, 1, row)[2 * chunk + g]) : 0;
      if (m.leaf[2]) scale = m.param[0] ? scale / load<float>(m.leaf[2]) : scale * load<float>(m.leaf[2]);
      words[g] = bits_of(0.5f * scale), words[2 + g] = bits_of(-6 * scale);
    }
  }
};

// leaves: codes, scales, zeros, biases, group of each column, of each row;
// params: bits, group, types of scales, zeros and biases, the zero if there are no zeros
enum AffineParam { kBits, kGroupSize, kScaleType, kZeroType, kBiasType, kZero };

// The lowest 8 * bits bits of a word are eight codes: each moves to the lowest bits of its byte. First the upper four
// move to the upper half, then pairs and then single codes within their part.
INLINE uint64_t spread(uint64_t word, int bits) {
  const uint64_t four = (uint64_t{1} << 4 * bits) - 1, two = ((1u << 2 * bits) - 1) * 0x100000001;
  const uint64_t one = ((1u << bits) - 1) * 0x1000100010001;
  word = (word & four) | (word >> 4 * bits & four) << 32;
  word = (word & two) | (word & two << 2 * bits) << (16 - 2 * bits);
  return (word & one) | (word & one << bits) << (8 - bits);
}

// 32 codes of `kBits` bits of two rows, one after the other.
template <int kBits>
INLINE void stream(const uint8_t* p, const uint8_t* q, u8x32* out) {
  uint64_t words[2][4];
  UNROLL
  for (int i = 0; i < 4; i++) {
    // Eight codes are kBits bytes. They are read as a part of eight bytes that are in the row.
    const int at = kBits * i, from = kBits == 1 || at < 4 * kBits - 8 ? at : 4 * kBits - 8, shift = 8 * (at - from);
    words[0][i] = spread(kBits == 1 ? p[at] : load<uint64_t>(p + from) >> shift, kBits);
    words[1][i] = spread(kBits == 1 ? q[at] : load<uint64_t>(q + from) >> shift, kBits);
  }
  out[0] = (u8x32)u64x4{words[0][0], words[0][1], words[1][0], words[1][1]};
  out[1] = (u8x32)u64x4{words[0][2], words[0][3], words[1][2], words[1][3]};
}

INLINE void affine_codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
  uint8_t copy[2][32];
  const int bits = int(m.param[kBits]), count = 4 * bits;
  const uint8_t* p = bytes_of(m, 0, a, count * chunk, count, copy[0]);
  const uint8_t* q = bytes_of(m, 0, b, count * chunk, count, copy[1]);
  switch (bits) {
    case 1: return stream<1>(p, q, out);
    case 2: return stream<2>(p, q, out);
    case 3: return stream<3>(p, q, out);
    case 4: return low_and_high(two(p, q), out);
    case 5: return stream<5>(p, q, out);
    case 6: return stream<6>(p, q, out);
    case 7: return stream<7>(p, q, out);
    default: out[0] = two(p, q), out[1] = two(p + 16, q + 16);
  }
}

INLINE void affine_group(const Matrix& m, int64_t row, int64_t group, float* scale, float* zero, float* bias) {
  *scale = element(row_of(m, 1, row), group, m.param[kScaleType]);
  *zero = m.leaf[2] ? element(row_of(m, 2, row), group, m.param[kZeroType]) : float(m.param[kZero]);
  *bias = m.leaf[3] ? element(row_of(m, 3, row), group, m.param[kBiasType]) : 0;
}

template <int kIn, bool kWide>  // wide: more than 4 bits, then codes are signed
struct Affine : Computed<32, kIn, true, kWide ? 0 : 8> {
  INLINE void codes(const Matrix& m, int64_t a, int64_t b, int64_t chunk, u8x32* out) {
    affine_codes(m, a, b, chunk, out);
    if (kWide) out[0] ^= 128, out[1] ^= 128;
  }
  INLINE void head(const Matrix& m, int64_t row, int64_t chunk, uint32_t* words) {
    UNROLL
    for (int g = 0; g < 32 / kIn; g++) {
      const int64_t k = 32 * chunk + kIn * g;
      float scale = 0, zero = 0, bias = 0;
      if (k < m.cols) affine_group(m, row, k / m.param[kGroupSize], &scale, &zero, &bias);
      const float middle = kWide ? 128 : 0;
      words[g] = bits_of(scale);
      words[32 / kIn + g] = bits_of(m.leaf[3] ? bias + middle * scale : (middle - zero) * scale);
    }
  }
};

// ---- float formats ----

// Groups that do not fit 16 neighbours, or that columns or rows choose.
struct AffineFloats {
  INLINE void decode(const Matrix& m, int64_t row, int64_t chunk, float* w) {
    u8x32 out[2];
    affine_codes(m, row, row, chunk, out);
    float scale = 0, zero = 0, bias = 0;
    int64_t last = -1;
    UNROLL
    for (int i = 0; i < 32; i++) {
      const int64_t k = 32 * chunk + i;
      if (k >= m.cols) {
        w[i] = 0;
        continue;
      }
      if (m.leaf[5]) {  // scales [groups, in]
        affine_group(m, load<int32_t>(m.leaf[5] + 4 * row), k, &scale, &zero, &bias);
      } else {
        const int64_t group = m.leaf[4] ? load<int32_t>(m.leaf[4] + 4 * k) : k / m.param[kGroupSize];
        if (group != last) affine_group(m, row, group, &scale, &zero, &bias);
        last = group;
      }
      const float code = out[i / 16][i % 16];
      w[i] = m.leaf[3] ? code * scale + bias : (code - zero) * scale;
    }
  }
};

// leaves: codes, scales, table; params: group
struct Codebook {
  INLINE void decode(const Matrix& m, int64_t row, int64_t chunk, float* w) {
    uint8_t copy[16];
    const uint8_t* codes = bytes_of(m, 0, row, 16 * chunk, 16, copy);
    const float *table = (const float*)m.leaf[2], *scales = (const float*)row_of(m, 1, row);
    const int64_t group = m.param[0], first = 32 * chunk, last = first + 32 < m.cols ? first + 32 : m.cols;
    UNROLL
    for (int i = 0; i < 16; i++) w[2 * i] = table[codes[i] >> 4], w[2 * i + 1] = table[codes[i] & 15];
    for (int64_t k = first; k < last;) {
      const int64_t end = (k / group + 1) * group < last ? (k / group + 1) * group : last;
      for (const float scale = scales[k / group]; k < end; k++) w[k - first] *= scale;
    }
    for (int64_t k = last; k < first + 32; k++) w[k - first] = 0;
  }
};

// Eight values of a type.
template <int kType>
INLINE f32x8 eight(const uint8_t* p) {
  if (kType == kF32) return load<f32x8>(p);
  if (kType == kBF16) return (f32x8)(__builtin_convertvector(load<u16x8>(p), u32x8) << 16);
  if (kType == kF16) return f16x8(load<u16x8>(p));
  if (kType == kS8) return floats(s8(p));
  const u16x8 byte = __builtin_convertvector(load<u8x8>(p), u16x8), rest = byte & 0x7f;
  if (kType == kE5M2) return f16x8(byte << 8);
  const u16x8 nan = (u16x8)(rest == 0x7f) & 0x7e00;  // kE4M3: a float16 with the same fields is 2^-8 times as large
  return f16x8((byte & 0x80) << 8 | rest << 7 | nan) * 256;
}

template <int kType>
constexpr int kSizeOf = kType == kF32 ? 4 : kType == kBF16 || kType == kF16 ? 2 : 1;

// 32 values of a row, from a block on.
template <int kType>
INLINE void values(const Matrix& m, int64_t row, int64_t block, float* w) {
  constexpr int size = kSizeOf<kType>;
  uint8_t copy[32 * size];
  const uint8_t* p = bytes_of(m, 0, row, 32 * size * block, 32 * size, copy);
  for (int i = 0; i < 32; i += 8) store(w + i, eight<kType>(p + size * i));
}

// leaves: values
template <int kType>
struct Dense {
  INLINE void decode(const Matrix& m, int64_t row, int64_t chunk, float* w) {
    values<kType>(m, row, chunk, w);
  }
};

// leaves: values, scales;
// params: rows and columns of a block, type and row bytes of scales, bits of the factor, type of values
enum ScaledParam { kBlockRows, kBlockCols, kScalesType, kScalesRow, kFactor, kValuesType };

template <int kType>
struct Scaled {
  INLINE void decode(const Matrix& m, int64_t row, int64_t chunk, float* w) {
    values<kType>(m, row, chunk, w);
    const uint8_t* scales = m.leaf[1] + row / m.param[kBlockRows] * m.param[kScalesRow];
    const int64_t wide = m.param[kBlockCols], first = 32 * chunk, last = first + 32 < m.cols ? first + 32 : m.cols;
    const float factor = from_bits(uint32_t(m.param[kFactor]));
    if (first / wide == (last - 1) / wide) {
      const float scale = element(scales, first / wide, m.param[kScalesType]);
      UNROLL
      for (int i = 0; i < 32; i++) w[i] = w[i] * scale * factor;
      return;
    }
    for (int64_t k = first; k < last; k++) {
      w[k - first] = w[k - first] * element(scales, k / wide, m.param[kScalesType]) * factor;
    }
  }
};

}}  // namespace jaxllm::JAXLLM_LEVEL
