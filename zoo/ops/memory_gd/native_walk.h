// The neural memory along the chunks of a head: its answers and its states, as `native.cpp` has them.
//
// What belongs to the tokens of a chunk lies feature by feature, with the tokens in the lanes of vectors: products with
// a matrix of weights and with its transpose then both read it as it lies, and only what is small is ever turned.
#pragma once

#include <vector>

#include "native.h"

namespace zoo {

template <typename T>
struct Inputs {
  int64_t b, t, h, d, e, w, hidden, width;
  const T *q, *k, *v, *step, *momentum, *decay, *weights, *surprise, *anchor, *initial;
  const bool *real, *refresh, *reset;

  int64_t chunks() const { return (t + width - 1) / width; }
  bool is_token(int64_t row, int64_t token) const { return token < t && (!real || real[row * t + token]); }
  bool opens(int64_t row, int64_t chunk) const { return !refresh || refresh[row * chunks() + chunk]; }
  bool restarts(int64_t row, int64_t chunk) const { return reset && reset[row * chunks() + chunk]; }
};

// The matrix of a layer (in out). Padded with zeros, its rows lie `row` apart, from `at` on among those of a memory.
struct Layer {
  int64_t in, out, row, at;
  int64_t size() const { return round_rows(in) * row; }
};

template <typename T>
std::vector<Layer> layers_of(const Inputs<T>& in) {
  const int64_t hidden = in.hidden, depth = hidden ? 2 + (in.w - hidden * (in.d + in.e)) / (hidden * hidden) : 1;
  std::vector<Layer> layers;
  for (int64_t l = 0, at = 0; l < depth; at += layers[l++].size()) {
    const int64_t rows = l ? hidden : in.d, columns = l + 1 < depth ? hidden : in.e;
    layers.push_back({rows, columns, round_up(columns, kLanes<T>), at});
  }
  return layers;
}

// y = silu(x) and its slope, where wanted its curvature too. Flattened, as a loop with a call in it does not become
// vector code.
template <bool curved, typename T>
[[gnu::flatten]] inline void silu(int64_t n, const T* __restrict__ x, T* __restrict__ y, T* __restrict__ slope,
                                  T* __restrict__ curvature = nullptr) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const T gate = sigmoid(x[i]), fall = gate * (1 - gate);
    y[i] = x[i] * gate;
    slope[i] = gate + x[i] * fall;
    if (curved) curvature[i] = fall * (2 + x[i] * (1 - 2 * gate));
  }
}

// What is known of a chunk before its queries are read. The first of c + 1 slots stands for what is before the chunk.
template <typename T>
struct Chunk {
  struct Sides {
    T *inputs, *errors, *errors_by_token;  // X (in c), E (out c), and E (c row)
    T *slope, *bend;                       // silu'(U) and, times E_next Z_next^T, silu''(U): (out c)
  };
  int64_t first, tokens;
  const T *weights, *surprise, *anchor;                         // before the chunk
  T *learned, *surprised, *of_weight, *of_past, *past_of_past;  // G, G' (c+1 c), a, b, b' (c+1)
  T* learned_by_write;                                          // G (j t)
  std::vector<Sides> sides;                                     // of each layer
};

// Along the chunks of a head. A state in scratch memory is its weights, its surprise and its anchor.
template <typename T>
struct Walk {
  using V = Vector<T>;
  // What a layer reads: x, a x and b x (in c), the slope at its answer (out c), X_j . x_t and that times G (j t).
  struct Reads {
    T *x, *by_weight, *by_past, *slope, *similar, *attention;
  };

  const Inputs<T>& in;
  std::vector<Layer> layers;
  const int64_t depth, slots, size;  // size: of the weights of a memory
  int64_t row = 0, head = 0;
  int64_t ahead = 1;  // -1 on the way back: where the chunk lies that comes next
  std::vector<Reads> reads;
  T *answers, *scaled;  // (in c) or (out c) of any layer

  Walk(const Inputs<T>& in, Arena<T>& arena)
      : in(in),
        layers(layers_of(in)),
        depth(layers.size()),
        slots(round_up(std::min(in.width, in.t), kLanes<T>)),
        size(layers.back().at + layers.back().size()) {
    for (const Layer& layer : layers) {
      reads.push_back({take(layer.in, arena), take(layer.in, arena), take(layer.in, arena), take(layer.out, arena),
                       take(slots, arena), take(slots, arena)});
    }
    for (T** any : {&answers, &scaled}) *any = take(widest(), arena);
  }

  int64_t widest() const { return std::max({in.d, in.e, in.hidden}); }
  T* take(int64_t features, Arena<T>& arena) const { return arena.take(round_rows(features) * slots); }

