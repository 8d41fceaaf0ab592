// The primitives of the device, a function each: PTX that C++ has no word for, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "launch.h"

namespace tailor {

// Dynamic shared memory of the block, at 16 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ uint4 shared_bytes[];
  return reinterpret_cast<char*>(shared_bytes);
}

// Where `inside`, 16 bytes that are read once: past L1, and the first to leave L2, where the tokens
// stay. A predicate on the one instruction: a branch around it would cost four more.
__device__ inline void load_streaming(const uint4* source, bool inside, uint4& v) {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %6, 0;\n"
      "@inside ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(source), "l"(policy), "r"(int(inside)));
}

// Starts to copy 16 bytes into shared memory, or to clear them.
__device__ inline void copy_async(void* shared, const void* source, bool inside) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Closes a group of copies that one wait can name.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the thread's own copies, except for the last `kOpen` groups.
template <int kOpen>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Bytes of a and b (numbers 0 to 3 and 4 to 7) by the four nibbles of `order`.
__device__ inline unsigned permute_bytes(unsigned a, unsigned b, unsigned order) {
  return __byte_perm(a, b, order);
}

// (word & mask) | bits: as one instruction, for which the compiler would take two.
__device__ inline unsigned insert_bits(unsigned word, unsigned mask, unsigned bits) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Difference of two pairs of T.
template <typename T>
__device__ inline unsigned subtract_pairs(unsigned a, unsigned b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair difference =
      __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const unsigned&>(difference);
}

// sum += A B on a tensor core: A is 16 rows by 32 bytes of K, B is 32 bytes of K by 8 columns.
template <typename T, typename Sum>
__device__ inline void multiply(Sum (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, std::int8_t>)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Waits for all threads of the cluster; what they wrote to shared memory before can be read after.
// Not .aligned: the loop before it may leave a warp's threads apart.
__device__ inline void synchronize_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same without an order of memory, for those who have read and may leave: no fence to wait for.
__device__ inline void leave_cluster_together() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// A 32-bit word at the place of `own`, in the shared memory of block `rank` of the cluster.
template <typename T>
__device__ inline T load_from_block(const T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(own)), word;
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(place) : "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(place) : "memory");
  return reinterpret_cast<const T&>(word);
#else
  return *own;  // without clusters a block is its own
#endif
}

// In a launch with `early`: waits until the kernel before has ended and its writes can be read.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets such a launch begin.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches, and turns a refusal into one clear message; without a driver CUDA first speaks here.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& shape,
            const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (shape.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > 48 << 10)  // more than a kernel gets unasked
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  if (status == cudaSuccess)
    status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next launch starts with a clean state
  throw CudaError(std::string(op) + ": the GPU launch was refused: " + cudaGetErrorString(status) +
                  " (nvidia-smi shows driver and GPU)");
}

}  // namespace tailor
