// num_t = exp(w_t) num_{t-1} + exp(k_t) v_t, den_t the same without v, and y_t = num_t / den_t, for each channel.
//
// A thread takes a row of the batch and a block of channels, whose sums stay in the first-level cache, and walks along
// the tokens. The backward first walks along them and keeps the sums before every chunk; then, from the last chunk to
// the first, it computes the sums before each of the chunk's tokens again and goes back through them. Gradients of what
// all tokens share are summed over those of a row, then over the rows in their order: the number of threads changes no
// result.
//
// Letters: b batch, t tokens, d channels.
#include "native.h"

#include <omp.h>

namespace {

using namespace zoo;

constexpr int64_t kBlock = 128;      // channels a thread takes at a time
constexpr int64_t kChunk = 16;       // tokens whose sums the backward holds at once
constexpr int64_t kAlone = 1 << 14;  // entries of k up to which a second thread costs more than it gives

template <typename T>
constexpr T kEmpty = T(-1e38);  // the maximum where nothing has been seen
template <typename T>
constexpr T kFar = sizeof(T) == 4 ? T(87) : T(745);  // exp of less than the negative of it counts as 0

struct Sizes {
  int64_t b, t, d;
  bool timed;  // log_decay is (b t d), not (d)
  int64_t blocks() const { return (d + kBlock - 1) / kBlock; }
  int64_t chunks() const { return (t + kChunk - 1) / kChunk; }
};

template <typename T>
struct Inputs {
  const T *k, *v, *log_decay, *num, *den, *maximum, *bonus;
  const bool* starts;
};

// A block of channels in a row of the batch: where its things lie.
struct Block {
  const Sizes& size;
  int64_t row, first, width;
  Block(const Sizes& size, int64_t row, int64_t index)
      : size(size), row(row), first(index * kBlock), width(std::min(kBlock, size.d - first)) {}
  int64_t state() const { return row * size.d + first; }
  int64_t token(int64_t step) const { return row * size.t + step; }
  int64_t at(int64_t step) const { return token(step) * size.d + first; }
  int64_t decay_at(int64_t step) const { return size.timed ? at(step) : first; }
};

// num and den of a block of channels, and the logarithm of what they are relative to: maximum + rest, where `rest` is
// what rounding takes from the maximum as it decays. So a decay moves that logarithm and nothing else.
template <typename T>
struct Sums {
  T num[kBlock], den[kBlock], maximum[kBlock], rest[kBlock];

