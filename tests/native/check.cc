// Every format, exact and rounded, on another instruction set (LEVELS): equal to the portable one. Buffers have
// exactly the size that they need, so that sanitizers see what reads beyond them. `make test-native` runs it with those.
// Then hostile ones: any bytes as a checkpoint may have them, and sizes and indices of which each has to be refused.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "divide.h"
#include "pool.h"
#include "refuse.h"

namespace jaxllm {
Grids grids;
}
using namespace jaxllm;

static uint64_t state = 1;
static uint32_t draw() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
static float real() { return float(int(draw() % 20001) - 10000) / 5000; }

struct Leaf {
  int64_t row_bytes, rows;
  bool shared;
  int kind;  // 0: bytes whose float16 and float8 are finite, 1: float32, 2: int32 below 4
};

struct Case {
  const char* name;
  Format format;
  int64_t cols;
  std::vector<Leaf> leaves;
  std::vector<int64_t> params;
};

constexpr int64_t kRowsOf = 37;

static Case block(const char* name, Format format, int64_t cols = 512) {
  const BlockSize block = kBlocks[format - kQ1_0];
  return {name, format, cols, {{cols / block.cols * block.bytes, kRowsOf, false, 0}}, {}};
}

static std::vector<Case> cases() {
  std::vector<Case> all = {
      block("Q1_0", kQ1_0), block("Q4_0", kQ4_0), block("Q4_1", kQ4_1),
      block("Q5_0", kQ5_0), block("Q5_1", kQ5_1), block("Q8_0", kQ8_0),
      block("Q8_1", kQ8_1), block("Q2_K", kQ2_K), block("Q3_K", kQ3_K),
      block("Q4_K", kQ4_K), block("Q5_K", kQ5_K), block("Q6_K", kQ6_K),
      block("Q8_K", kQ8_K), block("TQ1_0", kTQ1_0), block("TQ2_0", kTQ2_0),
      block("MXFP4", kGGML_MXFP4), block("NVFP4", kGGML_NVFP4), block("IQ1_S", kIQ1_S),
      block("IQ1_M", kIQ1_M), block("IQ2_XXS", kIQ2_XXS), block("IQ2_XS", kIQ2_XS),
      block("IQ2_S", kIQ2_S), block("IQ3_XXS", kIQ3_XXS), block("IQ3_S", kIQ3_S),
      block("IQ4_NL", kIQ4_NL), block("IQ4_XS", kIQ4_XS),
      block("Q4_1, wide", kQ4_1, 4096 + 96), block("Q2_K, wide", kQ2_K, 8192 + 256),
      {"MXFP4 in order", kMXFP4, 96, {{48, kRowsOf, false, 0}, {3, kRowsOf, false, 0}}, {}},
      {"NVFP4 in order", kNVFP4, 48, {{24, kRowsOf, false, 0}, {3, kRowsOf, false, 0}}, {}},
      {"codebook", kCodebook, 62, {{31, kRowsOf, false, 0}, {124, kRowsOf, false, 1}, {64, 1, true, 1}}, {2}},
      {"FP8", kScaled, 50, {{50, kRowsOf, false, 0}, {12, 5, true, 1}}, {8, 20, kF32, 12, 0x3f800000, kE4M3}},
      {"INT8", kScaled, 64, {{64, kRowsOf, false, 0}, {4, kRowsOf, true, 1}}, {1, 64, kF32, 4, 0x3f800000, kS8}},
      {"bfloat16", kDense, 33, {{66, kRowsOf, false, 0}}, {kBF16}},
      {"float16", kDense, 40, {{80, kRowsOf, false, 0}}, {kF16}},
  };
  static const char* names[] = {"affine 1", "affine 2", "affine 3", "affine 4",
                                "affine 5", "affine 6", "affine 7", "affine 8"};
  for (int64_t bits = 1; bits <= 8; bits++) {
    const Leaf codes{96 * bits / 8, kRowsOf, false, 0}, scales{96 / 32 * 2, kRowsOf, false, 0};
    all.push_back({names[bits - 1], kAffine, 96, {codes, scales, scales}, {bits, 32, kF16, kF16, 0, 0}});
  }
  const Leaf codes{20, kRowsOf, false, 0}, none{0, 0, true, 0};
  all.push_back({"affine, groups of 8", kAffine, 40, {codes, {20, kRowsOf, false, 1}}, {4, 8, kF32, 0, 0, 3}});
  all.push_back({"affine, groups of columns", kAffine, 40,
                 {codes, {16, kRowsOf, false, 1}, none, none, {160, 1, true, 2}}, {4, 40, kF32, 0, 0, 3}});
  all.push_back({"affine, groups of rows", kAffine, 40,
                 {codes, {160, 4, false, 1}, none, none, none, {148, 1, true, 2}}, {4, 40, kF32, 0, 0, 3}});
  return all;
}

