// The neural memory on a CPU, chunk by chunk; the algebra is that of `chunked.py`. In a chunk, a layer with the weights
// M and the surprise S answers each token t, and leaves
//
//   y_t = a_t x_t M + b_t x_t S + sum_{j<=t} G_tj (x_t . X_j) E_j
//   M' = a M + b S + sum_j G_j X_j^T E_j     S' = b' S + sum_j G'_j X_j^T E_j     a, b, G, b', G' of the last token
//
// with coefficients made of the gates alone, the minus of a step included. X and E are the two sides of the gradients
// at the anchor Z: what the layer gets of a key, and what the loss says of its answer,
//
//   X_first = K      U = X Z      X_next = silu(U)      E_last = 2 (U - V)      E = (E_next Z_next^T) * silu'(U)
//
// A single token, as decoding has it, takes the recurrence itself.
//
//   native_walk.h         the way forth along the chunks, which the backward takes too
//   native_walk_back.h    the way back
//
// Letters: b batch, t tokens, h heads, d key, e value, w weights of a memory, c slots of a chunk, l layer; in a chunk,
// t a token that reads and j one that has written.
#include "native_walk_back.h"

namespace {

using namespace zoo;

template <typename T>
struct Forward {
  Walk<T> walk;
  Chunk<T> chunk;
  T* state;

  Forward(const Inputs<T>& in, Arena<T>& arena)
      : walk(in, arena), chunk(walk.take_chunk(arena)), state(arena.take(3 * walk.size)) {}

  void run(int64_t index, T* y, T* end_weights, T* end_surprise, T* end_anchor) {
    walk.load_state(index, walk.in.weights, walk.in.surprise, walk.in.anchor, state);
    for (int64_t n = 0; n < walk.in.chunks(); n++) walk.advance(chunk, n, state, y);
    walk.store_state(index, state, end_weights, end_surprise, end_anchor);
  }
};

// One token, each weight read and written once.
template <typename T>
struct Step {
  const Inputs<T>& in;
  std::vector<Layer> layers;
  std::vector<T*> inputs, errors, slope;  // of each layer: X, E, silu'(U)
  T *answers, *x;

  Step(const Inputs<T>& in, Arena<T>& arena) : in(in), layers(layers_of(in)) {
    const int64_t widest = std::max({in.d, in.e, in.hidden});
    for (auto* sides : {&inputs, &errors, &slope}) {
      for (size_t l = 0; l < layers.size(); l++) sides->push_back(arena.take(widest));
    }
    for (T** any : {&answers, &x}) *any = arena.take(widest);
  }

  void run(int64_t index, T* y, T* end_weights, T* end_surprise, T* end_anchor) const {
    const int64_t row = index / in.h, depth = layers.size();
    const bool is_token = in.is_token(row, 0);
    const T gain = is_token ? 1 : 0, rate = is_token ? -in.step[index] : T(0);
    const T momentum = is_token ? in.momentum[index] : T(1), keep = is_token ? 1 - in.decay[index] : T(1);
    const T* anchor = (in.opens(row, 0) ? in.weights : in.anchor) + index * in.w;
    differentiate(anchor, in.k + index * in.d, in.v + index * in.e);
    std::copy_n(anchor, in.w, end_anchor + index * in.w);
    std::copy_n(in.q + index * in.d, in.d, x);
    for (int64_t l = 0, at = index * in.w; l < depth; l++) {
      const int64_t out = layers[l].out;
      const T* __restrict__ error = errors[l];
      T* __restrict__ sum = l + 1 < depth ? answers : y + index * in.e;
      std::fill_n(sum, out, T(0));
      for (int64_t i = 0; i < layers[l].in; i++, at += out) {
        const T *weights = in.weights + at, *surprise = in.surprise + at;
        T *learned = end_weights + at, *surprised = end_surprise + at;
        const T write = rate * inputs[l][i], read = x[i];
#pragma omp simd
        for (int64_t j = 0; j < out; j++) {
          surprised[j] = momentum * surprise[j] + write * error[j];
          learned[j] = keep * weights[j] + gain * surprised[j];
          sum[j] += read * learned[j];
        }
      }
      if (l + 1 < depth) silu<false>(out, answers, x, slope[l]);
    }
  }

