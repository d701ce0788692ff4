// The neural memory back along the chunks of a head: the gradients.
//
// It keeps the inputs alone. It walks forth once more, keeps what it finds of each chunk, and goes back along the
// chunks; where there are many, span by span, from states kept before each.
//
// With dy of a layer's answers, which is dx * silu' of the layer behind it, and dM', dS' of the state that the chunk
// leaves,
//
//   dx = a (dy M^T) + b (dy S^T) + (G * dP) X          dP_tj = dy_t . E_j        dM = a dM' + x^T (a_t dy)
//   dX = (G * dP)^T x + g (E dM'^T) + g' (E dS'^T)                               dS = b dM' + b' dS' + x^T (b_t dy)
//   dE = (G * (x X^T))^T dy + g (X dM') + g' (X dS')
//
// where g and g' are the last rows of G and G'. Then through both sides of the gradients
//
//   dE_next += (dE * silu') Z_next     dU = dX_next * silu' + dE * (E_next Z_next^T) * silu'', for the last layer 2 dE
//   dZ_next += (dE * silu')^T E_next   dX += dU Z^T      dZ += X^T dU
#pragma once

#include "native_walk.h"

namespace zoo {

constexpr int64_t kLeastSpan = 48;  // chunks of a span; more where there are more than its square

template <typename T>
struct Gradients {
  const T *y, *end_weights, *end_surprise, *end_anchor;
  T *q, *k, *v, *step, *momentum, *decay, *weights, *surprise, *anchor, *initial;
};

template <typename T>
struct Backward {
  using V = Vector<T>;
  const Gradients<T>& grad;
  Walk<T> walk;
  const int64_t slots, size, length, spans;  // length: of a span
  std::vector<Chunk<T>> chunks;              // of a span
  T *before, *inside;                        // the states before spans, and those in one but the first
  T *state, *initial;                        // gradients: of the state at hand and of the initial weights
  std::vector<T*> inputs, errors, by_token;  // of each layer: of X (in c), of E (out c), and of outputs (c row)
  T *x, *y, *any;                            // of what a layer reads and answers; all three of any layer
  T *learned, *pairs, *turned;               // of G (j t), and others
  T *of_weight, *of_past;                    // of a, b
  T *learned_last, *surprised_last;          // of g, g'
  T of_weight_last, of_past_last, past_of_past_last;

  Backward(const Inputs<T>& in, const Gradients<T>& grad, Arena<T>& arena)
      : grad(grad),
        walk(in, arena),
        slots(walk.slots),
        size(walk.size),
        length(std::min(in.chunks(), std::max<int64_t>(kLeastSpan, std::sqrt((double)in.chunks())))),
        spans((in.chunks() + length - 1) / length) {
    for (int64_t n = 0; n < length; n++) chunks.push_back(walk.take_chunk(arena));
    before = arena.take(spans * 3 * size);
    inside = arena.take((length - 1) * 2 * size);
    state = arena.take(3 * size);
    initial = arena.take(size);
    for (const Layer& layer : walk.layers) {
      inputs.push_back(walk.take(layer.in, arena));
      errors.push_back(walk.take(layer.out, arena));
      by_token.push_back(arena.take(slots * layer.row));
    }
    for (T** features : {&x, &y, &any}) *features = walk.take(walk.widest(), arena);
    for (T** square : {&learned, &pairs, &turned}) *square = walk.take(slots, arena);
    for (T** gates : {&of_weight, &of_past, &learned_last, &surprised_last}) *gates = arena.take(slots);
  }

  void run(int64_t index, T* grad_initial) {
    const Inputs<T>& in = walk.in;
    walk.load_state(index, in.weights, in.surprise, in.anchor, before);
    walk.ahead = 1;
    for (int64_t span = 1; span < spans; span++) {
      T* here = before + span * 3 * size;
      std::copy_n(here - 3 * size, 3 * size, here);
      for (int64_t n = (span - 1) * length; n < span * length; n++) walk.advance(chunks[0], n, here, nullptr);
    }
    walk.load_state(index, grad.end_weights, grad.end_surprise, grad.end_anchor, state);
    std::fill_n(initial, size, T(0));
    for (int64_t span = spans - 1; span >= 0; span--) run_span(span);
    walk.store_state(index, state, grad.weights, grad.surprise, grad.anchor);
    if (grad_initial) walk.store_memory(initial, grad_initial + index * in.w);
  }

