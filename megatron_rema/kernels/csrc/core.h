// The arithmetic of every kernel, written once: nvcc compiles it for cuda.cu, a C++ compiler for cpu.cpp.
// Functions of single elements and of partial results that can be merged; no threads, no memory, no torch.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define REMA_HD __host__ __device__ __forceinline__
#else
#define REMA_HD inline __attribute__((always_inline))
#endif

namespace rema {

// --- numbers in memory ------------------------------------------------------------------------------------------------

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

REMA_HD uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
REMA_HD float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

REMA_HD float load(const float* p) { return *p; }
REMA_HD float load(const bf16* p) { return from_bits(uint32_t(p->bits) << 16); }
REMA_HD float load(const f16* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#else
  const uint32_t magnitude = p->bits & 0x7fffu;  // the exponent is rebiased by a product, which is exact for subnormals too
  uint32_t u = bits_of(from_bits(magnitude << 13) * from_bits(0x77800000u));
  u = magnitude >= 0x7c00u ? (u | 0x7f800000u) : u;
  return from_bits(u | uint32_t(p->bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest even; NaN stays NaN.
REMA_HD void store(float* p, float x) { *p = x; }
REMA_HD void store(bf16* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t u = bits_of(x), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  p->bits = uint16_t(((u & 0x7fffffffu) > 0x7f800000u ? (u | 0x400000u) : rounded) >> 16);
#endif
}
REMA_HD void store(f16* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;    // rebias by -112, round half to even
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;         // the adder rounds at 2^-24
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  p->bits = uint16_t(half | sign);
#endif
}

// --- base 2 -----------------------------------------------------------------------------------------------------------
// Exponents are taken in base 2 and the temperature is folded into the change of base: z = logit * c, c = scale * log2(e).

constexpr double LN2 = 0.6931471805599453;

// Rounded once: an error of c is an error of the temperature, which no sum averages out.
REMA_HD float exponent_of(double scale) { return float(scale * 1.4426950408889634); }

// 2^x for x up to about 0; 0 below 2^-126; NaN for NaN. On the CPU a polynomial that a compiler can turn into vector code (Cephes exp2f).
REMA_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the last bits of the sum are the nearest integer
  const float r = clamped - (shifted - 12582912.0f);
  float y = 1.535336188e-4f;
  y = y * r + 1.339887440e-3f;
  y = y * r + 9.618437357e-3f;
  y = y * r + 5.550332471e-2f;
  y = y * r + 2.402264791e-1f;
  y = y * r + 6.931472029e-1f;
  y = y * r + 1.0f;
  y *= from_bits((bits_of(shifted) - 0x4b400000u + 127u) << 23);
  return x < -126.0f ? 0.0f : y;
#endif
}

// e^x within 2 units of the last place; inf above about 88.7, 0 below about -104; NaN for NaN. On the CPU Cephes expf, as vector code.
REMA_HD float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float limited = x > 89.0f ? 89.0f : (x < -104.0f ? -104.0f : x);
  const float shifted = limited * 1.44269504f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = fmaf(k, 2.12194440e-4f, fmaf(k, -0.693359375f, limited));  // ln 2 in two parts: the first has no rounding
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t whole = int32_t(bits_of(shifted) - 0x4b400000u), half = whole >> 1;  // 2^whole alone may be no number
  return y * from_bits(uint32_t(half + 127) << 23) * from_bits(uint32_t(whole - half + 127) << 23);
#endif
}

// Differences of exponents, -inf made finite: 2^-10000 is 0 like 2^-inf, but 0 * -10000 is 0 and not NaN. NaN passes.
REMA_HD float finite(float d) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, 0fC61C4000;" : "=f"(y) : "f"(d));
  return y;
#else
  return d < -1e4f ? -1e4f : d;
#endif
}

// The larger one. A NaN may be lost here: the sums carry it.
REMA_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return b > a ? b : a;
#endif
}

REMA_HD float reference_point(float max) { return max == -INFINITY ? 0.0f : max; }

// --- one distribution -------------------------------------------------------------------------------------------------
// max m of z, s = sum 2^(z - m), u = sum 2^(z - m) (z - m). Then, in nats,
//   logprob of z_a = ln 2 (z_a - m - log2 s)          entropy = ln 2 (log2 s - u / s)

