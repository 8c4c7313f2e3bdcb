// The CUDA library. Rows over blocks, columns over threads in 16-byte loads; no atomics, so a run repeats itself bit for bit.
// Statically linked runtime: the file loads on a machine without a GPU, where every call then returns a CUDA error.
#include "abi.h"
#include "core.h"

#ifndef REMA_LAUNCH
#include <cuda_runtime.h>
#define REMA_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
#ifndef REMA_BUILD
#define REMA_BUILD "sources=unknown;target=unknown"
#endif

using namespace rema;

namespace {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;  // 16-byte loads in flight per thread

template <class T> struct Vector { static constexpr int SIZE = 16 / sizeof(T); };

__device__ __forceinline__ bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Through memcpy, not through a cast of the elements: reading one type as another is undefined.
template <class T> __device__ __forceinline__ void load_vector(const T* p, float* x) {
  const uint4 words = *reinterpret_cast<const uint4*>(p);
  T elements[Vector<T>::SIZE];
  memcpy(elements, &words, 16);
#pragma unroll
  for (int k = 0; k < Vector<T>::SIZE; ++k) x[k] = load(elements + k);
}
template <class T> __device__ __forceinline__ void store_vector(T* p, const float* x) {
  T elements[Vector<T>::SIZE];
#pragma unroll
  for (int k = 0; k < Vector<T>::SIZE; ++k) store(elements + k, x[k]);
  uint4 words;
  memcpy(&words, elements, 16);
  *reinterpret_cast<uint4*>(p) = words;
}

// Merged over the block, valid in thread 0. Always in the same order.
template <class S> __device__ __forceinline__ S merge_in_warp(S mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    S other;
#pragma unroll
    for (int word = 0; word < int(sizeof(S) / 4); ++word) {
      uint32_t bits;
      memcpy(&bits, reinterpret_cast<const char*>(&mine) + 4 * word, 4);
      bits = __shfl_down_sync(0xffffffffu, bits, distance);
      memcpy(reinterpret_cast<char*>(&other) + 4 * word, &bits, 4);
    }
    mine = merge(mine, other);
  }
  return mine;
}
template <class S> __device__ __forceinline__ S merge_in_block(S mine, S none) {
  __shared__ S of_warp[THREADS / 32];
  mine = merge_in_warp(mine);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) mine = merge_in_warp(threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : none);
  return mine;
}

// --- logits statistics ------------------------------------------------------------------------------------------------

template <class T> __global__ void __launch_bounds__(THREADS)
    partial_kernel(const T* __restrict__ logits, int64_t columns, int64_t stride, const int64_t* __restrict__ labels, int64_t first_column,
                   float c, float* __restrict__ part) {
  constexpr int N = Vector<T>::SIZE;
  const int64_t row = blockIdx.x, thread = threadIdx.x;
  const T* x = logits + row * stride;
  Stats stats = no_stats();
  int64_t done = 0;
  if (is_aligned(x)) {
    constexpr int64_t STEP = int64_t(THREADS) * N;
    for (; done + STEP * UNROLL <= columns; done += STEP * UNROLL) {
      float values[N * UNROLL];
#pragma unroll
      for (int k = 0; k < UNROLL; ++k) load_vector(x + done + k * STEP + thread * N, values + k * N);
      add_all<N * UNROLL>(stats, values, c);
    }
    for (int64_t j = done + thread * N; j + N <= columns; j += STEP) {
      float values[N];
      load_vector(x + j, values);
      add_all<N>(stats, values, c);
    }
    done = columns / N * N;
  }
  for (int64_t j = done + thread; j < columns; j += THREADS) {
    const float value = load(x + j);
    add_all<1>(stats, &value, c);
  }
  stats = merge_in_block(stats, no_stats());
  if (thread == 0) {
    const int64_t label = labels[row] - first_column;
    pack(part + row * 4, stats, label >= 0 && label < columns ? load(x + label) : -INFINITY);
  }
}

