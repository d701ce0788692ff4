// S_t = diag(exp log_decay_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t, or y_t = (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t.
//
// A thread takes a head of a row and walks along its tokens in chunks: `scores`, what each read takes of each write,
// and the state that one chunk hands to the next are made with matrix products. A decay per head is a factor on the
// product of q and k. Decays per key channel are worked into the keys, pair by pair, in chunks short enough for that.
//
// A read before the write is a read after the write of the token before: with a bonus, token i reads at position i and
// writes at position i + 1, and its own share is added at the end. Where a document starts the decay is 0; where reads
// come first, what the starting token reads is dropped as well.
//
// The decay between a write and a read is the exponential of a sum of log-decays or a product of decays, never made of
// differences or quotients: -inf is as good as any. What is carried from chunk to chunk decays by sums, so that the
// errors of many factors near 1 do not add up.
//
// Letters: b batch, t tokens, h heads, d key width, e value width.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kBlock = 16;  // rows and columns of a triangle that are computed at once
constexpr int64_t kStrip = 8;   // rows of a triangle that are multiplied at once

template <typename T>
struct Inputs {
  int64_t b, t, h, d, e;
  const T *q, *k, *v, *log_decay, *state, *bonus, *normalizer;
  const bool* starts;

  int64_t lag() const { return bonus ? 1 : 0; }  // of the position where a token is written
  int64_t positions() const { return t + lag(); }
  bool starts_at(int64_t row, int64_t token) const { return starts && starts[row * t + token]; }
};

template <typename T>
struct Gradients {
  const T *y, *end, *q_n, *end_normalizer;
  T *q, *k, *v, *log_decay, *state, *bonus, *normalizer;
};

// first, first + 1, ... in the lanes of a vector
template <typename T>
inline Vector<T> count_from(int64_t first) {
  Vector<T> numbers;
  for (int i = 0; i < kLanes<T>; i++) numbers[i] = first + i;
  return numbers;
}

template <typename T>
inline void scale_row(int64_t n, T scale, const T* x, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = scale * x[i];
}

// Flattened, as a loop with a call in it does not become vector code.
template <typename T>
[[gnu::flatten]] inline void exponentials(int64_t n, const T* x, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = exponential(x[i]);
}

// Rows `first` and on of x (tokens x width, `step` apart) into rows of out, with zeros where there is none.
template <typename T>
inline void load_rows(const T* x, int64_t step, int64_t width, int64_t tokens, int64_t first, int64_t rows,
                      T* __restrict__ out, int64_t out_row) {
  using V = Vector<T>;
  for (int64_t r = 0; r < rows; r++, out += out_row) {
    const int64_t token = first + r;
    int64_t i = 0;
    if (token >= 0 && token < tokens) {
      const T* from = x + token * step;
      for (; i + kLanes<T> <= width; i += kLanes<T>) *(V*)(out + i) = *(const V*)(from + i);
      for (; i < width; i++) out[i] = from[i];
    }
    for (; i < out_row; i++) out[i] = 0;
  }
}

template <typename T>
inline void store_rows(const T* x, int64_t x_row, int64_t rows, T* out, int64_t step, int64_t width, int64_t tokens,
                       int64_t first) {
  using V = Vector<T>;
  for (int64_t r = std::max<int64_t>(0, -first); r < std::min(rows, tokens - first); r++) {
    const T* from = x + r * x_row;
    T* to = out + (first + r) * step;
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) *(V*)(to + i) = *(const V*)(from + i);
    for (; i < width; i++) to[i] = from[i];
  }
}

// Rows of a head that are needed soon. They lie far apart, where the processor cannot guess them. Asked for in small
// portions while a product is computed, they arrive for nothing; all at once they would keep it waiting.
template <typename T>
class Prefetcher {
 public:
  void clear() { count_ = current_ = 0; }

  // `rows` rows, `step` apart
  void add(const T* x, int64_t step, int64_t width, int64_t rows) {
    if (rows > 0) pending_[count_++] = {x, step, width, rows};
  }

  void operator()() {  // ask for a portion
    for (int64_t asked = 0; asked < kPortion && current_ < count_;) {
      Rows& at = pending_[current_];
      for (int64_t i = 0; i < at.width; i += 64 / sizeof(T)) __builtin_prefetch(at.x + i);
      asked += at.width;
      at.x += at.step;
      if (--at.rows == 0) current_++;
    }
  }

 private:
  struct Rows {
    const T* x;
    int64_t step, width, rows;
  };
  static constexpr int64_t kPortion = (kVectorBytes == 64 ? 16 : 4) * 64 / sizeof(T);  // the elements of a tile

  Rows pending_[9];
  int count_ = 0, current_ = 0;
};

// What a worker holds of a chunk. Of the `capacity` rows of its matrices, `rows`, a multiple of kBlock, are in use;
// those behind the last token are zero, with decay 1. Rows of d elements lie d_row apart, rows of e elements e_row.
template <typename T, bool by_channel>
struct Chunk {
  static constexpr int64_t capacity = by_channel ? 16 : 32;

