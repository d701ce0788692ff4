// Softmax attention under a mask, y_i = sum_j p_ij v_j with p_ij = exp(q_i . k_j / sqrt(d) - normaliser_i) where j is
// visible to i, forward and backward, in tiles. Tiles that nobody sees are left out; the backward computes p again.
//
// Letters: b batch, t queries, s keys, h heads of queries, g groups of them, each with keys and values, d width; m masks,
// 1 or b.
#include <omp.h>

#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kRows = 32, kColumns = 32;  // of a tile: queries and keys

struct Sizes {
  int64_t m, b, t, s, h, g, d;

  int64_t row_tiles() const { return (t + kRows - 1) / kRows; }
  int64_t column_tiles() const { return (s + kColumns - 1) / kColumns; }
  int64_t keys() const { return column_tiles() * kColumns; }  // with those that fill the last tile
  int64_t query(int64_t batch, int64_t token, int64_t head) const { return ((batch * t + token) * h + head) * d; }
  int64_t key(int64_t batch, int64_t slot, int64_t group) const { return ((batch * s + slot) * g + group) * d; }
};

// The mask in whole tiles, and which of them anybody sees. What fills the last ones up is hidden.
class Mask {
 public:
  Mask(const Sizes& z, const bool* visible)
      : z_(z), visible_(z.m * z.row_tiles() * kRows * z.keys()), tiles_(z.m * z.row_tiles() * z.column_tiles()) {
    visible_.zero(z.m * z.row_tiles() * kRows * z.keys());
    tiles_.zero(z.m * z.row_tiles() * z.column_tiles());
    for (int64_t mask = 0; mask < z.m; mask++) {
      for (int64_t i = 0; i < z.t; i++) {
        uint8_t* row = visible_ + (mask * z.row_tiles() * kRows + i) * z.keys();
        std::memcpy(row, visible + (mask * z.t + i) * z.s, z.s);
        uint8_t* tiles = tiles_ + (mask * z.row_tiles() + i / kRows) * z.column_tiles();
        for (int64_t j = 0; j < z.keys(); j++) tiles[j / kColumns] |= row[j];
      }
    }
  }

  // What query i sees.
  const uint8_t* seen(int64_t batch, int64_t i) const {
    return (const uint8_t*)visible_ + ((z_.m == 1 ? 0 : batch) * z_.row_tiles() * kRows + i) * z_.keys();
  }

  // Call `visit` with the first key of each tile that is not hidden from all of a tile of queries.
  template <typename Visit>
  void visit_tiles(int64_t batch, int64_t row_tile, const Visit& visit) const {
    const uint8_t* tiles = tiles_ + ((z_.m == 1 ? 0 : batch) * z_.row_tiles() + row_tile) * z_.column_tiles();
    for (int64_t tile = 0; tile < z_.column_tiles(); tile++) {
      if (tiles[tile]) visit(tile * kColumns);
    }
  }

 private:
  Sizes z_;
  Scratch<uint8_t> visible_, tiles_;
};

// out (kRows x width) = scale times the rows of a tile's queries, the rest 0
template <typename T>
inline void load_queries(const Sizes& z, int64_t batch, int64_t head, int64_t first, T scale, const T* from, T* out,
                         int64_t width) {
  std::memset(out, 0, kRows * width * sizeof(T));
  for (int64_t r = 0; r < std::min(kRows, z.t - first); r++) {
    const T* row = from + z.query(batch, first + r, head);
    for (int64_t c = 0; c < z.d; c++) out[r * width + c] = scale * row[c];
  }
}

// out (keys x width) = the keys or values of a group, the rest 0
template <typename T>
inline void load_keys(const Sizes& z, int64_t batch, int64_t group, const T* from, T* out, int64_t width) {
  std::memset(out, 0, z.keys() * width * sizeof(T));
  for (int64_t j = 0; j < z.s; j++) std::memcpy(out + j * width, from + z.key(batch, j, group), z.d * sizeof(T));
}

// out (d x keys) = the transpose of the keys or values of a group, the rest 0
template <typename T>
inline void load_transposed(const Sizes& z, int64_t batch, int64_t group, const T* from, T* out) {
  std::memset(out, 0, z.d * z.keys() * sizeof(T));
  transpose(z.s, z.d, from + z.key(batch, 0, group), z.g * z.d, out, z.keys());
}

// ---- forward --------------------------------------------------------------------------------------------------------

// A query's scores of a tile: the largest that is seen, column by column.
template <typename T>
inline void raise(const T* __restrict__ scores, const uint8_t* __restrict__ seen, T* __restrict__ tops) {
#pragma omp simd
  for (int64_t c = 0; c < kColumns; c++) {
    const T score = seen[c] ? scores[c] : -std::numeric_limits<T>::infinity();
    tops[c] = score > tops[c] ? score : tops[c];
  }
}