  // Both sides of the gradient.
  void differentiate(const T* anchor, const T* k, const T* v) const {
    const int64_t last = layers.size() - 1;
    std::copy_n(k, in.d, inputs[0]);
    for (int64_t l = 0; l <= last; anchor += layers[l].in * layers[l].out, l++) {
      const int64_t out = layers[l].out;
      std::fill_n(errors[l], out, T(0));
      for (int64_t i = 0; i < layers[l].in; i++) add_scaled(out, inputs[l][i], anchor + i * out, errors[l]);
      if (l < last) silu<false>(out, errors[l], inputs[l + 1], slope[l]);
    }
    for (int64_t j = 0; j < in.e; j++) errors[last][j] = 2 * (errors[last][j] - v[j]);
    for (int64_t l = last; l > 0; l--) {
      const int64_t rows = layers[l].in, out = layers[l].out;
      anchor -= rows * out;
      for (int64_t i = 0; i < rows; i++) errors[l - 1][i] = slope[l - 1][i] * dot(out, anchor + i * out, errors[l]);
    }
  }
};

// Every head of a row is a task of its own; a worker has one `Task`, with its memory, and runs it for some of them.
template <class Task, typename T, typename Run, typename... Given>
void run_heads(const Inputs<T>& in, int64_t threads, const Run& run, const Given&... given) {
  const int64_t heads = in.b * in.h, workers = std::max<int64_t>(1, std::min(threads, heads));
  Arena<T> counted{nullptr};
  Task(in, given..., counted);
  Scratch<T> memory(workers * counted.used);
  memory.zero(workers * counted.used);  // what pads the matrices stays 0
  Arena<T> arena{memory};
  std::vector<Task> tasks;
  tasks.reserve(workers);
  for (int64_t worker = 0; worker < workers; worker++) tasks.emplace_back(in, given..., arena);
#pragma omp parallel for num_threads(workers) schedule(static) if (heads * in.t * in.w > 1 << 16)
  for (int64_t worker = 0; worker < workers; worker++) {
    for (int64_t index = worker; index < heads; index += workers) run(tasks[worker], index);
  }
}

template <typename T>
void forward(const Inputs<T>& in, T* y, T* end_weights, T* end_surprise, T* end_anchor, int64_t threads) {
  const auto run = [&](auto& task, int64_t index) { task.run(index, y, end_weights, end_surprise, end_anchor); };
  if (in.t == 1 && !in.reset) return run_heads<Step<T>>(in, threads, run);
  run_heads<Forward<T>>(in, threads, run);
}

template <typename T>
void backward(const Inputs<T>& in, const Gradients<T>& grad, int64_t threads) {
  const int64_t memories = in.h * in.w;
  Scratch<T> scratch(grad.initial ? in.b * memories : 0);
  T* initial = grad.initial ? (T*)scratch : nullptr;  // of every row
  run_heads<Backward<T>>(in, threads, [&](auto& task, int64_t index) { task.run(index, initial); }, grad);
  if (!initial) return;
  std::fill_n(grad.initial, memories, T(0));
  for (int64_t row = 0; row < in.b; row++) add_scaled(memories, T(1), initial + row * memories, grad.initial);
}

}  // namespace

#define NAMES                                                                                                          \
  b, t, h, d, e, w, hidden, width, q, k, v, step, momentum, decay, weights, surprise, anchor, initial, real, refresh,  \
      reset

#define INPUTS(T)                                                                                                      \
  int64_t b, int64_t t, int64_t h, int64_t d, int64_t e, int64_t w, int64_t hidden, int64_t width, const T *q,         \
      const T *k, const T *v, const T *step, const T *momentum, const T *decay, const T *weights, const T *surprise,   \
      const T *anchor, const T *initial, const bool *real, const bool *refresh, const bool *reset

#define EXPORT(suffix, T)                                                                                              \
  extern "C" int memory_gd_forward_##suffix(INPUTS(T), T* y, T* end_weights, T* end_surprise, T* end_anchor,           \
                                            int64_t threads) {                                                         \
    const Inputs<T> in = {NAMES};                                                                                      \
    ZOO_STATUS(forward(in, y, end_weights, end_surprise, end_anchor, threads))                                         \
  }                                                                                                                    \
  extern "C" int memory_gd_backward_##suffix(INPUTS(T), const T* y, const T* end_weights, const T* end_surprise,       \
                                             const T* end_anchor, T* grad_q, T* grad_k, T* grad_v, T* grad_step,       \
                                             T* grad_momentum, T* grad_decay, T* grad_weights, T* grad_surprise,       \
                                             T* grad_anchor, T* grad_initial, int64_t threads) {                       \
    const Inputs<T> in = {NAMES};                                                                                      \
    const Gradients<T> grad = {y, end_weights, end_surprise, end_anchor, grad_q, grad_k, grad_v, grad_step,            \
                               grad_momentum, grad_decay, grad_weights, grad_surprise, grad_anchor, grad_initial};     \
    ZOO_STATUS(backward(in, grad, threads))                                                                            \
  }

EXPORT(f32, float)
EXPORT(f64, double)
