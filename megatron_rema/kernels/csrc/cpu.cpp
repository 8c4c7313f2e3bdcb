// The CPU library: rows over OpenMP threads, columns over vector lanes. Results do not depend on the number of threads.
#include <algorithm>
#include "abi.h"
#include "core.h"

#ifndef REMA_BUILD
#define REMA_BUILD "sources=unknown;target=unknown"
#endif
// One binary for every x86-64 CPU: the loader picks the widest vector unit that is there.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define REMA_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REMA_VECTOR
#endif
#define PARALLEL_FOR _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

using namespace rema;

namespace {

constexpr int64_t BLOCK = 2048;  // columns that are read from memory once and then twice more from the first-level cache
constexpr int64_t MOMENTS_BLOCK = 4096;

template <class T> REMA_HD Stats stats_of(const T* logits, int64_t columns, float c) {
  Stats total = no_stats();
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    const T* x = logits + begin;
    const int64_t n = std::min(BLOCK, columns - begin);
    float top = -INFINITY, s = 0.0f, u = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) top = larger(top, load(x + j));
    const float m = c * top, base = reference_point(m);
#pragma omp simd reduction(+ : s, u)
    for (int64_t j = 0; j < n; ++j) add(s, u, load(x + j), c, base);
    total = merge(total, {m, s, u});
  }
  return total;
}

template <class T> REMA_HD PairStats pair_stats_of(const T* logits, const T* ref_logits, int64_t columns, float c) {
  PairStats total = no_pair_stats();
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    const T *x = logits + begin, *y = ref_logits + begin;
    const int64_t n = std::min(BLOCK, columns - begin);
    float top = -INFINITY, top_q = -INFINITY, s = 0.0f, u = 0.0f, w = 0.0f, sq = 0.0f;
#pragma omp simd reduction(max : top, top_q)
    for (int64_t j = 0; j < n; ++j) top = larger(top, load(x + j)), top_q = larger(top_q, load(y + j));
    const float mp = c * top, mq = c * top_q, base_p = reference_point(mp), base_q = reference_point(mq);
#pragma omp simd reduction(+ : s, u, w, sq)
    for (int64_t j = 0; j < n; ++j) add(s, u, w, sq, load(x + j), load(y + j), c, base_p, base_q);
    total = merge(total, {{mp, s, u}, w, mq, sq});
  }
  return total;
}

template <class T> REMA_HD void grad_row_of(const RowGrad& row, const T* logits, const T* ref_logits, T* grad, int64_t columns) {
  const RowGrad g = row;  // a copy that `grad` cannot point into
  if (ref_logits == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(grad + j, grad_of(g, load(logits + j)));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(grad + j, grad_of(g, load(logits + j), load(ref_logits + j)));
  }
}

// target_clones wants plain functions
#define ROW_FUNCTIONS(T)                                                                                               \
  REMA_VECTOR void row_part(const T* logits, const T* ref_logits, int64_t columns, float c, float label, float* part) { \
    if (ref_logits == nullptr) pack(part, stats_of(logits, columns, c), label);                                         \
    else pack(part, pair_stats_of(logits, ref_logits, columns, c), label);                                              \
  }                                                                                                                    \
  REMA_VECTOR void grad_row(const RowGrad& g, const T* logits, const T* ref_logits, T* grad, int64_t columns) {         \
    grad_row_of(g, logits, ref_logits, grad, columns);                                                                 \
  }
ROW_FUNCTIONS(float)
ROW_FUNCTIONS(bf16)
ROW_FUNCTIONS(f16)

template <class T> void partial(const T* logits, const T* ref_logits, int64_t rows, int64_t columns, int64_t stride, int64_t ref_stride,
                                const int64_t* labels, int64_t first_column, float c, float* part, int threads) {
  PARALLEL_FOR
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = logits + row * stride;
    const int64_t label = labels[row] - first_column;
    const float label_logit = label >= 0 && label < columns ? load(x + label) : -INFINITY;
    row_part(x, ref_logits ? ref_logits + row * ref_stride : nullptr, columns, c, label_logit, part + row * (ref_logits ? 8 : 4));
  }
}