struct Stats { float m, s, u; };

REMA_HD Stats no_stats() { return {-INFINITY, 0.0f, 0.0f}; }

// Into plain sums, which a compiler keeps in the lanes of a vector.
REMA_HD void add(float& s, float& u, float logit, float c, float base) {
  const float d = finite(fmaf(logit, c, -base)), e = exp2_of(d);
  s += e;
  u += e * d;
}

// The same sums about another maximum.
REMA_HD void move_to(Stats& t, float m) {
  const float d = t.m == m ? 0.0f : finite(t.m - m), factor = exp2_of(d);
  t.u = factor * (t.u + t.s * d);
  t.s *= factor;
  t.m = m;
}

REMA_HD Stats merge(Stats a, Stats b) {
  const float m = larger(a.m, b.m);
  move_to(a, m);
  move_to(b, m);
  return {m, a.s + b.s, a.u + b.u};
}

template <int K> REMA_HD void add_all(Stats& t, const float* logits, float c) {
  float top = logits[0];
  for (int k = 1; k < K; ++k) top = larger(top, logits[k]);
  move_to(t, larger(t.m, c * top));
  const float base = reference_point(t.m);
  for (int k = 0; k < K; ++k) add(t.s, t.u, logits[k], c, base);
}

// --- two distributions ------------------------------------------------------------------------------------------------
// p from logits, q from reference logits (y, mq, sq likewise): w = sum 2^(z - m) ((z - m) - (y - mq)), and
//   KL(p || q) = ln 2 (w / s - log2 s + log2 sq)
// Differences before products: sum p (z - y) would lose the digits that z and y have in common.

struct PairStats { Stats p; float w, mq, sq; };

REMA_HD PairStats no_pair_stats() { return {no_stats(), 0.0f, -INFINITY, 0.0f}; }

REMA_HD void add(float& s, float& u, float& w, float& sq, float logit, float ref_logit, float c, float base_p, float base_q) {
  const float d = finite(fmaf(logit, c, -base_p)), e = exp2_of(d);
  const float f = fmaf(ref_logit, c, -base_q), term = e * (d - f);
  s += e;
  u += e * d;
  w += e == 0.0f ? 0.0f : term;  // p = 0 counts 0 whatever q is; q = 0 < p gives +inf, as it should
  sq += exp2_of(finite(f));
}

REMA_HD void move_to(PairStats& t, float mp, float mq) {
  const float dp = t.p.m == mp ? 0.0f : finite(t.p.m - mp), dq = t.mq == mq ? 0.0f : finite(t.mq - mq);
  const float factor = exp2_of(dp), moved = factor * (t.w + t.p.s * (dp - dq));
  t.w = factor == 0.0f ? 0.0f : moved;
  t.sq *= exp2_of(dq);
  t.mq = mq;
  move_to(t.p, mp);
}

REMA_HD PairStats merge(PairStats a, PairStats b) {
  const float mp = larger(a.p.m, b.p.m), mq = larger(a.mq, b.mq);
  move_to(a, mp, mq);
  move_to(b, mp, mq);
  return {{mp, a.p.s + b.p.s, a.p.u + b.p.u}, a.w + b.w, mq, a.sq + b.sq};
}

template <int K> REMA_HD void add_all(PairStats& t, const float* logits, const float* ref_logits, float c) {
  float top = logits[0], top_q = ref_logits[0];
  for (int k = 1; k < K; ++k) top = larger(top, logits[k]), top_q = larger(top_q, ref_logits[k]);
  move_to(t, larger(t.p.m, c * top), larger(t.mq, c * top_q));
  const float base_p = reference_point(t.p.m), base_q = reference_point(t.mq);
  for (int k = 0; k < K; ++k) add(t.p.s, t.p.u, t.w, t.sq, logits[k], ref_logits[k], c, base_p, base_q);
}

// --- what travels between ranks: [4] m, s, u, label's logit (-inf where another rank has it), or [8] with w, mq, sq, 0 -----------

