// The delta rule on a CPU, token after token. A block of the state stays in the first-level cache, and one pass over it
// writes a token, answers its query and reads for the next token: fewer operations than a form in chunks needs, and no
// condition on the decays.
//
//   general   S_t = diag(w_t) S_{t-1} + b_t read_t^T + k_t v_t^T      read_t = S_{t-1}^T a_t
//   gated     S_t = w_t S_{t-1} + k_t write_t^T                       write_t = beta_t (v_t - w_t S_{t-1}^T k_t)
//
// Forward, values lie in the lanes of vectors: columns of S are independent, and a thread takes a block of them.
// Backward, keys do, on rows of S^T: most sums are then over rows, and few over lanes. States are kept every kBlock
// tokens on the way forth, and those between are computed again on the way back.
//
// Letters: b batch, t tokens, h heads, d key, e value; row of the batch.
#include <omp.h>

#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kBlock = 32;  // tokens between two states kept for the backward
constexpr int64_t kAhead = 4;   // by how many tokens memory is asked for before it is read

// What the registers hold: 32 of them with AVX-512, else 16.
constexpr int kColumnVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;

template <typename T>
constexpr int64_t kColumns = kColumnVectors * kLanes<T>;

template <typename T>
struct Inputs {
  int64_t b, t, h, d, e;
  int64_t decays;  // of a head: 1 or d
  const T *q, *k, *v, *log_decay, *state, *a, *b_key, *beta;
  const bool* starts;

  int64_t token(int64_t row, int64_t head, int64_t step) const { return (row * t + step) * h + head; }
  bool starts_at(int64_t row, int64_t step) const { return starts && starts[row * t + step]; }
  // w of the gated form
  T decay(int64_t row, int64_t head, int64_t step) const {
    return starts_at(row, step) ? T(0) : exponential(log_decay[token(row, head, step)]);
  }
  // w of the general form
  void decays_of(int64_t row, int64_t head, int64_t step, T* __restrict__ w) const {
    const T* __restrict__ at = log_decay + token(row, head, step) * decays;
    if (starts_at(row, step)) {
      std::fill(w, w + d, T(0));
    } else if (decays == 1) {
      std::fill(w, w + d, exponential(at[0]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; i++) w[i] = exponential(at[i]);
    }
  }
};

// The vectors at a place in memory where only `width` numbers are; the others are 0.
template <int vectors, typename T>
inline void load(const T* at, int64_t width, Vector<T> (&out)[vectors]) {
  constexpr int lanes = kLanes<T>;
  T padded[vectors * lanes];
  if (width < vectors * lanes) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, at, width * sizeof(T));
    at = padded;
  }
#pragma GCC unroll 4
  for (int s = 0; s < vectors; s++) out[s] = *(const Vector<T>*)(at + s * lanes);
}

template <int vectors, typename T>
inline void store(const Vector<T> (&x)[vectors], int64_t width, T* at) {
  constexpr int lanes = kLanes<T>;
  T padded[vectors * lanes];
  T* to = width < vectors * lanes ? padded : at;
#pragma GCC unroll 4
  for (int s = 0; s < vectors; s++) *(Vector<T>*)(to + s * lanes) = x[s];
  if (to == padded) std::memcpy(at, padded, width * sizeof(T));
}

// ---- forward: values in lanes ---------------------------------------------------------------------------------------

// out = S^T key
template <int vectors, typename T>
inline void read_state(int64_t d, const T* state, int64_t state_row, const T* key, Vector<T> (&out)[vectors]) {
  for (int s = 0; s < vectors; s++) out[s] = Vector<T>{};
  for (int64_t i = 0; i < d; i++) {
#pragma GCC unroll 4
    for (int s = 0; s < vectors; s++) out[s] += key[i] * *(const Vector<T>*)(state + i * state_row + s * kLanes<T>);
  }
}