template <class T> __global__ void __launch_bounds__(THREADS)
    pair_kernel(const T* __restrict__ logits, const T* __restrict__ ref_logits, int64_t columns, int64_t stride, int64_t ref_stride,
                const int64_t* __restrict__ labels, int64_t first_column, float c, float* __restrict__ part) {
  constexpr int N = Vector<T>::SIZE, PAIRS = UNROLL / 2;
  const int64_t row = blockIdx.x, thread = threadIdx.x;
  const T *x = logits + row * stride, *y = ref_logits + row * ref_stride;
  PairStats stats = no_pair_stats();
  int64_t done = 0;
  if (is_aligned(x) && is_aligned(y)) {
    constexpr int64_t STEP = int64_t(THREADS) * N;
    for (; done + STEP * PAIRS <= columns; done += STEP * PAIRS) {
      float values[N * PAIRS], ref_values[N * PAIRS];
#pragma unroll
      for (int k = 0; k < PAIRS; ++k) {
        load_vector(x + done + k * STEP + thread * N, values + k * N);
        load_vector(y + done + k * STEP + thread * N, ref_values + k * N);
      }
      add_all<N * PAIRS>(stats, values, ref_values, c);
    }
  }
  for (int64_t j = done + thread; j < columns; j += THREADS) {
    const float value = load(x + j), ref_value = load(y + j);
    add_all<1>(stats, &value, &ref_value, c);
  }
  stats = merge_in_block(stats, no_pair_stats());
  if (thread == 0) {
    const int64_t label = labels[row] - first_column;
    pack(part + row * 8, stats, label >= 0 && label < columns ? load(x + label) : -INFINITY);
  }
}

__global__ void __launch_bounds__(THREADS)
    finish_kernel(const float* __restrict__ parts, int with_ref, int64_t shards, int64_t rows, const int64_t* __restrict__ labels,
                  int64_t vocab_size, float c, float* __restrict__ logprobs, float* __restrict__ entropy, float* __restrict__ kl,
                  float* __restrict__ norms) {
  const int64_t row = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (row >= rows) return;
  const RowResult result = finish_row(parts, with_ref, shards, rows, row, labels[row], vocab_size, c, norms + row * (with_ref ? 4 : 2));
  logprobs[row] = result.logprob, entropy[row] = result.entropy;
  if (with_ref) kl[row] = result.kl;
}

// logits and grad may be one tensor: every element is read before it is written, by the same thread.
template <class T, bool WITH_KL> __global__ void __launch_bounds__(THREADS)
    grad_kernel(const T* logits, const T* ref_logits, T* grad, int with_ref, int64_t columns, int64_t width, int64_t stride, int64_t ref_stride,
                int64_t grad_stride, const int64_t* __restrict__ labels, int64_t first_column, double scale, const float* __restrict__ norms,
                const float* __restrict__ entropy, const float* __restrict__ kl, const float* __restrict__ grad_logprobs,
                const float* __restrict__ grad_entropy, const float* __restrict__ grad_kl) {
  constexpr int N = Vector<T>::SIZE;
  const int64_t row = blockIdx.x, thread = threadIdx.x, label = labels[row] - first_column;
  const T* x = logits + row * stride;
  const T* y = WITH_KL ? ref_logits + row * ref_stride : x;
  T* out = grad + row * grad_stride;
  const RowGrad g = row_grad(row, with_ref != 0, scale, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl);
  const bool zero = is_zero(g);
  const float at_label = g.scale * g.logprob;
  const auto one = [&](int64_t j, float value, float ref_value) {
    const float slope = WITH_KL ? grad_of(g, value, ref_value) : grad_of(g, value);
    return j == label ? slope + at_label : slope;
  };
  int64_t done = 0;
  if (is_aligned(x) && is_aligned(y) && is_aligned(out)) {
    for (int64_t j = thread * N; j + N <= columns; j += int64_t(THREADS) * N) {
      float values[N] = {}, ref_values[N] = {};
      if (!zero) {
        load_vector(x + j, values);
        if (WITH_KL) load_vector(y + j, ref_values);
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = one(j + k, values[k], ref_values[k]);
      }
      store_vector(out + j, values);
    }
    done = columns / N * N;
  }
  for (int64_t j = done + thread; j < columns; j += THREADS)
    store(out + j, zero ? 0.0f : one(j, load(x + j), WITH_KL ? load(y + j) : 0.0f));
  for (int64_t j = columns + thread; j < width; j += THREADS) store(out + j, 0.0f);
}

// --- generalised advantages: every tile alone, then what follows each tile, then every tile again with it --------------