  const Inputs<T>& in;
  const int64_t d_row, e_row;
  int64_t row = 0, head = 0, first = 0, rows = 0;
  T *q, *k, *v;
  T* log_decay;       // (rows); by channel, the decays themselves (rows x d)
  T *scores, *decay;  // (reads x writes): what a read takes of a write; by head, its factor that is the decay
  T *since, *until;   // decay from the beginning to a read, from a write to the end: (rows); by channel (d)
  T *reads, *writes;  // q and k, decayed so
  T* keep;            // decay over all of the chunk (d)
  T* turned;          // the transpose of the matrix at hand
  Prefetcher<T> prefetcher;

  Chunk(const Inputs<T>& in, Arena<T>& arena)
      : in(in), d_row(round_up(in.d, kLanes<T>)), e_row(round_up(in.e, kLanes<T>)) {
    q = arena.take(capacity * d_row);
    k = arena.take(capacity * d_row);
    v = arena.take(capacity * e_row);
    log_decay = arena.take(capacity * (by_channel ? d_row : 1));
    scores = arena.take(capacity * capacity);
    decay = arena.take(by_channel ? 0 : capacity * capacity);
    since = arena.take(std::max(capacity, d_row));
    until = arena.take(std::max(capacity, d_row));
    reads = arena.take(capacity * d_row);
    writes = arena.take(capacity * d_row);
    keep = arena.take(d_row);
    turned = arena.take(std::max(std::max(in.d, in.e) * capacity, in.e * d_row));
  }

  // Where a head's rows begin in a tensor (b t h width).
  int64_t offset(int64_t width) const { return (row * in.t * in.h + head) * width; }

  void seek(int64_t first_position) {
    first = first_position;
    rows = std::min(capacity, round_up(in.positions() - first, kBlock));
  }

  // The rows of a chunk that begins at token `from`, of a tensor (b t h width), will be needed soon.
  void expect(const T* x, int64_t width, int64_t from) {
    const int64_t begin = std::max<int64_t>(from, 0), step = in.h * width;
    prefetcher.add(x + offset(width) + begin * step, step, width, std::min(from + capacity, in.t) - begin);
  }
  void expect_writes(int64_t first_position) {
    expect(in.k, in.d, first_position - in.lag());
    expect(in.v, in.e, first_position - in.lag());
    if constexpr (by_channel) expect(in.log_decay, in.d, first_position - in.lag());
  }