// scores = exp(scores - shift) where they are seen, else 0; adds them up, column by column.
template <typename T>
inline void exponentiate(T* __restrict__ scores, const uint8_t* __restrict__ seen, T shift, T* __restrict__ sums) {
#pragma omp simd
  for (int64_t c = 0; c < kColumns; c++) {
    scores[c] = seen[c] ? decaying_exponential(scores[c] - shift) : T(0);
    sums[c] += scores[c];
  }
}

template <typename T>
struct Forward {
  const Sizes& z;
  const Mask& mask;
  int64_t width;
  T *k, *v, *q, *scores, *y;  // (d keys), (keys width), (kRows width), (kRows keys), (kRows width)

  Forward(const Sizes& z, const Mask& mask, Arena<T> arena, int64_t* used = nullptr)
      : z(z), mask(mask), width(round_columns<T>(z.d)) {
    k = arena.take(z.d * z.keys());
    v = arena.take(z.keys() * width);
    q = arena.take(kRows * width);
    scores = arena.take(kRows * z.keys());
    y = arena.take(kRows * width);
    if (used) *used = arena.used;
  }

  void run(int64_t batch, int64_t head, int64_t tile, const T* queries, T* out, T* normaliser) {
    const int64_t first = tile * kRows, rows = std::min(kRows, z.t - first), keys = z.keys();
    load_queries(z, batch, head, first, 1 / std::sqrt(T(z.d)), queries, q, width);
    mask.visit_tiles(batch, tile, [&](int64_t at) {
      multiply<false>(kRows, kColumns, z.d, q, width, k + at, keys, scores + at, keys);
    });
    T sum_of[kRows];
    for (int64_t r = 0; r < rows; r++) {
      T *row = scores + r * keys, tops[kColumns], sums[kColumns] = {};
      const uint8_t* seen = mask.seen(batch, first + r);
      std::fill(tops, tops + kColumns, -std::numeric_limits<T>::infinity());
      mask.visit_tiles(batch, tile, [&](int64_t at) { raise(row + at, seen + at, tops); });
      const T shift = *std::max_element(tops, tops + kColumns);
      mask.visit_tiles(batch, tile, [&](int64_t at) { exponentiate(row + at, seen + at, shift, sums); });
      sum_of[r] = sum_lanes<T, kColumns>(sums);
      normaliser[(batch * z.h + head) * z.t + first + r] = shift + std::log(sum_of[r]);
    }
    std::memset(y, 0, kRows * width * sizeof(T));
    mask.visit_tiles(batch, tile, [&](int64_t at) {
      multiply<true>(kRows, width, kColumns, scores + at, keys, v + at * width, width, y, width);
    });
    for (int64_t r = 0; r < rows; r++) {
      const T scale = sum_of[r] == 0 ? 0 : 1 / sum_of[r];  // of a query that sees nothing
      T* to = out + z.query(batch, first + r, head);
      for (int64_t c = 0; c < z.d; c++) to[c] = scale * y[r * width + c];
    }
  }
};