template <class T> void gradient(const T* logits, const T* ref_logits, T* grad, int64_t rows, int64_t columns, int64_t width, int64_t stride,
                                 int64_t ref_stride, int64_t grad_stride, const int64_t* labels, int64_t first_column, double scale,
                                 const float* norms, const float* entropy, const float* kl, const float* grad_logprobs,
                                 const float* grad_entropy, const float* grad_kl, int threads) {
  PARALLEL_FOR
  for (int64_t row = 0; row < rows; ++row) {
    const T *x = logits + row * stride, *y = grad_kl ? ref_logits + row * ref_stride : nullptr;
    T* out = grad + row * grad_stride;
    RowGrad g = row_grad(row, ref_logits != nullptr, scale, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl);
    const int64_t label = labels[row] - first_column;
    if (is_zero(g)) {
      memset(static_cast<void*>(out), 0, width * sizeof(T));
      continue;
    }
    float at_label = 0.0f;
    const bool mine = label >= 0 && label < columns;
    if (mine) at_label = g.scale * g.logprob + (y ? grad_of(g, load(x + label), load(y + label)) : grad_of(g, load(x + label)));
    grad_row(g, x, y, out, columns);
    if (mine) store(out + label, at_label);
    if (width > columns) memset(static_cast<void*>(out + columns), 0, (width - columns) * sizeof(T));
  }
}

constexpr int64_t LOSS_BLOCK = 1024;  // tokens, where every token has its own ratio

#define LOSS_SUMS policy, kl, entropy, own, parts, clipped, dual, ratios, kl_old, kl_nats, entropy_nats, pull
#define ADD_LOSS_SUMS(ratio, share)                                                                                          \
  const LossSums s = loss_sums_of(k, tokens, t, ratio, share);                                                                \
  policy += s.policy, kl += s.kl, entropy += s.entropy, own += s.tokens, parts += s.units, clipped += s.clipped, dual += s.dual, \
      ratios += s.ratio, kl_old += s.kl_old, kl_nats += s.kl_nats, entropy_nats += s.entropy_nats, pull += s.pull

// Tokens that have a ratio each.
REMA_VECTOR LossSums token_losses(const LossRules& rules, const LossTokens& columns, int64_t begin, int64_t end, float* grad) {
  const LossRules k = rules;  // copies that `grad` cannot point into
  const LossTokens tokens = columns;
  double policy = 0.0, kl = 0.0, entropy = 0.0, own = 0.0, parts = 0.0, clipped = 0.0, dual = 0.0, ratios = 0.0, kl_old = 0.0, kl_nats = 0.0,
         entropy_nats = 0.0, pull = 0.0;
#pragma omp simd reduction(+ : LOSS_SUMS)
  for (int64_t t = begin; t < end; ++t) {
    const float delta = log_ratio_at(tokens, t), ratio = capped_exp(k, delta);
    ADD_LOSS_SUMS(ratio, 1.0f);
    grad[t] = loss_grad_of(k, tokens, t, s.pull * (delta > k.cap ? 0.0f : ratio));
  }
  return {LOSS_SUMS};
}

// A unit: tokens that share a ratio.
REMA_VECTOR LossSums unit_losses(const LossRules& rules, const LossTokens& columns, int64_t begin, int64_t end, float* grad) {
  const LossRules k = rules;
  const LossTokens tokens = columns;
  double n = 0.0, sum = 0.0;
#pragma omp simd reduction(+ : n, sum)
  for (int64_t t = begin; t < end; ++t) {
    const float delta = log_ratio_at(tokens, t), value = k.arithmetic ? capped_exp(k, delta) : delta;
    n += tokens.mask[t] ? 1.0 : 0.0, sum += tokens.mask[t] ? value : 0.0f;
  }
  if (n == 0.0) {
    std::fill(grad + begin, grad + end, 0.0f);
    return no_loss_sums();
  }
  const Unit unit = {n, sum};
  const float ratio = unit_ratio(k, unit), share = 1.0f / float(n);
  double policy = 0.0, kl = 0.0, entropy = 0.0, own = 0.0, parts = 0.0, clipped = 0.0, dual = 0.0, ratios = 0.0, kl_old = 0.0, kl_nats = 0.0,
         entropy_nats = 0.0, pull = 0.0;
#pragma omp simd reduction(+ : LOSS_SUMS)
  for (int64_t t = begin; t < end; ++t) {
    ADD_LOSS_SUMS(ratio, share);
  }
#pragma omp simd
  for (int64_t t = begin; t < end; ++t) grad[t] = loss_grad_of(k, tokens, t, pull * ratio_slope(k, unit, ratio, log_ratio_at(tokens, t)));
  return {LOSS_SUMS};
}

template <class Function> int for_dtype(int dtype, Function&& function) {
  if (dtype == 0) function(float{});
  else if (dtype == 1) function(bf16{});
  else if (dtype == 2) function(f16{});
  else return 1;
  return 0;
}

}  // namespace

const char* rema_build() { return REMA_BUILD; }
const char* rema_error(int code) { return code == 0 ? "no error" : "unknown dtype"; }

