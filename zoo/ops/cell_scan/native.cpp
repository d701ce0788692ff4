// Recurrent cells of several heads: LSTM, GRU, sLSTM.
//
// A thread takes a head and some rows of the batch and walks along the tokens; the head's weights, packed once, stay in
// the second-level cache. The backward knows every h from the outputs: what the gates get from them is one large
// product, and only the elementwise rest of the cell runs forward again, before the gradients come back token by token.
//
// Letters: b batch, t tokens, h heads, d channels of a head; g d the gates of a head.
#include "native.h"

#include <omp.h>

namespace {

using namespace zoo;

constexpr int64_t kMostRows = 32;    // of the batch, walked together
constexpr int64_t kTokenBlock = 32;  // tokens of a row in one product
constexpr int64_t kPackFrom = 4;     // tokens: for fewer, packing the weights costs more than it saves

// ---- the cells -------------------------------------------------------------------------------------------------------
//
// Each has `kGates` gates and `kStates` tensors of state, h the first; the `kCarried` behind it are what its backward
// needs of the state. `forward` turns a channel's state into the next, given what its gates get from the input and from
// the last h, and says what the backward needs: a value for each gate and, where `kExtra`, one more. `backward` turns
// the gradients of the state behind the token into those before it, but for what reaches h through the weights.

// torch.nn.LSTM: i, f, g, o; h, c
template <typename T>
struct Lstm {
  static constexpr int kGates = 4, kStates = 2, kCarried = 1;
  static constexpr bool kExtra = false, kOwnRecurrentGradient = false;

  static inline void forward(const T* input, const T* recurrent, T* state, T* kept) {
    const T i = sigmoid(input[0] + recurrent[0]), f = sigmoid(input[1] + recurrent[1]);
    const T g = hyperbolic_tangent(input[2] + recurrent[2]), o = sigmoid(input[3] + recurrent[3]);
    state[1] = f * state[1] + i * g;
    state[0] = o * hyperbolic_tangent(state[1]);
    kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
  }

  static inline void backward(const T* kept, const T* before, const T* after, T* grad_state, T* grad_input,
                              T* grad_recurrent) {
    const T i = kept[0], f = kept[1], g = kept[2], o = kept[3];
    const T bounded = hyperbolic_tangent(after[1]);
    const T grad_c = grad_state[1] + grad_state[0] * o * (1 - bounded * bounded);
    grad_input[0] = grad_c * g * i * (1 - i);
    grad_input[1] = grad_c * before[1] * f * (1 - f);
    grad_input[2] = grad_c * i * (1 - g * g);
    grad_input[3] = grad_state[0] * bounded * o * (1 - o);
    for (int gate = 0; gate < kGates; gate++) grad_recurrent[gate] = grad_input[gate];
    grad_state[0] = 0;
    grad_state[1] = grad_c * f;
  }
};

// torch.nn.GRU: r, z, n; h. What n gets from the last h is kept besides the gates.
template <typename T>
struct Gru {
  static constexpr int kGates = 3, kStates = 1, kCarried = 0;
  static constexpr bool kExtra = true, kOwnRecurrentGradient = true;

  static inline void forward(const T* input, const T* recurrent, T* state, T* kept) {
    const T r = sigmoid(input[0] + recurrent[0]), z = sigmoid(input[1] + recurrent[1]);
    const T n = hyperbolic_tangent(input[2] + r * recurrent[2]);
    state[0] = n + z * (state[0] - n);
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = recurrent[2];
  }

  static inline void backward(const T* kept, const T* before, const T*, T* grad_state, T* grad_input,
                              T* grad_recurrent) {
    const T r = kept[0], z = kept[1], n = kept[2];
    const T grad_n = grad_state[0] * (1 - z) * (1 - n * n);
    grad_input[0] = grad_n * kept[3] * r * (1 - r);
    grad_input[1] = grad_state[0] * (before[0] - n) * z * (1 - z);
    grad_input[2] = grad_n;
    grad_recurrent[0] = grad_input[0];
    grad_recurrent[1] = grad_input[1];
    grad_recurrent[2] = grad_n * r;
    grad_state[0] *= z;
  }
};

// arXiv:2405.04517, eq. 8-17: i, f, z, o; h, c, n, m. m is a gauge and has no gradient; where n is 0, m is i. The slope
// of ln f is kept besides the gates.
template <typename T>
struct Slstm {
  static constexpr int kGates = 4, kStates = 4, kCarried = 2;
  static constexpr bool kExtra = true, kOwnRecurrentGradient = false;