// One token: from -> to, which may be the same. `read` is what the state held for this token, then what it holds for
// the next one, at `next`. `w` has one number (gated) or d.
template <bool gated, bool answer, int vectors, typename T>
inline void step(int64_t d, const T* from, int64_t from_row, T* to, int64_t to_row, const T* w, const T* b_key,
                 const T* k, const T* q, const T* next, const Vector<T> (&write)[vectors], Vector<T> (&read)[vectors],
                 Vector<T> (&y)[vectors]) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const T w_head = w[0];
  V writes[vectors], reads[vectors], answers[vectors], next_reads[vectors];
  for (int s = 0; s < vectors; s++) {
    writes[s] = write[s];
    reads[s] = read[s];
    answers[s] = next_reads[s] = V{};
  }
  for (int64_t i = 0; i < d; i++) {
    const T w_i = gated ? w_head : w[i], k_i = k[i], b_i = gated ? T(0) : b_key[i], q_i = q[i], next_i = next[i];
#pragma GCC unroll 4
    for (int s = 0; s < vectors; s++) {
      V x = w_i * *(const V*)(from + i * from_row + s * lanes) + k_i * writes[s];
      if (!gated) x += b_i * reads[s];
      *(V*)(to + i * to_row + s * lanes) = x;
      if (answer) answers[s] += q_i * x;
      next_reads[s] += next_i * x;
    }
  }
  for (int s = 0; s < vectors; s++) {
    read[s] = next_reads[s];
    y[s] = answers[s];
  }
}

// Where the way back finds what it needs of the way forth, both for one head.
template <typename T>
struct Record {
  T* states;  // S^T before every kBlock-th token, (e d), rows `state_row` apart
  T* reads;   // what the state held for each token, (t e), rows `read_row` apart
  int64_t state_row, state_size, read_row;
};

template <typename T>
inline int64_t walk_scratch(int64_t d) {
  return d * (kColumns<T> + 2);
}

// A block of `width` columns from `column` on, along all tokens. The answer goes to y and end, or a record is made.
template <bool gated, bool answer, int vectors, typename T>
void walk(const Inputs<T>& x, int64_t row, int64_t head, int64_t column, int64_t width, T* y, T* end,
          const Record<T>* record, T* scratch) {
  using V = Vector<T>;
  constexpr int64_t columns = vectors * kLanes<T>;
  const int64_t d = x.d, e = x.e;
  const T* first = x.state + (row * x.h + head) * d * e + column;
  T* last = answer ? end + (row * x.h + head) * d * e + column : nullptr;
  T *block = scratch, *w = scratch + d * columns, *zeros = w + d;
  std::memset(zeros, 0, d * sizeof(T));

  const T* from = first;
  int64_t from_row = e;
  if (width < columns) {
    for (int64_t i = 0; i < d; i++) {
      V padded[vectors];
      load<vectors, T>(first + i * e, width, padded);
      store<vectors, T>(padded, columns, block + i * columns);
    }
    from = block;
    from_row = columns;
  }
  const T* reader = gated ? x.k : x.a;
  const auto reader_at = [&](int64_t t) {
    return x.starts_at(row, t) ? zeros : reader + x.token(row, head, t) * d;
  };

  V read[vectors], write[vectors], answers[vectors];
  read_state<vectors, T>(d, from, from_row, reader_at(0), read);
  for (int64_t t = 0; t < x.t; t++) {
    const int64_t at = x.token(row, head, t);
    load<vectors, T>(x.v + at * e + column, width, write);
    if (!answer) {
      if (t % kBlock == 0) {
        T* kept = record->states + t / kBlock * record->state_size + column * record->state_row;
        transpose(d, width, from, from_row, kept, record->state_row);
      }
      store<vectors, T>(read, width, record->reads + t * record->read_row + column);
    }
    if (gated) {
      w[0] = x.decay(row, head, t);
      for (int s = 0; s < vectors; s++) write[s] = x.beta[at] * (write[s] - w[0] * read[s]);
    } else {
      x.decays_of(row, head, t, w);
    }
    if (t + kAhead < x.t) {
      const int64_t soon = x.token(row, head, t + kAhead);
      prefetch(x.q + soon * d, d);
      prefetch(x.k + soon * d, d);
      prefetch(x.v + soon * e + column, width);
      if (!gated) {
        prefetch(x.a + soon * d, d);
        prefetch(x.b_key + soon * d, d);
        prefetch(x.log_decay + soon * x.decays, x.decays);
      }
    }
    const bool finish = answer && t == x.t - 1 && width == columns;
    T* to = finish ? last : block;
    const int64_t to_row = finish ? e : columns;
    const T* next = t + 1 < x.t ? reader_at(t + 1) : zeros;
    step<gated, answer, vectors, T>(d, from, from_row, to, to_row, w, gated ? nullptr : x.b_key + at * d, x.k + at * d,
                                    x.q + at * d, next, write, read, answers);
    if (answer) store<vectors, T>(answers, width, y + at * e + column);
    from = to;
    from_row = to_row;
  }
  if (answer && width < columns) {
    for (int64_t i = 0; i < d; i++) std::memcpy(last + i * e, block + i * columns, width * sizeof(T));
  }
}

