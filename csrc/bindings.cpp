// The launchers in Python. Addresses and streams are integers: nothing here knows of torch, so one build
// serves all of its versions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using Address = uintptr_t;
using Shape3 = std::array<int64_t, 3>;
using Shape4 = std::array<int64_t, 4>;
using Strided = std::tuple<Address, Shape4, Shape4>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(int error) {
  if (error) throw std::runtime_error(std::string("CUDA kernel: ") + helix_error_string(error));
}

void merge_attention(Address output, int dtype, const Shape3& output_strides, Address log_sum_exp,
                     const Shape3& sum_strides, Address part, int part_dtype, const Shape3& part_strides,
                     Address part_log_sum_exp, const Shape3& part_sum_strides, const Shape3& sizes,
                     int64_t width, Address stream) {
  check(helix_merge_attention(at(output), dtype, output_strides.data(), at<float>(log_sum_exp),
                              sum_strides.data(), at(part), part_dtype, part_strides.data(),
                              at<const float>(part_log_sum_exp), part_sum_strides.data(), sizes.data(), width,
                              at(stream)));
}

void activation(Address out, Address input, Address bias, int64_t rows, int64_t width, int dtype, int function,
                Address stream) {
  check(helix_activation(at(out), at(input), at(bias), rows, width, dtype, function, at(stream)));
}

void activation_backward(Address grad_input, Address grad, Address input, Address bias, int64_t rows,
                         int64_t width, int dtype, int function, Address stream) {
  check(helix_activation_backward(at(grad_input), at(grad), at(input), at(bias), rows, width, dtype, function,
                                  at(stream)));
}

void pack(Address buffer, const std::vector<Strided>& tensors, int element_bytes, Address stream) {
  std::vector<HelixTensor> described;
  for (const auto& [data, sizes, strides] : tensors) {
    HelixTensor tensor{at(data), {}, {}};
    for (int i = 0; i < 4; ++i) {
      tensor.sizes[i] = sizes[i];
      tensor.strides[i] = strides[i];
    }
    described.push_back(tensor);
  }
  check(helix_pack(at(buffer), described.data(), int(described.size()), element_bytes, at(stream)));
}

void accumulate(Address total, Address gradient, int64_t count, int dtype, Address stream) {
  check(helix_accumulate(at<float>(total), at(gradient), count, dtype, at(stream)));
}

}  // namespace

PYBIND11_MODULE(HELIX_MODULE, module) {
  module.attr("most_tensors") = HELIX_MOST_TENSORS;
  module.attr("source_hash") = HELIX_SOURCE_HASH;
  module.def("merge_attention", merge_attention);
  module.def("activation", activation);
  module.def("activation_backward", activation_backward);
  module.def("pack", pack);
  module.def("accumulate", accumulate);
}