  static inline void forward(const T* input, const T* recurrent, T* state, T* kept) {
    const T pre_i = input[0] + recurrent[0], pre_f = input[1] + recurrent[1];
    const T z = hyperbolic_tangent(input[2] + recurrent[2]), o = sigmoid(input[3] + recurrent[3]);
    const T log_f = log_sigmoid(pre_f), before = state[3];
    const bool empty = state[2] == 0;
    const T m = empty ? pre_i : std::max(log_f + before, pre_i);
    const T i = decaying_exponential(pre_i - m);
    const T f = empty ? T(0) : decaying_exponential((before - m) + log_f);
    state[1] = f * state[1] + i * z;
    state[2] = f * state[2] + i;
    state[3] = m;
    state[0] = o * state[1] / state[2];
    kept[0] = i, kept[1] = f, kept[2] = z, kept[3] = o, kept[4] = sigmoid(-pre_f);
  }

  static inline void backward(const T* kept, const T* before, const T* after, T* grad_state, T* grad_input,
                              T* grad_recurrent) {
    const T i = kept[0], f = kept[1], z = kept[2], o = kept[3];
    const T inverse = 1 / after[2], average = after[1] * inverse;
    const T grad_c = grad_state[1] + grad_state[0] * o * inverse;
    const T grad_n = grad_state[2] - grad_state[0] * o * average * inverse;
    grad_input[0] = (grad_c * z + grad_n) * i;
    grad_input[1] = (grad_c * before[1] + grad_n * before[2]) * f * kept[4];
    grad_input[2] = grad_c * i * (1 - z * z);
    grad_input[3] = grad_state[0] * average * o * (1 - o);
    for (int gate = 0; gate < kGates; gate++) grad_recurrent[gate] = grad_input[gate];
    grad_state[0] = 0;
    grad_state[1] = grad_c * f;
    grad_state[2] = grad_n * f;
    grad_state[3] = 0;
  }
};

// One token of one row at one channel. `state[s]` are the d channels of a tensor of the state, gates lie d apart.
template <class Cell, bool keep, typename T>
inline void advance_channel(int64_t i, int64_t d, const T* input, const T* recurrent, const T* bias, T* const* state,
                            T* kept, T* extra) {
  T from_input[Cell::kGates], from_h[Cell::kGates], parts[Cell::kStates], values[5];
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; g++) {
    from_input[g] = input[g * d + i];
    from_h[g] = recurrent[g * d + i] + bias[g * d + i];
  }
#pragma GCC unroll 4
  for (int s = 0; s < Cell::kStates; s++) parts[s] = state[s][i];
  Cell::forward(from_input, from_h, parts, values);
#pragma GCC unroll 4
  for (int s = 0; s < Cell::kStates; s++) state[s][i] = parts[s];
  if (keep) {
#pragma GCC unroll 4
    for (int g = 0; g < Cell::kGates; g++) kept[g * d + i] = values[g];
    if (Cell::kExtra) extra[i] = values[Cell::kGates];
  }
}

template <class Cell, bool keep, typename T>
inline void advance(int64_t d, const T* input, const T* recurrent, const T* bias, T* const* state, T* kept, T* extra) {
#pragma omp simd
  for (int64_t i = 0; i < d; i++) advance_channel<Cell, keep>(i, d, input, recurrent, bias, state, kept, extra);
}

// Back over one token: `kept` becomes the gradient of the input's part, `grad_state` that of the state before it.
template <class Cell, typename T>
inline void retreat_channel(int64_t i, int64_t d, T* kept, T* extra, const T* const* before, const T* const* after,
                            T* const* grad_state, T* grad_recurrent) {
  T values[5], old[3], now[3], grads[Cell::kStates], to_input[Cell::kGates], to_recurrent[Cell::kGates];
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; g++) values[g] = kept[g * d + i];
  if (Cell::kExtra) values[Cell::kGates] = extra[i];
  old[0] = before[0][i];
#pragma GCC unroll 4
  for (int s = 1; s <= Cell::kCarried; s++) old[s] = before[s][i], now[s] = after[s][i];
#pragma GCC unroll 4
  for (int s = 0; s < Cell::kStates; s++) grads[s] = grad_state[s][i];
  Cell::backward(values, old, now, grads, to_input, to_recurrent);