// The same with as many vectors as the columns need.
template <bool gated, bool answer, typename T>
void walk_columns(const Inputs<T>& x, int64_t row, int64_t head, int64_t column, T* y, T* end, const Record<T>* record,
                  T* scratch) {
  const int64_t width = std::min(kColumns<T>, x.e - column);
  switch ((width + kLanes<T> - 1) / kLanes<T>) {
    case 1: return walk<gated, answer, 1, T>(x, row, head, column, width, y, end, record, scratch);
    case 2: return walk<gated, answer, 2, T>(x, row, head, column, width, y, end, record, scratch);
    default: return walk<gated, answer, kColumnVectors, T>(x, row, head, column, width, y, end, record, scratch);
  }
}

template <bool gated, typename T>
void forward(const Inputs<T>& x, T* y, T* end, int64_t threads) {
  const int64_t blocks = (x.e + kColumns<T> - 1) / kColumns<T>, tasks = x.b * x.h * blocks;
  const int64_t each = walk_scratch<T>(x.d);
  threads = std::max<int64_t>(1, std::min(threads, tasks));
  Scratch<T> scratch(threads * each);
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t index = task / blocks, column = task % blocks * kColumns<T>;
    T* mine = scratch + omp_get_thread_num() * each;
    walk_columns<gated, true, T>(x, index / x.h, index % x.h, column, y, end, nullptr, mine);
  }
}

// ---- backward: keys in lanes ----------------------------------------------------------------------------------------

template <typename T>
struct Gradients {
  const T *y, *end;
  T *q, *k, *v, *log_decay, *state, *a, *b_key, *beta;
};

// Scratch memory of one head: sequences of a block of tokens with keys padded to whole vectors and values to whole
// tiles of kRows, the gradient G of S^T, and the states of a block for kRows of its rows.
template <typename T>
struct Block {
  int64_t keys, values, steps;
  T *q, *k, *a, *b_key, *w, *grad_q, *grad_k, *grad_a, *grad_b_key, *grad_w;  // (kBlock keys)
  T *grad_y, *write, *read, *grad_write;                                     // (kBlock values)
  T *grad_state, *states;
  Record<T> record;

  static int64_t size(const Inputs<T>& x) {
    Block block;
    return block.divide(x, nullptr);
  }

  // Deal out the memory; returns how much there must be.
  int64_t divide(const Inputs<T>& x, T* memory) {
    keys = (x.d + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    values = (x.e + kRows - 1) / kRows * kRows;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      T* taken = memory ? memory + used : nullptr;
      used += (count + 15) / 16 * 16;  // each begins a cache line
      return taken;
    };
    for (T** sequence : {&q, &k, &a, &b_key, &w, &grad_q, &grad_k, &grad_a, &grad_b_key, &grad_w}) {
      *sequence = take(kBlock * keys);
    }
    for (T** sequence : {&grad_y, &write, &grad_write}) *sequence = take(kBlock * values);
    grad_state = take(values * keys);
    states = take((kBlock + 1) * kRows * keys);
    record = {nullptr, nullptr, keys, values * keys, values};
    record.states = take((x.t + kBlock - 1) / kBlock * record.state_size);
    record.reads = take(x.t * values);
    return used;
  }
};