  void run_span(int64_t span) {
    const int64_t first = span * length, count = std::min(length, walk.in.chunks() - first);
    T* here = before + span * 3 * size;
    const T* anchor = here + 2 * size;
    walk.ahead = 1;
    for (int64_t n = 0; n < count; n++) {
      walk.enter(chunks[n], first + n, here, anchor);
      anchor = chunks[n].anchor;
      if (n + 1 == count) break;
      here = inside + n * 2 * size;
      walk.leave(chunks[n], here);
    }
    walk.ahead = -1;
    for (int64_t n = count - 1; n >= 0; n--) run_chunk(chunks[n], first + n);
  }

  void run_chunk(const Chunk<T>& chunk, int64_t index) {
    walk.load(chunk, grad.y, walk.in.e, y);
    walk.read(chunk, nullptr);
    std::fill_n(learned, slots * slots, T(0));
    for (T* gates : {of_weight, of_past, learned_last, surprised_last}) std::fill_n(gates, slots, T(0));
    of_weight_last = of_past_last = past_of_past_last = 0;
    for (int64_t l = walk.depth - 1; l >= 0; l--) {
      leave_back(chunk, l);
      read_back(chunk, l);
      if (l > 0) multiply_row(walk.layers[l].in * slots, x, walk.reads[l - 1].slope, y);
    }
    walk.store(chunk, x, walk.in.d, grad.q);
    differentiate_back(chunk);
    mix_gates_back(chunk);
    enter_back(index);
  }

  // out = or += factors_t x_t; the gradients of factors get x_t . with_t
  template <bool add>
  void scale_back(int64_t features, const T* factors, const T* x, const T* with, T* grad_factors, T* out) const {
    for (int64_t t = 0; t < slots; t += kLanes<T>) {
      const V factor = *(const V*)(factors + t);
      V sum = *(const V*)(grad_factors + t);
      for (int64_t i = t; i < round_rows(features) * slots; i += slots) {
        const V x_i = *(const V*)(x + i);
        sum += x_i * *(const V*)(with + i);
        *(V*)(out + i) = add ? *(const V*)(out + i) + factor * x_i : factor * x_i;
      }
      *(V*)(grad_factors + t) = sum;
    }
  }

  // From the state that a layer leaves.
  void leave_back(const Chunk<T>& chunk, int64_t l) {
    const Layer& layer = walk.layers[l];
    const auto& side = chunk.sides[l];
    T *weights = state, *surprise = state + size;
    const T *learns = chunk.learned + slots * slots, *surprises = chunk.surprised + slots * slots;
    walk.template answer<false>(layer, weights, side.inputs, any);
    scale_back<false>(layer.out, learns, any, side.errors, learned_last, errors[l]);
    walk.template answer<false>(layer, surprise, side.inputs, any);
    scale_back<true>(layer.out, surprises, any, side.errors, surprised_last, errors[l]);
    walk.scale(layer.out, side.errors, learns, any);
    walk.template answer_back<false>(layer, weights, any, inputs[l]);
    walk.scale(layer.out, side.errors, surprises, any);
    walk.template answer_back<true>(layer, surprise, any, inputs[l]);

    const T keep = chunk.of_weight[slots], past = chunk.of_past[slots], past_of_past = chunk.past_of_past[slots];
    V to_weight{}, to_past{}, past_to_past{};
    for (int64_t i = layer.at; i < layer.at + layer.size(); i += kLanes<T>) {
      const V weight = *(const V*)(weights + i), surprised = *(const V*)(surprise + i);
      const V surprise_before = *(const V*)(chunk.surprise + i);
      to_weight += *(const V*)(chunk.weights + i) * weight;
      to_past += surprise_before * weight;
      past_to_past += surprise_before * surprised;
      *(V*)(weights + i) = keep * weight;
      *(V*)(surprise + i) = past * weight + past_of_past * surprised;
    }
    of_weight_last += sum_lanes<T>(to_weight);
    of_past_last += sum_lanes<T>(to_past);
    past_of_past_last += sum_lanes<T>(past_to_past);
  }