REMA_HD void pack(float* part, Stats t, float label_logit) { part[0] = t.m, part[1] = t.s, part[2] = t.u, part[3] = label_logit; }
REMA_HD void pack(float* part, PairStats t, float label_logit) {
  pack(part, t.p, label_logit);
  part[4] = t.w, part[5] = t.mq, part[6] = t.sq, part[7] = 0.0f;
}
REMA_HD Stats unpack(const float* part) { return {part[0], part[1], part[2]}; }
REMA_HD PairStats unpack_pair(const float* part) { return {unpack(part), part[4], part[5], part[6]}; }

struct RowResult { float logprob, entropy, kl; };

// Row `row` of parts [shards, rows, width], merged in rank order. norms: m, log2 s (, mq, log2 sq): apart, because their sum would round
// at the size of the logits.
REMA_HD RowResult finish_row(const float* parts, int with_ref, int64_t shards, int64_t rows, int64_t row, int64_t label, int64_t vocab_size,
                             float c, float* norms) {
  const int width = with_ref ? 8 : 4;
  PairStats t = no_pair_stats();
  float label_logit = -INFINITY;
  for (int64_t shard = 0; shard < shards; ++shard) {
    const float* part = parts + (shard * rows + row) * width;
    if (with_ref) t = merge(t, unpack_pair(part)); else t.p = merge(t.p, unpack(part));
    label_logit = larger(label_logit, part[3]);
  }
  // One row, one number each: float64 costs nothing here and leaves one rounding.
  const double log_s = log2(double(t.p.s));
  norms[0] = t.p.m, norms[1] = float(log_s);
  RowResult result;
  result.logprob = float(LN2 * (double(label_logit) * c - t.p.m - log_s));
  result.logprob = result.logprob > 0.0f ? 0.0f : result.logprob;  // a rounding above 0 is no probability; NaN passes
  if (label < 0 || label >= vocab_size) result.logprob = NAN;
  result.entropy = float(LN2 * (log_s - double(t.p.u) / t.p.s));
  result.kl = 0.0f;
  if (with_ref) {
    const double log_sq = log2(double(t.sq));
    norms[2] = t.mq, norms[3] = float(log_sq);
    result.kl = float(LN2 * (double(t.w) / t.p.s - log_s + log_sq));
  }
  return result;
}

// --- gradient ---------------------------------------------------------------------------------------------------------
//   d logprob_a / d logit_j = scale ([j = a] - p_j)           d entropy / d logit_j = -scale p_j (logprob_j + entropy)
//   d KL / d logit_j = scale p_j (logprob_j - logprob_q_j - KL)

struct RowGrad {
  float c, scale, m, log_s, mq, log_sq;      // of the distributions
  float logprob, entropy, kl;                // incoming gradients
  float entropy_value, kl_value;
};

REMA_HD float grad_of(const RowGrad& g, float logit) {
  const float d = finite(fmaf(logit, g.c, -g.m) - g.log_s);
  return -g.scale * exp2_of(d) * (g.logprob + g.entropy * (float(LN2) * d + g.entropy_value));
}

REMA_HD float grad_of(const RowGrad& g, float logit, float ref_logit) {
  const float d = finite(fmaf(logit, g.c, -g.m) - g.log_s), p = exp2_of(d);
  const float f = fmaf(ref_logit, g.c, -g.mq) - g.log_sq;
  const float slope = g.logprob + g.entropy * (float(LN2) * d + g.entropy_value) - g.kl * (float(LN2) * (d - f) - g.kl_value);
  return p == 0.0f ? 0.0f : -g.scale * p * slope;  // q may be 0 there too, and 0 * inf is NaN; a NaN row has no p of 0
}

REMA_HD RowGrad row_grad(int64_t row, bool with_ref, double scale, const float* norms, const float* entropy, const float* kl,
                         const float* grad_logprobs, const float* grad_entropy, const float* grad_kl) {
  norms += row * (with_ref ? 4 : 2);
  RowGrad g;
  g.c = exponent_of(scale), g.scale = float(scale);
  g.m = norms[0], g.log_s = norms[1], g.mq = with_ref ? norms[2] : 0.0f, g.log_sq = with_ref ? norms[3] : 0.0f;
  g.logprob = grad_logprobs ? grad_logprobs[row] : 0.0f;
  g.entropy = grad_entropy ? grad_entropy[row] : 0.0f;
  g.kl = grad_kl ? grad_kl[row] : 0.0f;
  g.entropy_value = entropy[row], g.kl_value = grad_kl ? kl[row] : 0.0f;
  return g;
}