// (t width) of one head, from the token at `at` on, -> (t padded), and back
template <typename T>
inline void gather(const Inputs<T>& x, int64_t at, int64_t steps, const T* from, int64_t width, T* to, int64_t padded) {
  for (int64_t t = 0; t < steps; t++) {
    std::memcpy(to + t * padded, from + (at + t * x.h) * width, width * sizeof(T));
  }
}

template <typename T>
inline void scatter(const Inputs<T>& x, int64_t at, int64_t steps, const T* from, int64_t padded, T* to,
                    int64_t width) {
  for (int64_t t = 0; t < steps; t++) {
    std::memcpy(to + (at + t * x.h) * width, from + t * padded, width * sizeof(T));
  }
}

// The states of rows [row, row + kRows) of S^T from before the block to its last token.
template <bool gated, typename T>
inline void replay(const Block<T>& block, const T* kept, int64_t row) {
  using V = Vector<T>;
  const int64_t keys = block.keys, size = kRows * keys;
  std::memcpy(block.states, kept + row * keys, size * sizeof(T));
  for (int64_t t = 0; t < block.steps; t++) {
    const T *before = block.states + t * size, *w = block.w + t * keys, *k = block.k + t * keys;
    const T *b_key = block.b_key + t * keys, *write = block.write + t * block.values + row;
    const T* read = block.read + t * block.values + row;
    T* after = block.states + (t + 1) * size;
    for (int64_t i = 0; i < keys; i += kLanes<T>) {
      const V w_i = *(const V*)(w + i), k_i = *(const V*)(k + i);
      const V b_i = gated ? V{} : *(const V*)(b_key + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        V x = w_i * *(const V*)(before + r * keys + i) + write[r] * k_i;
        if (!gated) x += read[r] * b_i;
        *(V*)(after + r * keys + i) = x;
      }
    }
  }
}

// One token back, for rows [row, row + kRows) of S^T: G, the gradient of what comes later, first meets the token's
// state, then passes on to the one before it. `read_gain` is, in the gated form, how a write depends on its read.
template <bool gated, typename T>
inline void step_back(const Block<T>& block, int64_t t, int64_t row, T read_gain) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t keys = block.keys, at = t * keys, value = t * block.values + row;
  const T *before = block.states + t * kRows * keys, *after = before + kRows * keys;
  const T *q = block.q + at, *k = block.k + at, *a = block.a + at, *b_key = block.b_key + at, *w = block.w + at;
  T *grad_q = block.grad_q + at, *grad_k = block.grad_k + at, *grad_a = block.grad_a + at;
  T *grad_b_key = block.grad_b_key + at, *grad_w = block.grad_w + at;
  T* grad_state = block.grad_state + row * keys;

  T grad_y[kRows], write[kRows], read[kRows], grad_read[kRows];
  V write_sums[kRows], read_sums[kRows];
  for (int r = 0; r < kRows; r++) {
    grad_y[r] = block.grad_y[value + r];
    write[r] = block.write[value + r];
    read[r] = block.read[value + r];
    write_sums[r] = read_sums[r] = V{};
  }
  for (int64_t i = 0; i < keys; i += lanes) {
    const V q_i = *(const V*)(q + i), k_i = *(const V*)(k + i), b_i = gated ? V{} : *(const V*)(b_key + i);
    V grad_q_i = *(V*)(grad_q + i), grad_k_i = *(V*)(grad_k + i), grad_b_i = gated ? V{} : *(V*)(grad_b_key + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const V g = *(V*)(grad_state + r * keys + i) + grad_y[r] * q_i;
      *(V*)(grad_state + r * keys + i) = g;
      grad_q_i += grad_y[r] * *(const V*)(after + r * keys + i);
      grad_k_i += write[r] * g;
      write_sums[r] += k_i * g;
      if (!gated) {
        grad_b_i += read[r] * g;
        read_sums[r] += b_i * g;
      }
    }
    *(V*)(grad_q + i) = grad_q_i;
    *(V*)(grad_k + i) = grad_k_i;
    if (!gated) *(V*)(grad_b_key + i) = grad_b_i;
  }

  for (int r = 0; r < kRows; r++) {
    const T grad_write = sum_lanes((const T*)&write_sums[r]);
    block.grad_write[value + r] = grad_write;
    grad_read[r] = gated ? read_gain * grad_write : sum_lanes((const T*)&read_sums[r]);
  }
  V decay_sum = V{};
  for (int64_t i = 0; i < keys; i += lanes) {
    const V a_i = *(const V*)(a + i), w_i = *(const V*)(w + i);
    V grad_a_i = *(V*)(grad_a + i), grad_w_i = gated ? decay_sum : *(V*)(grad_w + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const V g = *(V*)(grad_state + r * keys + i), state = *(const V*)(before + r * keys + i);
      grad_a_i += grad_read[r] * state;
      grad_w_i += g * state;
      *(V*)(grad_state + r * keys + i) = w_i * g + grad_read[r] * a_i;
    }
    *(V*)(grad_a + i) = grad_a_i;
    if (gated) {
      decay_sum = grad_w_i;
    } else {
      *(V*)(grad_w + i) = grad_w_i;
    }
  }
  if (gated) *(V*)grad_w += decay_sum;
}

