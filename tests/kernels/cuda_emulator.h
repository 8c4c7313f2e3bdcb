// Runs cuda.cu, unchanged, on a CPU: included before it, it stands for nvcc's language and the runtime.
//
// Each CUDA thread of a block is a fiber with its own stack; __syncthreads and shuffles are where fibers change. The order in which ready
// fibers run is shuffled anew each round, so that a missing barrier gives a wrong or unstable result. Blocks run one after another (races
// between blocks are not seen), a barrier that some threads never reach aborts, and so does a misaligned 16-byte access (-fsanitize=alignment).
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time: what is static is the block's

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
using cudaError_t = int;
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return "no error"; }

namespace emulator {

enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };
struct Fiber { ucontext_t context; Index thread; State state; };
constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Index block, block_dim, grid_dim;
inline uint32_t exchange[1024];
inline uint32_t random_state = 1;

inline uint32_t random_below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % n;
}
[[noreturn]] inline void die(const char* why) { fprintf(stderr, "cuda emulator: %s\n", why); abort(); }

inline void wait_in(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}
inline void enter() {
  body();
  wait_in(State::DONE);
}

inline void release_warps(int count, bool& released) {
  for (int first = 0; first < count; first += WARP) {
    const int last = std::min(first + WARP, count);
    const auto waits = [](const Fiber& f) { return f.state == State::AT_WARP_BARRIER; };
    if (!std::all_of(fibers.begin() + first, fibers.begin() + last, waits)) continue;
    for (int i = first; i < last; ++i) fibers[i].state = State::READY;
    released = true;
  }
}

inline void run_block() {
  const int count = int(block_dim.x);
  fibers.resize(count);
  stacks.resize(STACK * count);
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    order[i] = i;
    Fiber& f = fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = &stacks[STACK * i];
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    f.thread = {unsigned(i)};
    f.state = State::READY;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
    bool ran = false;
    for (int i : order)
      if (fibers[i].state == State::READY) {
        current = &fibers[i];
        swapcontext(&scheduler, &current->context);
        ran = true;
      }
    const auto in = [&](State s) { return std::count_if(fibers.begin(), fibers.end(), [s](const Fiber& f) { return f.state == s; }); };
    if (in(State::DONE) == count) return;
    bool released = false;
    release_warps(count, released);
    if (!released && in(State::AT_BLOCK_BARRIER)) {
      if (in(State::AT_BLOCK_BARRIER) != count) die("a __syncthreads that not all threads of the block reach");
      for (Fiber& f : fibers) f.state = State::READY;
      released = true;
    }
    if (!released && !ran) die("threads of a warp wait for threads that have ended");
  }
}

template <class Kernel, class... Arguments> void launch(Kernel kernel, int64_t grid, int threads, Arguments... arguments) {
  if (grid < 1 || grid > 0x7fffffff || threads < 1 || threads > 1024) die("an impossible launch");
  grid_dim = {unsigned(grid)}, block_dim = {unsigned(threads)};
  body = [=] { kernel(arguments...); };
  for (int64_t i = 0; i < grid; ++i) {
    block = {unsigned(i)};
    run_block();
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)
#define REMA_LAUNCH(kernel, grid, block, stream, ...) ((void)(stream), emulator::launch(kernel, grid, block, __VA_ARGS__))

inline void __syncthreads() { emulator::wait_in(emulator::State::AT_BLOCK_BARRIER); }
inline uint32_t __shfl_down_sync(unsigned, uint32_t value, int distance) {
  const unsigned thread = threadIdx.x, lane = thread % emulator::WARP;
  emulator::exchange[thread] = value;
  emulator::wait_in(emulator::State::AT_WARP_BARRIER);
  const uint32_t result = emulator::exchange[lane + distance < emulator::WARP ? thread + distance : thread];
  emulator::wait_in(emulator::State::AT_WARP_BARRIER);
  return result;
}