#pragma GCC unroll 4
  for (int s = 0; s < Cell::kStates; s++) grad_state[s][i] = grads[s];
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; g++) {
    kept[g * d + i] = to_input[g];
    grad_recurrent[g * d + i] = to_recurrent[g];
  }
  if (Cell::kOwnRecurrentGradient) extra[i] = to_recurrent[Cell::kGates - 1];
}

template <class Cell, typename T>
inline void retreat(int64_t d, T* kept, T* extra, const T* const* before, const T* const* after, T* const* grad_state,
                    T* grad_recurrent) {
#pragma omp simd
  for (int64_t i = 0; i < d; i++) {
    retreat_channel<Cell>(i, d, kept, extra, before, after, grad_state, grad_recurrent);
  }
}

// ---- products with the weights ---------------------------------------------------------------------------------------

// weights (k x n), its element (p, j) at p * row + j * column, in panels of kColumnBlock columns, each contiguous, padded
// with zeros
template <typename T>
void pack(int64_t k, int64_t n, const T* weights, int64_t row, int64_t column, T* panels) {
  constexpr int64_t width = kColumnBlock<T>;
  for (int64_t first = 0; first < n; first += width) {
    for (int64_t p = 0; p < k; p++) {
      for (int64_t j = first; j < first + width; j++) *panels++ = j < n ? weights[p * row + j * column] : T(0);
    }
  }
}

// out (m x padded n) = a (m x k) times packed weights
template <typename T>
inline void multiply_packed(int64_t m, int64_t n, int64_t k, const T* a, const T* panels, T* out) {
  constexpr int64_t width = kColumnBlock<T>;
  const int64_t padded = round_columns<T>(n);
  for (int64_t j = 0; j < n; j += width) multiply<false>(m, width, k, a, k, panels + j * k, width, out + j, padded);
}

// out (n) = a (k) times weights (k x n)
template <typename T>
inline void multiply_row(int64_t n, int64_t k, const T* a, const T* __restrict__ weights, T* __restrict__ out) {
  std::fill(out, out + n, T(0));
  int64_t p = 0;
  for (; p + 4 <= k; p += 4) {
    const T a0 = a[p], a1 = a[p + 1], a2 = a[p + 2], a3 = a[p + 3];
    const T* __restrict__ w = weights + p * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] += a0 * w[j] + a1 * w[n + j] + a2 * w[2 * n + j] + a3 * w[3 * n + j];
  }
  for (; p < k; p++) {
    for (int64_t j = 0; j < n; j++) out[j] += a[p] * weights[p * n + j];
  }
}

template <typename T>
inline void add(int64_t n, const T* __restrict__ x, T* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] += x[i];
}

// ---- the scan --------------------------------------------------------------------------------------------------------

// Rows of the batch that a thread walks together: many share the weights, but every thread shall have some.
inline int64_t rows_of_a_task(int64_t b, int64_t h, int64_t threads) {
  const int64_t blocks = (threads + h - 1) / h;
  return std::min(kMostRows, round_rows((b + blocks - 1) / blocks));
}