  Chunk<T> take_chunk(Arena<T>& arena) const {
    Chunk<T> chunk;
    for (T** x : {&chunk.learned, &chunk.surprised}) *x = take(slots + 1, arena);
    for (T** x : {&chunk.of_weight, &chunk.of_past, &chunk.past_of_past}) *x = arena.take(slots + 1);
    chunk.learned_by_write = take(slots, arena);
    for (const Layer& layer : layers) {
      chunk.sides.push_back({take(layer.in, arena), take(layer.out, arena), arena.take(slots * layer.row),
                             take(layer.out, arena), take(layer.out, arena)});
    }
    return chunk;
  }

  // What lies outside: tokens (b t h width) and memories (b h w).

  int64_t offset(int64_t token, int64_t width) const { return ((row * in.t + token) * in.h + head) * width; }

  // Asks for the rows of the chunk that comes next as well: they lie far apart.
  void load(const Chunk<T>& chunk, const T* x, int64_t width, T* out) const {
    if (chunk.tokens < slots) std::fill_n(out, width * slots, T(0));
    transpose(chunk.tokens, width, x + offset(chunk.first, width), in.h * width, out, slots);
    const int64_t soon = chunk.first + ahead * in.width;
    for (int64_t token = std::max<int64_t>(soon, 0); token < std::min(soon + in.width, in.t); token++) {
      prefetch(x + offset(token, width), width);
    }
  }

  void store(const Chunk<T>& chunk, const T* x, int64_t width, T* out) const {
    transpose(width, chunk.tokens, x, slots, out + offset(chunk.first, width), in.h * width);
  }

  void load_memory(const T* x, T* out) const {
    for (const Layer& layer : layers) {
      T* matrix = out + layer.at;
      for (int64_t i = 0; i < layer.in; i++, x += layer.out) std::copy_n(x, layer.out, matrix + i * layer.row);
    }
  }

  void store_memory(const T* x, T* out) const {
    for (const Layer& layer : layers) {
      const T* matrix = x + layer.at;
      for (int64_t i = 0; i < layer.in; i++, out += layer.out) std::copy_n(matrix + i * layer.row, layer.out, out);
    }
  }

  void load_state(int64_t index, const T* weights, const T* surprise, const T* anchor, T* state) {
    row = index / in.h, head = index % in.h;
    for (const T* memory : {weights, surprise, anchor}) {
      load_memory(memory + index * in.w, state);
      state += size;
    }
  }

  void store_state(int64_t index, const T* state, T* weights, T* surprise, T* anchor) const {
    for (T* memory : {weights, surprise, anchor}) {
      store_memory(state, memory + index * in.w);
      state += size;
    }
  }

  // Products of x (in c), y (out c), the weights W of a memory, and pairs of tokens (j t).

  // y = or += x W
  template <bool add>
  void answer(const Layer& layer, const T* weights, const T* x, T* y) const {
    multiply_transposed<add>(round_rows(layer.out), slots, layer.in, weights + layer.at, layer.row, x, slots, y, slots);
  }

  // x = or += y W^T
  template <bool add>
  void answer_back(const Layer& layer, const T* weights, const T* y, T* x) const {
    multiply<add>(round_rows(layer.in), slots, layer.out, weights + layer.at, layer.row, y, slots, x, slots);
  }

  // W += x^T y, given y (c row)
  void write(const Layer& layer, const T* x, const T* y_by_token, T* weights) const {
    multiply<true>(round_rows(layer.in), layer.row, slots, x, slots, y_by_token, layer.row, weights + layer.at,
                   layer.row);
  }

  // pairs_jt = x_j . y_t
  void compare(int64_t features, const T* x, const T* y, T* pairs) const {
    multiply_transposed<false>(slots, slots, features, x, slots, y, slots, pairs, slots);
  }

  // y_t += sum_j x_j pairs_jt
  void mix(int64_t features, const T* x, const T* pairs, T* y) const {
    multiply<true>(round_rows(features), slots, slots, x, slots, pairs, slots, y, slots);
  }

  // out_t = factors_t x_t
  void scale(int64_t features, const T* x, const T* factors, T* out) const {
    for (int64_t t = 0; t < slots; t += kLanes<T>) {
      const V factor = *(const V*)(factors + t);
      for (int64_t i = t; i < round_rows(features) * slots; i += slots) *(V*)(out + i) = factor * *(const V*)(x + i);
    }
  }

  // A chunk, given the state before it and its anchor where it opens none.
  void enter(Chunk<T>& chunk, int64_t index, T* state, const T* anchor) const {
    chunk.first = index * in.width;
    chunk.tokens = std::min(in.width, in.t - chunk.first);
    if (in.restarts(row, index)) {
      load_memory(in.initial + head * in.w, state);
      std::fill_n(state + size, size, T(0));
    }
    chunk.weights = state;
    chunk.surprise = state + size;
    chunk.anchor = in.opens(row, index) ? state : anchor;
    mix_gates(chunk);
    differentiate(chunk);
  }