static int failures = 0;

static void compare(const char* name, const char* what, const std::vector<float>& got,
                    const std::vector<float>& expected) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < got.size(); i++) {
    largest = std::fmax(largest, std::fabs(expected[i])), error = std::fmax(error, std::fabs(got[i] - expected[i]));
    if (std::isnan(got[i]) != std::isnan(expected[i])) error = INFINITY;
  }
  if (error <= 2e-6 * largest) return;
  std::printf("%s, %s: off by %g of %g\n", name, what, error, largest), failures++;
}

// A matrix, and how many bytes its leaves have. Hostile: of any bytes, but of indices in their range.
struct Made {
  Matrix m;
  int64_t bytes[kLeaves] = {};
  std::vector<std::unique_ptr<uint8_t[]>> held;

  explicit Made(const Case& c, bool hostile = false) : m{c.format, kRowsOf, c.cols, {}, {}, {}} {
    for (size_t i = 0; i < c.leaves.size(); i++) {
      const Leaf& leaf = c.leaves[i];
      const int64_t size = leaf.row_bytes * leaf.rows;
      if (!size) continue;
      held.emplace_back(new uint8_t[size]);
      uint8_t* p = held.back().get();
      const int kind = hostile && leaf.kind == 1 ? 0 : leaf.kind;
      for (int64_t k = 0; k < size; k++) p[k] = uint8_t(hostile ? draw() | -int(draw() % 4 == 0) : draw() & 0x3b);
      for (int64_t k = 0; k + 4 <= size && kind; k += 4) {
        const float number = real();
        const int32_t index = draw() % (c.leaves.size() == 5 ? 2 : 4);
        std::memcpy(p + k, kind == 1 ? (const void*)&number : &index, 4);
      }
      m.leaf[i] = p, m.row_bytes[i] = leaf.shared ? 0 : leaf.row_bytes, bytes[i] = size;
    }
    for (size_t i = 0; i < c.params.size(); i++) m.param[i] = c.params[i];
  }
};

static void check_products(const Level& level, const Case& c) {
  const Made made(c);
  const Matrix& m = made.m;
  if (const char* why = wrong_matrix(m, made.bytes)) std::printf("%s: refused (%s)\n", c.name, why), failures++;
  for (int64_t count : {1, 2, 3, 7, 70}) {
    std::vector<float> x(count * c.cols), got(count * kRowsOf), expected(count * kRowsOf);
    for (float& value : x) value = real();
    const Product ours{m, 0, count, got.data()}, theirs{m, 0, count, expected.data()};
    multiply(level, {ours}, x.data(), count, true);
    multiply(portable, {theirs}, x.data(), count, true);
    compare(c.name, "exact", got, expected);
    // Fused multiply-adds decide some ties otherwise, so both get the same codes.
    std::vector<RoundedSlice> slices((c.cols + kSlice - 1) / kSlice * count);
    const RoundedX rounded{slices.data(), count};
    level.round_rows(x.data(), c.cols, 0, count, rounded);
    level.multiply(ours, x.data(), &rounded, 0, kRowsOf);
    portable.multiply(theirs, x.data(), &rounded, 0, kRowsOf);
    compare(c.name, "rounded", got, expected);
    if (!level.rounds(m)) continue;
    for (int64_t row = 0; row < count; row++) {  // to the bit what it is among others
      std::vector<float> alone(kRowsOf);
      level.multiply({m, row, 1, alone.data()}, x.data(), &rounded, 0, kRowsOf);
      if (std::memcmp(alone.data(), got.data() + row * kRowsOf, 4 * kRowsOf)) {
        std::printf("%s: row %d of %d is another one alone\n", c.name, int(row), int(count)), failures++;
      }
    }
  }
}