constexpr int PER_THREAD = 8;
constexpr int64_t TILE = int64_t(THREADS) * PER_THREAD;

int64_t tiles_of(int64_t tokens) { return (tokens + TILE - 1) / TILE; }

__device__ __forceinline__ Run run_at(const Tokens& tokens, int64_t t) {
  if (t >= tokens.count || !tokens.mask[t]) return no_run();
  return run_of(reward_at(tokens, t), tokens.values[t], tokens.turn_ids[t], tokens.trace_ids[t]);
}

// after[i] = all runs from thread i's to the last thread's, joined
__device__ __forceinline__ void join_behind(Run* after, const Discounts& k) {
  __syncthreads();
  for (int distance = 1; distance < THREADS; distance *= 2) {
    Run joined = after[threadIdx.x];
    if (threadIdx.x + distance < THREADS) joined = join(joined, after[threadIdx.x + distance], k);
    __syncthreads();
    after[threadIdx.x] = joined;
    __syncthreads();
  }
}

__device__ __forceinline__ Run own_run(const Tokens& tokens, int64_t first, const Discounts& k) {
  Run run = no_run();
  for (int i = PER_THREAD - 1; i >= 0; --i) run = join(run_at(tokens, first + i), run, k);
  return run;
}

__global__ void __launch_bounds__(THREADS) tile_kernel(Tokens tokens, Discounts k, Run* __restrict__ tiles) {
  __shared__ Run after[THREADS];
  after[threadIdx.x] = own_run(tokens, blockIdx.x * TILE + threadIdx.x * PER_THREAD, k);
  join_behind(after, k);
  if (threadIdx.x == 0) tiles[blockIdx.x] = after[0];
}

// tiles[i] becomes what follows tile i. One block; each thread takes neighbouring tiles.
__global__ void __launch_bounds__(THREADS) behind_kernel(Run* tiles, int64_t count, Discounts k) {
  __shared__ Run after[THREADS];
  const int64_t each = (count + THREADS - 1) / THREADS, first = threadIdx.x * each;
  const int64_t last = first + each < count ? first + each : count;
  Run run = no_run();
  for (int64_t i = last - 1; i >= first; --i) run = join(tiles[i], run, k);
  after[threadIdx.x] = run;
  join_behind(after, k);
  Run behind = threadIdx.x + 1 < THREADS ? after[threadIdx.x + 1] : no_run();
  for (int64_t i = last - 1; i >= first; --i) {
    const Run tile = tiles[i];
    tiles[i] = behind;
    behind = join(tile, behind, k);
  }
}

__global__ void __launch_bounds__(THREADS)
    advantage_kernel(Tokens tokens, Discounts k, const Run* __restrict__ tiles, float* __restrict__ advantages, float* __restrict__ returns) {
  __shared__ Run after[THREADS];
  const int64_t first = blockIdx.x * TILE + threadIdx.x * PER_THREAD;
  after[threadIdx.x] = own_run(tokens, first, k);
  join_behind(after, k);
  Run behind = tiles[blockIdx.x];
  if (threadIdx.x + 1 < THREADS) behind = join(after[threadIdx.x + 1], behind, k);
  for (int i = PER_THREAD - 1; i >= 0; --i) {
    const int64_t t = first + i;
    if (t >= tokens.count) continue;
    const Run own = run_at(tokens, t);
    if (own.live) behind = join(own, behind, k);
    advantages[t] = own.live ? float(behind.c) : 0.0f;
    returns[t] = own.live ? float(behind.c + own.v) : 0.0f;
  }
}

// --- moments ----------------------------------------------------------------------------------------------------------

constexpr int64_t MOMENTS_BLOCKS = 512;

int64_t moments_blocks(int64_t tokens) {
  const int64_t wanted = (tokens + TILE - 1) / TILE;
  return wanted < 1 ? 1 : (wanted < MOMENTS_BLOCKS ? wanted : MOMENTS_BLOCKS);
}

__global__ void __launch_bounds__(THREADS)
    moments_kernel(const float* __restrict__ values, const uint8_t* __restrict__ mask, const float* __restrict__ weights, int64_t tokens,
                   Moments* __restrict__ blocks) {
  Moments own = no_moments();
  for (int64_t t = blockIdx.x * int64_t(THREADS) + threadIdx.x; t < tokens; t += int64_t(gridDim.x) * THREADS)
    if (mask[t]) own = merge(own, Moments{weight_at(mask, weights, t), values[t], 0.0});
  own = merge_in_block(own, no_moments());
  if (threadIdx.x == 0) blocks[blockIdx.x] = own;
}