  void load_writes() {
    load_rows(in.k + offset(in.d), in.h * in.d, in.d, in.t, first - in.lag(), rows, k, d_row);
    load_rows(in.v + offset(in.e), in.h * in.e, in.e, in.t, first - in.lag(), rows, v, e_row);
    const int64_t width = by_channel ? in.d : 1;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = first + r - in.lag();
      T* out = log_decay + r * (by_channel ? d_row : 1);
      const T* from = in.log_decay + offset(width) + token * in.h * width;
      const bool inside = token >= 0 && token < in.t, empties = inside && in.starts_at(row, token);
      if constexpr (by_channel) {
        if (!inside || empties) {
          std::fill(out, out + d_row, empties ? T(0) : T(1));
          continue;
        }
        exponentials(in.d, from, out);
        std::fill(out + in.d, out + d_row, T(1));
      } else {
        *out = empties ? -std::numeric_limits<T>::infinity() : inside ? *from : T(0);
      }
    }
  }

  void load_reads() {
    load_rows(in.q + offset(in.d), in.h * in.d, in.d, in.t, first, rows, q, d_row);
    if (!in.lag()) return;
    for (int64_t r = 0; r < std::min(rows, in.t - first); r++) {
      if (in.starts_at(row, first + r)) std::fill(q + r * d_row, q + (r + 1) * d_row, T(0));
    }
  }

  // keep and writes, from log_decay and k
  void weigh_writes() {
    if constexpr (by_channel) {
      std::fill(keep, keep + d_row, T(1));
      for (int64_t s = rows - 1; s >= 0; s--) {
        multiply_row(d_row, keep, k + s * d_row, writes + s * d_row);
        multiply_row(d_row, keep, log_decay + s * d_row, keep);
      }
    } else {
      T sum = 0;
      for (int64_t s = rows - 1; s >= 0; s--) {
        until[s] = sum;
        sum += log_decay[s];
      }
      exponentials(rows, until, until);
      std::fill(keep, keep + d_row, exponential(sum));
      for (int64_t s = 0; s < rows; s++) scale_row(d_row, until[s], k + s * d_row, writes + s * d_row);
    }
  }

  // state (d x e) and normalizer (d): from before the chunk to behind it
  void advance(T* state, T* normalizer) {
    for (int64_t i = 0; i < in.d; i++) scale_row(e_row, keep[i], state + i * e_row, state + i * e_row);
    multiply_transposed<true>(round_rows(in.d), e_row, rows, writes, d_row, v, e_row, state, e_row, prefetcher);
    if (in.normalizer) advance_normalizer(normalizer, normalizer);
  }

  void advance_normalizer(const T* before, T* after) {
    multiply_row(d_row, keep, before, after);
    for (int64_t s = 0; s < rows; s++) add_scaled(d_row, T(1), writes + s * d_row, after);
  }

  // scores, reads, writes and keep; by channel also, where wanted, what the gradient of the scores gives to q.
  void score(const T* grad_scores = nullptr, T* grad_q = nullptr) {
    if constexpr (by_channel) {
      score_by_channel(grad_scores, grad_q);
    } else {
      score_by_head();
      weigh_writes();
    }
  }

  void score_by_head() {
    transpose(rows, in.d, k, d_row, turned, capacity);
    for (int64_t i = 0; i < rows; i += kBlock) {
      multiply<false>(kBlock, i + kBlock, in.d, q + i * d_row, d_row, turned, capacity, scores + i * capacity, capacity,
                      prefetcher);
    }
    T sum = 0;
    for (int64_t r = 0; r < rows; r++) {
      sum += log_decay[r];
      since[r] = sum;
    }
    exponentials(rows, since, since);
    for (int64_t r = 0; r < rows; r++) scale_row(d_row, since[r], q + r * d_row, reads + r * d_row);
    decay_scores();
  }

  // The decay of a pair is the product of those between: down a column of the matrix it falls from 1 on.
  void decay_scores() {
    using V = Vector<T>;
    T step[capacity];
    exponentials(rows, log_decay, step);
    for (int64_t s = 0; s < rows; s += kLanes<T>) {
      const V column = count_from<T>(s);
      V factor{};
      for (int64_t r = s / kBlock * kBlock; r < rows; r++) {
        factor *= step[r];
        factor = factor < std::numeric_limits<T>::min() ? V{} : factor;  // denormal numbers are slow
        factor = column == T(r) ? V{} + 1 : factor;
        T* score = scores + r * capacity + s;
        *(V*)(decay + r * capacity + s) = factor;
        *(V*)score *= factor;
      }
    }
  }

  void score_by_channel(const T* grad_scores, T* grad_q) {
    using V = Vector<T>;
    std::fill(keep, keep + d_row, T(1));
    for (int64_t r = 0; r < rows; r++) {
      const T* __restrict__ q_r = q + r * d_row;
      const T* __restrict__ decay_r = log_decay + r * d_row;
      T* __restrict__ score = scores + r * capacity;
      for (int64_t s = 0; s < r; s++) {
        T* __restrict__ write = writes + s * d_row;
        V sums{};
        for (int64_t i = 0; i < d_row; i += kLanes<T>) {
          const V decayed = *(const V*)(write + i) * *(const V*)(decay_r + i);
          *(V*)(write + i) = decayed;
          sums += decayed * *(const V*)(q_r + i);
        }
        score[s] = sum_lanes<T>(sums);
        if (grad_q) add_scaled(d_row, grad_scores[r * capacity + s], write, grad_q + r * d_row);
      }
      std::copy(k + r * d_row, k + (r + 1) * d_row, writes + r * d_row);
      score[r] = dot(d_row, q_r, k + r * d_row);
      std::fill(score + r + 1, score + rows, T(0));
      multiply_row(d_row, keep, decay_r, keep);
      multiply_row(d_row, keep, q_r, reads + r * d_row);
    }
  }
};

// With a bonus: what a token reads of itself.
template <typename T>
void add_bonus(const Inputs<T>& in, int64_t row, int64_t head, T* y) {
  const T* bonus = in.bonus + head * in.d;
  for (int64_t token = 0; token < in.t; token++) {
    const int64_t at = (row * in.t + token) * in.h + head;
    const T *q = in.q + at * in.d, *k = in.k + at * in.d;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < in.d; i++) sum += q[i] * bonus[i] * k[i];
    add_scaled(in.e, sum, in.v + at * in.e, y + at * in.e);
  }
}

// The state of a head of (b h d e) into rows that are padded with zeros, and back.
template <typename T>
void load_state(const Inputs<T>& in, const T* state, int64_t index, T* out, int64_t d_row, int64_t e_row) {
  load_rows(state + index * in.d * in.e, in.e, in.e, in.d, 0, d_row, out, e_row);
}
template <typename T>
void store_state(const Inputs<T>& in, const T* x, int64_t e_row, T* state, int64_t index) {
  store_rows(x, e_row, in.d, state + index * in.d * in.e, in.e, in.e, in.d, 0);
}

template <typename T, bool by_channel>
struct Forward {
  const Inputs<T>& in;
  Chunk<T, by_channel> chunk;
  T *state, *normalizer, *y;

