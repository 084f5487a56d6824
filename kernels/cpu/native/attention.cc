// How attention is divided into pieces of work, and put together again.
#include <algorithm>
#include <cmath>
#include <vector>

#include "divide.h"
#include "pool.h"

namespace jaxllm {
namespace {

// Queries that pass over the keys together: some heads of one key head, at some positions.
struct Tile {
  int64_t batch, kv_head, head, heads, time, times;
  int64_t begin, end;    // the keys that any of them sees
  size_t first, last;    // its parts

  int64_t rows() const { return heads * times; }
  int64_t token(const Attention& a, int64_t row) const { return batch * a.time + time + row / heads; }
  int64_t query(const Attention& a, int64_t row) const { return token(a, row) * a.heads + head + row % heads; }
};

struct Part {
  size_t tile;
  int64_t begin, end;  // keys
};

std::vector<Tile> tiles_of(const Attention& a) {
  const int64_t group = a.heads / a.kv_heads, heads = std::min<int64_t>(group, kTokens);
  // A token of a decode step gets the same numbers whatever is computed beside it: so it has tiles of its own, divided as
  // its own position says.
  const int64_t times = a.time < kFew ? 1 : kTokens / heads;
  std::vector<Tile> tiles;
  for (int64_t batch = 0; batch < a.batch; batch++) {
    for (int64_t head = 0; head < a.heads;) {
      const int64_t kv_head = head / group, some = std::min(heads, (kv_head + 1) * group - head);
      for (int64_t time = 0; time < a.time; time += times) {
        Tile tile{batch, kv_head, head, some, time, std::min(times, a.time - time), 0, a.length, 0, 0};
        if (!a.key_positions) {
          const int32_t* at = a.positions + batch * a.time + time;
          const auto [low, high] = std::minmax_element(at, at + tile.times);
          tile.end = std::min<int64_t>(a.length, int64_t{*high} + 1);
          if (a.window) tile.begin = std::max<int64_t>(0, *low - std::min<int64_t>(a.window - 1, INT32_MAX));
        }
        tiles.push_back(tile);
      }
      head += some;
    }
  }
  return tiles;
}

// In a decode step, keys are divided too, because there are few tiles.
std::vector<Part> parts_of(std::vector<Tile>& tiles, int64_t time) {
  const int64_t wanted = time < kFew ? 4 : 1;
  std::vector<Part> parts;
  for (size_t i = 0; i < tiles.size(); i++) {
    Tile& tile = tiles[i];
    const int64_t keys = tile.end - tile.begin, step = std::max<int64_t>(128, (keys + wanted - 1) / wanted);
    tile.first = parts.size();
    for (int64_t key = tile.begin; key < tile.end; key += wanted > 1 ? step : keys) {
      parts.push_back({i, key, wanted > 1 ? std::min(key + step, tile.end) : tile.end});
    }
    tile.last = parts.size();
  }
  return parts;
}

}  // namespace

void attend(const Level& level, const Attention& a) {
  std::vector<Tile> tiles = tiles_of(a);
  const std::vector<Part> parts = parts_of(tiles, a.time);
  const int64_t size = (a.value_dim + 2) * kTokens;  // what a part finds, see Level
  thread_local std::vector<float> buffer;
  buffer.resize(std::max<size_t>(buffer.size(), parts.size() * size + 16));
  float* found = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);

  in_parallel(parts.size(), [&](int64_t i) {
    const Tile& tile = tiles[parts[i].tile];
    std::vector<float> q(tile.rows() * a.dim);
    int32_t positions[kTokens];
    for (int64_t row = 0; row < tile.rows(); row++) {
      std::copy_n(a.q + tile.query(a, row) * a.dim, a.dim, q.data() + row * a.dim);
      positions[row] = a.positions[tile.token(a, row)];
    }
    level.attend(a, tile.batch, tile.kv_head, q.data(), positions, tile.rows(), parts[i].begin, parts[i].end,
                 found + i * size);
  });

  const auto join = [&](int64_t i) {
    const Tile& tile = tiles[i];
    for (int64_t row = 0; row < tile.rows(); row++) {
      const int64_t most_at = a.value_dim * kTokens + row, weight_at = most_at + kTokens;
      const float sink = a.sinks ? a.sinks[tile.head + row % tile.heads] : -INFINITY;
      float most = sink, weight = 0;
      for (size_t p = tile.first; p < tile.last; p++) most = std::fmax(most, found[p * size + most_at]);
      if (a.sinks) weight = std::exp(sink - most);
      float* y = a.y + tile.query(a, row) * a.value_dim;
      std::fill_n(y, a.value_dim, 0.0f);
      for (size_t p = tile.first; p < tile.last; p++) {
        const float* sums = found + p * size;
        const float shrunk = sums[most_at] == -INFINITY ? 0 : std::exp(sums[most_at] - most);
        weight += shrunk * sums[weight_at];
        for (int64_t k = 0; k < a.value_dim; k++) y[k] += shrunk * sums[(k / 8 * kTokens + row) * 8 + k % 8];
      }
      for (int64_t k = 0; k < a.value_dim; k++) y[k] /= weight;
      if (a.logs) a.logs[tile.query(a, row)] = most + std::log(weight);
    }
  };
  if (a.time > 1) return in_parallel(tiles.size(), join);
  for (size_t i = 0; i < tiles.size(); i++) join(i);
}

void gradients(const Level& level, const AttentionGradients& a) {
  const Attention& f = a.forward;
  const int64_t keys = f.batch * f.heads * f.length;
  std::fill_n(a.q, f.batch * f.time * f.heads * f.dim, 0.0f);
  std::fill_n(a.keys, keys * f.dim, 0.0f), std::fill_n(a.values, keys * f.value_dim, 0.0f);
  in_parallel(f.batch * f.heads, [&](int64_t i) {
    std::vector<float> columns(kKeys * (f.dim + f.value_dim));
    level.gradients(a, i / f.heads, i % f.heads, columns.data());
  });
}

}  // namespace jaxllm