__global__ void __launch_bounds__(THREADS) merge_moments_kernel(const Moments* __restrict__ blocks, int64_t count, double* __restrict__ moments) {
  Moments own = no_moments();
  for (int64_t i = threadIdx.x; i < count; i += THREADS) own = merge(own, blocks[i]);
  own = merge_in_block(own, no_moments());
  if (threadIdx.x == 0) moments[0] = own.n, moments[1] = own.mean, moments[2] = own.m2;
}

__global__ void __launch_bounds__(THREADS) whiten_kernel(const float* values, const uint8_t* __restrict__ mask, int64_t tokens,
                                                         const double* __restrict__ moments, int64_t shards, double eps, float* out) {
  const int64_t t = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (t >= tokens) return;
  const Whitening w = whitening_of(merge_all(moments, shards), eps);
  out[t] = mask[t] ? whitened(w, values[t]) : 0.0f;
}

// --- advantages within groups: a block per trace looks through all of them, so that no order is needed and none is waited for -----------

__global__ void __launch_bounds__(THREADS)
    groups_kernel(const float* __restrict__ rewards, const int64_t* __restrict__ group_ids, int64_t traces, int estimator, double eps,
                  float* __restrict__ advantages) {
  __shared__ Unit group;
  const int64_t trace = blockIdx.x, id = group_ids[trace];
  Unit own = no_unit();
  for (int64_t i = threadIdx.x; i < traces; i += THREADS)
    if (group_ids[i] == id) own = merge(own, Unit{1.0, rewards[i]});
  own = merge_in_block(own, no_unit());
  if (threadIdx.x == 0) group = own;
  __syncthreads();
  const double mean = group.sum / group.n;
  own = no_unit();
  for (int64_t i = threadIdx.x; i < traces; i += THREADS)
    if (group_ids[i] == id) own.sum += (rewards[i] - mean) * (rewards[i] - mean);
  own = merge_in_block(own, no_unit());
  if (threadIdx.x == 0) advantages[trace] = group_advantage_of(estimator, rewards[trace], group.n, mean, own.sum, eps);
}

// --- policy loss: a block per unit, or per LOSS_BLOCK tokens that have a ratio each; then the sums of all blocks --------------------------

constexpr int64_t LOSS_BLOCK = int64_t(THREADS) * 4;

int64_t loss_blocks(int64_t tokens) { return (tokens + LOSS_BLOCK - 1) / LOSS_BLOCK; }

__global__ void __launch_bounds__(THREADS)
    policy_loss_kernel(LossRules k, LossTokens tokens, const int64_t* __restrict__ starts, int64_t count, float* __restrict__ grad_logprobs,
                       float* __restrict__ grad_kl, float* __restrict__ grad_entropy, double* __restrict__ parts) {
  __shared__ Unit unit;
  __shared__ double pull;
  const int64_t begin = starts ? starts[blockIdx.x] : blockIdx.x * LOSS_BLOCK;
  const int64_t end = starts ? starts[blockIdx.x + 1] : (begin + LOSS_BLOCK < count ? begin + LOSS_BLOCK : count);
  float ratio = 1.0f, share = 1.0f;
  if (starts) {
    Unit own = no_unit();
    for (int64_t t = begin + threadIdx.x; t < end; t += THREADS) {
      const float delta = log_ratio_at(tokens, t);
      if (tokens.mask[t]) own = merge(own, Unit{1.0, k.arithmetic ? capped_exp(k, delta) : delta});
    }
    own = merge_in_block(own, no_unit());
    if (threadIdx.x == 0) unit = own;
    __syncthreads();
    ratio = unit_ratio(k, unit), share = 1.0f / float(unit.n);  // of a unit without a token nothing is used
  }
  LossSums sums = no_loss_sums();
  for (int64_t t = begin + threadIdx.x; t < end; t += THREADS) {
    const float delta = log_ratio_at(tokens, t);
    if (!starts) ratio = capped_exp(k, delta);
    const LossSums own = loss_sums_of(k, tokens, t, ratio, share);
    sums = merge(sums, own);
    if (!starts) grad_logprobs[t] = loss_grad_of(k, tokens, t, own.pull * (delta > k.cap ? 0.0f : ratio));
    if (grad_kl) grad_kl[t] = tokens.mask[t] ? float(k.kl_coef * tokens.weights[t]) : 0.0f;
    if (grad_entropy) grad_entropy[t] = tokens.mask[t] ? float(-k.entropy_coef * tokens.weights[t]) : 0.0f;
  }
  sums = merge_in_block(sums, no_loss_sums());
  if (threadIdx.x == 0) store_sums(parts + blockIdx.x * NUM_LOSS_SUMS, sums), pull = sums.pull;
  if (!starts) return;
  __syncthreads();
  for (int64_t t = begin + threadIdx.x; t < end; t += THREADS)
    grad_logprobs[t] = loss_grad_of(k, tokens, t, pull * ratio_slope(k, unit, ratio, log_ratio_at(tokens, t)));
}