REMA_HD bool is_zero(const RowGrad& g) { return g.logprob == 0.0f && g.entropy == 0.0f && g.kl == 0.0f; }

// --- estimates of KL(policy || reference), algorithm/kl.py: x = log reference - log policy ------------------------------

enum { KL_NONE, KL_K1, KL_K2, KL_K3, KL_EXACT };
constexpr float KL_CAP = 20.0f;

// e^x - 1 - x; the series where e^x - 1 would lose the digits that count
REMA_HD float k3_of(float x) {
  float y = 2.50521084e-8f;
  y = y * x + 2.75573192e-7f;
  y = y * x + 2.75573192e-6f;
  y = y * x + 2.48015873e-5f;
  y = y * x + 1.98412698e-4f;
  y = y * x + 1.38888889e-3f;
  y = y * x + 8.33333333e-3f;
  y = y * x + 4.16666667e-2f;
  y = y * x + 1.66666667e-1f;
  y = y * x + 0.5f;
  const float far = exp_of(x) - 1.0f - x;
  return fabsf(x) < 1.0f ? y * x * x : far;
}

REMA_HD float kl_of(int estimator, float x) {
  const float k3 = k3_of(x > KL_CAP ? KL_CAP : x);
  return estimator == KL_K1 ? -x : (estimator == KL_K2 ? 0.5f * x * x : k3);
}
// d kl / d log policy; of k2 and k3, the ones that are used as a loss
REMA_HD float kl_slope(int estimator, float x) {
  if (estimator == KL_EXACT) return 0.0f;  // it hangs on logits that the log-probability does not know
  const float k3 = x > KL_CAP ? 0.0f : -(k3_of(x) + x);
  return estimator == KL_K2 ? -x : k3;
}

// --- the clipped policy loss, algorithm/losses.py -----------------------------------------------------------------------

struct LossRules {
  float low, high, dual, cap;  // bounds of the ratio; dual inf: none
  double kl_coef, entropy_coef;
  int kl, arithmetic;
};

REMA_HD LossRules loss_rules(int arithmetic, double clip_low, double clip_high, double dual_clip, double log_ratio_cap, int kl_estimator,
                             double kl_coef, double entropy_coef) {
  return {float(1.0 - clip_low), float(1.0 + clip_high), float(dual_clip), float(log_ratio_cap), kl_coef, entropy_coef, kl_estimator, arithmetic};
}

struct TokenLoss { float loss, slope, clipped, dual; };  // slope: d loss / d ratio; the last two are 0 or 1

REMA_HD TokenLoss clipped_loss(const LossRules& k, float ratio, float advantage) {
  const float inside = ratio < k.low ? k.low : (ratio > k.high ? k.high : ratio);
  const float plain = -advantage * ratio, clipped = -advantage * inside, bound = -advantage * k.dual;
  const bool is_clipped = clipped > plain;
  const float loss = is_clipped ? clipped : plain;
  const bool is_dual = advantage < 0.0f && loss > bound;
  return {is_dual ? bound : loss, is_clipped || is_dual ? 0.0f : -advantage, is_clipped ? 1.0f : 0.0f, is_dual ? 1.0f : 0.0f};
}

REMA_HD float capped_exp(const LossRules& k, float delta) { return exp_of(delta > k.cap ? k.cap : delta); }

// Of the tokens of one unit (what shares a ratio: a turn, a trace): how many, and the sum of their log-ratios or capped ratios.
struct Unit { double n, sum; };
REMA_HD Unit no_unit() { return {0.0, 0.0}; }
REMA_HD Unit merge(Unit a, Unit b) { return {a.n + b.n, a.sum + b.sum}; }

REMA_HD float unit_ratio(const LossRules& k, Unit unit) {
  const float mean = float(unit.sum / unit.n);
  return k.arithmetic ? mean : capped_exp(k, mean);
}
// d ratio of the unit / d log-probability of a token with log-ratio `delta`
REMA_HD float ratio_slope(const LossRules& k, Unit unit, float ratio, float delta) {
  const float mean = float(unit.sum / unit.n), at = k.arithmetic ? delta : mean, value = k.arithmetic ? capped_exp(k, delta) : ratio;
  return at > k.cap ? 0.0f : value / float(unit.n);
}