template <typename T>
void forward(const Sizes& z, const T* q, const T* k, const T* v, const bool* visible, T* y, T* normaliser,
             int64_t threads) {
  const Mask mask(z, visible);
  int64_t each;
  Forward<T>(z, mask, Arena<T>{nullptr}, &each);
  threads = std::max<int64_t>(1, std::min(threads, z.b * z.g));
  Scratch<T> scratch(threads * each);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < z.b * z.g; index++) {
    const int64_t batch = index / z.g, group = index % z.g, heads = z.h / z.g;
    Forward<T> task(z, mask, Arena<T>{scratch + omp_get_thread_num() * each});
    load_transposed(z, batch, group, k, task.k);
    load_keys(z, batch, group, v, task.v, task.width);
    for (int64_t head = group * heads; head < (group + 1) * heads; head++) {
      for (int64_t tile = 0; tile < z.row_tiles(); tile++) task.run(batch, head, tile, q, y, normaliser);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T>
struct Backward {
  const Sizes& z;
  const Mask& mask;
  int64_t width;
  T *k_across, *v_across, *k, *grad_k, *grad_v;  // (d keys) twice, (keys width)
  T *q, *grad_y, *grad_q;                        // (kRows width)
  T *p, *grad_p;                                 // (kRows kColumns)

  Backward(const Sizes& z, const Mask& mask, Arena<T> arena, int64_t* used = nullptr)
      : z(z), mask(mask), width(round_columns<T>(z.d)) {
    k_across = arena.take(z.d * z.keys());
    v_across = arena.take(z.d * z.keys());
    k = arena.take(z.keys() * width);
    grad_k = arena.take(z.keys() * width);
    grad_v = arena.take(z.keys() * width);
    q = arena.take(kRows * width);
    grad_y = arena.take(kRows * width);
    grad_q = arena.take(kRows * width);
    p = arena.take(kRows * kColumns);
    grad_p = arena.take(kRows * kColumns);
    if (used) *used = arena.used;
  }

  void run(int64_t batch, int64_t head, int64_t tile, const T* queries, const T* y, const T* normaliser,
           const T* grads, T* grad_queries) {
    const int64_t first = tile * kRows, rows = std::min(kRows, z.t - first), keys = z.keys();
    const T scale = 1 / std::sqrt(T(z.d));
    load_queries(z, batch, head, first, scale, queries, q, width);
    load_queries(z, batch, head, first, T(1), grads, grad_y, width);
    T mean[kRows];  // of the gradients of a query's p, weighted by p
    for (int64_t r = 0; r < rows; r++) mean[r] = dot(z.d, grad_y + r * width, y + z.query(batch, first + r, head));
    std::memset(grad_q, 0, kRows * width * sizeof(T));
    mask.visit_tiles(batch, tile, [&](int64_t at) {
      multiply<false>(kRows, kColumns, z.d, q, width, k_across + at, keys, p, kColumns);
      multiply<false>(kRows, kColumns, z.d, grad_y, width, v_across + at, keys, grad_p, kColumns);
      for (int64_t r = 0; r < rows; r++) {
        T* __restrict__ weight = p + r * kColumns;
        T* __restrict__ grad = grad_p + r * kColumns;
        const uint8_t* seen = mask.seen(batch, first + r) + at;
        const T shift = normaliser[(batch * z.h + head) * z.t + first + r];
#pragma omp simd
        for (int64_t c = 0; c < kColumns; c++) {
          weight[c] = seen[c] ? decaying_exponential(weight[c] - shift) : T(0);
          grad[c] = weight[c] * (grad[c] - mean[r]);
        }
      }
      std::memset(p + rows * kColumns, 0, (kRows - rows) * kColumns * sizeof(T));
      std::memset(grad_p + rows * kColumns, 0, (kRows - rows) * kColumns * sizeof(T));
      T *const k_at = grad_k + at * width, *const v_at = grad_v + at * width;
      multiply_transposed<true>(kColumns, width, kRows, p, kColumns, grad_y, width, v_at, width);
      multiply_transposed<true>(kColumns, width, kRows, grad_p, kColumns, q, width, k_at, width);
      multiply<true>(kRows, width, kColumns, grad_p, kColumns, k + at * width, width, grad_q, width);
    });
    for (int64_t r = 0; r < rows; r++) {
      T* to = grad_queries + z.query(batch, first + r, head);
      for (int64_t c = 0; c < z.d; c++) to[c] = scale * grad_q[r * width + c];
    }
  }
};

template <typename T>
void backward(const Sizes& z, const T* q, const T* k, const T* v, const bool* visible, const T* y, const T* normaliser,
              const T* grad_y, T* grad_q, T* grad_k, T* grad_v, int64_t threads) {
  const Mask mask(z, visible);
  int64_t each;
  Backward<T>(z, mask, Arena<T>{nullptr}, &each);
  threads = std::max<int64_t>(1, std::min(threads, z.b * z.g));
  Scratch<T> scratch(threads * each);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < z.b * z.g; index++) {
    const int64_t batch = index / z.g, group = index % z.g, heads = z.h / z.g;
    Backward<T> task(z, mask, Arena<T>{scratch + omp_get_thread_num() * each});
    load_transposed(z, batch, group, k, task.k_across);
    load_transposed(z, batch, group, v, task.v_across);
    load_keys(z, batch, group, k, task.k, task.width);
    std::memset(task.grad_k, 0, z.keys() * task.width * sizeof(T));
    std::memset(task.grad_v, 0, z.keys() * task.width * sizeof(T));
    for (int64_t head = group * heads; head < (group + 1) * heads; head++) {
      for (int64_t tile = 0; tile < z.row_tiles(); tile++) {
        task.run(batch, head, tile, q, y, normaliser, grad_y, grad_q);
      }
    }
    for (int64_t j = 0; j < z.s; j++) {
      std::memcpy(grad_k + z.key(batch, j, group), task.grad_k + j * task.width, z.d * sizeof(T));
      std::memcpy(grad_v + z.key(batch, j, group), task.grad_v + j * task.width, z.d * sizeof(T));
    }
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                              \
  extern "C" int attention_forward_##suffix(int64_t m, int64_t b, int64_t t, int64_t s, int64_t h, int64_t g,          \
                                            int64_t d, const T* q, const T* k, const T* v, const bool* visible, T* y,  \
                                            T* normaliser, int64_t threads) {                                          \
    ZOO_STATUS(forward<T>({m, b, t, s, h, g, d}, q, k, v, visible, y, normaliser, threads))                            \
  }                                                                                                                    \
  extern "C" int attention_backward_##suffix(int64_t m, int64_t b, int64_t t, int64_t s, int64_t h, int64_t g,         \
                                             int64_t d, const T* q, const T* k, const T* v, const bool* visible,       \
                                             const T* y, const T* normaliser, const T* grad_y, T* grad_q, T* grad_k,   \
                                             T* grad_v, int64_t threads) {                                             \
    ZOO_STATUS(backward<T>({m, b, t, s, h, g, d}, q, k, v, visible, y, normaliser, grad_y, grad_q, grad_k, grad_v,     \
                           threads))                                                                                   \
  }

EXPORT(f32, float)
EXPORT(f64, double)