  // From the answers of a layer, y, to what it reads, x.
  void read_back(const Chunk<T>& chunk, int64_t l) {
    const Layer& layer = walk.layers[l];
    const auto& side = chunk.sides[l];
    const auto& reads = walk.reads[l];
    transpose(layer.out, slots, y, slots, by_token[l], layer.row);
    walk.write(layer, reads.by_weight, by_token[l], state);
    walk.write(layer, reads.by_past, by_token[l], state + size);
    walk.template answer_back<false>(layer, chunk.weights, y, any);
    scale_back<false>(layer.in, chunk.of_weight + 1, any, reads.x, of_weight, x);
    walk.template answer_back<false>(layer, chunk.surprise, y, any);
    scale_back<true>(layer.in, chunk.of_past + 1, any, reads.x, of_past, x);

    walk.compare(layer.out, side.errors, y, pairs);
#pragma omp simd
    for (int64_t i = 0; i < slots * slots; i++) {
      learned[i] += pairs[i] * reads.similar[i];
      pairs[i] *= chunk.learned_by_write[i];
    }
    walk.mix(layer.in, side.inputs, pairs, x);
    transpose(slots, slots, pairs, slots, turned, slots);
    walk.mix(layer.in, reads.x, turned, inputs[l]);
    transpose(slots, slots, reads.attention, slots, turned, slots);
    walk.mix(layer.out, y, turned, errors[l]);
  }

  // From both sides of the gradients to keys, values and anchor.
  void differentiate_back(const Chunk<T>& chunk) {
    const int64_t last = walk.depth - 1, count = walk.in.e * slots;
    T* anchor = state + 2 * size;
    for (int64_t l = 0; l < last; l++) {
      const Layer& next = walk.layers[l + 1];
      const auto& side = chunk.sides[l];
      multiply_row(round_rows(next.in) * slots, errors[l], side.slope, any);
      walk.template answer<true>(next, chunk.anchor, any, errors[l + 1]);
      walk.write(next, any, chunk.sides[l + 1].errors_by_token, anchor);
      multiply_row(next.in * slots, errors[l], side.bend, errors[l]);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      errors[last][i] *= 2;
      any[i] = -errors[last][i];
    }
    walk.store(chunk, any, walk.in.e, grad.v);
    for (int64_t l = last; l >= 0; l--) {
      const Layer& layer = walk.layers[l];
      const auto& side = chunk.sides[l];
      if (l < last) {
#pragma omp simd
        for (int64_t i = 0; i < layer.out * slots; i++) errors[l][i] += inputs[l + 1][i] * side.slope[i];
      }
      walk.template answer_back<true>(layer, chunk.anchor, errors[l], inputs[l]);
      transpose(layer.out, slots, errors[l], slots, by_token[l], layer.row);
      walk.write(layer, side.inputs, by_token[l], anchor);
    }
    walk.store(chunk, inputs[0], walk.in.d, grad.k);
  }

  // From the coefficients to the gates, from the last token to the first.
  void mix_gates_back(const Chunk<T>& chunk) {
    const Inputs<T>& in = walk.in;
    T *learns = learned_last, *surprises = surprised_last;  // of the rows of G and G' at the token at hand
    T keep = of_weight_last, past = of_past_last, past_of_past = past_of_past_last;
    transpose(slots, slots, learned, slots, turned, slots);
    for (int64_t t = slots - 1; t >= 0; t--) {
      add_scaled(slots, T(1), turned + t * slots, learns);
      keep += of_weight[t];
      past += of_past[t];
      if (t >= chunk.tokens) continue;
      const int64_t at = walk.offset(chunk.first + t, 1);
      grad.step[at] = grad.momentum[at] = grad.decay[at] = 0;
      if (!in.is_token(walk.row, chunk.first + t)) continue;
      const T *learned_before = chunk.learned + t * slots, *surprised_before = chunk.surprised + t * slots;
      const T kept = 1 - in.decay[at], momentum = in.momentum[at];
      grad.decay[at] = -dot(slots, learns, learned_before) - keep * chunk.of_weight[t] - past * chunk.of_past[t];
      add_scaled(slots, T(1), learns, surprises);
      past_of_past += past;
      grad.step[at] = -surprises[t];
      grad.momentum[at] = dot(slots, surprises, surprised_before) + past_of_past * chunk.past_of_past[t];
      for (int64_t j = 0; j < slots; j++) {
        learns[j] *= kept;
        surprises[j] *= momentum;
      }
      keep *= kept;
      past *= kept;
      past_of_past *= momentum;
    }
  }

  // To the state as the chunk before left it, or to the initial weights.
  void enter_back(int64_t index) {
    T *weights = state, *surprise = state + size, *anchor = state + 2 * size;
    if (walk.in.opens(walk.row, index)) {
      add_scaled(size, T(1), anchor, weights);
      std::fill_n(anchor, size, T(0));
    }
    if (walk.in.restarts(walk.row, index)) {
      add_scaled(size, T(1), weights, initial);
      for (T* none : {weights, surprise}) std::fill_n(none, size, T(0));
    }
  }
};

}  // namespace zoo