int rema_logits_partial(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t columns, int64_t stride,
                        int64_t ref_stride, const int64_t* labels, int64_t first_column, double scale, float* part, int threads, void*) {
  return for_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    partial((const T*)logits, (const T*)ref_logits, rows, columns, stride, ref_stride, labels, first_column, exponent_of(scale), part, threads);
  });
}

int rema_logits_finish(const float* parts, int with_ref, int64_t shards, int64_t rows, const int64_t* labels, int64_t vocab_size, double scale,
                       float* logprobs, float* entropy, float* kl, float* norms, int threads, void*) {
  PARALLEL_FOR
  for (int64_t row = 0; row < rows; ++row) {
    const RowResult result = finish_row(parts, with_ref, shards, rows, row, labels[row], vocab_size, exponent_of(scale),
                                        norms + row * (with_ref ? 4 : 2));
    logprobs[row] = result.logprob, entropy[row] = result.entropy;
    if (with_ref) kl[row] = result.kl;
  }
  return 0;
}

int rema_logits_grad(const void* logits, const void* ref_logits, void* grad, int dtype, int64_t rows, int64_t columns, int64_t width,
                     int64_t stride, int64_t ref_stride, int64_t grad_stride, const int64_t* labels, int64_t first_column, double scale,
                     const float* norms, const float* entropy, const float* kl, const float* grad_logprobs, const float* grad_entropy,
                     const float* grad_kl, int threads, void*) {
  return for_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    gradient((const T*)logits, (const T*)ref_logits, (T*)grad, rows, columns, width, stride, ref_stride, grad_stride, labels, first_column,
             scale, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl, threads);
  });
}

int64_t rema_gae_scratch(int64_t) { return 0; }

// Each thread takes a part that ends where a trace ends, so that the sums are those of one thread.
int rema_gae(const float* rewards, const float* values, const float* logprobs, const float* ref_logprobs, int kl_estimator, double kl_coef,
             const int64_t* turn_ids, const int64_t* trace_ids, const uint8_t* mask, int64_t tokens, double discount, double gae_lambda,
             double turn_discount, double turn_lambda, float* advantages, float* returns, void*, int threads, void*) {
  const Tokens packed = {rewards, values, logprobs, ref_logprobs, turn_ids, trace_ids, mask, tokens, kl_coef, kl_estimator};
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, tokens / 4096));
  const auto cut = [&](int64_t part) {
    int64_t at = part == parts ? tokens : tokens * part / parts, before = at - 1;
    while (before >= 0 && !mask[before]) --before;
    if (before < 0) return part == parts ? tokens : int64_t(0);
    for (; at < tokens; ++at) {
      if (mask[at] && trace_ids[at] != trace_ids[before]) break;
      if (mask[at]) before = at;
    }
    return at;
  };
  PARALLEL_FOR
  for (int64_t part = 0; part < parts; ++part) {
    double advantage = 0.0, next_value = 0.0;
    int64_t next_turn = 0, next_trace = 0;
    bool any = false;
    const int64_t first = cut(part);
    for (int64_t t = cut(part + 1) - 1; t >= first; --t) {
      if (!mask[t]) {
        advantages[t] = returns[t] = 0.0f;
        continue;
      }
      const double value = values[t], own = reward_at(packed, t) - value;
      if (any && trace_ids[t] == next_trace) {
        const bool same_turn = turn_ids[t] == next_turn;
        const double g = same_turn ? discount : turn_discount, decay = g * (same_turn ? gae_lambda : turn_lambda);
        advantage = own + (g * next_value + decay * advantage);
      } else {
        advantage = own;
      }
      advantages[t] = float(advantage), returns[t] = float(advantage + value);
      next_value = value, next_turn = turn_ids[t], next_trace = trace_ids[t], any = true;
    }
  }
  return 0;
}

int64_t rema_moments_scratch(int64_t tokens) { return (tokens + MOMENTS_BLOCK - 1) / MOMENTS_BLOCK * int64_t(sizeof(Moments)); }