template <class Cell, typename T>
void forward(int64_t b, int64_t t, int64_t h, int64_t d, const T* x, const T* recurrent, const T* bias, const T* state,
             const bool* mask, const bool* starts, T* y, T* end, int64_t threads) {
  constexpr int kStates = Cell::kStates;
  const int64_t n = Cell::kGates * d, padded = round_columns<T>(n);
  const int64_t most_rows = rows_of_a_task(b, h, threads), blocks = (b + most_rows - 1) / most_rows;
  const bool packed = t >= kPackFrom && b > 1;
  const int64_t panels_size = packed ? d * padded : 0;
  const int64_t each = panels_size + most_rows * padded + round_columns<T>(kStates * most_rows * d);
  threads = std::min(threads, h * blocks);
  Scratch<T> scratch(threads * each), no_bias(n);
  no_bias.zero(n);
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < h * blocks; task++) {
    const int64_t head = task / blocks, first = task % blocks * most_rows, rows = std::min(most_rows, b - first);
    T* panels = scratch + omp_get_thread_num() * each;  // first, for they should begin with a line of the cache
    T* from_h = panels + panels_size;                   // rows padded
    T* states = from_h + most_rows * padded;            // s rows d
    const T* weights = recurrent + head * d * n;
    const T* added = bias ? bias + head * n : (const T*)no_bias;
    std::memset(states, 0, most_rows * d * sizeof(T));  // rows of h that only fill the last block of rows
    const auto part = [&](int s, int64_t r) { return states + (s * most_rows + r) * d; };
    const auto outside = [&](int s, int64_t r) { return (((first + r) * kStates + s) * h + head) * d; };
    for (int64_t r = 0; r < rows; r++) {
      for (int s = 0; s < kStates; s++) std::memcpy(part(s, r), state + outside(s, r), d * sizeof(T));
    }
    if (packed) pack(d, n, weights, n, 1, panels);
    for (int64_t token = 0; token < t; token++) {
      for (int64_t r = 0; starts && r < rows; r++) {
        if (!starts[(first + r) * t + token]) continue;
        for (int s = 0; s < kStates; s++) std::memset(part(s, r), 0, d * sizeof(T));
      }
      if (packed) {
        multiply_packed(round_rows(rows), n, d, states, panels, from_h);
      } else if (b > 1 && n % kLanes<T> == 0) {
        multiply<false>(round_rows(rows), n, d, states, d, weights, n, from_h, padded);
      } else {
        for (int64_t r = 0; r < rows; r++) multiply_row(n, d, part(0, r), weights, from_h + r * padded);
      }
      for (int64_t r = 0; r < rows; r++) {
        const int64_t at = (first + r) * t + token;
        if (token + 1 < t) prefetch(x + ((at + 1) * h + head) * n, n);
        if (!mask || mask[at]) {
          T* parts[kStates];
          for (int s = 0; s < kStates; s++) parts[s] = part(s, r);
          advance<Cell, false, T>(d, x + (at * h + head) * n, from_h + r * padded, added, parts, nullptr, nullptr);
        }
        std::memcpy(y + (at * h + head) * d, part(0, r), d * sizeof(T));
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int s = 0; s < kStates; s++) std::memcpy(end + outside(s, r), part(s, r), d * sizeof(T));
    }
  }
}

// h before a token of a row, of one head: of the outputs, of the first state, or of a new document.
template <typename T>
struct HiddenBefore {
  int64_t t, h, d, states, head;
  const T *y, *state, *zeros;
  const bool* starts;
  const T* operator()(int64_t row, int64_t token) const {
    const int64_t at = row * t + token;
    if (starts && starts[at]) return zeros;
    return token > 0 ? y + ((at - 1) * h + head) * d : state + (row * states * h + head) * d;
  }
};

// The gradients of `recurrent` and `bias`: sums over all tokens. A thread takes a head, or some of its columns where there
// are more threads than heads. `grad_last` is the gradient of the recurrent part of the last gate where it is not that of
// the input's part.
template <class Cell, typename T>
void sum_over_tokens(int64_t b, int64_t t, int64_t h, int64_t d, const T* grad_x, const T* grad_last, const T* y,
                     const T* state, const T* zeros, const bool* starts, T* grad_recurrent, T* grad_bias,
                     int64_t threads) {
  const int64_t n = Cell::kGates * d, padded_d = round_rows(d), shares = (threads + h - 1) / h;
  const int64_t width = round_columns<T>((n + shares - 1) / shares), blocks = (n + width - 1) / width;
  const int64_t each = round_columns<T>(kTokenBlock * (padded_d + width) + (padded_d + 1) * width);
  threads = std::min(threads, h * blocks);
  Scratch<T> scratch(threads * each);
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < h * blocks; task++) {
    const int64_t head = task / blocks, first = task % blocks * width, columns = std::min(width, n - first);
    const int64_t same = Cell::kOwnRecurrentGradient ? std::min(std::max<int64_t>(n - d - first, 0), columns) : columns;
    const HiddenBefore<T> hidden_before{t, h, d, Cell::kStates, head, y, state, zeros, starts};
    T* grads = scratch + omp_get_thread_num() * each;
    T* sums = grads + kTokenBlock * width;
    T* bias_sums = sums + padded_d * width;
    T* hidden = bias_sums + width;
    std::memset(grads, 0, each * sizeof(T));
    for (int64_t row = 0; row < b; row++) {
      for (int64_t start = 0; start < t; start += kTokenBlock) {
        const int64_t tokens = std::min(kTokenBlock, t - start);
        for (int64_t i = 0; i < tokens; i++) {
          const int64_t cell = (row * t + start + i) * h + head;
          T* grads_i = grads + i * width;
          if (start + i + 1 < t) prefetch(grad_x + (cell + h) * n + first, same);
          std::memcpy(hidden + i * padded_d, hidden_before(row, start + i), d * sizeof(T));
          std::memcpy(grads_i, grad_x + cell * n + first, same * sizeof(T));
          for (int64_t j = same; j < columns; j++) grads_i[j] = grad_last[cell * d + first + j - (n - d)];
          add(columns, grads_i, bias_sums);
        }
        multiply_transposed<true>(padded_d, width, tokens, hidden, padded_d, grads, width, sums, width);
      }
    }
    for (int64_t i = 0; i < d; i++) {
      std::memcpy(grad_recurrent + (head * d + i) * n + first, sums + i * width, columns * sizeof(T));
    }
    if (grad_bias) std::memcpy(grad_bias + head * n + first, bias_sums, columns * sizeof(T));
  }
}