// In the order of abi.h; `pull` is the unit's own: sum of weight * d loss / d ratio.
struct LossSums { double policy, kl, entropy, tokens, units, clipped, dual, ratio, kl_old, kl_nats, entropy_nats, pull; };
constexpr int NUM_LOSS_SUMS = 11;

REMA_HD LossSums no_loss_sums() { return {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}; }
REMA_HD LossSums merge(const LossSums& a, const LossSums& b) {
  return {a.policy + b.policy, a.kl + b.kl, a.entropy + b.entropy, a.tokens + b.tokens, a.units + b.units, a.clipped + b.clipped,
          a.dual + b.dual, a.ratio + b.ratio, a.kl_old + b.kl_old, a.kl_nats + b.kl_nats, a.entropy_nats + b.entropy_nats, a.pull + b.pull};
}
REMA_HD void store_sums(double* out, const LossSums& s) {
  out[0] = s.policy, out[1] = s.kl, out[2] = s.entropy, out[3] = s.tokens, out[4] = s.units, out[5] = s.clipped;
  out[6] = s.dual, out[7] = s.ratio, out[8] = s.kl_old, out[9] = s.kl_nats, out[10] = s.entropy_nats;
}
REMA_HD LossSums load_sums(const double* in) {
  return {in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10], 0.0};
}

REMA_HD float total_loss(const LossRules& k, const LossSums& s) {
  double loss = s.policy;
  if (k.kl_coef != 0.0) loss += k.kl_coef * s.kl;  // a term that was not asked for does not count, not even as NaN
  if (k.entropy_coef != 0.0) loss -= k.entropy_coef * s.entropy;
  return float(loss);
}

// The packed columns of a batch; for KL_EXACT, ref_logprobs are the KL itself. What there is none of is the log-probabilities again (kl KL_NONE, entropy_coef 0), so that loads need no test.
struct LossTokens {
  const float *logprobs, *old_logprobs, *advantages, *weights, *ref_logprobs, *entropy;
  const uint8_t* mask;
};

REMA_HD float log_ratio_at(const LossTokens& tokens, int64_t t) { return tokens.logprobs[t] - tokens.old_logprobs[t]; }

// One token's part of the sums, `share` of its unit (1 / tokens). Chosen by the mask, not multiplied: no NaN comes in from outside it.
REMA_HD LossSums loss_sums_of(const LossRules& k, const LossTokens& tokens, int64_t t, float ratio, float share) {
  const bool own = tokens.mask[t] != 0;
  const float moved = log_ratio_at(tokens, t), away = tokens.ref_logprobs[t] - tokens.logprobs[t];
  const TokenLoss token = clipped_loss(k, own ? ratio : 1.0f, own ? tokens.advantages[t] : 0.0f);
  const double weight = own ? tokens.weights[t] : 0.0f, part = own ? share : 0.0f;
  const float given = k.kl == KL_EXACT ? tokens.ref_logprobs[t] : 0.0f, estimate = k.kl == KL_EXACT ? given : kl_of(k.kl, away);
  const double kl = own && k.kl != KL_NONE ? estimate : 0.0f, entropy = own ? tokens.entropy[t] : 0.0f;
  const double kl_old = own ? k3_of(moved > KL_CAP ? KL_CAP : moved) : 0.0f;
  return {weight * token.loss, weight * kl, weight * entropy, own ? 1.0 : 0.0, part, part * token.clipped, part * token.dual,
          own ? part * ratio : 0.0, kl_old, kl, entropy, weight * token.slope};
}

// d (policy term + kl_coef * KL term) / d log-probability of token t; `pull` of its unit times d ratio / d log-probability comes in.
REMA_HD float loss_grad_of(const LossRules& k, const LossTokens& tokens, int64_t t, double policy_grad) {
  const double kl = k.kl_coef * tokens.weights[t] * kl_slope(k.kl, tokens.ref_logprobs[t] - tokens.logprobs[t]);
  const double grad = k.kl_coef == 0.0 ? policy_grad : policy_grad + kl;
  return tokens.mask[t] ? float(grad) : 0.0f;
}