int rema_moments(const float* values, const uint8_t* mask, const float* weights, int64_t tokens, double* moments, void* scratch, int threads,
                 void*) {
  Moments* blocks = static_cast<Moments*>(scratch);
  const int64_t num_blocks = (tokens + MOMENTS_BLOCK - 1) / MOMENTS_BLOCK;
  PARALLEL_FOR
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * MOMENTS_BLOCK, end = std::min(begin + MOMENTS_BLOCK, tokens);
    double n = 0.0, sum = 0.0, m2 = 0.0;
#pragma omp simd reduction(+ : n, sum)
    for (int64_t t = begin; t < end; ++t) n += weight_at(mask, weights, t), sum += mask[t] ? weight_at(mask, weights, t) * values[t] : 0.0;
    const double mean = n > 0.0 ? sum / n : 0.0;
#pragma omp simd reduction(+ : m2)
    for (int64_t t = begin; t < end; ++t) m2 += mask[t] ? weight_at(mask, weights, t) * (values[t] - mean) * (values[t] - mean) : 0.0;
    blocks[block] = {n, mean, m2};
  }
  const Moments all = merge_all(static_cast<const double*>(scratch), num_blocks);
  moments[0] = all.n, moments[1] = all.mean, moments[2] = all.m2;
  return 0;
}

int rema_whiten(const float* values, const uint8_t* mask, int64_t tokens, const double* moments, int64_t shards, double eps, float* out,
                int threads, void*) {
  const Whitening w = whitening_of(merge_all(moments, shards), eps);
  PARALLEL_FOR
  for (int64_t t = 0; t < tokens; ++t) out[t] = mask[t] ? whitened(w, values[t]) : 0.0f;
  return 0;
}

int64_t rema_groups_scratch(int64_t traces) { return traces * int64_t(sizeof(int64_t)); }

int rema_groups(const float* rewards, const int64_t* group_ids, int64_t traces, int estimator, double eps, float* advantages, void* scratch, int,
                void*) {
  int64_t* order = static_cast<int64_t*>(scratch);
  for (int64_t i = 0; i < traces; ++i) order[i] = i;
  std::sort(order, order + traces, [&](int64_t a, int64_t b) { return group_ids[a] != group_ids[b] ? group_ids[a] < group_ids[b] : a < b; });
  for (int64_t begin = 0, end = 0; begin < traces; begin = end) {
    double sum = 0.0, squares = 0.0;
    for (; end < traces && group_ids[order[end]] == group_ids[order[begin]]; ++end) sum += rewards[order[end]];
    const double n = double(end - begin), mean = sum / n;
    for (int64_t i = begin; i < end; ++i) squares += (rewards[order[i]] - mean) * (rewards[order[i]] - mean);
    for (int64_t i = begin; i < end; ++i) advantages[order[i]] = group_advantage_of(estimator, rewards[order[i]], n, mean, squares, eps);
  }
  return 0;
}

int64_t rema_policy_loss_scratch(int64_t units, int64_t tokens) {
  return std::max(units, (tokens + LOSS_BLOCK - 1) / LOSS_BLOCK) * NUM_LOSS_SUMS * int64_t(sizeof(double));
}

int rema_policy_loss(const float* logprobs, const float* old_logprobs, const float* advantages, const float* weights, const float* ref_logprobs,
                     const float* entropy, const uint8_t* mask, const int64_t* starts, int64_t units, int64_t tokens, int arithmetic,
                     double clip_low, double clip_high, double dual_clip, double log_ratio_cap, int kl_estimator, double kl_coef,
                     double entropy_coef, float* loss, double* sums, float* grad_logprobs, float* grad_kl, float* grad_entropy, void* scratch,
                     int threads, void*) {
  const LossRules k = loss_rules(arithmetic, clip_low, clip_high, dual_clip, log_ratio_cap, kl_estimator, kl_coef, entropy_coef);
  const LossTokens columns = {logprobs, old_logprobs, advantages, weights, ref_logprobs ? ref_logprobs : logprobs,
                              entropy ? entropy : logprobs, mask};
  double* parts = static_cast<double*>(scratch);
  const int64_t count = starts ? units : (tokens + LOSS_BLOCK - 1) / LOSS_BLOCK;
  PARALLEL_FOR
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = starts ? starts[i] : i * LOSS_BLOCK, end = starts ? starts[i + 1] : std::min(begin + LOSS_BLOCK, tokens);
    const LossSums part = starts ? unit_losses(k, columns, begin, end, grad_logprobs) : token_losses(k, columns, begin, end, grad_logprobs);
    store_sums(parts + i * NUM_LOSS_SUMS, part);
    for (int64_t t = begin; t < end && grad_kl; ++t) grad_kl[t] = mask[t] ? float(k.kl_coef * weights[t]) : 0.0f;
    for (int64_t t = begin; t < end && grad_entropy; ++t) grad_entropy[t] = mask[t] ? float(-k.entropy_coef * weights[t]) : 0.0f;
  }
  LossSums all = no_loss_sums();
  for (int64_t i = 0; i < count; ++i) all = merge(all, load_sums(parts + i * NUM_LOSS_SUMS));
  store_sums(sums, all);
  *loss = total_loss(k, all);
  return 0;
}