template <class Cell, typename T>
void backward(int64_t b, int64_t t, int64_t h, int64_t d, const T* x, const T* recurrent, const T* bias, const T* state,
              const bool* mask, const bool* starts, const T* y, const T* grad_y, const T* grad_end, T* grad_x,
              T* grad_recurrent, T* grad_bias, T* grad_state, int64_t threads) {
  constexpr int kStates = Cell::kStates, kCarried = Cell::kCarried;
  const int64_t n = Cell::kGates * d, padded = round_columns<T>(n), padded_d = round_columns<T>(d);
  const int64_t most_rows = rows_of_a_task(b, h, threads), blocks = (b + most_rows - 1) / most_rows;
  const int64_t weights_size = std::max(d * padded, n * padded_d);
  const int64_t each = round_columns<T>(weights_size + kTokenBlock * (d + padded) + kStates * (most_rows + 1) * d +
                                        most_rows * (n + padded_d) + kCarried * most_rows * t * d);
  const int64_t used = std::min(threads, h * blocks);
  Scratch<T> scratch(used * each), zeros(n), extras(Cell::kExtra ? b * t * h * d : 0);
  zeros.zero(n);
#pragma omp parallel for num_threads(used)
  for (int64_t task = 0; task < h * blocks; task++) {
    const int64_t head = task / blocks, first = task % blocks * most_rows, rows = std::min(most_rows, b - first);
    T* panels = scratch + omp_get_thread_num() * each;  // of the weights, then of their transpose
    T* hidden = panels + weights_size;                  // kTokenBlock d
    T* from_h = hidden + kTokenBlock * d;               // kTokenBlock padded
    T* now = from_h + kTokenBlock * padded;             // s d: the state of a row
    T* grads = now + kStates * d;                       // s rows d: the gradients of the state
    T* grad_gates = grads + kStates * most_rows * d;    // rows n: those of what the gates get from h
    T* grad_h = grad_gates + most_rows * n;             // rows padded_d: what these mean for h
    T* carried = grad_h + most_rows * padded_d;         // rows t kCarried d: the state behind h, after every token
    const T* weights = recurrent + head * d * n;
    const T* added = bias ? bias + head * n : (const T*)zeros;
    const HiddenBefore<T> hidden_before{t, h, d, kStates, head, y, state, zeros, starts};
    const auto outside = [&](int s, int64_t r) { return (((first + r) * kStates + s) * h + head) * d; };
    const auto carried_at = [&](int s, int64_t r, int64_t token) {
      return carried + ((r * t + token) * kCarried + s - 1) * d;
    };

    // forward again: gates go into grad_x, and what else the way back needs into `extras` and `carried`
    pack(d, n, weights, n, 1, panels);
    std::memset(hidden, 0, kTokenBlock * d * sizeof(T));
    for (int64_t r = 0; r < rows; r++) {
      T* parts[kStates];
      for (int s = 0; s < kStates; s++) {
        parts[s] = now + s * d;
        std::memcpy(parts[s], state + outside(s, r), d * sizeof(T));
      }
      for (int64_t start = 0; start < t; start += kTokenBlock) {
        const int64_t tokens = std::min(kTokenBlock, t - start);
        for (int64_t i = 0; i < tokens; i++) {
          std::memcpy(hidden + i * d, hidden_before(first + r, start + i), d * sizeof(T));
        }
        multiply_packed(round_rows(tokens), n, d, hidden, panels, from_h);
        for (int64_t i = 0; i < tokens; i++) {
          const int64_t at = (first + r) * t + start + i, cell = at * h + head;
          if (start + i + 1 < t) {
            prefetch(x + (cell + h) * n, n);
            prefetch(grad_x + (cell + h) * n, n);
          }
          if (starts && starts[at]) std::memset(now, 0, kStates * d * sizeof(T));
          if (!mask || mask[at]) {
            std::memcpy(now, hidden + i * d, d * sizeof(T));
            T* extra = Cell::kExtra ? extras + cell * d : nullptr;
            advance<Cell, true>(d, x + cell * n, from_h + i * padded, added, parts, grad_x + cell * n, extra);
          }
          for (int s = 1; s <= kCarried; s++) std::memcpy(carried_at(s, r, start + i), parts[s], d * sizeof(T));
        }
      }
    }

    // back, token by token
    pack(n, d, weights, 1, n, panels);
    std::memset(grad_gates, 0, most_rows * n * sizeof(T));
    const auto grad_part = [&](int s, int64_t r) { return grads + (s * most_rows + r) * d; };
    for (int64_t r = 0; r < rows; r++) {
      for (int s = 0; s < kStates; s++) std::memcpy(grad_part(s, r), grad_end + outside(s, r), d * sizeof(T));
    }
    for (int64_t token = t - 1; token >= 0; token--) {
      for (int64_t r = 0; r < rows; r++) {
        const int64_t at = (first + r) * t + token, cell = at * h + head;
        T* to_gates = grad_gates + r * n;
        if (token > 0) {
          prefetch(grad_x + (cell - h) * n, n);
          prefetch(grad_y + (cell - h) * d, d);
        }
        T* extra = Cell::kExtra ? extras + cell * d : nullptr;
        add(d, grad_y + cell * d, grad_part(0, r));
        if (mask && !mask[at]) {
          std::memset(grad_x + cell * n, 0, n * sizeof(T));
          std::memset(to_gates, 0, n * sizeof(T));
          if (Cell::kExtra) std::memset(extra, 0, d * sizeof(T));
          continue;
        }
        const T *before[1 + kCarried], *after[1 + kCarried];
        T* to_state[kStates];
        before[0] = hidden_before(first + r, token);
        for (int s = 1; s <= kCarried; s++) {
          const bool anew = starts && starts[at];
          const T* earlier = token > 0 ? carried_at(s, r, token - 1) : state + outside(s, r);
          before[s] = anew ? (const T*)zeros : earlier;
          after[s] = carried_at(s, r, token);
        }
        for (int s = 0; s < kStates; s++) to_state[s] = grad_part(s, r);
        retreat<Cell>(d, grad_x + cell * n, extra, before, after, to_state, to_gates);
      }
      multiply_packed(round_rows(rows), d, n, grad_gates, panels, grad_h);
      for (int64_t r = 0; r < rows; r++) {
        add(d, grad_h + r * padded_d, grad_part(0, r));
        if (!starts || !starts[(first + r) * t + token]) continue;
        for (int s = 0; s < kStates; s++) std::memset(grad_part(s, r), 0, d * sizeof(T));
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int s = 0; s < kStates; s++) std::memcpy(grad_state + outside(s, r), grad_part(s, r), d * sizeof(T));
    }
  }
  sum_over_tokens<Cell>(b, t, h, d, grad_x, (const T*)extras, y, state, (const T*)zeros, starts, grad_recurrent,
                        grad_bias, threads);
}

}  // namespace