static void check_attention(const Level& level, int64_t time, int64_t heads, int64_t kv_heads, int64_t dim,
                            int64_t value_dim, int64_t length, int64_t type, int64_t window, bool ring) {
  const int64_t batch = 2, size = type == kF32 ? 4 : type == kS8 || type == kE4M3 ? 1 : 2;
  const auto fill = [&](int64_t count, int64_t size) {
    std::vector<uint8_t> bytes(count * size);
    for (uint8_t& byte : bytes) byte = draw() & 0x3b;
    if (size == 4) for (int64_t i = 0; i < count; i++) reinterpret_cast<float*>(bytes.data())[i] = real();
    return bytes;
  };
  const int64_t held = batch * kv_heads * length;
  const auto keys = fill(held * dim, size), values = fill(held * value_dim, size);
  const auto key_scales = fill(held, 2), value_scales = fill(held, 2);
  std::vector<float> q(batch * time * heads * dim), sinks(heads), got(batch * time * heads * value_dim), expected(got);
  std::vector<int32_t> positions, at, rows{1, 0};
  for (float& x : q) x = real() / 4;
  for (float& x : sinks) x = real();
  for (int64_t i = 0; i < batch * time; i++) positions.push_back(int32_t(length - time + i % time));
  for (int64_t k = 0; k < length; k++) at.push_back(int32_t((k * 7 + 3) % length) - 1);
  Attention a{q.data(), keys.data(), values.data(), key_scales.data(), value_scales.data(), positions.data(),
              ring ? at.data() : nullptr, sinks.data(), rows.data(), batch, time, heads, kv_heads, length, dim,
              value_dim, 1, type, window, ring ? 5.0f : 0.0f, nullptr, nullptr};
  a.y = got.data(), attend(level, a);
  a.y = expected.data(), attend(portable, a);
  compare("attention", ring ? "ring" : "buffer", got, expected);
}

static void check_gradients(const Level& level, int64_t time, int64_t heads, int64_t kv_heads, int64_t dim,
                            int64_t value_dim, int64_t window, float score_cap) {
  const int64_t batch = 2;
  const auto numbers = [&](int64_t count) {
    std::vector<float> all(count);
    for (float& x : all) x = real() / 4;
    return all;
  };
  const auto q = numbers(batch * time * heads * dim), g = numbers(batch * time * heads * value_dim);
  const auto keys = numbers(batch * kv_heads * time * dim), values = numbers(batch * kv_heads * time * value_dim);
  const auto logs = numbers(batch * time * heads), means = numbers(batch * time * heads);
  std::vector<int32_t> positions;
  for (int64_t i = 0; i < batch * time; i++) positions.push_back(int32_t(i % time + (i % time > time / 3 ? 500 : 0)));
  AttentionGradients a{};
  Attention& f = a.forward;
  f.q = q.data(), f.positions = f.key_positions = positions.data();
  f.keys = reinterpret_cast<const uint8_t*>(keys.data()), f.values = reinterpret_cast<const uint8_t*>(values.data());
  f.batch = f.key_batches = batch, f.time = f.length = time, f.heads = heads, f.kv_heads = kv_heads;
  f.dim = dim, f.value_dim = value_dim, f.window = window, f.score_cap = score_cap;
  a.logs = logs.data(), a.means = means.data(), a.g = g.data();
  std::vector<float> got[3], expected[3];
  for (auto* all : {got, expected}) {
    all[0].resize(q.size()), all[1].resize(batch * heads * time * dim), all[2].resize(batch * heads * time * value_dim);
    a.q = all[0].data(), a.keys = all[1].data(), a.values = all[2].data();
    gradients(all == got ? level : portable, a);
  }
  const char* names[] = {"q", "keys", "values"};
  for (int i = 0; i < 3; i++) compare("gradients of attention", names[i], got[i], expected[i]);
}

static void expect_refused(const char* name, const char* what, const char* why) {
  if (!why) std::printf("%s: %s is not refused\n", name, what), failures++;
}

// Any bytes as weights, scales and x: what comes of them may be anything, but nothing else is read or written.
static void check_hostile_bytes(const Level& level, const Case& c) {
  const Made made(c, true);
  std::vector<float> x(3 * c.cols), y(3 * kRowsOf);
  for (float& value : x) {
    const uint32_t bits = draw() << 1 ^ draw();
    std::memcpy(&value, &bits, 4);
  }
  for (bool exact : {false, true}) multiply(level, {{made.m, 0, 3, y.data()}}, x.data(), 3, exact);
}