  void load(const Inputs<T>& in, const Block& block) {
    std::memcpy(num, in.num + block.state(), block.width * sizeof(T));
    std::memcpy(den, in.den + block.state(), block.width * sizeof(T));
    std::memcpy(maximum, in.maximum + block.state(), block.width * sizeof(T));
    std::fill(rest, rest + kBlock, T(0));
  }
  void forget() {
    std::fill(num, num + kBlock, T(0));
    std::fill(den, den + kBlock, T(0));
    std::fill(maximum, maximum + kBlock, kEmpty<T>);
    std::fill(rest, rest + kBlock, T(0));
  }
};

// What num and den are divided by at the end, so that den = 1 there.
template <typename T>
inline T total(T den) { return den > 0 ? den : T(1); }

// What the sums and a token are multiplied with where its weight is exp(lead) times what they are relative to: one of
// both with 1, so that there is a single exponential.
template <typename T>
struct Shares {
  T kept, own;
  explicit Shares(T lead) {
    const T distance = std::fabs(lead), smaller = distance > kFar<T> ? T(0) : decaying_exponential(-distance);
    kept = lead > 0 ? smaller : T(1);
    own = lead > 0 ? T(1) : smaller;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

// The sums behind a token from those before it; `left` may be `found`. With `remembers`, what sums and token were
// multiplied with is written down.
template <bool remembers, typename T>
inline void add_token(const Inputs<T>& in, const Block& block, int64_t step, const Sums<T>& found, Sums<T>& left,
                      T* __restrict__ kept = nullptr, T* __restrict__ own = nullptr) {
  const T* __restrict__ k = in.k + block.at(step);
  const T* __restrict__ v = in.v + block.at(step);
  const T* __restrict__ log_decay = in.log_decay + block.decay_at(step);
#pragma omp simd
  for (int64_t i = 0; i < block.width; i++) {
    // maximum + rest + log_decay, in two numbers that lose nothing (D. Knuth's sum of two)
    const T before = found.maximum[i], sum = before + log_decay[i], change = sum - before;
    const T lost = found.rest[i] + ((before - (sum - change)) + (log_decay[i] - change));
    const bool is_gone = sum < kEmpty<T>;
    const T decayed = is_gone ? kEmpty<T> : sum + lost, rest = is_gone ? T(0) : lost - (decayed - sum);

    const T lead = (k[i] - decayed) - rest;
    const Shares<T> shares(lead);
    const T kept_i = is_gone ? T(0) : shares.kept, own_i = shares.own;
    left.num[i] = kept_i * found.num[i] + own_i * v[i];
    left.den[i] = kept_i * found.den[i] + own_i;
    left.maximum[i] = lead > 0 ? k[i] : decayed;
    left.rest[i] = lead > 0 ? T(0) : rest;
    if (remembers) {
      kept[i] = kept_i;
      own[i] = own_i;
    }
  }
}

// y where a token is read after it has been added
template <typename T>
inline void read(const Block& block, const Sums<T>& sums, T* __restrict__ y) {
#pragma omp simd
  for (int64_t i = 0; i < block.width; i++) y[i] = sums.num[i] / (sums.den[i] == 0 ? T(1) : sums.den[i]);
}

// y where it is read before, with a bonus
template <typename T>
inline void read_with_bonus(const Inputs<T>& in, const Block& block, int64_t step, const Sums<T>& sums,
                            T* __restrict__ y) {
  const T* __restrict__ k = in.k + block.at(step);
  const T* __restrict__ v = in.v + block.at(step);
  const T* __restrict__ bonus = in.bonus + block.first;
#pragma omp simd
  for (int64_t i = 0; i < block.width; i++) {
    const Shares<T> shares(((k[i] - sums.maximum[i]) + bonus[i]) - sums.rest[i]);
    const T num = shares.kept * sums.num[i] + shares.own * v[i], den = shares.kept * sums.den[i] + shares.own;
    y[i] = num / (den == 0 ? T(1) : den);
  }
}

template <typename T>
void forward(const Sizes& size, const Inputs<T>& in, T* y, T* num_end, T* den_end, T* maximum_end, int64_t threads) {
  const int64_t blocks = size.blocks();
#pragma omp parallel for collapse(2) num_threads(threads) if (size.b * size.t * size.d > kAlone)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t index = 0; index < blocks; index++) {
      const Block block(size, row, index);
      Sums<T> sums;
      sums.load(in, block);
      for (int64_t step = 0; step < size.t; step++) {
        if (in.starts && in.starts[block.token(step)]) sums.forget();
        T* y_t = y + block.at(step);
        if (in.bonus) read_with_bonus(in, block, step, sums, y_t);
        add_token<false>(in, block, step, sums, sums);
        if (!in.bonus) read(block, sums, y_t);
      }
      for (int64_t i = 0; i < block.width; i++) {
        const int64_t at = block.state() + i;
        const T divisor = total(sums.den[i]);
        num_end[at] = sums.num[i] / divisor;
        den_end[at] = sums.den[i] / divisor;
        maximum_end[at] = sums.maximum[i] + (sums.rest[i] + std::log(divisor));
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <typename T>
struct Gradients {
  T *k, *v, *log_decay, *num, *den, *bonus;
};

// What a thread holds of a chunk of tokens of its block.
template <typename T>
struct Chunk {
  Sums<T> before[kChunk + 1];                   // each token, and behind the last
  T kept[kChunk][kBlock], own[kChunk][kBlock];  // what they and the token were multiplied with
};

// Gradients that are carried from token to token, or summed over them.
template <typename T>
struct Carry {
  T num[kBlock], den[kBlock], log_decay[kBlock], bonus[kBlock];
};

// An average and the gradients of its num and den. Where nothing has been seen, y = num.
template <typename T>
struct Average {
  T y, grad_num, grad_den;
  Average(T num, T den, T grad_y) {
    const T inverse = 1 / (den == 0 ? T(1) : den);
    y = num * inverse;
    grad_num = grad_y * inverse;
    grad_den = den == 0 ? T(0) : -grad_num * y;
  }
};

// Back through a token: the gradients of the sums behind it become those of the sums before it.
template <bool has_bonus, bool timed, typename T>
inline void grad_token(const Inputs<T>& in, const Block& block, int64_t step, const T* __restrict__ grad_y,
                       const Sums<T>& before, const T* __restrict__ kept, const T* __restrict__ own, Carry<T>& carry,
                       const Gradients<T>& grad) {
  const int64_t at = block.at(step);
  const T* __restrict__ k = in.k + at;
  const T* __restrict__ v = in.v + at;
  const T* __restrict__ bonus = has_bonus ? in.bonus + block.first : nullptr;
  const T* __restrict__ grad_y_t = grad_y + at;
  T* __restrict__ grad_k = grad.k + at;
  T* __restrict__ grad_v = grad.v + at;
  T* __restrict__ grad_decay = timed ? grad.log_decay + at : carry.log_decay;
#pragma omp simd
  for (int64_t i = 0; i < block.width; i++) {
    const T num = before.num[i], den = before.den[i];
    T grad_num = carry.num[i], grad_den = carry.den[i];
    if (!has_bonus) {
      const Average<T> average(kept[i] * num + own[i] * v[i], kept[i] * den + own[i], grad_y_t[i]);
      grad_num += average.grad_num;
      grad_den += average.grad_den;
    }
    T grad_v_i = own[i] * grad_num, grad_k_i = own[i] * (v[i] * grad_num + grad_den);
    const T grad_decay_i = kept[i] * (num * grad_num + den * grad_den);
    grad_num *= kept[i];
    grad_den *= kept[i];
    if (has_bonus) {
      const Shares<T> shares(((k[i] - before.maximum[i]) + bonus[i]) - before.rest[i]);
      const Average<T> average(shares.kept * num + shares.own * v[i], shares.kept * den + shares.own, grad_y_t[i]);
      const T grad_bonus = shares.own * (v[i] * average.grad_num + average.grad_den);
      carry.bonus[i] += grad_bonus;
      grad_k_i += grad_bonus;
      grad_v_i += shares.own * average.grad_num;
      grad_num += shares.kept * average.grad_num;
      grad_den += shares.kept * average.grad_den;
    }
    grad_k[i] = grad_k_i;
    grad_v[i] = grad_v_i;
    grad_decay[i] = timed ? grad_decay_i : grad_decay[i] + grad_decay_i;
    carry.num[i] = grad_num;
    carry.den[i] = grad_den;
  }
}

template <bool has_bonus, bool timed, typename T>
void grad_block(const Inputs<T>& in, const Block& block, const T* grad_y, const T* grad_num_end, const T* grad_den_end,
                Sums<T>* checkpoints, Chunk<T>& chunk, Carry<T>& carry, const Gradients<T>& grad) {
  const int64_t chunks = block.size.chunks();
  const auto starts = [&](int64_t step) { return in.starts && in.starts[block.token(step)]; };
  checkpoints[0].load(in, block);
  for (int64_t c = 0; c + 1 < chunks; c++) {
    Sums<T>& sums = checkpoints[c + 1];
    sums = checkpoints[c];
    for (int64_t step = c * kChunk; step < (c + 1) * kChunk; step++) {
      if (starts(step)) sums.forget();
      add_token<false>(in, block, step, sums, sums);
    }
  }

  std::memset(&carry, 0, sizeof(carry));
  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int64_t begin = c * kChunk, tokens = std::min(kChunk, block.size.t - begin);
    chunk.before[0] = checkpoints[c];
    for (int64_t i = 0; i < tokens; i++) {
      if (starts(begin + i)) chunk.before[i].forget();
      add_token<true>(in, block, begin + i, chunk.before[i], chunk.before[i + 1], chunk.kept[i], chunk.own[i]);
    }
    if (c == chunks - 1) {
      for (int64_t i = 0; i < block.width; i++) {
        const T divisor = total(chunk.before[tokens].den[i]);
        carry.num[i] = grad_num_end[block.state() + i] / divisor;
        carry.den[i] = grad_den_end[block.state() + i] / divisor;
      }
    }
    for (int64_t i = tokens - 1; i >= 0; i--) {
      grad_token<has_bonus, timed>(in, block, begin + i, grad_y, chunk.before[i], chunk.kept[i], chunk.own[i], carry,
                                   grad);
      if (starts(begin + i)) {
        std::fill(carry.num, carry.num + kBlock, T(0));
        std::fill(carry.den, carry.den + kBlock, T(0));
      }
    }
  }
}

// out (d) = the sum of the rows of parts (b d), the first one first
template <typename T>
void add_rows(const Sizes& size, const T* parts, T* out) {
  std::memcpy(out, parts, size.d * sizeof(T));
  for (int64_t row = 1; row < size.b; row++) {
    for (int64_t i = 0; i < size.d; i++) out[i] += parts[row * size.d + i];
  }
}

template <bool has_bonus, bool timed, typename T>
void backward(const Sizes& size, const Inputs<T>& in, const T* grad_y, const T* grad_num_end, const T* grad_den_end,
              const Gradients<T>& grad, int64_t threads) {
  const int64_t blocks = size.blocks(), chunks = size.chunks();
  Scratch<Sums<T>> checkpoints(threads * chunks);
  Scratch<Chunk<T>> chunk(threads);
  Scratch<T> parts_decay(timed ? 0 : size.b * size.d), parts_bonus(has_bonus ? size.b * size.d : 0);
#pragma omp parallel for collapse(2) num_threads(threads) if (size.b * size.t * size.d > kAlone)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t index = 0; index < blocks; index++) {
      const Block block(size, row, index);
      const int64_t thread = omp_get_thread_num(), bytes = block.width * sizeof(T);
      Carry<T> carry;
      grad_block<has_bonus, timed>(in, block, grad_y, grad_num_end, grad_den_end, checkpoints + thread * chunks,
                                   chunk[thread], carry, grad);
      std::memcpy(grad.num + block.state(), carry.num, bytes);
      std::memcpy(grad.den + block.state(), carry.den, bytes);
      if (!timed) std::memcpy(parts_decay + block.state(), carry.log_decay, bytes);
      if (has_bonus) std::memcpy(parts_bonus + block.state(), carry.bonus, bytes);
    }
  }
  if (!timed) add_rows<T>(size, parts_decay, grad.log_decay);
  if (has_bonus) add_rows<T>(size, parts_bonus, grad.bonus);
}

template <typename T, typename... Rest>
void choose_backward(const Sizes& size, const Inputs<T>& in, Rest... rest) {
  if (in.bonus) {
    size.timed ? backward<true, true>(size, in, rest...) : backward<true, false>(size, in, rest...);
  } else {
    size.timed ? backward<false, true>(size, in, rest...) : backward<false, false>(size, in, rest...);
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
  extern "C" int lse_scan_forward_##suffix(int64_t b, int64_t t, int64_t d, int64_t timed, const T* k, const T* v,    \
                                           const T* log_decay, const T* num, const T* den, const T* maximum,          \
                                           const T* bonus, const bool* starts, T* y, T* num_end, T* den_end,          \
                                           T* maximum_end, int64_t threads) {                                         \
    ZOO_STATUS(forward<T>({b, t, d, timed != 0}, {k, v, log_decay, num, den, maximum, bonus, starts}, y, num_end,     \
                          den_end, maximum_end, threads))                                                             \
  }                                                                                                                   \
  extern "C" int lse_scan_backward_##suffix(                                                                          \
      int64_t b, int64_t t, int64_t d, int64_t timed, const T* k, const T* v, const T* log_decay, const T* num,       \
      const T* den, const T* maximum, const T* bonus, const bool* starts, const T* grad_y, const T* grad_num_end,     \
      const T* grad_den_end, T* grad_k, T* grad_v, T* grad_decay, T* grad_num, T* grad_den, T* grad_bonus,            \
      int64_t threads) {                                                                                              \
    const Gradients<T> grad{grad_k, grad_v, grad_decay, grad_num, grad_den, grad_bonus};                              \
    ZOO_STATUS(choose_backward<T>({b, t, d, timed != 0}, {k, v, log_decay, num, den, maximum, bonus, starts}, grad_y, \
                                  grad_num_end, grad_den_end, grad, threads))                                         \
  }

EXPORT(f32, float)
EXPORT(f64, double)