  // The coefficients, token by token. A slot without a token leaves everything as it is.
  void mix_gates(Chunk<T>& chunk) const {
    for (T* none : {chunk.learned, chunk.surprised}) std::fill_n(none, slots, T(0));
    chunk.of_weight[0] = chunk.past_of_past[0] = 1;
    chunk.of_past[0] = 0;
    for (int64_t t = 0; t < slots; t++) {
      const bool is_token = t < chunk.tokens && in.is_token(row, chunk.first + t);
      const int64_t at = offset(chunk.first + t, 1);
      const T momentum = is_token ? in.momentum[at] : T(1), keep = is_token ? 1 - in.decay[at] : T(1);
      const T gain = is_token ? 1 : 0;
      const T *surprised = chunk.surprised + t * slots, *learned = chunk.learned + t * slots;
      T *surprised_now = chunk.surprised + (t + 1) * slots, *learned_now = chunk.learned + (t + 1) * slots;
#pragma omp simd
      for (int64_t j = 0; j < slots; j++) surprised_now[j] = momentum * surprised[j];
      surprised_now[t] = is_token ? -in.step[at] : T(0);
#pragma omp simd
      for (int64_t j = 0; j < slots; j++) learned_now[j] = keep * learned[j] + gain * surprised_now[j];
      chunk.past_of_past[t + 1] = momentum * chunk.past_of_past[t];
      chunk.of_past[t + 1] = keep * chunk.of_past[t] + gain * chunk.past_of_past[t + 1];
      chunk.of_weight[t + 1] = keep * chunk.of_weight[t];
    }
    transpose(slots, slots, chunk.learned + slots, slots, chunk.learned_by_write, slots);
  }

  // Both sides of the gradients.
  void differentiate(Chunk<T>& chunk) const {
    load(chunk, in.k, in.d, chunk.sides[0].inputs);
    load(chunk, in.v, in.e, scaled);
    for (int64_t l = 0; l < depth; l++) {
      auto& side = chunk.sides[l];
      answer<false>(layers[l], chunk.anchor, side.inputs, answers);
      if (l + 1 < depth) silu<true>(layers[l].out * slots, answers, chunk.sides[l + 1].inputs, side.slope, side.bend);
    }
    for (int64_t l = depth - 1; l >= 0; l--) {
      auto& side = chunk.sides[l];
      const int64_t count = layers[l].out * slots;
      if (l + 1 < depth) {
        answer_back<false>(layers[l + 1], chunk.anchor, chunk.sides[l + 1].errors, answers);
        multiply_row(count, answers, side.bend, side.bend);
        multiply_row(count, answers, side.slope, side.errors);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) side.errors[i] = 2 * (answers[i] - scaled[i]);
      }
      transpose(layers[l].out, slots, side.errors, slots, side.errors_by_token, layers[l].row);
    }
  }

  // Answer the queries; the last layer does where there is a place for it.
  void read(const Chunk<T>& chunk, T* y) const {
    load(chunk, in.q, in.d, reads[0].x);
    for (int64_t l = 0; l < depth; l++) {
      const Layer& layer = layers[l];
      const auto& side = chunk.sides[l];
      const auto [x, by_weight, by_past, slope, similar, attention] = reads[l];
      scale(layer.in, x, chunk.of_weight + 1, by_weight);
      scale(layer.in, x, chunk.of_past + 1, by_past);
      compare(layer.in, side.inputs, x, similar);
      multiply_row(slots * slots, similar, chunk.learned_by_write, attention);
      if (l + 1 == depth && !y) return;
      answer<false>(layer, chunk.weights, by_weight, answers);
      answer<true>(layer, chunk.surprise, by_past, answers);
      mix(layer.out, side.errors, attention, answers);
      if (l + 1 < depth) silu<false>(layer.out * slots, answers, reads[l + 1].x, slope);
    }
    store(chunk, answers, in.e, y);
  }

  // The state behind the chunk, which may take the place of that before it.
  void leave(const Chunk<T>& chunk, T* state) const {
    T *weights = state, *surprise = state + size;
    const T keep = chunk.of_weight[slots], past = chunk.of_past[slots], past_of_past = chunk.past_of_past[slots];
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      weights[i] = keep * chunk.weights[i] + past * chunk.surprise[i];
      surprise[i] = past_of_past * chunk.surprise[i];
    }
    for (int64_t l = 0; l < depth; l++) {
      const auto& side = chunk.sides[l];
      scale(layers[l].in, side.inputs, chunk.learned + slots * slots, scaled);
      write(layers[l], scaled, side.errors_by_token, weights);
      scale(layers[l].in, side.inputs, chunk.surprised + slots * slots, scaled);
      write(layers[l], scaled, side.errors_by_token, surprise);
    }
  }

  // Lead a state over a chunk; its answers go where there is a place for them.
  void advance(Chunk<T>& chunk, int64_t index, T* state, T* y) const {
    T* anchor = state + 2 * size;
    enter(chunk, index, state, anchor);
    if (y) read(chunk, y);
    const bool is_read_later = index + 1 == in.chunks() || !in.opens(row, index + 1);
    if (chunk.anchor != anchor && is_read_later) std::copy_n(chunk.anchor, size, anchor);
    leave(chunk, state);
  }
};

}  // namespace zoo
