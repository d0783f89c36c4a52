// A GPU's threads on one CPU thread, so that kernels written against simt.h can be run, and run wrongly, without a GPU.
//
// Every CUDA thread is a fibre with its own stack. A warp runs until all of its lanes wait at a block barrier or are done,
// so an early warp overruns a late one as far as missing barriers let it. SIMT_ORDER: 0 warps and blocks ascending, 1
// descending, larger: a seed for a random order of warps. Asynchronous copies land as late as they may (a missing wait
// shows), or with SIMT_COPIES=eager at once (a missing barrier before their buffer's reuse shows). Shared memory is filled
// with NaN for every block. With SIMT_TSAN each fibre is one to ThreadSanitizer too, and barriers order them.
//
// Not emulated: wgmma, TMA, mbarrier, clusters, atomics (kernels here use none), rounding of ex2.approx and of mma's sums,
// races between blocks. x86-64 only.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "the SIMT emulator switches stacks by x86-64 instructions"
#endif
#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __restrict__
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define SIMT_SHARED(type, name, count) \
  static type name[count];             \
  simt::poison(name, sizeof(name))
#define SIMT_DYNAMIC_SHARED(name) unsigned char* name = simt::block()->dynamic
#define SIMT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  simt::status = simt::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define SIMT_STATUS() (simt::status)

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define SIMT_ACQUIRE(p) __tsan_acquire(p)
#define SIMT_RELEASE(p) __tsan_release(p)
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define SIMT_ACQUIRE(p) (void)0
#define SIMT_RELEASE(p) (void)0
#define SIMT_UNSEEN
#endif

// The kernel's own memory accesses: outside namespace simt, whose races the sanitizer is told to ignore.
namespace simt_memory {
__attribute__((noinline)) inline uint16_t read(const uint16_t* p) { return *p; }
__attribute__((noinline)) inline void copy(void* to, const void* from, bool valid) {
  for (int i = 0; i < 4; ++i) ((uint32_t*)to)[i] = valid ? ((const uint32_t*)from)[i] : 0u;
}
}  // namespace simt_memory

extern "C" void simt_switch(void** save_stack, void* load_stack);
__asm__(
    ".text\n.weak simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n.size simt_switch,.-simt_switch\n");

