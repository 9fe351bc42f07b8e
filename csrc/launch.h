// Runs a kernel body over rows and columns, with 16-byte accesses where the operands allow them.
//
// A body is a struct with `template <int W> void at(int64_t row, int64_t element) const`, which handles W
// neighbouring elements of a row, and `static constexpr int width`, the W of its wide accesses. nvcc makes a
// CUDA kernel of it, any other compiler a loop on the host: tests run the same bodies without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"
#include "numeric.h"

namespace helix {

// W elements, accessed 16 bytes at a time.
template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Vector {
  T values[W];
};

template <int W, class T>
HELIX_HD void load(const T* from, float (&to)[W]) {
  const Vector<T, W> vector = *reinterpret_cast<const Vector<T, W>*>(from);
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = to_float(vector.values[i]);
}

template <int W, class T>
HELIX_HD void store(T* to, const float (&from)[W]) {
  Vector<T, W> vector;
#pragma unroll
  for (int i = 0; i < W; ++i) vector.values[i] = from_float<T>(from[i]);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof vector % sizeof(uint4) == 0) {
    // Said outright: the compiler splits the store of a struct whose parts come from branches.
#pragma unroll
    for (int i = 0; i < int(sizeof vector / sizeof(uint4)); ++i)
      __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&vector)[i]);
    return;
  }
#endif
  *reinterpret_cast<Vector<T, W>*>(to) = vector;
}

struct Division {
  uint64_t quotient, remainder;

  // In 32 bits where they suffice, which takes a fraction of the time.
  HELIX_HD Division(uint64_t value, uint64_t divisor) {
    if ((value | divisor) >> 32 == 0) {
      quotient = uint32_t(value) / uint32_t(divisor);
      remainder = uint32_t(value) - uint32_t(quotient) * uint32_t(divisor);
    } else {
      quotient = value / divisor;
      remainder = value - quotient * divisor;
    }
  }
};

// How the elements of each row are cut: single ones up to the first aligned address, vectors, and the rest.
struct Columns {
  int64_t head, vectors, tail;
  HELIX_HD int64_t count() const { return head + vectors + tail; }
};

// What a body reads or writes: the address in the first row, and how far apart rows are.
struct Operand {
  const void* start;
  int64_t element_bytes;
  int64_t row_bytes;
};

// One cut for all operands and rows; single elements only, if they are not aligned together.
inline Columns cut(int64_t length, int width, int64_t rows, std::initializer_list<Operand> operands) {
  for (int64_t head = 0; head < width && head + width <= length; ++head) {
    bool aligned = true;
    for (const Operand& operand : operands) {
      if (operand.start == nullptr) continue;
      const int64_t bytes = width * operand.element_bytes;
      const int64_t unit = bytes < 16 ? bytes : 16;
      aligned &= (reinterpret_cast<uintptr_t>(operand.start) + head * operand.element_bytes) % unit == 0;
      aligned &= rows == 1 || operand.row_bytes % unit == 0;
    }
    if (aligned) return {head, (length - head) / width, (length - head) % width};
  }
  return {0, 0, length};
}

template <class Body>
HELIX_HD void visit(const Body& body, const Columns& columns, int64_t row, int64_t column) {
  if (column < columns.vectors) {
    body.template at<Body::width>(row, columns.head + column * Body::width);
  } else {
    const int64_t single = column - columns.vectors;
    body.template at<1>(row, single < columns.head ? single : single + columns.vectors * Body::width);
  }
}

#ifdef __CUDACC__

constexpr int kThreads = 256;

template <class Body>
__global__ void __launch_bounds__(kThreads)
    grid_kernel(const Body body, const Columns columns, int64_t rows, uint32_t column_blocks) {
  const int64_t row = int64_t(blockIdx.x / column_blocks) * blockDim.y + threadIdx.y;
  const int64_t column = int64_t(blockIdx.x % column_blocks) * blockDim.x + threadIdx.x;
  if (row < rows && column < columns.count()) visit(body, columns, row, column);
}

template <class Body>
int launch(const Body& body, const Columns& columns, int64_t rows, void* stream) {
  const int64_t count = columns.count();
  if (count == 0 || rows == 0) return kSuccess;
  // Short rows share a block; long ones take several, of a size that leaves few threads without work.
  int across = 1;
  while (across < count && across < (rows > 1 ? kThreads / 2 : kThreads)) across *= 2;
  const int down = rows > 1 ? kThreads / across : 1;
  const int64_t column_blocks = (count + across - 1) / across, row_blocks = (rows + down - 1) / down;
  if (column_blocks > INT32_MAX / row_blocks) return kTooLarge;
  grid_kernel<<<dim3(uint32_t(column_blocks * row_blocks)), dim3(across, down), 0,
                static_cast<cudaStream_t>(stream)>>>(body, columns, rows, uint32_t(column_blocks));
  return int(cudaGetLastError());
}

#else

template <class Body>
int launch(const Body& body, const Columns& columns, int64_t rows, void*) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns.count(); ++column) visit(body, columns, row, column);
  return kSuccess;
}

#endif

// Calls `function` with a null pointer of the element type that a code stands for.
template <class Function>
int with_type(int dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(static_cast<float*>(nullptr));
    case kFloat16:
      return function(static_cast<Float16*>(nullptr));
    case kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
  }
  return kUnknownType;
}

}  // namespace helix