  Forward(const Inputs<T>& in, Arena<T> arena, int64_t* used = nullptr) : in(in), chunk(in, arena) {
    state = arena.take(chunk.d_row * chunk.e_row);
    normalizer = arena.take(chunk.d_row);
    y = arena.take(chunk.capacity * chunk.e_row);
    if (used) *used = arena.used;
  }

  void run(int64_t index, T* all_y, T* end, T* all_q_n, T* end_normalizer) {
    auto& c = chunk;
    c.row = index / in.h, c.head = index % in.h;
    load_state(in, in.state, index, state, c.d_row, c.e_row);
    if (in.normalizer) load_rows(in.normalizer + index * in.d, in.d, in.d, 1, 0, 1, normalizer, c.d_row);
    for (int64_t first = 0; first < in.positions(); first += c.capacity) {
      c.seek(first);
      c.load_writes();
      c.load_reads();
      c.prefetcher.clear();
      c.expect(all_y, in.e, first);
      c.expect_writes(first + c.capacity);
      c.expect(in.q, in.d, first + c.capacity);
      c.score();
      for (int64_t i = 0; i < c.rows; i += kStrip) {
        multiply<false>(kStrip, c.e_row, i + kStrip, c.scores + i * c.capacity, c.capacity, c.v, c.e_row,
                        y + i * c.e_row, c.e_row, c.prefetcher);
      }
      multiply<true>(c.rows, c.e_row, in.d, c.reads, c.d_row, state, c.e_row, y, c.e_row, c.prefetcher);
      store_rows(y, c.e_row, c.rows, all_y + c.offset(in.e), in.h * in.e, in.e, in.t, first);
      if (in.normalizer) {
        for (int64_t r = 0; r < std::min(c.rows, in.t - first); r++) {
          T sum = dot(c.d_row, c.reads + r * c.d_row, normalizer);
          for (int64_t s = 0; s <= r; s++) sum += c.scores[r * c.capacity + s];
          all_q_n[c.offset(1) + (first + r) * in.h] = sum;
        }
      }
      c.advance(state, normalizer);
    }
    store_state(in, state, c.e_row, end, index);
    if (in.normalizer) std::copy(normalizer, normalizer + in.d, end_normalizer + index * in.d);
    if (in.bonus) add_bonus(in, c.row, c.head, all_y);
  }
};

// One token, without the chunks.
template <typename T>
void step(const Inputs<T>& in, bool by_channel, T* y, T* end, T* q_n, T* end_normalizer, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (in.b * in.h * in.d * in.e > 1 << 16)
  for (int64_t index = 0; index < in.b * in.h; index++) {
    const int64_t row = index / in.h, head = index % in.h;
    const T carry = in.starts_at(row, 0) ? 0 : 1;
    const T *q = in.q + index * in.d, *k = in.k + index * in.d;
    const T* __restrict__ v = in.v + index * in.e;
    T* __restrict__ y_t = y + index * in.e;
    std::fill(y_t, y_t + in.e, T(0));
    T sum = 0;
    for (int64_t i = 0; i < in.d; i++) {
      const T decay = exponential(in.log_decay[by_channel ? index * in.d + i : index]);
      const T* __restrict__ before = in.state + (index * in.d + i) * in.e;
      T* __restrict__ after = end + (index * in.d + i) * in.e;
      const T q_before = in.bonus ? q[i] * carry : 0, q_after = in.bonus ? 0 : q[i];
      const T q_own = in.bonus ? q[i] * in.bonus[head * in.d + i] * k[i] : 0, keep = carry * decay, write = k[i];
#pragma omp simd
      for (int64_t j = 0; j < in.e; j++) {
        after[j] = keep * before[j] + write * v[j];
        y_t[j] += q_before * before[j] + q_after * after[j] + q_own * v[j];
      }
      if (in.normalizer) {
        end_normalizer[index * in.d + i] = keep * in.normalizer[index * in.d + i] + write;
        sum += q[i] * end_normalizer[index * in.d + i];
      }
    }
    if (in.normalizer) q_n[index] = sum;
  }
}