namespace simt {

enum State { RUNNING, AT_WARP, AT_BLOCK, DONE };
constexpr size_t STACK = 256 * 1024;
constexpr int WIDEST = 48;  // bytes that lanes can exchange at once
static thread_local int status = 0;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct Fibre {
  void* stack = nullptr;
  void* tsan = nullptr;
  State state = DONE;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Warp {
  char token[2];
  unsigned phase = 0;
  int arrived = 0;
  uint32_t mask = 0;
  unsigned char lanes[2][32][WIDEST];
};
struct Block {
  dim3 grid, size, index;
  int threads = 0, current = 0, at_barrier = 0;
  unsigned phase = 0;
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  void* poisoned[32];
  int poisons = 0;
  void* scheduler = nullptr;
  void* tsan = nullptr;
  std::function<void()> body;
  unsigned char* dynamic = nullptr;
  char begun, ended, token[2];
};
inline Block*& block() {
  static thread_local Block* current = nullptr;
  return current;
}
inline int order() {
  const char* value = getenv("SIMT_ORDER");
  return value ? atoi(value) : 0;
}
inline bool eager() {
  const char* value = getenv("SIMT_COPIES");
  return value && !strcmp(value, "eager");
}

SIMT_UNSEEN inline void suspend() {
  Block& b = *block();
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(b.tsan, 1);
#endif
  simt_switch(&b.fibres[b.current].stack, b.scheduler);
}
SIMT_UNSEEN inline void resume(Block& b, int thread) {
  b.current = thread;
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(b.fibres[thread].tsan, 1);
#endif
  simt_switch(&b.scheduler, b.fibres[thread].stack);
}
SIMT_UNSEEN inline void entry() {
  Block& b = *block();
  SIMT_ACQUIRE(&b.begun);
  b.body();
  b.fibres[b.current].state = DONE;
  SIMT_RELEASE(&b.ended);
  suspend();
  abort();
}
[[noreturn]] inline void fail(const char* message) {
  Block& b = *block();
  fprintf(stderr, "[simt] %s (block %u,%u,%u thread %d)\n", message, b.index.x, b.index.y, b.index.z, b.current);
  exit(86);  // an exception cannot leave a fibre
}
SIMT_UNSEEN inline void poison(void* memory, size_t bytes) {
  Block& b = *block();
  for (int i = 0; i < b.poisons; ++i)
    if (b.poisoned[i] == memory) return;
  if (b.poisons == 32) fail("more than 32 shared arrays in one kernel");
  b.poisoned[b.poisons++] = memory;
  for (size_t i = 0; i < bytes; ++i) ((volatile unsigned char*)memory)[i] = 0xFF;
}

inline int lane() { return block()->current & 31; }
inline Warp& warp() { return block()->warps[block()->current >> 5]; }
inline void warp_barrier(uint32_t mask) {
  Block& b = *block();
  Warp& w = warp();
  if (!(mask >> lane() & 1)) fail("a lane is not in its own mask");
  if (w.arrived == 0) w.mask = mask;
  if (w.mask != mask) fail("lanes of a warp disagree on the mask");
  const unsigned phase = w.phase;
  SIMT_RELEASE(&w.token[phase & 1]);
  if (++w.arrived == __builtin_popcount(mask)) {
    w.arrived = 0;
    w.phase++;
    for (int i = b.current & ~31; i < std::min(b.threads, (b.current & ~31) + 32); ++i)
      if (b.fibres[i].state == AT_WARP) b.fibres[i].state = RUNNING;
  } else {
    b.fibres[b.current].state = AT_WARP;
    suspend();
  }
  SIMT_ACQUIRE(&w.token[phase & 1]);
}
template <class T> inline const unsigned char (*exchange(uint32_t mask, const T& value))[WIDEST] {
  static_assert(sizeof(T) <= WIDEST, "too wide to exchange");
  Warp& w = warp();
  auto* lanes = w.lanes[w.phase & 1];
  memcpy(lanes[lane()], &value, sizeof(T));
  warp_barrier(mask);
  return lanes;
}
template <class T> inline T from_lane(uint32_t mask, const T& value, int source) {
  T result;
  memcpy(&result, exchange(mask, value)[source], sizeof(T));
  return result;
}
inline void block_barrier() {
  Block& b = *block();
  const unsigned phase = b.phase & 1;
  SIMT_RELEASE(&b.token[phase]);
  if (++b.at_barrier == b.threads) {
    b.at_barrier = 0;
    b.phase++;
    for (auto& fibre : b.fibres)
      if (fibre.state == AT_BLOCK) fibre.state = RUNNING;
  } else {
    b.fibres[b.current].state = AT_BLOCK;
    suspend();
  }
  SIMT_ACQUIRE(&b.token[phase]);
}

// Runs one warp until none of its lanes can go on; returns how many lanes were run and counts those that ended.
inline int run_warp(Block& b, int w, int& left) {
  int ran = 0;
  for (bool again = true; again;) {
    again = false;
    for (int j = 0; j < 32; ++j) {
      const int thread = w * 32 + (order() == 1 ? 31 - j : j);
      if (thread >= b.threads || b.fibres[thread].state != RUNNING) continue;
      resume(b, thread);
      ++ran;
      again = true;
      left -= b.fibres[thread].state == DONE;
    }
  }
  return ran;
}
inline void prepare(Block& b, std::vector<char>& stacks) {
  b.fibres.assign(b.threads, Fibre());
  b.warps.assign((b.threads + 31) / 32, Warp());
  b.poisons = 0;
  b.at_barrier = 0;
#ifdef SIMT_TSAN
  b.tsan = __tsan_get_current_fiber();
  SIMT_RELEASE(&b.begun);
  for (auto& fibre : b.fibres) fibre.tsan = __tsan_create_fiber(0);
#endif
  for (int i = 0; i < b.threads; ++i) {
    void** top = (void**)((uintptr_t)(stacks.data() + STACK * (i + 1)) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void*)&entry;
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    b.fibres[i].stack = top;
    b.fibres[i].state = RUNNING;
  }
}
inline void run_block(Block& b, std::vector<char>& stacks) {
  block() = &b;
  prepare(b, stacks);
  std::mt19937 random(order());
  std::vector<int> warps((b.threads + 31) / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = order() == 1 ? warps.size() - 1 - i : i;
  for (int left = b.threads; left;) {
    int ran = 0;
    if (order() >= 2) std::shuffle(warps.begin(), warps.end(), random);
    for (int w : warps) ran += run_warp(b, w, left);
    if (!ran) fail("deadlock: threads wait at different barriers");
  }
#ifdef SIMT_TSAN
  for (auto& fibre : b.fibres) {
    __tsan_acquire(&b.ended);
    __tsan_destroy_fiber(fibre.tsan);
  }
#endif
}
template <class Body> inline int launch(dim3 grid, dim3 size, size_t shared, Body body) {
  static thread_local std::vector<char> stacks;
  Block b;
  b.grid = grid;
  b.size = size;
  b.threads = size.x * size.y * size.z;
  b.body = body;
  if (b.threads > 1024 || shared > 227 * 1024) return 9;  // cudaErrorInvalidConfiguration
  if (stacks.size() < STACK * (b.threads + 1)) stacks.resize(STACK * (b.threads + 1));
  std::vector<unsigned char> dynamic(shared + 128);       // its end is the heap's, so an overrun is the sanitizer's
  b.dynamic = (unsigned char*)(((uintptr_t)dynamic.data() + 127) & ~(uintptr_t)127);
  const size_t blocks = (size_t)grid.x * grid.y * grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t j = order() == 1 ? blocks - 1 - i : i;
    b.index = dim3(j % grid.x, j / grid.x % grid.y, j / grid.x / grid.y);
    memset(dynamic.data(), 0xFF, dynamic.size());
    run_block(b, stacks);
  }
  block() = nullptr;
  return 0;
}

struct ThreadIndex {
  struct { operator unsigned() const { return block()->current % block()->size.x; } } x;
  struct { operator unsigned() const { return block()->current / block()->size.x % block()->size.y; } } y;
  struct { operator unsigned() const { return block()->current / block()->size.x / block()->size.y; } } z;
};
template <dim3 Block::*Field> struct Dimensions {
  struct { operator unsigned() const { return (block()->*Field).x; } } x;
  struct { operator unsigned() const { return (block()->*Field).y; } } y;
  struct { operator unsigned() const { return (block()->*Field).z; } } z;
};

inline float bf16_half(uint32_t pair, int high) {
  const uint32_t bits = high ? pair & 0xFFFF0000u : pair << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float f16_half(uint32_t pair, int high) {
  const uint16_t bits = high ? pair >> 16 : pair;
  __half value;
  memcpy(&value, &bits, 2);
  return __half2float(value);
}
// Fragment layout of m16n8k16 from the PTX ISA.
template <float (*Half)(uint32_t, int)>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment { uint32_t a[4], b[2]; };
  const Fragment mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  auto* lanes = exchange(~0u, mine);
  const int row = lane() >> 2, column = (lane() & 3) * 2;
  float sum[4] = {0, 0, 0, 0};
  for (int k = 0; k < 16; ++k) {
    const int pair = (k & 7) >> 1, high = k & 1, upper = k >> 3;
    const Fragment& left = *(const Fragment*)lanes[row * 4 + pair];
    for (int j = 0; j < 2; ++j) {
      const float b = Half(((const Fragment*)lanes[(column + j) * 4 + pair])->b[upper], high);
      sum[j] += Half(left.a[upper * 2], high) * b;
      sum[2 + j] += Half(left.a[upper * 2 + 1], high) * b;
    }
  }
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<bf16_half>(d, a, b0, b1); }
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma<f16_half>(d, a, b0, b1); }

inline void gather_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if ((uintptr_t)row & 15) fail("load_matrices: row is not 16-byte aligned");
  auto* lanes = exchange(~0u, row);
  const int l = lane();
  for (int m = 0; m < 4; ++m) {
    uint32_t pair = 0;
    for (int j = 0; j < 2; ++j) {
      const int from = transposed ? (l & 3) * 2 + j : l >> 2, at = transposed ? l >> 2 : (l & 3) * 2 + j;
      const uint16_t* start;
      memcpy(&start, lanes[m * 8 + from], sizeof(start));
      pair |= (uint32_t)simt_memory::read(start + at) << (16 * j);
    }
    r[m] = pair;
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { gather_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { gather_matrices(r, row, true); }

inline Fibre& fibre() { return block()->fibres[block()->current]; }
inline void copy_async(void* shared, const void* global, bool valid) {
  if (((uintptr_t)shared | (valid ? (uintptr_t)global : 0)) & 15) fail("copy_async: address is not 16-byte aligned");
  if (eager())
    simt_memory::copy(shared, global, valid);
  else
    fibre().open.push_back({shared, global, valid});
}
inline void commit_copies() {
  fibre().groups.push_back(std::move(fibre().open));
  fibre().open.clear();
}
template <int Pending> inline void wait_copies() {
  auto& groups = fibre().groups;
  while ((int)groups.size() > Pending) {
    for (auto& copy : groups[0]) simt_memory::copy(copy.to, copy.from, copy.valid);
    groups.erase(groups.begin());
  }
}
inline float exp2_fast(float x) { return exp2f(x); }

}  // namespace simt

static const simt::ThreadIndex threadIdx;
static const simt::Dimensions<&simt::Block::index> blockIdx;
static const simt::Dimensions<&simt::Block::size> blockDim;
static const simt::Dimensions<&simt::Block::grid> gridDim;
inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = ~0u) { simt::warp_barrier(mask); }
template <class T> inline T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return simt::from_lane(mask, value, simt::lane() ^ other);
}
template <class T> inline T __shfl_sync(uint32_t mask, T value, int source) { return simt::from_lane(mask, value, source & 31); }
template <class T> inline T __shfl_down_sync(uint32_t mask, T value, int by) {
  return simt::from_lane(mask, value, simt::lane() + by < 32 ? simt::lane() + by : simt::lane());
}
template <class T> inline T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
