// What both libraries export: the same functions with the same arguments, whether a GPU or a CPU computes. Plain C, no torch.
//
// Pointers are device memory for librema_cuda.so and host memory for librema_cpu.so. `threads` counts CPU threads and is ignored on CUDA;
// `stream` is a cudaStream_t and is ignored on the CPU. Functions return 0, or a code that rema_error explains. Nothing is allocated here.
// Matrices are [rows, columns] with columns next to each other and `stride` elements from a row to the next; sizes are 64-bit throughout.
// dtype: 0 float32, 1 bfloat16, 2 float16.
#pragma once
#include <stdint.h>

#define REMA_API extern "C" __attribute__((visibility("default")))

// "key=value;..." of the build: sources (their hash), target.
REMA_API const char* rema_build();
REMA_API const char* rema_error(int code);

// --- statistics of softmax(logits * scale), scale = 1 / temperature ---------------------------------------------------
// One read of this rank's columns [first_column, first_column + columns) of the vocabulary. part [rows, 4], or [rows, 8] with ref_logits:
// what other ranks need to know (see core.h). Columns of padding are simply not counted in `columns`, which may be 0.
REMA_API int rema_logits_partial(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t columns, int64_t stride,
                                 int64_t ref_stride, const int64_t* labels, int64_t first_column, double scale, float* part, int threads,
                                 void* stream);

// parts [shards, rows, 4 or 8], merged in rank order. All in nats, [rows]: log-probability of the label (NaN where the label is outside
// [0, vocab_size)), entropy, KL(softmax(logits) || softmax(ref_logits)) (with_ref only). norms [rows, 2 or 4]: what the gradient needs.
REMA_API int rema_logits_finish(const float* parts, int with_ref, int64_t shards, int64_t rows, const int64_t* labels, int64_t vocab_size,
                                double scale, float* logprobs, float* entropy, float* kl, float* norms, int threads, void* stream);

// Gradient of sum(grad_logprobs * logprobs + grad_entropy * entropy + grad_kl * kl) with respect to this rank's logits; any of the three
// may be null. grad may be the logits themselves. Columns from `columns` to `width` are padding and get 0. A row whose incoming gradients
// are all 0 gets 0 without being read.
REMA_API int rema_logits_grad(const void* logits, const void* ref_logits, void* grad, int dtype, int64_t rows, int64_t columns, int64_t width,
                              int64_t stride, int64_t ref_stride, int64_t grad_stride, const int64_t* labels, int64_t first_column,
                              double scale, const float* norms, const float* entropy, const float* kl, const float* grad_logprobs,
                              const float* grad_entropy, const float* grad_kl, int threads, void* stream);

// --- advantages over packed traces, [tokens] --------------------------------------------------------------------------
// The recurrence of algorithm/gae.py. Sums are float64 inside. mask: 1 for an own token. scratch: rema_gae_scratch(tokens) bytes.
// A token's reward is rewards - kl_coef * KL of its logprobs from ref_logprobs by kl_estimator (1 k1, 2 k2, 3 k3); null ref_logprobs: no KL.
REMA_API int64_t rema_gae_scratch(int64_t tokens);
REMA_API int rema_gae(const float* rewards, const float* values, const float* logprobs, const float* ref_logprobs, int kl_estimator,
                      double kl_coef, const int64_t* turn_ids, const int64_t* trace_ids, const uint8_t* mask,
                      int64_t tokens, double discount, double gae_lambda, double turn_discount, double turn_lambda, float* advantages,
                      float* returns, void* scratch, int threads, void* stream);

// moments [3]: how many values the mask keeps, their mean, the sum of their squared distances from it. weights (null: 1 each): how often
// each counts.
REMA_API int64_t rema_moments_scratch(int64_t tokens);
REMA_API int rema_moments(const float* values, const uint8_t* mask, const float* weights, int64_t tokens, double* moments, void* scratch, int threads,
                          void* stream);
// moments [shards, 3], merged in order. out = (value - mean) / sqrt(variance + eps), 0 where the mask is 0. out may be values.
REMA_API int rema_whiten(const float* values, const uint8_t* mask, int64_t tokens, const double* moments, int64_t shards, double eps,
                         float* out, int threads, void* stream);

// --- advantages within groups, [traces] ---------------------------------------------------------------------------------
// Of algorithm/advantage.py: estimator 0 GRPO, 1 Dr.GRPO, 2 RLOO. group_ids: any numbers, in any order. scratch: rema_groups_scratch(traces).
REMA_API int64_t rema_groups_scratch(int64_t traces);
REMA_API int rema_groups(const float* rewards, const int64_t* group_ids, int64_t traces, int estimator, double eps, float* advantages,
                         void* scratch, int threads, void* stream);

// --- the clipped policy loss over packed traces, [tokens] ---------------------------------------------------------------
// Of algorithm/losses.py. starts [units + 1], from 0 to tokens: where the turns (or traces) begin that share a ratio; null: every token has
// its own. A unit's tokens are those between its start and the next whose mask is 1. arithmetic: 1 for the mean of the ratios, 0 for the
// geometric one. dual_clip inf: none. kl_estimator: 0 none (ref_logprobs null), 1 k1, 2 k2, 3 k3, 4 exact: ref_logprobs are the KL itself.
// entropy may be null.
// loss [1]. sums [11]: weighted policy loss, KL and entropy; tokens, units, clipped and dual-clipped units, sum of the units' ratios; nats of
// KL(old || new) by k3, of the KL to the reference, of entropy, summed over tokens. grad_logprobs, grad_kl (null but for exact), grad_entropy
// (null where entropy_coef is 0): d loss, 0 where the mask is 0. scratch: rema_policy_loss_scratch(units, tokens) bytes.
REMA_API int64_t rema_policy_loss_scratch(int64_t units, int64_t tokens);
REMA_API int rema_policy_loss(const float* logprobs, const float* old_logprobs, const float* advantages, const float* weights,
                              const float* ref_logprobs, const float* entropy, const uint8_t* mask, const int64_t* starts, int64_t units,
                              int64_t tokens, int arithmetic, double clip_low, double clip_high, double dual_clip, double log_ratio_cap,
                              int kl_estimator, double kl_coef, double entropy_coef, float* loss, double* sums, float* grad_logprobs,
                              float* grad_kl, float* grad_entropy, void* scratch, int threads, void* stream);