// One token of the attention with a normaliser (`normalized_decay_attention`), gates and maximum included. Decoding takes
// it: as PyTorch operations, what stands around `step` costs more than the step.
template <typename T>
void normalized_step(const Inputs<T>& in, const T* log_input, const T* maximum, double floor, double eps, T* y, T* end,
                     T* end_normalizer, T* end_maximum, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (in.b * in.h * in.d * in.e > 1 << 16)
  for (int64_t index = 0; index < in.b * in.h; index++) {
    const T *q = in.q + index * in.d, *k = in.k + index * in.d, *before_n = in.normalizer + index * in.d;
    const T* __restrict__ v = in.v + index * in.e;
    T* __restrict__ y_t = y + index * in.e;
    const T m = std::max(in.log_decay[index] + maximum[index], log_input[index]);
    const T unit = std::max(m, T(-1e30));  // -inf less -inf is no number
    const T keep = exponential(in.log_decay[index] + (maximum[index] - unit)), gate = exponential(log_input[index] - unit);
    std::fill(y_t, y_t + in.e, T(0));
    T q_n = 0;
    for (int64_t i = 0; i < in.d; i++) {
      const T* __restrict__ before = in.state + (index * in.d + i) * in.e;
      T* __restrict__ after = end + (index * in.d + i) * in.e;
      const T read = q[i], write = gate * k[i];
#pragma omp simd
      for (int64_t j = 0; j < in.e; j++) {
        after[j] = keep * before[j] + write * v[j];
        y_t[j] += read * after[j];
      }
      const T n = keep * before_n[i] + write;
      end_normalizer[index * in.d + i] = n;
      q_n += read * n;
    }
    const T least = floor > 0 ? T(floor) * std::exp(-m) : T(0), scale = 1 / (std::max(std::fabs(q_n), least) + T(eps));
#pragma omp simd
    for (int64_t j = 0; j < in.e; j++) y_t[j] *= scale;
    end_maximum[index] = m;
  }
}

template <typename T, bool by_channel>
void forward(const Inputs<T>& in, T* y, T* end, T* q_n, T* end_normalizer, int64_t threads) {
  if (in.t == 1) return step(in, by_channel, y, end, q_n, end_normalizer, threads);
  const int64_t heads = in.b * in.h, workers = std::max<int64_t>(1, std::min(threads, heads));
  int64_t size = 0;
  Forward<T, by_channel>(in, Arena<T>{nullptr}, &size);
  Scratch<T> memory(workers * size);
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t worker = 0; worker < workers; worker++) {
    Forward<T, by_channel> task(in, Arena<T>{memory + worker * size});
    for (int64_t index = worker; index < heads; index += workers) task.run(index, y, end, q_n, end_normalizer);
  }
}

// From the last chunk to the first; the states before each are computed again, first of all, and kept.
template <typename T, bool by_channel>
struct Backward {
  const Inputs<T>& in;
  const Gradients<T>& grad;
  Chunk<T, by_channel> chunk;
  T *states, *normalizers;  // before each chunk, the states turned (e x d)
  T *state, *normalizer;    // gradients of those behind the chunk at hand
  T *y, *q_n, *q, *k, *v, *log_decay, *scores;  // gradients in the chunk
  T *reads, *pairs;         // by channel: queries decayed back to a write (rows x d), what they give to its key (d)
  T *carried, *bonus;       // (d)

  Backward(const Inputs<T>& in, const Gradients<T>& grad, Arena<T> arena, int64_t* used = nullptr)
      : in(in), grad(grad), chunk(in, arena) {
    const int64_t d_row = chunk.d_row, e_row = chunk.e_row, capacity = chunk.capacity;
    const int64_t chunks = (in.positions() + capacity - 1) / capacity;
    states = arena.take(chunks * round_rows(in.e) * d_row);
    normalizers = arena.take(chunks * d_row);
    state = arena.take(d_row * e_row);
    normalizer = arena.take(d_row);
    y = arena.take(capacity * e_row);
    q_n = arena.take(capacity);
    q = arena.take(capacity * d_row);
    k = arena.take(capacity * d_row);
    v = arena.take(capacity * e_row);
    log_decay = arena.take(capacity * (by_channel ? d_row : 1));
    scores = arena.take(capacity * capacity);
    reads = arena.take(by_channel ? capacity * d_row : 0);
    pairs = arena.take(d_row);
    carried = arena.take(d_row);
    bonus = arena.take(d_row);
    if (used) *used = arena.used;
  }

  void run(int64_t index, T* grad_bonus) {
    auto& c = chunk;
    c.row = index / in.h, c.head = index % in.h;
    compute_states(index);
    load_state(in, grad.end, index, state, c.d_row, c.e_row);
    if (in.normalizer) load_rows(grad.end_normalizer + index * in.d, in.d, in.d, 1, 0, 1, normalizer, c.d_row);
    for (int64_t n = (in.positions() - 1) / c.capacity; n >= 0; n--) {
      run_chunk(n * c.capacity, states + n * round_rows(in.e) * c.d_row, normalizers + n * c.d_row);
    }
    store_state(in, state, c.e_row, grad.state, index);
    if (in.normalizer) std::copy(normalizer, normalizer + in.d, grad.normalizer + index * in.d);
    if (in.bonus) add_bonus_gradients(grad_bonus + index * in.d);
  }