// Fill a block with what its tokens brought; of a gated token the decay, from there on, is as that of any other.
template <bool gated, typename T>
void enter(const Inputs<T>& x, const Gradients<T>& grads, int64_t row, int64_t head, int64_t first, Block<T>& block) {
  const int64_t at = x.token(row, head, first), steps = std::min(kBlock, x.t - first);
  block.steps = steps;
  block.read = block.record.reads + first * block.values;
  gather(x, at, steps, x.q, x.d, block.q, block.keys);
  gather(x, at, steps, x.k, x.d, block.k, block.keys);
  gather(x, at, steps, grads.y, x.e, block.grad_y, block.values);
  gather(x, at, steps, x.v, x.e, block.write, block.values);
  if (!gated) {
    gather(x, at, steps, x.a, x.d, block.a, block.keys);
    gather(x, at, steps, x.b_key, x.d, block.b_key, block.keys);
  }
  for (int64_t t = 0; t < steps; t++) {
    T *w = block.w + t * block.keys, *write = block.write + t * block.values;
    const T* read = block.read + t * block.values;
    if (gated) {
      const T decay = x.decay(row, head, first + t), beta = x.beta[at + t * x.h];
      std::fill(w, w + x.d, decay);
      for (int64_t j = 0; j < x.e; j++) write[j] = beta * (write[j] - decay * read[j]);
    } else {
      x.decays_of(row, head, first + t, w);
      if (x.starts_at(row, first + t)) std::fill_n(block.a + t * block.keys, x.d, T(0));
    }
  }
  for (T* sums : {block.grad_q, block.grad_k, block.grad_a, block.grad_b_key, block.grad_w}) {
    std::memset(sums, 0, steps * block.keys * sizeof(T));
  }
}

// Hand out the gradients of a block's tokens.
template <bool gated, typename T>
void leave(const Inputs<T>& x, const Gradients<T>& grads, int64_t row, int64_t head, int64_t first,
           const Block<T>& block) {
  const int64_t at = x.token(row, head, first), steps = block.steps, keys = block.keys, values = block.values;
  for (int64_t t = 0; t < steps; t++) {
    const int64_t token = at + t * x.h;
    const T *w = block.w + t * keys, *read = block.read + t * values;
    T *grad_w = block.grad_w + t * keys, *grad_write = block.grad_write + t * values;
    if (gated) {
      const T* v = x.v + token * x.e;
      const T beta = x.beta[token];
      T through_error = 0, through_read = 0;
      for (int64_t j = 0; j < x.e; j++) {
        through_error += grad_write[j] * (v[j] - w[0] * read[j]);
        through_read += grad_write[j] * read[j];
        grad_write[j] *= beta;
      }
      grads.beta[token] = through_error;
      grad_w[0] -= beta * through_read;
    } else if (x.starts_at(row, first + t)) {
      std::fill_n(block.grad_a + t * keys, x.d, T(0));
    }
    if (x.decays == 1) {
      T sum = 0;
      for (int64_t i = 0; i < keys; i++) sum += grad_w[i];
      grads.log_decay[token] = w[0] * sum;
    } else {
      for (int64_t i = 0; i < x.d; i++) grads.log_decay[token * x.d + i] = w[i] * grad_w[i];
    }
  }
  scatter(x, at, steps, block.grad_q, keys, grads.q, x.d);
  scatter(x, at, steps, block.grad_k, keys, grads.k, x.d);
  scatter(x, at, steps, block.grad_write, values, grads.v, x.e);
  if (!gated) {
    scatter(x, at, steps, block.grad_a, keys, grads.a, x.d);
    scatter(x, at, steps, block.grad_b_key, keys, grads.b_key, x.d);
  }
}