#define EXPORT(cell, Cell, suffix, T)                                                                                  \
  extern "C" int cell##_forward_##suffix(int64_t b, int64_t t, int64_t h, int64_t d, const T* x, const T* recurrent,   \
                                         const T* bias, const T* state, const bool* mask, const bool* starts, T* y,    \
                                         T* end, int64_t threads) {                                                    \
    ZOO_STATUS(forward<Cell<T>>(b, t, h, d, x, recurrent, bias, state, mask, starts, y, end, threads))                 \
  }                                                                                                                    \
  extern "C" int cell##_backward_##suffix(int64_t b, int64_t t, int64_t h, int64_t d, const T* x, const T* recurrent,  \
                                          const T* bias, const T* state, const bool* mask, const bool* starts,         \
                                          const T* y, const T* grad_y, const T* grad_end, T* grad_x,                   \
                                          T* grad_recurrent, T* grad_bias, T* grad_state, int64_t threads) {           \
    ZOO_STATUS(backward<Cell<T>>(b, t, h, d, x, recurrent, bias, state, mask, starts, y, grad_y, grad_end, grad_x,     \
                                 grad_recurrent, grad_bias, grad_state, threads))                                      \
  }

EXPORT(lstm, Lstm, f32, float)
EXPORT(lstm, Lstm, f64, double)
EXPORT(gru, Gru, f32, float)
EXPORT(gru, Gru, f64, double)
EXPORT(slstm, Slstm, f32, float)
EXPORT(slstm, Slstm, f64, double)
