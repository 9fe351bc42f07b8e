// Runs every launcher on heap buffers of exact sizes, at all small sizes and alignments. Built with sanitizers:
// an access outside of a buffer, or a wide one at an address that is not aligned for it, ends the program.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "launch.h"

namespace {

int launches = 0;

void check(int error) {
  ++launches;
  if (error) {
    std::fprintf(stderr, "launch %d: %s\n", launches, helix_error_string(error));
    std::exit(1);
  }
}

// `bytes` bytes of which the last is the last of an allocation, `shift` bytes beyond an aligned address.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t shift) : whole_(static_cast<char*>(std::malloc(bytes + shift))) {
    for (int64_t i = 0; i < bytes + shift; ++i) whole_.get()[i] = char(i * 37 % 59);
    start_ = whole_.get() + shift;
  }
  void* get() const { return start_; }
  float* floats() const { return static_cast<float*>(get()); }

 private:
  struct Free {
    void operator()(char* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<char, Free> whole_;
  char* start_;
};

void activations(int64_t rows, int64_t length, int dtype, int64_t shift) {
  const int64_t size = dtype == 0 ? 4 : 2;
  for (int function : {kSwiGLU, kGeluTanh, kGeluErf}) {
    const int64_t factor = function == kSwiGLU ? 2 : 1;
    const Buffer out(rows * length * size, shift * size), input(rows * length * factor * size, shift * size),
        grad(rows * length * size, 0), grad_input(rows * length * factor * size, shift * size),
        bias(length * factor * size, shift * size);
    for (void* used : {bias.get(), static_cast<void*>(nullptr)}) {
      check(helix_activation(out.get(), input.get(), used, rows, length, dtype, function, nullptr));
      check(helix_activation_backward(grad_input.get(), grad.get(), input.get(), used, rows, length, dtype,
                                      function, nullptr));
    }
  }
}

void merges(int64_t rows, int64_t length, int dtype, int64_t shift) {
  const int64_t size = dtype == 0 ? 4 : 2;
  const int64_t sizes[3] = {2, rows, 3}, strides[3] = {3 * rows * length, 3 * length, length};
  const int64_t sum_strides[3] = {3 * rows, 3, 1};
  for (int own : {dtype, 0}) {
    const Buffer output(6 * rows * length * (own == 0 ? 4 : size), shift * (own == 0 ? 4 : size)),
        part(6 * rows * length * size, shift * size), sums(6 * rows * 4, 0), part_sums(6 * rows * 4, 4);
    check(helix_merge_attention(output.get(), own, strides, sums.floats(), sum_strides, part.get(), dtype,
                                strides, part_sums.floats(), sum_strides, sizes, length, nullptr));
  }
}

void messages(int64_t rows, int64_t length, int bytes, int64_t shift) {
  const Buffer dense(rows * length * bytes, shift * bytes), strided(rows * (length + 3) * bytes, 0),
      buffer((2 * rows * length + 1) * bytes, 0), single(bytes, 0);
  const HelixTensor tensors[] = {
      {single.get(), {1, 1, 1, 1}, {0, 0, 0, 1}},
      {dense.get(), {1, 1, 1, rows * length}, {0, 0, 0, 1}},
      {strided.get(), {1, 1, rows, length}, {0, 0, length + 3, 1}},
  };
  check(helix_pack(buffer.get(), tensors, 3, bytes, nullptr));
}

// Beyond 32 bits, where no buffer of a test reaches.
void divisions() {
  for (uint64_t value : {uint64_t(0), uint64_t(7), uint64_t(UINT32_MAX), uint64_t(1) << 32, (uint64_t(1) << 40) + 7})
    for (uint64_t divisor : {uint64_t(1), uint64_t(3), uint64_t(UINT32_MAX), uint64_t(1) << 33}) {
      const helix::Division found(value, divisor);
      check(found.quotient == value / divisor && found.remainder == value % divisor ? kSuccess : kTooLarge);
    }
}

}  // namespace

int main() {
  divisions();
  for (int64_t rows : {1, 3})
    for (int64_t length : {0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 70})
      for (int64_t shift : {0, 1, 2, 3, 4, 8}) {
        for (int dtype : {0, 1, 2}) {
          activations(rows, length, dtype, shift);
          merges(rows, length, dtype, shift);
          const int64_t count = rows * length, size = dtype == 0 ? 4 : 2;
          const Buffer total(count * 4, shift * 4), gradient(count * size, shift * size);
          check(helix_accumulate(total.floats(), gradient.get(), count, dtype, nullptr));
        }
        for (int bytes : {1, 2, 4, 8}) messages(rows, length, bytes, shift);
      }
  std::printf("%d launches\n", launches);
  return 0;
}