// --- advantages within groups, algorithm/advantage.py -------------------------------------------------------------------

enum { GRPO, DR_GRPO, RLOO };

REMA_HD float group_advantage_of(int estimator, double reward, double n, double mean, double squares, double eps) {
  const double centred = reward - mean, others = n > 1.0 ? n - 1.0 : 1.0;
  if (estimator == GRPO) return float(centred / (sqrt(squares / others) + eps));
  return float(estimator == RLOO ? centred * (n / others) : centred);
}

// --- generalised advantages -------------------------------------------------------------------------------------------
// A run of neighbouring tokens as a map of what follows it: with X what the next own token adds, the first own token's advantage is
// c + p X. Runs join associatively. A trace's end closes a run (`open` 0): nothing behind it is multiplied in, so no NaN crosses it.

struct Discounts { double discount, gae_lambda, turn_discount, turn_lambda; };

struct Run {
  double c, p, v;                                           // v: value at the first own token
  int64_t first_turn, first_trace, last_turn, last_trace;   // of the first and the last own token
  int32_t live, open;                                       // live 0: no own token
};

// The packed columns; ref_logprobs null: no KL in the reward
struct Tokens {
  const float *rewards, *values, *logprobs, *ref_logprobs;
  const int64_t *turn_ids, *trace_ids;
  const uint8_t* mask;
  int64_t count;
  double kl_coef;
  int kl;
};

REMA_HD double reward_at(const Tokens& tokens, int64_t t) {
  if (tokens.ref_logprobs == nullptr) return tokens.rewards[t];
  return tokens.rewards[t] - tokens.kl_coef * kl_of(tokens.kl, tokens.ref_logprobs[t] - tokens.logprobs[t]);
}

REMA_HD Run no_run() { return {0.0, 1.0, 0.0, 0, 0, 0, 0, 0, 1}; }
REMA_HD Run run_of(double reward, double value, int64_t turn, int64_t trace) {
  return {reward - value, 1.0, value, turn, trace, turn, trace, 1, 1};
}

// `a` stands before `b`.
REMA_HD Run join(const Run& a, const Run& b, const Discounts& k) {
  if (!a.live) return b;
  if (!b.live) return a;
  Run r = a;
  r.last_turn = b.last_turn, r.last_trace = b.last_trace;
  if (!a.open) return r;
  if (a.last_trace != b.first_trace) {
    r.p = 0.0, r.open = 0;
    return r;
  }
  const bool same_turn = a.last_turn == b.first_turn;
  const double discount = same_turn ? k.discount : k.turn_discount, decay = discount * (same_turn ? k.gae_lambda : k.turn_lambda);
  r.c = a.c + a.p * (discount * b.v + decay * b.c);
  r.p = a.p * decay * b.p, r.open = b.open;
  return r;
}

// --- moments ----------------------------------------------------------------------------------------------------------

struct Moments { double n, mean, m2; };

REMA_HD Moments no_moments() { return {0.0, 0.0, 0.0}; }
REMA_HD Moments merge(Moments a, Moments b) {  // Chan et al. 1979
  const double n = a.n + b.n, share = n > 0.0 ? b.n / n : 0.0, d = b.mean - a.mean;
  return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.n * share};
}
REMA_HD Moments merge_all(const double* moments, int64_t shards) {
  Moments t = no_moments();
  for (int64_t i = 0; i < shards; ++i) t = merge(t, {moments[3 * i], moments[3 * i + 1], moments[3 * i + 2]});
  return t;
}

// How often value t counts; weights null: every one once.
REMA_HD double weight_at(const uint8_t* mask, const float* weights, int64_t t) {
  const float weight = weights ? weights[t] : 1.0f;
  return mask[t] ? weight : 0.0f;
}

struct Whitening { double mean, scale; };

REMA_HD Whitening whitening_of(Moments t, double eps) { return {t.mean, 1.0 / sqrt(t.m2 / (t.n > 0.0 ? t.n : 1.0) + eps)}; }
REMA_HD float whitened(Whitening w, float x) { return float((x - w.mean) * w.scale); }

}  // namespace rema