template <bool gated, typename T>
void backward(const Inputs<T>& x, const Gradients<T>& grads, int64_t threads) {
  const int64_t block_size = Block<T>::size(x), each = block_size + walk_scratch<T>(x.d), heads = x.b * x.h;
  threads = std::max<int64_t>(1, std::min(threads, heads));
  Scratch<T> scratch(threads * each);
  scratch.zero(threads * each);  // what pads keys and values stays 0
#pragma omp parallel for num_threads(threads)
  for (int64_t index = 0; index < heads; index++) {
    const int64_t row = index / x.h, head = index % x.h;
    T* mine = scratch + omp_get_thread_num() * each;
    Block<T> block;
    block.divide(x, mine);
    if (gated) {
      block.a = block.k;
      block.grad_a = block.grad_k;
    }
    for (int64_t column = 0; column < x.e; column += kColumns<T>) {
      walk_columns<gated, false, T>(x, row, head, column, nullptr, nullptr, &block.record, mine + block_size);
    }
    std::memset(block.grad_state, 0, block.values * block.keys * sizeof(T));
    transpose(x.d, x.e, grads.end + index * x.d * x.e, x.e, block.grad_state, block.keys);
    for (int64_t first = (x.t - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
      enter<gated, T>(x, grads, row, head, first, block);
      for (int64_t value = 0; value < block.values; value += kRows) {
        replay<gated, T>(block, block.record.states + first / kBlock * block.record.state_size, value);
        for (int64_t t = block.steps - 1; t >= 0; t--) {
          const T read_gain = gated ? -x.beta[x.token(row, head, first + t)] * block.w[t * block.keys] : T(0);
          step_back<gated, T>(block, t, value, read_gain);
        }
      }
      leave<gated, T>(x, grads, row, head, first, block);
    }
    transpose(x.e, x.d, block.grad_state, block.keys, grads.state + index * x.d * x.e, x.e);
  }
}

}  // namespace

#define INPUTS(T)                                                                                                     \
  int64_t b, int64_t t, int64_t h, int64_t d, int64_t e, int64_t decays, const T *q, const T *k, const T *v,          \
      const T *log_decay, const T *state, const T *a, const T *b_key, const T *beta, const bool *starts

#define EXPORT(suffix, T)                                                                                             \
  extern "C" int delta_rule_forward_##suffix(INPUTS(T), T* y, T* end, int64_t threads) {                              \
    const Inputs<T> x = {b, t, h, d, e, decays, q, k, v, log_decay, state, a, b_key, beta, starts};                   \
    ZOO_STATUS(beta ? forward<true, T>(x, y, end, threads) : forward<false, T>(x, y, end, threads))                   \
  }                                                                                                                   \
  extern "C" int delta_rule_backward_##suffix(INPUTS(T), const T* grad_y, const T* grad_end, T* grad_q, T* grad_k,    \
                                              T* grad_v, T* grad_log_decay, T* grad_state, T* grad_a, T* grad_b_key,  \
                                              T* grad_beta, int64_t threads) {                                        \
    const Inputs<T> x = {b, t, h, d, e, decays, q, k, v, log_decay, state, a, b_key, beta, starts};                   \
    const Gradients<T> grads = {grad_y, grad_end,   grad_q, grad_k,     grad_v,                                       \
                                grad_log_decay, grad_state, grad_a, grad_b_key, grad_beta};                           \
    ZOO_STATUS(beta ? backward<true, T>(x, grads, threads) : backward<false, T>(x, grads, threads))                   \
  }

EXPORT(f32, float)
EXPORT(f64, double)
