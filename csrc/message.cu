// Tensors copied one after the other into one buffer: one launch for a whole message.
#include "launch.h"

namespace helix {
namespace {

// 32 bytes, which two loads of 16 fetch: twice as much is under way as with one.
struct alignas(16) Wide {
  uint64_t values[4];
};
struct alignas(16) Narrow {
  uint64_t values[2];
};

// A run of equal chunks: rows of bytes in a tensor, dense in the buffer.
struct Segment {
  const char* tensor;
  char* buffer;
  int64_t first;         // number of its first chunk in the launch
  int64_t row_chunks;    // chunks in a row
  int64_t sizes[2];      // of the two faster ones of three dimensions of rows
  int64_t strides[3];    // between rows, in bytes
  int32_t chunk_bytes;
  int32_t rows_are_dense;

  HELIX_HD int64_t offset(uint64_t chunk) const {
    if (rows_are_dense) return int64_t(chunk) * chunk_bytes;
    const Division row(chunk, row_chunks), inner(row.quotient, sizes[1]), outer(inner.quotient, sizes[0]);
    return int64_t(outer.quotient) * strides[0] + int64_t(outer.remainder) * strides[1] +
           int64_t(inner.remainder) * strides[2] + int64_t(row.remainder) * chunk_bytes;
  }
};

// Head, body and tail of each tensor. Kernel parameters are limited to 4096 bytes.
constexpr int kMostSegments = 3 * HELIX_MOST_TENSORS;

struct Copy {
  static constexpr int width = 1;
  int count;
  Segment segments[kMostSegments];

  template <int W>
  HELIX_HD void at(int64_t, int64_t chunk) const {
    int index = 0;
    while (index + 1 < count && chunk >= segments[index + 1].first) ++index;
    const Segment& segment = segments[index];
    chunk -= segment.first;
    const char* tensor = segment.tensor + segment.offset(chunk);
    char* buffer = segment.buffer + chunk * segment.chunk_bytes;
    switch (segment.chunk_bytes) {
      case 32:
        return move<Wide>(tensor, buffer);
      case 16:
        return move<Narrow>(tensor, buffer);
      case 8:
        return move<uint64_t>(tensor, buffer);
      case 4:
        return move<uint32_t>(tensor, buffer);
      case 2:
        return move<uint16_t>(tensor, buffer);
      default:
        return move<uint8_t>(tensor, buffer);
    }
  }

  template <class Chunk>
  HELIX_HD static void move(const char* tensor, char* buffer) {
    *reinterpret_cast<Chunk*>(buffer) = *reinterpret_cast<const Chunk*>(tensor);
  }
};

static_assert(sizeof(Copy) + sizeof(Columns) + 16 <= 4096, "kernel parameters");

// The largest power of two up to 16 that divides all of the bits.
int64_t alignment(uint64_t bits) { return int64_t((bits | 16) & (~(bits | 16) + 1)); }

class Plan {
 public:
  void add(const HelixTensor& tensor, char* buffer, int64_t element_bytes) {
    int64_t bytes[4], numel = 1;
    for (int i = 0; i < 4; ++i) {
      bytes[i] = tensor.strides[i] * element_bytes;
      numel *= tensor.sizes[i];
    }
    if (numel == 0) return;
    const char* data = static_cast<const char*>(tensor.data);
    const int64_t row_bytes = tensor.sizes[3] * element_bytes;
    if (numel == tensor.sizes[3]) return add_dense(data, buffer, row_bytes);
    uint64_t bits = uint64_t(data) | uint64_t(buffer) | uint64_t(row_bytes);
    for (int i = 0; i < 3; ++i)
      if (tensor.sizes[i] > 1) bits |= uint64_t(bytes[i]);
    const int64_t aligned = alignment(bits);
    const int64_t chunk = aligned == 16 && row_bytes % 32 == 0 ? 32 : aligned;
    push({data, buffer, 0, row_bytes / chunk, {tensor.sizes[1], tensor.sizes[2]},
          {bytes[0], bytes[1], bytes[2]}, int32_t(chunk), 0},
         numel * element_bytes / chunk);
  }

  int run(void* stream) const { return launch(body_, Columns{0, 0, chunks_}, 1, stream); }

 private:
  void add_dense(const char* data, char* buffer, int64_t bytes) {
    // Both can be aligned only as far as their distance is.
    const int64_t unit = alignment(uint64_t(data) ^ uint64_t(buffer));
    int64_t head = int64_t(-uint64_t(buffer) % uint64_t(unit));
    if (head > bytes) head = bytes;
    const int64_t chunk = unit == 16 ? 32 : unit;
    const int64_t middle = (bytes - head) / chunk * chunk;
    // A head or tail is whole elements: single bytes would be right, too, but slower.
    push_run(data, buffer, head);
    push({data + head, buffer + head, 0, 0, {1, 1}, {0, 0, 0}, int32_t(chunk), 1}, middle / chunk);
    push_run(data + head + middle, buffer + head + middle, bytes - head - middle);
  }

  void push_run(const char* data, char* buffer, int64_t bytes) {
    const int64_t chunk = alignment(uint64_t(data) | uint64_t(buffer) | uint64_t(bytes));
    push({data, buffer, 0, 0, {1, 1}, {0, 0, 0}, int32_t(chunk), 1}, bytes / chunk);
  }

  void push(Segment segment, int64_t chunks) {
    if (chunks == 0) return;
    segment.first = chunks_;
    body_.segments[body_.count++] = segment;
    chunks_ += chunks;
  }

  Copy body_{};
  int64_t chunks_ = 0;
};

}  // namespace
}  // namespace helix

extern "C" int helix_pack(void* buffer, const HelixTensor* tensors, int count, int element_bytes,
                          void* stream) {
  if (count > HELIX_MOST_TENSORS) return kTooMany;
  helix::Plan plan;
  char* place = static_cast<char*>(buffer);
  for (int i = 0; i < count; ++i) {
    plan.add(tensors[i], place, element_bytes);
    int64_t numel = 1;
    for (int64_t size : tensors[i].sizes) numel *= size;
    place += numel * element_bytes;
  }
  return plan.run(stream);
}