  void compute_states(int64_t index) {
    auto& c = chunk;
    const int64_t d_row = c.d_row, size = round_rows(in.e) * d_row;
    T *before = states, *normal = normalizers;
    std::fill(before, before + size, T(0));
    transpose(in.d, in.e, in.state + index * in.d * in.e, in.e, before, d_row);
    if (in.normalizer) load_rows(in.normalizer + index * in.d, in.d, in.d, 1, 0, 1, normal, d_row);
    for (int64_t first = 0; first + c.capacity < in.positions(); first += c.capacity) {
      c.seek(first);
      c.load_writes();
      c.weigh_writes();
      c.prefetcher.clear();
      c.expect_writes(first + c.capacity);
      T* after = before + size;
      for (int64_t j = 0; j < round_rows(in.e); j++) multiply_row(d_row, c.keep, before + j * d_row, after + j * d_row);
      multiply_transposed<true>(round_rows(in.e), d_row, c.rows, c.v, c.e_row, c.writes, d_row, after, d_row,
                                c.prefetcher);
      if (in.normalizer) c.advance_normalizer(normal, normal + d_row);
      before = after, normal += d_row;
    }
  }

  void run_chunk(int64_t first, const T* before, const T* normal_before) {
    auto& c = chunk;
    const int64_t d_row = c.d_row, e_row = c.e_row, capacity = c.capacity;
    c.seek(first);
    c.load_writes();
    c.load_reads();
    const int64_t rows = c.rows;
    load_rows(grad.y + c.offset(in.e), in.h * in.e, in.e, in.t, first, rows, y, e_row);
    expect_rows(first);

    transpose(rows, in.e, c.v, e_row, c.turned, capacity);
    for (int64_t i = 0; i < rows; i += kBlock) {
      multiply<false>(kBlock, i + kBlock, in.e, y + i * e_row, e_row, c.turned, capacity, scores + i * capacity,
                      capacity, c.prefetcher);
    }
    if (in.normalizer) {
      load_rows(grad.q_n + c.offset(1), in.h, 1, in.t, first, rows, q_n, 1);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t s = 0; s <= r; s++) scores[r * capacity + s] += q_n[r];
      }
    }

    // what passes through the state: of the reads ...
    multiply<false>(rows, d_row, in.e, y, e_row, before, d_row, q, d_row, c.prefetcher);
    for (int64_t r = 0; in.normalizer && r < rows; r++) add_scaled(d_row, q_n[r], normal_before, q + r * d_row);
    // ... of the writes ...
    transpose(d_row, in.e, state, e_row, c.turned, d_row);
    multiply<false>(rows, d_row, in.e, c.v, e_row, c.turned, d_row, k, d_row, c.prefetcher);
    for (int64_t s = 0; in.normalizer && s < rows; s++) add_scaled(d_row, T(1), normalizer, k + s * d_row);

    if constexpr (by_channel) {
      finish_by_channel(before);
    } else {
      finish_by_head(before, normal_before);
    }

    for (int64_t i = 0; i < rows; i += kStrip) {
      multiply_transposed<false>(kStrip, e_row, rows - i, c.scores + i * capacity + i, capacity, y + i * e_row, e_row,
                                 v + i * e_row, e_row, c.prefetcher);
    }
    multiply<true>(rows, e_row, in.d, c.writes, d_row, state, e_row, v, e_row, c.prefetcher);

    // ... and of the state before the chunk
    for (int64_t i = 0; i < in.d; i++) scale_row(e_row, c.keep[i], state + i * e_row, state + i * e_row);
    multiply_transposed<true>(round_rows(in.d), e_row, rows, c.reads, d_row, y, e_row, state, e_row, c.prefetcher);
    if (in.normalizer) {
      multiply_row(d_row, c.keep, normalizer, normalizer);
      for (int64_t r = 0; r < rows; r++) add_scaled(d_row, q_n[r], c.reads + r * d_row, normalizer);
    }
    store(first);
  }

  void expect_rows(int64_t first) {
    auto& c = chunk;
    c.prefetcher.clear();
    c.expect(grad.q, in.d, first);
    c.expect(grad.k, in.d, first - in.lag());
    c.expect(grad.v, in.e, first - in.lag());
    if constexpr (by_channel) c.expect(grad.log_decay, in.d, first - in.lag());
    c.expect_writes(first - c.capacity);
    c.expect(in.q, in.d, first - c.capacity);
    c.expect(grad.y, in.e, first - c.capacity);
  }

  void store(int64_t first) {
    auto& c = chunk;
    const int64_t written = first - in.lag(), width = by_channel ? in.d : 1;
    if (in.lag()) {
      for (int64_t r = 0; r < std::min(c.rows, in.t - first); r++) {
        if (in.starts_at(c.row, first + r)) std::fill(q + r * c.d_row, q + (r + 1) * c.d_row, T(0));
      }
    }
    store_rows(q, c.d_row, c.rows, grad.q + c.offset(in.d), in.h * in.d, in.d, in.t, first);
    store_rows(k, c.d_row, c.rows, grad.k + c.offset(in.d), in.h * in.d, in.d, in.t, written);
    store_rows(v, c.e_row, c.rows, grad.v + c.offset(in.e), in.h * in.e, in.e, in.t, written);
    store_rows(log_decay, by_channel ? c.d_row : 1, c.rows, grad.log_decay + c.offset(width), in.h * width, width, in.t,
               written);
  }

  // The gradient of a log-decay is the sum of all that passed through it: of the pairs of a write before it and a read
  // at or behind it; of what is carried in and read from it on; of what is written before it and carried out; and of
  // what is carried through the chunk.
  void finish_by_head(const T* before, const T* normal_before) {
    auto& c = chunk;
    const int64_t d_row = c.d_row, capacity = c.capacity, rows = c.rows;
    T carried = dot(in.e * d_row, before, c.turned);
    if (in.normalizer) carried += dot(d_row, normal_before, normalizer);
    c.score();
    carried *= c.keep[0];
    for (int64_t s = 0; s < rows; s++) {
      log_decay[s] = carried;
      carried += c.until[s] * dot(d_row, k + s * d_row, c.k + s * d_row);
      scale_row(d_row, c.until[s], k + s * d_row, k + s * d_row);
    }
    T read = 0;
    for (int64_t r = rows - 1; r >= 0; r--) {
      read += c.since[r] * dot(d_row, q + r * d_row, c.q + r * d_row);
      scale_row(d_row, c.since[r], q + r * d_row, q + r * d_row);
      log_decay[r] += read;
    }
    add_pairs();
    for (int64_t i = 0; i < rows; i += kStrip) {
      multiply<true>(kStrip, d_row, i + kStrip, scores + i * capacity, capacity, c.k, d_row, q + i * d_row, d_row,
                     c.prefetcher);
      multiply_transposed<true>(kStrip, d_row, rows - i, scores + i * capacity + i, capacity, c.q + i * d_row, d_row,
                                k + i * d_row, d_row, c.prefetcher);
    }
  }

  // Pairs of a write before a decay and a read at or behind it; their gradients, decayed as the scores are.
  void add_pairs() {
    using V = Vector<T>;
    auto& c = chunk;
    const int64_t capacity = c.capacity, rows = c.rows;
    V sums[Chunk<T, by_channel>::capacity] = {};
    for (int64_t s = 0; s < rows; s += kLanes<T>) {
      const V column = count_from<T>(s);
      V pairs{};
      for (int64_t r = rows - 1; r >= s / kBlock * kBlock; r--) {
        T* at = scores + r * capacity + s;
        pairs += *(const V*)at * *(const V*)(c.scores + r * capacity + s);
        pairs = column < T(r) ? pairs : V{};
        *(V*)at *= *(const V*)(c.decay + r * capacity + s);
        sums[r] += pairs;
      }
    }
    for (int64_t r = 0; r < rows; r++) log_decay[r] += sum_lanes<T>(sums[r]);
  }

  // The same for each channel. Pairs around a decay are those that read from it on, less those that also write there.
  void finish_by_channel(const T* before) {
    auto& c = chunk;
    const int64_t d_row = c.d_row, capacity = c.capacity, rows = c.rows;
    const auto decay = [&](int64_t r) { return c.log_decay + r * d_row; };
    std::fill(c.since, c.since + d_row, T(1));
    for (int64_t r = 0; r < rows; r++) {
      multiply_row(d_row, c.since, decay(r), c.since);
      multiply_row(d_row, c.since, q + r * d_row, q + r * d_row);
    }
    c.score(scores, q);
    std::fill(carried, carried + d_row, T(0));
    for (int64_t j = 0; j < in.e; j++) {
#pragma omp simd
      for (int64_t i = 0; i < d_row; i++) carried[i] += before[j * d_row + i] * c.turned[j * d_row + i];
    }
    multiply_row(d_row, c.keep, carried, carried);
    std::fill(c.until, c.until + d_row, T(1));
    for (int64_t s = rows - 1; s >= 0; s--) {
      multiply_row(d_row, c.until, k + s * d_row, k + s * d_row);
      multiply_row(d_row, c.until, decay(s), c.until);
    }
    for (int64_t s = 0; s < rows; s++) {
      std::copy(carried, carried + d_row, log_decay + s * d_row);
#pragma omp simd
      for (int64_t i = 0; i < d_row; i++) carried[i] += c.k[s * d_row + i] * k[s * d_row + i];
    }
    T* __restrict__ sum = c.since;
    std::fill(sum, sum + d_row, T(0));
    for (int64_t s = rows - 1; s >= 0; s--) {
      std::fill(pairs, pairs + d_row, T(0));
      for (int64_t r = s + 1; r < rows; r++) {
        T* __restrict__ read = reads + r * d_row;
        const T* __restrict__ decay_next = decay(s + 1);
        const T grad_score = scores[r * capacity + s];
#pragma omp simd
        for (int64_t i = 0; i < d_row; i++) {
          read[i] *= decay_next[i];
          pairs[i] += grad_score * read[i];
        }
      }
      std::copy(c.q + s * d_row, c.q + (s + 1) * d_row, reads + s * d_row);
      const T own = scores[s * capacity + s];
#pragma omp simd
      for (int64_t i = 0; i < d_row; i++) {
        const int64_t at = s * d_row + i;
        sum[i] += c.q[at] * q[at] - c.k[at] * pairs[i];
        log_decay[at] += sum[i];
        q[at] += own * c.k[at];
        k[at] += pairs[i] + own * c.q[at];
      }
    }
  }

  void add_bonus_gradients(T* grad_bonus) {
    const auto& c = chunk;
    const T* weight = in.bonus + c.head * in.d;
    std::fill(bonus, bonus + in.d, T(0));
    for (int64_t token = 0; token < in.t; token++) {
      const int64_t at = c.offset(1) + token * in.h;
      const T *q_t = in.q + at * in.d, *k_t = in.k + at * in.d;
      const T own = dot(in.e, grad.y + at * in.e, in.v + at * in.e);
      T *grad_q = grad.q + at * in.d, *grad_k = grad.k + at * in.d, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < in.d; i++) {
        sum += q_t[i] * weight[i] * k_t[i];
        grad_q[i] += own * weight[i] * k_t[i];
        grad_k[i] += own * weight[i] * q_t[i];
        bonus[i] += own * q_t[i] * k_t[i];
      }
      add_scaled(in.e, sum, grad.y + at * in.e, grad.v + at * in.e);
    }
    std::copy(bonus, bonus + in.d, grad_bonus);
  }
};

