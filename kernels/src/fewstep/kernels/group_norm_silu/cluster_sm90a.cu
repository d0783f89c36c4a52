// The same with the chunks of a group in one thread block cluster: each program holds its chunk in shared memory, reads the
// others' statistics there (distributed shared memory) and finishes, so that memory is read once. Not run before a GPU.
#include <cooperative_groups.h>

#include "device.h"

namespace group_norm {
namespace {

namespace cg = cooperative_groups;

// Programs of a cluster are consecutive blocks, so here chunks count fastest.
__device__ __forceinline__ int index_of(const GroupNorm& n) {
  const int part = blockIdx.x % n.chunks, rest = blockIdx.x / n.chunks;
  return (rest / n.blocks * n.chunks + part) * n.blocks + rest % n.blocks;
}

// Each program's two numbers per group, put where the others read them; `group` is free for the merged ones.
__device__ __forceinline__ void publish(const Program& p) {
  for (int g = threadIdx.x; g < 2 * p.n.together; g += THREADS) p.scratch[g] = p.group[g];
  cg::this_cluster().sync();
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) forward_cluster(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, index_of(n), false);
  hold_and_measure<E>(p);
  publish(p);
  cg::cluster_group cluster = cg::this_cluster();
  merge_moments(
      p, n.chunks, [&](int g, int k) { return cluster.map_shared_rank(p.scratch, k)[g]; },
      [&](int g, int k) { return cluster.map_shared_rank(p.scratch, k)[n.together + g]; });
  spread_moments(p, p.part == 0);
  finish<E>(p, true);
  cluster.sync();  // no program may end while another reads its shared memory
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) backward_cluster(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, index_of(n), true);
  hold_and_sum<E>(p);
  publish(p);
  cg::cluster_group cluster = cg::this_cluster();
  merge_sums(
      p, n.chunks, [&](int g, int k) { return cluster.map_shared_rank(p.scratch, k)[g]; },
      [&](int g, int k) { return cluster.map_shared_rank(p.scratch, k)[n.together + g]; });
  finish_backward<E>(p, true);
  cluster.sync();
}

int launch(void (*kernel)(const GroupNorm), const GroupNorm& n, int shared) {
  cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = n.chunks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(programs(n));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)n.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, kernel, n);
}

template <class E> int forward_of(const GroupNorm& n) {
  return launch(forward_cluster<E>, n, shared_bytes(n, false, 1, E::HELD));
}
template <class E> int backward_of(const GroupNorm& n) {
  return launch(backward_cluster<E>, n, shared_bytes(n, true, 2, E::HELD));
}

}  // namespace
}  // namespace group_norm

using namespace group_norm;

extern "C" int group_norm_silu_forward_cluster(const GroupNorm* n) {
  if (!n->wide) return group_norm::forward_of<Single>(*n);
  if (n->dtype == 0) return group_norm::forward_of<Wide<float>>(*n);
  return n->dtype == 1 ? group_norm::forward_of<Wide<__nv_bfloat16>>(*n) : group_norm::forward_of<Wide<__half>>(*n);
}

extern "C" int group_norm_silu_backward_cluster(const GroupNorm* n) {
  if (!n->wide) return group_norm::backward_of<Single>(*n);
  if (n->dtype == 0) return group_norm::backward_of<Wide<float>>(*n);
  return n->dtype == 1 ? group_norm::backward_of<Wide<__nv_bfloat16>>(*n) : group_norm::backward_of<Wide<__half>>(*n);
}