__global__ void __launch_bounds__(THREADS)
    merge_loss_kernel(LossRules k, const double* __restrict__ parts, int64_t count, float* __restrict__ loss, double* __restrict__ sums) {
  LossSums own = no_loss_sums();
  for (int64_t i = threadIdx.x; i < count; i += THREADS) own = merge(own, load_sums(parts + i * NUM_LOSS_SUMS));
  own = merge_in_block(own, no_loss_sums());
  if (threadIdx.x == 0) store_sums(sums, own), *loss = total_loss(k, own);
}

int64_t blocks_of(int64_t count) { return (count + THREADS - 1) / THREADS; }

constexpr int UNKNOWN_DTYPE = -1;

template <class Function> int for_dtype(int dtype, Function&& function) {
  if (dtype == 0) function(float{});
  else if (dtype == 1) function(bf16{});
  else if (dtype == 2) function(f16{});
  else return UNKNOWN_DTYPE;
  return cudaGetLastError();
}

}  // namespace

const char* rema_build() { return REMA_BUILD; }
const char* rema_error(int code) { return code == UNKNOWN_DTYPE ? "unknown dtype" : cudaGetErrorString(static_cast<cudaError_t>(code)); }

int rema_logits_partial(const void* logits, const void* ref_logits, int dtype, int64_t rows, int64_t columns, int64_t stride,
                        int64_t ref_stride, const int64_t* labels, int64_t first_column, double scale, float* part, int, void* stream) {
  if (rows == 0) return 0;
  const float c = exponent_of(scale);
  return for_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    if (ref_logits == nullptr) {
      REMA_LAUNCH(partial_kernel<T>, rows, THREADS, stream, (const T*)logits, columns, stride, labels, first_column, c, part);
    } else {
      REMA_LAUNCH(pair_kernel<T>, rows, THREADS, stream, (const T*)logits, (const T*)ref_logits, columns, stride, ref_stride, labels,
                  first_column, c, part);
    }
  });
}

int rema_logits_finish(const float* parts, int with_ref, int64_t shards, int64_t rows, const int64_t* labels, int64_t vocab_size, double scale,
                       float* logprobs, float* entropy, float* kl, float* norms, int, void* stream) {
  if (rows == 0) return 0;
  REMA_LAUNCH(finish_kernel, blocks_of(rows), THREADS, stream, parts, with_ref, shards, rows, labels, vocab_size, exponent_of(scale), logprobs,
              entropy, kl, norms);
  return cudaGetLastError();
}

int rema_logits_grad(const void* logits, const void* ref_logits, void* grad, int dtype, int64_t rows, int64_t columns, int64_t width,
                     int64_t stride, int64_t ref_stride, int64_t grad_stride, const int64_t* labels, int64_t first_column, double scale,
                     const float* norms, const float* entropy, const float* kl, const float* grad_logprobs, const float* grad_entropy,
                     const float* grad_kl, int, void* stream) {
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    auto kernel = grad_kl ? grad_kernel<T, true> : grad_kernel<T, false>;
    REMA_LAUNCH(kernel, rows, THREADS, stream, (const T*)logits, (const T*)ref_logits, (T*)grad, ref_logits != nullptr, columns, width,
                stride, ref_stride, grad_stride, labels, first_column, scale, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl);
  });
}