// Each number of a matrix, one at a time, is such that it would read beyond its leaves.
static void check_hostile_sizes(const Case& c) {
  constexpr int64_t huge[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 62, (int64_t{1} << 61) + 1};
  const auto check = [&](const char* what, auto change) {
    Made made(c);
    change(made);
    expect_refused(c.name, what, wrong_matrix(made.m, made.bytes));
  };
  for (int64_t n : huge) {
    check("a number of rows", [n](Made& made) { made.m.rows = n; });
    check("a number of columns", [n](Made& made) { made.m.cols = n; });
    check("a format", [n](Made& made) { made.m.format = Format(n); });
    for (size_t i = 0; i < c.leaves.size(); i++) {
      if (c.leaves[i].shared || !c.leaves[i].row_bytes) continue;
      check("a row's size", [n, i](Made& made) { made.m.row_bytes[i] = n; });
    }
  }
  check("a row more", [](Made& made) { made.m.rows++; });
  check("256 columns more", [](Made& made) { made.m.cols += 256; });
  for (size_t i = 0; i < c.leaves.size(); i++) {
    if (!c.leaves[i].row_bytes) continue;
    check("a byte less", [i](Made& made) { made.bytes[i]--; });
    if (c.format != kAffine && c.format != kNVFP4) check("no leaf", [i](Made& made) { made.m.leaf[i] = nullptr; });
    if (c.leaves[i].kind != 2) continue;
    for (int32_t index : {-1, INT32_MIN, INT32_MAX, 4}) {
      check("an index", [i, index](Made& made) { std::memcpy(const_cast<uint8_t*>(made.m.leaf[i]) + 8, &index, 4); });
    }
  }
  if (c.format == kAffine || c.format == kScaled || c.format == kCodebook) {
    const int group = c.format == kAffine ? 1 : 0;
    for (int64_t n : {int64_t{0}, int64_t{-1}, INT64_MIN}) {
      check("a group", [n, group](Made& made) { made.m.param[group] = n; });
    }
  }
}

// Positions of any size, and a cache that is shorter: defined, whatever it means. Rows of no sequence are refused.
static void check_hostile_attention(const Level& level) {
  constexpr int32_t numbers[] = {INT32_MIN, INT32_MIN + 1, -1, 0, 5, 29, 30, 1000, INT32_MAX - 1, INT32_MAX};
  const int64_t length = 30, dim = 24;
  std::vector<float> q(2 * dim, 0.5f), held(length * dim, 0.25f), y(2 * dim);
  std::vector<int32_t> at(length), rows{0};
  for (int64_t k = 0; k < length; k++) at[k] = numbers[k % 10];
  for (int64_t window : {int64_t{0}, int64_t{3}, INT64_MAX, INT64_MIN}) {
    for (bool ring : {false, true}) {
      for (int32_t position : numbers) {
        const std::vector<int32_t> positions{position, numbers[draw() % 10]};
        const auto bytes = reinterpret_cast<const uint8_t*>(held.data());
        Attention a{q.data(), bytes, bytes, nullptr, nullptr, positions.data(), ring ? at.data() : nullptr, nullptr,
                    rows.data(), 1, 2, 1, 1, length, dim, dim, 1, kF32, window, 0, y.data()};
        if (window < 0) expect_refused("attention", "a window", wrong_attention(a, 1));
        else attend(level, a);
        for (int32_t row : {-1, INT32_MIN, INT32_MAX, 1}) {
          rows[0] = row;
          expect_refused("attention", "a row", wrong_attention(a, 1));
        }
        rows[0] = 0, a.kv_heads = 0, expect_refused("attention", "no key head", wrong_attention(a, 1));
      }
    }
  }
}

int main(int argc, char** argv) {
  std::vector<std::vector<int8_t>> tables;
  for (int size : {8 * 2048, 8 * 256, 8 * 512, 8 * 1024, 4 * 256, 4 * 512}) {
    tables.emplace_back(size);
    for (int8_t& value : tables.back()) value = int8_t(1 + draw() % 60);
  }
  grids = {tables[0].data(), tables[1].data(), tables[2].data(), tables[3].data(), tables[4].data(), tables[5].data()};
  use_threads(argc > 1 ? std::atoi(argv[1]) : 3);
  for (const Level* level : {&portable, LEVELS}) {
    for (const Case& c : cases()) check_products(*level, c), check_hostile_bytes(*level, c), check_hostile_sizes(c);
    check_hostile_attention(*level);
    for (int64_t type : {kF32, kF16, kBF16, kS8, kE4M3}) {
      check_attention(*level, 1, 9, 3, 64, 64, 700, type, 0, false);
      check_attention(*level, 3, 16, 2, 24, 40, 130, type, 16, true);
      check_attention(*level, 2, 6, 1, 72, 8, 90, type, 0, false);
      check_attention(*level, 1, 5, 5, 16, 80, 33, type, 0, false);
      check_attention(*level, 70, 6, 2, 20, 24, 130, type, 16, true);
      check_attention(*level, 5, 100, 1, 40, 8, 30, type, 4, false);
    }
    check_gradients(*level, 70, 4, 2, 24, 8, 16, 5.0f);
    check_gradients(*level, 131, 3, 1, 64, 40, 0, 0.0f);
    std::printf("%s: %d failures\n", level->name, failures);
  }
  return failures != 0;
}