template <typename T, bool by_channel>
void backward(const Inputs<T>& in, const Gradients<T>& grad, int64_t threads) {
  const int64_t heads = in.b * in.h, workers = std::max<int64_t>(1, std::min(threads, heads));
  int64_t size = 0;
  Backward<T, by_channel>(in, grad, Arena<T>{nullptr}, &size);
  Scratch<T> memory(workers * size), bonus(in.bonus ? heads * in.d : 0);
  T* grad_bonus = bonus;
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t worker = 0; worker < workers; worker++) {
    Backward<T, by_channel> task(in, grad, Arena<T>{memory + worker * size});
    for (int64_t index = worker; index < heads; index += workers) task.run(index, grad_bonus);
  }
  if (!in.bonus) return;
  std::fill(grad.bonus, grad.bonus + in.h * in.d, T(0));
  for (int64_t row = 0; row < in.b; row++) {
    add_scaled(in.h * in.d, T(1), grad_bonus + row * in.h * in.d, grad.bonus);
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                              \
  extern "C" int decay_attention_forward_##suffix(                                                                     \
      int64_t b, int64_t t, int64_t h, int64_t d, int64_t e, int64_t by_channel, const T* q, const T* k, const T* v,   \
      const T* log_decay, const T* state, const T* bonus, const T* normalizer, const bool* starts, T* y, T* end,       \
      T* q_n, T* end_normalizer, int64_t threads) {                                                                    \
    const Inputs<T> in{b, t, h, d, e, q, k, v, log_decay, state, bonus, normalizer, starts};                           \
    ZOO_STATUS(by_channel ? forward<T, true>(in, y, end, q_n, end_normalizer, threads)                                 \
                          : forward<T, false>(in, y, end, q_n, end_normalizer, threads))                               \
  }                                                                                                                    \
  extern "C" int normalized_step_##suffix(int64_t b, int64_t h, int64_t d, int64_t e, const T* q, const T* k,           \
                                          const T* v, const T* log_decay, const T* log_input, const T* state,          \
                                          const T* normalizer, const T* maximum, double floor, double eps, T* y,       \
                                          T* end, T* end_normalizer, T* end_maximum, int64_t threads) {                \
    const Inputs<T> in{b, 1, h, d, e, q, k, v, log_decay, state, nullptr, normalizer, nullptr};                        \
    ZOO_STATUS(normalized_step(in, log_input, maximum, floor, eps, y, end, end_normalizer, end_maximum, threads))      \
  }                                                                                                                    \
  extern "C" int decay_attention_backward_##suffix(                                                                    \
      int64_t b, int64_t t, int64_t h, int64_t d, int64_t e, int64_t by_channel, const T* q, const T* k, const T* v,   \
      const T* log_decay, const T* state, const T* bonus, const T* normalizer, const bool* starts, const T* grad_y,    \
      const T* grad_end, const T* grad_q_n, const T* grad_end_normalizer, T* grad_q, T* grad_k, T* grad_v,             \
      T* grad_log_decay, T* grad_state, T* grad_bonus, T* grad_normalizer, int64_t threads) {                          \
    const Inputs<T> in{b, t, h, d, e, q, k, v, log_decay, state, bonus, normalizer, starts};                           \
    const Gradients<T> grad{grad_y, grad_end,       grad_q_n,   grad_end_normalizer, grad_q,         grad_k,           \
                            grad_v, grad_log_decay, grad_state, grad_bonus,          grad_normalizer};                 \
    ZOO_STATUS(by_channel ? backward<T, true>(in, grad, threads) : backward<T, false>(in, grad, threads))              \
  }

EXPORT(f32, float)
EXPORT(f64, double)