int64_t rema_gae_scratch(int64_t tokens) { return tiles_of(tokens) * int64_t(sizeof(Run)); }

int rema_gae(const float* rewards, const float* values, const float* logprobs, const float* ref_logprobs, int kl_estimator, double kl_coef,
             const int64_t* turn_ids, const int64_t* trace_ids, const uint8_t* mask, int64_t tokens, double discount, double gae_lambda,
             double turn_discount, double turn_lambda, float* advantages, float* returns, void* scratch, int, void* stream) {
  if (tokens == 0) return 0;
  const Tokens packed = {rewards, values, logprobs, ref_logprobs, turn_ids, trace_ids, mask, tokens, kl_coef, kl_estimator};
  const Discounts k = {discount, gae_lambda, turn_discount, turn_lambda};
  Run* tiles = static_cast<Run*>(scratch);
  const int64_t count = tiles_of(tokens);
  REMA_LAUNCH(tile_kernel, count, THREADS, stream, packed, k, tiles);
  REMA_LAUNCH(behind_kernel, 1, THREADS, stream, tiles, count, k);
  REMA_LAUNCH(advantage_kernel, count, THREADS, stream, packed, k, tiles, advantages, returns);
  return cudaGetLastError();
}

int64_t rema_moments_scratch(int64_t tokens) { return moments_blocks(tokens) * int64_t(sizeof(Moments)); }

int rema_moments(const float* values, const uint8_t* mask, const float* weights, int64_t tokens, double* moments, void* scratch, int,
                 void* stream) {
  Moments* blocks = static_cast<Moments*>(scratch);
  const int64_t count = moments_blocks(tokens);
  REMA_LAUNCH(moments_kernel, count, THREADS, stream, values, mask, weights, tokens, blocks);
  REMA_LAUNCH(merge_moments_kernel, 1, THREADS, stream, blocks, count, moments);
  return cudaGetLastError();
}

int rema_whiten(const float* values, const uint8_t* mask, int64_t tokens, const double* moments, int64_t shards, double eps, float* out, int,
                void* stream) {
  if (tokens == 0) return 0;
  REMA_LAUNCH(whiten_kernel, blocks_of(tokens), THREADS, stream, values, mask, tokens, moments, shards, eps, out);
  return cudaGetLastError();
}

int64_t rema_groups_scratch(int64_t) { return 0; }

int rema_groups(const float* rewards, const int64_t* group_ids, int64_t traces, int estimator, double eps, float* advantages, void*, int,
                void* stream) {
  if (traces == 0) return 0;
  REMA_LAUNCH(groups_kernel, traces, THREADS, stream, rewards, group_ids, traces, estimator, eps, advantages);
  return cudaGetLastError();
}

int64_t rema_policy_loss_scratch(int64_t units, int64_t tokens) {
  const int64_t blocks = loss_blocks(tokens);
  return (units > blocks ? units : blocks) * NUM_LOSS_SUMS * int64_t(sizeof(double));
}

int rema_policy_loss(const float* logprobs, const float* old_logprobs, const float* advantages, const float* weights, const float* ref_logprobs,
                     const float* entropy, const uint8_t* mask, const int64_t* starts, int64_t units, int64_t tokens, int arithmetic,
                     double clip_low, double clip_high, double dual_clip, double log_ratio_cap, int kl_estimator, double kl_coef,
                     double entropy_coef, float* loss, double* sums, float* grad_logprobs, float* grad_kl, float* grad_entropy, void* scratch,
                     int, void* stream) {
  const LossRules k = loss_rules(arithmetic, clip_low, clip_high, dual_clip, log_ratio_cap, kl_estimator, kl_coef, entropy_coef);
  const LossTokens columns = {logprobs, old_logprobs, advantages, weights, ref_logprobs ? ref_logprobs : logprobs,
                              entropy ? entropy : logprobs, mask};
  double* parts = static_cast<double*>(scratch);
  const int64_t count = tokens == 0 ? 0 : (starts ? units : loss_blocks(tokens));
  if (count > 0) REMA_LAUNCH(policy_loss_kernel, count, THREADS, stream, k, columns, starts, tokens, grad_logprobs, grad_kl, grad_entropy, parts);
  REMA_LAUNCH(merge_loss_kernel, 1, THREADS, stream, k, parts, count, loss, sums);
  return cudaGetLastError();
}
